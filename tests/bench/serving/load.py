"""The load generator, compiled on first use: closed and open loops whose client costs microseconds (load.c)."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

SOURCE = Path(__file__).with_name("load.c")


class LoadFailed(Exception):
    """The load generator could not do its work; the message says why."""


@dataclass(frozen=True)
class Target:
    """Where requests go, and what each of them is."""

    port: int
    protocol: Literal["grpc", "http"]
    path: str
    content_type: str
    body: Path
    """File of one request: a serialised message, or an HTTP body."""
    host: str = "127.0.0.1"


@dataclass(frozen=True)
class Load:
    """What the clients did and saw."""

    latencies: NDArray[np.float64]
    """Seconds of every answered request, from when it was meant to start."""
    failed: int
    """Requests answered with an error."""
    reason: str
    """The first error, or empty."""
    rps: float
    """Answers a second within the time asked for."""
    client_cpu_ms: float
    """Of one request."""
    answer: bytes
    """Body of the first answer."""


def compiled(folder: Path) -> Path:
    """The program, built into `folder` where it is not there yet or older than its source.

    Raises: LoadFailed without a C compiler.
    """
    program = folder / "load"
    if not program.exists() or program.stat().st_mtime < SOURCE.stat().st_mtime:
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            raise LoadFailed("no C compiler; the load generator needs one")
        folder.mkdir(parents=True, exist_ok=True)
        command = [compiler, "-O2", "-std=gnu11", "-o", str(program), str(SOURCE), "-lm"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise LoadFailed(f"{SOURCE.name} does not compile: {result.stderr.strip()[:500]}")
    return program


def run(
    program: Path,
    target: Target,
    *,
    seconds: float,
    connections: int,
    streams: int = 1,
    rate: float = 0.0,
    poisson: bool = True,
    seed: int = 0,
) -> Load:
    """Load one server for some seconds.

    Args:
        connections: TCP connections; streams: requests at a time on each, more than one with gRPC only. Together they
            are the clients of a closed loop, and the most requests under way in an open one; what is due beyond that
            waits, and its latency counts from then.
        rate: requests a second of an open loop; 0 is a closed one.
        poisson: whether they come at random, or evenly.
        seed: of the random ones; the same seed gives the same moments.

    Raises: LoadFailed where the server closed a connection, left requests without an answer, or answered none.
    """
    with tempfile.TemporaryDirectory() as directory:
        latencies, answer = Path(directory, "latencies"), Path(directory, "answer")
        command = [program, target.host, target.port, target.protocol, target.path, target.content_type, target.body]
        command += [connections, streams, seconds, rate, "poisson" if poisson else "fixed", seed, latencies, answer]
        result = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
        if result.returncode:
            raise LoadFailed(result.stderr.strip())
        found = json.loads(result.stdout)
        if not found["answered"]:
            raise LoadFailed(found["reason"] or "no answer")
        return Load(
            latencies=np.fromfile(latencies, np.float64),
            failed=found["failed"],
            reason=found["reason"],
            rps=found["rps"],
            client_cpu_ms=found["client_cpu_ms"],
            answer=answer.read_bytes(),
        )
