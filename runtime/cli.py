"""The `trivium` command: one subcommand per stage, each declared as an entry point in pyproject.toml."""

from __future__ import annotations

import argparse
import os
import sys
from importlib.metadata import EntryPoint, entry_points, version

from .errors import MissingExtra, TriviumError

COMMANDS = {
    "demo": ("all", "train, export, serve and ask on Fashion-MNIST"),
    "data": ("train", "obtain or inspect a data set"),
    "train": ("train", "train a robust student by recipe"),
    "evaluate": ("train,eval", "accuracy, robustness, calibration and flips of a checkpoint or bundle"),
    "report": ("train,eval", "finished evaluations compared: mean and spread, cost, attacks, one page"),
    "study": ("train,eval", "many ways of training over seeds, as rows of one table"),
    "calibrate": ("train,eval,cpu", "find what may be promised of a bundle's answers"),
    "verify-guarantees": ("train,eval,cpu", "calibrate again and again, and see whether the promises hold"),
    "export": ("export,cpu", "compile a checkpoint or a timm model into a bundle"),
    "bundle": ("cpu", "show or verify a bundle"),
    "serve": ("cpu", "serve bundles over gRPC"),
    "top": ("cpu", "watch a running server"),
    "predict": ("cpu", "classify picture files with a bundle, or by a server"),
    "feedback": ("cpu", "compare a server's logged answers with labels that came later"),
    "score": ("cpu,score", "answer many pictures offline, into Parquet files"),
}
"""Subcommand -> (extra that brings its packages, one line of help)."""


def main() -> None:
    """Run the subcommand named by the first argument; a TriviumError becomes one line and an exit status."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        raise SystemExit(0 if arguments else 2)
    if arguments[0] in ("-V", "--version"):
        print(f"trivium {version('trivium')}")
        raise SystemExit(0)
    found = {entry.name: entry for entry in entry_points(group="trivium.commands")}
    name = arguments[0]
    if name not in found:
        print(f"trivium: no command {name!r}\n{usage()}", file=sys.stderr)
        raise SystemExit(2)
    sys.argv[:2] = [f"trivium {name}"]
    try:
        call(found[name])
    except TriviumError as error:
        print(f"trivium {name}: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None


def call(entry: EntryPoint) -> None:
    """Carry out a subcommand.

    Raises: MissingExtra, with the pip line to run, where a package of its stage is absent; what the subcommand raises.
    """
    try:
        entry.load()()
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "trivium":
            raise
        extra = COMMANDS[entry.name][0]
        raise MissingExtra(
            f"the package {error.name.split('.')[0]!r} is not installed; run: pip install 'trivium[{extra}]'"
        ) from None


def positive(text: str) -> int:
    """Of argparse: a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def usage() -> str:
    """The help text."""
    rows = "\n".join(f"  {name:17} {text}" for name, (_, text) in COMMANDS.items())
    return (
        "usage: trivium COMMAND ...        trivium COMMAND --help        trivium --version\n\n"
        f"Robust, uncertainty-aware image classification, from training to serving.\n\n{rows}"
    )
