"""`trivium score` beside its limit; python -m tests.bench.score, build/bench/score.json.

The limit is two bare ONNX Runtime sessions on pictures that are decoded already, with the CPU time of reading and
decoding added, measured apart, by two processes at a time. Probed before and after every run; the run is counted from
its start to its exit, with all processes that it starts. Efficiency is the limit's CPU time a picture over the run's;
the speed is compared with what the probe's cores, as busy as others keep them, would have done of decoding and engine
together.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import astuple
from itertools import cycle
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, median

import numpy as np
from PIL import Image

from trivium.runtime.bundle import read_manifest
from trivium.runtime.preprocess import read_picture

from .serving import pictures
from .serving.limit import Limit, Probe, probing

ROOT = Path(__file__).parents[2]
SESSIONS = 2
SIDE = 448
"""Pixels, as of pictures made for the web."""
DECODE_SECONDS = 1.5
"""For which each of as many processes reads and decodes, all at the same time."""
START_SECONDS = 0.5
"""For these to be ready."""
LEFT_SECONDS = 60.0
"""For processes that outlive the command to end."""
PR_SET_CHILD_SUBREAPER = 36


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.score", description=__doc__.split("\n\n")[0])
    parser.add_argument("--pictures", type=int, default=2000, metavar="N")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each probe")
    parser.add_argument("--engine", choices=["processes", "ray"], default="processes")
    parser.add_argument("--out", type=Path, default=ROOT / "build/bench/score.json")
    given = parser.parse_args()
    # what outlives the command becomes this process's, so that its CPU time is counted too
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    folder: Path = given.out.parent
    bundle = folder / "bundle-lite0"
    if not bundle.is_dir():
        pictures.build("lite0", bundle)
    files = photographs(folder / "score-pictures", given.pictures)
    rows = []
    with probing(bundle) as probe, ProcessPoolExecutor(SESSIONS, get_context("spawn")) as decoders:
        for _ in range(given.rounds):
            rows.append(visit(probe, decoders, bundle, files, given))
            print(line(rows[-1]), flush=True)
    found = {name: median(row[name] for row in rows) for name in rows[0]}
    given.out.write_text(json.dumps({"engine": given.engine, "median": found, "rounds": rows}, indent=2) + "\n")
    print(f"\nmedians of {len(rows)} rounds: {given.pictures} JPEGs of {SIDE} x {SIDE}, EfficientNet-Lite0")
    print(line(found))
    print(given.out)


def photographs(folder: Path, count: int) -> list[Path]:
    """So many different JPEGs of smooth colours with some grain, quality 90; made at the first call."""
    files = [folder / f"{i // 500}/{i:05d}.jpg" for i in range(count)]
    rng = np.random.default_rng(0)
    for file in files:
        coarse = rng.integers(0, 256, (8, 8, 3), np.uint8)
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            smooth = np.asarray(Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.int16)
            grain = np.random.default_rng(len(file.name)).integers(-8, 9, smooth.shape, np.int16)
            Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(file, quality=90)
    return files


def visit(
    probe: Probe, decoders: Executor, bundle: Path, files: list[Path], given: argparse.Namespace
) -> dict[str, float]:
    """One run between two probes."""
    before, decode = probe.measure(SESSIONS, given.seconds), decode_ms(decoders, bundle, files)
    wall, cpu = run(bundle, files[0].parent.parent, given.out.parent / "score-out", given.engine)
    after, decode_after = probe.measure(SESSIONS, given.seconds), decode_ms(decoders, bundle, files)
    engine = Limit(*(sum(pair) / 2 for pair in zip(astuple(before), astuple(after), strict=True)))
    decode = (decode + decode_after) / 2
    limit_ms = engine.cpu_ms + decode
    rate = len(files) / wall
    return {
        "engine_cpu_ms": engine.cpu_ms,
        "decode_cpu_ms": decode,
        "score_cpu_ms": 1e3 * cpu / len(files),
        "efficiency": limit_ms / (1e3 * cpu / len(files)),
        "limit_rps": engine.rps * engine.cpu_ms / limit_ms,
        "score_rps": rate,
        "ratio_to_limit": rate / (engine.rps * engine.cpu_ms / limit_ms),
    }


def decode_ms(decoders: Executor, bundle: Path, files: list[Path]) -> float:
    """CPU milliseconds of reading, decoding and preparing a picture, by all processes at a time."""
    begin = time.monotonic() + START_SECONDS
    shares = [decoders.submit(decoded, bundle, files[number::SESSIONS], begin) for number in range(SESSIONS)]
    return 1e3 * fmean(share.result() for share in shares)


def decoded(bundle: Path, files: list[Path], begin: float) -> float:
    """CPU seconds a picture."""
    preprocessing = read_manifest(bundle).preprocessing
    read_picture(files[0], preprocessing)
    time.sleep(max(0.0, begin - time.monotonic()))
    cpu, end = time.process_time(), begin + DECODE_SECONDS
    count = 0
    for file in cycle(files):
        read_picture(file, preprocessing)
        count += 1
        if time.monotonic() >= end:
            break
    return (time.process_time() - cpu) / count


def run(bundle: Path, folder: Path, out: Path, engine: str) -> tuple[float, float]:
    """Wall and CPU seconds of the command."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "trivium", "score", str(bundle), str(folder), "--out", str(out)]
    staying, used, began = children(), children_cpu(), time.perf_counter()
    process = subprocess.Popen([*command, "--workers", str(SESSIONS), "--engine", engine], cwd=ROOT)
    os.waitpid(process.pid, 0)
    wall = time.perf_counter() - began
    process.returncode = 0
    if not (out / "_score.json").exists() or json.loads((out / "_score.json").read_text())["finished"] is None:
        raise SystemExit("trivium score did not finish")
    reap(staying)
    return wall, children_cpu() - used


def reap(staying: set[str]) -> None:
    """Wait for all children but these."""
    deadline = time.monotonic() + LEFT_SECONDS
    while left := children() - staying:
        if time.monotonic() > deadline:
            raise SystemExit(f"the command left processes behind: {', '.join(left)}")
        for pid in left:
            os.waitpid(int(pid), os.WNOHANG)
        time.sleep(0.05)


def children() -> set[str]:
    """Process numbers."""
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def line(row: dict[str, float]) -> str:
    return (
        f"CPU-ms a picture: limit {row['engine_cpu_ms']:.2f} engine + {row['decode_cpu_ms']:.2f} decoding, "
        f"trivium score {row['score_cpu_ms']:.2f}: efficiency {row['efficiency']:.3f}; {row['score_rps']:.0f} of "
        f"{row['limit_rps']:.0f} pictures a second: {row['ratio_to_limit']:.3f}"
    )


if __name__ == "__main__":
    main()
