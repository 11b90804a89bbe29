"""`trivium predict`: classify picture files with a bundle, as a table or as one JSON object a line."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter_ns
from typing import Any

from .bundle import Manifest, printable
from .cpus import usable_cpus
from .errors import InvalidPicture, InvalidRequest
from .predictor import Prediction, Predictor
from .preprocess import SUFFIXES, read_picture
from .router import routers

WIDTH = 1000
"""Columns of a table that goes into a file or a pipe, where nothing needs to be folded."""


def main() -> None:
    """Answer every picture that can be read; exit status 1 where some could not."""
    parser = argparse.ArgumentParser(prog=sys.argv[0], description="Classify picture files with a bundle.")
    parser.add_argument("bundle", metavar="BUNDLE", help="directory of a bundle")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="JPEG, PNG or WebP files, or directories of them")
    parser.add_argument("--router", metavar="NAME", help="a head's name or a rule; the bundle's own choice by default")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--top", metavar="N", type=_positive, default=1, help="classes to show a picture (default 1)")
    parser.add_argument("--kernels", choices=["auto", "on", "off"], default="auto", help="use of the fused kernel")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args()

    predictor = Predictor.load(arguments.bundle, kernels=arguments.kernels, device=arguments.device)
    available = routers(predictor.manifest)
    if arguments.router is not None and arguments.router not in available:
        raise InvalidRequest(f"unknown router {arguments.router!r}; this model has: {', '.join(available)}")
    failed = 0
    rows: list[tuple[str, Prediction]] = []
    for path, answer in predict(predictor, list(pictures(arguments.images)), arguments.router):
        if isinstance(answer, InvalidPicture):
            failed += 1
            print(f"{sys.argv[0]}: {printable(str(answer))}", file=sys.stderr)
        elif arguments.json:
            print(json.dumps(record(path, answer, predictor.manifest, arguments.top), ensure_ascii=False), flush=True)
        else:
            rows.append((path, answer))
    if rows:
        print_table(rows, predictor.manifest, arguments.top)
    if failed:
        raise SystemExit(1)


def pictures(arguments: Sequence[str]) -> Iterator[str]:
    """Files as they are named, and of each directory the pictures below it, sorted.

    Raises: InvalidRequest for a directory without pictures.
    """
    for argument in arguments:
        if not Path(argument).is_dir():
            yield argument
            continue
        found = sorted(str(p) for p in Path(argument).rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not found:
            raise InvalidRequest(f"{argument}: no {', '.join(SUFFIXES)} file in this directory")
        yield from found


def predict(
    predictor: Predictor, paths: Sequence[str], router: str | None
) -> Iterator[tuple[str, Prediction | InvalidPicture]]:
    """Answers in the order of the paths, computed on all cores that this process may use."""

    def one(path: str) -> Prediction | InvalidPicture:
        start = perf_counter_ns()
        try:
            image = read_picture(path, predictor.manifest.preprocessing, predictor.limits)
        except InvalidPicture as error:
            return error
        return predictor.infer(image, router, decode_ns=perf_counter_ns() - start)

    pool = ThreadPoolExecutor(max_workers=usable_cpus())
    try:
        yield from zip(paths, pool.map(one, paths), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def record(path: str, prediction: Prediction, manifest: Manifest, top: int) -> dict[str, Any]:
    """What --json prints of a picture. Entropies and divergences in nats, times in nanoseconds."""

    def by_head(values: Any) -> dict[str, Any]:
        return dict(zip(manifest.heads, values, strict=True))

    best = prediction.probabilities.argsort(kind="stable")[::-1][:top]
    timings = prediction.timings
    return {
        "path": path,
        "class_id": prediction.class_id,
        "label": prediction.label,
        "probability": float(prediction.probabilities[prediction.class_id]),
        "head": prediction.head,
        "top": [
            {"class_id": int(i), "label": manifest.classes[i], "probability": float(prediction.probabilities[i])}
            for i in best
        ],
        "predictive_entropy": by_head(prediction.predictive_entropy.tolist()),
        "mutual_information": by_head(prediction.mutual_information.tolist()),
        "divergence": by_head(by_head(row) for row in prediction.divergence.tolist()),
        "energy": by_head(prediction.energy.tolist()),
        "decode_ns": timings.decode,
        "compute_ns": timings.compute,
        "route_ns": timings.route,
    }


def print_table(rows: Sequence[tuple[str, Prediction]], manifest: Manifest, top: int) -> None:
    """Uncertainty of the head that answered, or the mean over the heads where several did."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("picture", "label", "p", "head", "entropy", "MI", box=None, pad_edge=False)
    if disagreement := {"clean", "robust"} <= set(manifest.heads):
        table.add_column("KL clean-robust")
    shared = _shared_folder([path for path, _ in rows])
    for path, prediction in rows:
        best = prediction.probabilities.argsort(kind="stable")[::-1][:top]
        own = [k for k, head in enumerate(manifest.heads) if head in prediction.head.split("+")]
        own = own or list(range(len(manifest.heads)))
        cells = [
            printable(os.path.relpath(path, shared) if shared else path),
            "\n".join(manifest.classes[i] for i in best),
            "\n".join(f"{prediction.probabilities[i]:.3f}" for i in best),
            prediction.head,
            f"{prediction.predictive_entropy[own].mean():.3f}",
            f"{prediction.mutual_information[own].mean():.3f}",
        ]
        if disagreement:
            clean, robust = manifest.heads.index("clean"), manifest.heads.index("robust")
            cells.append(f"{prediction.divergence[clean, robust]:.3f}")
        table.add_row(*(Text(cell, overflow="fold") for cell in cells))
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    if shared:
        console.print(Text(f"in {printable(shared)}"))
    console.print(table)
    console.print("entropy, MI (mutual information) and KL in nats", style="dim")


def _shared_folder(paths: Sequence[str]) -> str:
    """The directory above all paths, which would only push the answers off the screen; "" where there is none."""
    try:
        shared = os.path.commonpath([os.path.dirname(path) for path in paths])
    except ValueError:  # some absolute, some relative
        return ""
    return shared if len(paths) > 1 and shared != os.sep else ""


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)
