"""One target under atheris (libFuzzer), with limits of CPU time and memory for every input."""

from __future__ import annotations

import argparse
import json
import resource
import sys
from pathlib import Path
from random import Random
from time import monotonic, process_time

import atheris  # type: ignore[import-untyped,import-not-found]

# their branches guide the mutations; all of Pillow would take a minute to instrument
INSTRUMENTED = [
    *("trivium.runtime.bundle", "trivium.runtime.config", "trivium.runtime.containers", "trivium.runtime.preprocess"),
    *("trivium.runtime.security", "trivium.runtime.weights", "trivium.runtime.wire", "trivium.runtime.engine"),
    *("PIL.JpegImagePlugin", "PIL.PngImagePlugin", "PIL.WebPImagePlugin", "yaml", "zipfile"),
]
# the finder of an editable install keeps atheris from the sources
sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__name__.startswith("ScikitBuild")]
sys.path.insert(0, ".namespace")
# none of them may be imported before
with atheris.instrument_imports(include=INSTRUMENTED):
    from tests.fuzz.targets import Target, targets

SECONDS = 1.0
"""CPU time of one input."""
MEMORY_MB = 256
"""What the process may grow by, beyond its size after the seeds' imports."""
HANG_SECONDS = 30
"""Wall time after which libFuzzer itself ends an input that does not come back."""
MEMORY_CEILING_MB = 1536
"""Where libFuzzer ends the process in the midst of an input."""


class Excess(Exception):
    """An input that cost too much."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--runs", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    options = parser.parse_args()
    target = targets(options.scratch)[options.name]
    corpus = options.scratch / "corpus"
    corpus.mkdir()
    for i, seed in enumerate(target.seeds):
        (corpus / f"{i:04}").write_bytes(seed)
        target.check(seed)
    watch = Watch(target, options.runs, options.out, options.name)
    arguments = [
        *(sys.argv[0], f"-runs={options.runs}", f"-seed={options.seed}", f"-max_len={target.max_length}"),
        *(f"-timeout={HANG_SECONDS}", f"-rss_limit_mb={MEMORY_CEILING_MB}", f"-artifact_prefix={options.out}/"),
        *("-len_control=0", "-print_final_stats=1", "-verbosity=1", str(corpus)),
    ]

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        rng = Random(seed)
        found = atheris.Mutate(data, max_size) if rng.random() < 0.3 else target.mutate(data, rng)
        return found[:max_size]

    atheris.Setup(arguments, watch, custom_mutator=mutate)
    atheris.Fuzz()


class Watch:
    """Runs the check on each input and measures it."""

    def __init__(self, target: Target, runs: int, out: Path, name: str) -> None:
        self._target, self._runs, self._out, self._name = target, runs, out, name
        self._count, self._slowest = 0, 0.0
        self._start = monotonic()
        self._before = _peak_mb()

    def __call__(self, data: bytes) -> None:
        start = process_time()
        self._target.check(data)
        seconds = process_time() - start
        self._slowest = max(self._slowest, seconds)
        self._count += 1
        grown = _peak_mb() - self._before
        # libFuzzer leaves the process without a chance to write at its end
        if self._count % 500 == 0 or self._count >= self._runs:
            report = {
                "target": self._name,
                "inputs": self._count,
                "seconds": round(monotonic() - self._start, 1),
                "slowest_ms": round(self._slowest * 1000, 1),
                "memory_mb": round(grown, 1),
            }
            (self._out / "report.json").write_text(json.dumps(report))
        if seconds > SECONDS:
            raise Excess(f"{seconds:.2f} s of CPU time")
        if grown > MEMORY_MB:
            raise Excess(f"{grown:.0f} MB of memory")


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
