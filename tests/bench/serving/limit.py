"""The limit: bare ONNX Runtime on the same graph with the same kernels, in a process that works only when asked.

    python -m tests.bench.serving.limit BUNDLE       reads lines "THREADS SECONDS", answers each with a line of JSON

Each thread has a session of its own with one intra-op thread, as the workers of every server here have.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Limit:
    rps: float
    cpu_ms: float
    """CPU milliseconds of a picture."""
    ms: float
    """Median of a call."""


class Probe:
    """A process of its own with sessions on a bundle's graph."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def measure(self, threads: int, seconds: float) -> Limit:
        """So many threads, each calling its session again and again."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{threads} {seconds}\n")
        self._process.stdin.flush()
        return Limit(**json.loads(self._process.stdout.readline()))


@contextmanager
def probing(bundle: Path) -> Iterator[Probe]:
    command = [sys.executable, "-m", "tests.bench.serving.limit", str(bundle)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        yield Probe(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()


def main() -> None:
    import numpy as np

    from trivium.runtime.bundle import open_bundle
    from trivium.runtime.engine import INPUT, OUTPUTS, Engine

    bundle = open_bundle(sys.argv[1])
    size = bundle.manifest.preprocessing
    image = np.random.default_rng(0).integers(0, 256, (1, size.height, size.width, 3), np.uint8)
    sessions: list[Any] = []
    for line in sys.stdin:
        threads, seconds = int(line.split()[0]), float(line.split()[1])
        while len(sessions) < threads:
            sessions.append(Engine(bundle)._session)
            sessions[-1].run(OUTPUTS, {INPUT: image})
        calls: list[list[float]] = [[] for _ in range(threads)]

        def work(index: int, end: float, calls: list[list[float]] = calls) -> None:
            while not calls[index] or time.perf_counter() < end:
                start = time.perf_counter()
                sessions[index].run(OUTPUTS, {INPUT: image})
                calls[index].append(time.perf_counter() - start)

        start, cpu = time.perf_counter(), time.process_time()
        workers = [threading.Thread(target=work, args=(i, start + seconds)) for i in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
        times = [one for each in calls for one in each]
        found = {"rps": len(times) / wall, "cpu_ms": 1e3 * cpu / len(times), "ms": 1e3 * median(times)}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
