"""`python -m tests.fuzz`: every target under atheris, some processes at a time, and a table of what was found."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic
from typing import Any

from tests.fuzz.targets import scratch_directory, targets

OUT = Path("build/fuzz/targets")


def main() -> int:
    scratch = scratch_directory()
    runs = {name: target.runs for name, target in targets(scratch).items()}
    shutil.rmtree(scratch)
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="TARGET", help=f"of {', '.join(runs)}; default: all")
    parser.add_argument("--share", type=float, default=1.0, help="of each target's number of inputs (default 1)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    if unknown := set(options.names) - set(runs):
        parser.error(f"unknown target {min(unknown)}")
    wanted = {name: max(500, round(runs[name] * options.share)) for name in options.names or runs}
    start = monotonic()
    with ThreadPoolExecutor(options.jobs) as pool:
        reports = list(pool.map(lambda item: _run(item[0], item[1], options.seed), wanted.items()))
    print(f"{'target':<10} {'inputs':>8} {'seconds':>8} {'slowest ms':>11} {'memory MB':>10}  finding")
    for report in reports:
        print(
            f"{report['target']:<10} {report['inputs']:>8} {report['seconds']:>8.0f} {report['slowest_ms']:>11.0f} "
            f"{report['memory_mb']:>10.0f}  {report['finding'] or 'none'}"
        )
    total = sum(report["inputs"] for report in reports)
    found = sum(report["finding"] is not None for report in reports)
    print(
        f"{total} inputs in {monotonic() - start:.0f} s, {found} findings; slowest in CPU time, memory beyond the start"
    )
    (OUT / "report.json").write_text(json.dumps(reports, indent=1) + "\n")
    return 1 if found else 0


def _run(name: str, runs: int, seed: int) -> dict[str, Any]:
    """One target in a process of its own, which a finding ends."""
    out = OUT / name
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*"):
        old.unlink()
    # the worker cannot remove it: libFuzzer leaves the process without a chance to
    scratch = scratch_directory()
    command = [sys.executable, "-m", "tests.fuzz.worker", name, "--runs", str(runs), "--seed", str(seed)]
    command += ["--out", str(out), "--scratch", str(scratch)]
    try:
        with (out / "log.txt").open("w") as log:
            status = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    kept = [path for path in out.iterdir() if path.name not in ("log.txt", "report.json")]
    report: dict[str, Any] = {
        "target": name,
        "inputs": 0,
        "seconds": 0,
        "slowest_ms": 0,
        "memory_mb": 0,
        "finding": None,
    }
    if (out / "report.json").exists():
        report |= json.loads((out / "report.json").read_text())
    if kept:
        report["finding"] = ", ".join(str(path) for path in kept)
    elif status != 0 or report["inputs"] < runs:
        report["finding"] = f"ended with status {status} after {report['inputs']} inputs, see {out / 'log.txt'}"
    return report


if __name__ == "__main__":
    sys.exit(main())
