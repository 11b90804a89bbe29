"""The run of gpu-check: parity, sanitizers, times, and the report they make."""

from __future__ import annotations

import argparse
import itertools
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from trivium.kernels.cuda import CudaLibrary

from . import parity, times
from .card import ROOT, Problem, build

BATCHES, UNITS, CLASSES, PASSES = (1, 8, 64, 256), (768, 1280, 2048), (10, 1000), (16, 32, 64)


def main(description: str) -> None:
    """Check the card at hand. Raises: Problem where something is missing or wrong."""
    parser = argparse.ArgumentParser(prog="make gpu-check", description=description)
    parser.add_argument("--out", type=Path, default=ROOT / "kernels" / "GPU.md", help="the report (Markdown)")
    parser.add_argument("--quick", action="store_true", help="time D=768 and T=32 only")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out of the table")
    parser.add_argument("--sanitized", type=Path, help=argparse.SUPPRESS)  # a library: run the small cases, no more
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise Problem("gpu-check: torch finds no CUDA device")
    torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.device("cuda")
    if arguments.sanitized:
        _, wrong = run_parity(CudaLibrary(arguments.sanitized), parity.SMALL, device, graphs=False)
        raise SystemExit("\n".join(wrong) if wrong else 0)

    folder = ROOT / "build" / "gpu-check"
    library = build(folder)
    report = heading()
    lines, wrong = run_parity(library, parity.ALL, device)
    report += lines
    for tool in ("memcheck", "racecheck"):
        line, clean = sanitize(folder / "libtrivium_cuda.so", tool)
        report.append(line)
        wrong += [] if clean else [line]
    shapes = itertools.product(BATCHES, UNITS, CLASSES, PASSES)
    if arguments.quick:
        shapes = itertools.product(BATCHES, (768,), CLASSES, (32,))
    with torch.inference_mode():
        report += kernel_table(times.measure(library, device, shapes, not arguments.no_compile))
    report += backbone_table(times.measure_backbone(library, device, BATCHES))
    text = "\n".join(report) + "\n"
    arguments.out.write_text(text)
    print(text)
    print(f"written to {arguments.out}", file=sys.stderr)
    if wrong:
        raise Problem("\n".join([f"gpu-check: {len(wrong)} checks FAILED", *wrong]))


def heading() -> list[str]:
    properties = torch.cuda.get_device_properties(0)
    return [
        "# The CUDA kernels, measured",
        "",
        f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
        f"{properties.multi_processor_count} multiprocessors; torch {torch.__version__}, CUDA {torch.version.cuda}. "
        "Written by `make gpu-check`.",
        "",
    ]


def run_parity(
    library: CudaLibrary, cases: list[parity.Case], device: torch.device, graphs: bool = True
) -> tuple[list[str], list[str]]:
    """The lines of the report, and one more line for each check that failed."""
    worst: dict[str, tuple[float, float]] = {}
    wrong: list[str] = []
    count = 0
    for outcome in parity.check(library, cases, device, graphs):
        count += 1
        if outcome.problem:
            wrong.append(f"{outcome.arithmetic} {tuple(outcome.case)}: {outcome.problem}")
        elif not outcome.case.outliers:
            p, s = worst.get(outcome.arithmetic, (0.0, 0.0))
            worst[outcome.arithmetic] = (max(p, outcome.probability_error), max(s, outcome.statistic_error))
    if graphs and (problem := parity.check_streams(library, device)):
        wrong.append(f"two streams at once: {problem}")
    errors = [f"{name} {p:.1e} in probabilities, {s:.1e} in statistics" for name, (p, s) in worst.items()]
    lines = [
        f"{count} runs against the float64 reference (bfloat16: the reference of rounded weights and features), their "
        f"captured graphs against themselves, two streams at once: {len(wrong)} of these checks failed. "
        f"Largest error: {'; '.join(errors)}.",
        "",
        *(f"- FAILED: {line}" for line in wrong),
        "",
    ]
    print("\n".join(lines), file=sys.stderr)
    return lines, wrong


def sanitize(library: Path, tool: str) -> tuple[str, bool]:
    """One line on what compute-sanitizer found in the small cases; false where it found something."""
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if program is None:
        return f"compute-sanitizer {tool}: not installed, not run.  ", True
    command = [program, "--tool", tool, "--error-exitcode", "99", "--kernel-regex", "kns=trivium"]
    command += [sys.executable, "-m", str(__package__), "--sanitized", str(library)]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / ".namespace"),
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",  # blocks of their own, so that memcheck sees where they end
    }
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    output = result.stdout + result.stderr
    if result.returncode == 0:
        return f"compute-sanitizer {tool}: {len(parity.SMALL)} cases, nothing found.  ", True
    if "not supported" in output:
        return f"compute-sanitizer {tool}: does not run on this machine.  ", True
    print(output[-4000:], file=sys.stderr)
    return f"compute-sanitizer {tool}: FAILED with exit status {result.returncode}.  ", False


def kernel_table(rows: Iterable[times.Row]) -> list[str]:
    """Markdown of the kernels' times."""
    lines = [
        "",
        "## MCHeads alone",
        "",
        f"{times.HEADS} heads, antithetic masks, features float32; microseconds, medians of CUDA graph replays. The "
        "floor of the statistics is their bytes over the bandwidth of a large copy, that of the product is torch.mm "
        "of the same shape in bfloat16; small shapes stay in the cache and may pass below the former.",
        "",
        "| B | D | C | T | expand | product | statistics | whole | float32 | statistics / floor | product / floor "
        "| torch eager | torch.compile | eager / whole |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        numbers = [r.expand, r.product, r.statistics, r.whole, r.whole_float32]
        ratios = [r.statistics / r.statistics_floor, r.product / r.product_floor]
        cells = [f"{v:.1f}" for v in numbers] + [f"{v:.2f}" for v in ratios] + [f"{r.eager:.1f}"]
        cells += ["" if math.isnan(r.compiled) else f"{r.compiled:.1f}", f"{r.eager / r.whole:.1f}"]
        lines.append(f"| {r.batch} | {r.units} | {r.classes} | {r.passes} | " + " | ".join(cells) + " |")
        print(lines[-1], file=sys.stderr)
    return lines


def backbone_table(rows: Iterable[times.BackboneRow]) -> list[str]:
    """Markdown of the whole network's times."""
    lines = [
        "",
        "## Whole ViT-B/16, T = 32, C = 1000",
        "",
        "bfloat16, random weights, CUDA graph replays: the network with three plain linear heads and their softmax, "
        "and with MCHeads in their place.",
        "",
        "| B | plain heads, ms | 32 passes, ms | ratio |",
        "|---|---|---|---|",
    ]
    for r in rows:
        ratio = r.passes_us / r.plain_us
        lines.append(f"| {r.batch} | {r.plain_us / 1e3:.3f} | {r.passes_us / 1e3:.3f} | {ratio:.3f} |")
        print(lines[-1], file=sys.stderr)
    return lines
