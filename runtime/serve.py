"""`trivium serve`: bundles over gRPC, with metrics and health over HTTP."""

from __future__ import annotations

import os
import sys

from .config import load


def main() -> None:
    """Serve the bundles of the command line until a signal.

    Raises: TriviumError where settings or bundles cannot be used.
    """
    settings, print_config = load(sys.argv[1:], os.environ, sys.argv[0])
    if print_config:
        print(settings.yaml(), end="")
        return
    # gRPC's core would print its own version of an error that is about to be raised
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    # imported late: --help and --print-config need neither gRPC nor ONNX Runtime
    import uvloop

    from .logs import configure
    from .server import run

    configure(settings.log_level, settings.log_format)
    uvloop.run(run(settings))
