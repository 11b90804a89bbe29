"""`trivium export`: a checkpoint or a timm model in, a verified bundle out."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
from pathlib import Path

from rich.console import Console

from trivium.runtime.bundle import Dropout
from trivium.runtime.errors import ConfigError

from .build import build
from .plan import PRECISIONS, TARGETS, Plan, Target
from .source import Source, checkpoint_source, timm_source

TIMM_PASSES, TIMM_DROPOUT, TIMM_SEED = 32, 0.2, 0
"""For a model that was wrapped as it is: the rate with which most timm classifiers of this kind were trained."""
EXIT_CODES = """exit status:
  0    everything was written (with --dry-run: everything could be)
  1    this machine failed: the disk is full, an engine does not run
  2    a mistake in the command line, the source, the labels or the place to write to
  3    refused by what was measured: an implementation differs by more than its limit, int8 costs more than --max-drop
  130  interrupted (143: by SIGTERM)
Whatever the status, each place that was to be written holds what it held before, or what was asked for, whole."""


def main() -> None:
    """Compile what the command line names."""
    # So that the temporary directory of an export that is told to end goes with it.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    parser = arguments()
    given = parser.parse_args()
    expected = 1 if given.timm else 2
    if len(given.paths) != expected:
        parser.error(f"{'--timm NAME' if given.timm else 'a SOURCE'} and one BUNDLE are needed")
    console = Console(highlight=False, soft_wrap=True, stderr=given.json)
    plan = plan_of(given)
    plan.check()
    source = source_of(given, console)
    console.print(plan.text(source), markup=False)
    if given.dry_run:
        document = {"status": "planned", "plan": plan.document(source)}
    else:
        result = build(source, plan, console)
        manifest = result.bundle.manifest
        size = f"{sum(file.size for file in manifest.files) / 1e6:.1f} MB"
        console.print(result.table())
        console.print(
            f"wrote {plan.bundle}: {manifest.name} version {manifest.version}, {size}, router {manifest.router.default}"
        )
        document = {"status": "written", "plan": plan.document(source), **result.document()}
    if given.json:
        print(json.dumps(document, indent=2, ensure_ascii=False))


def plan_of(given: argparse.Namespace) -> Plan:
    """What the arguments ask to be made."""
    return Plan(
        Path(given.paths[-1]),
        name=given.name,
        version=given.version,
        router=None if given.router == "auto" else given.router,
        calibration_pictures=given.calibration_pictures,
        force=given.force,
        targets=given.target,
        precision=given.precision,
        calibration=given.calibration,
        max_drop=given.max_drop,
        fold_router=given.fold_router,
        repository=given.repository,
    )


def source_of(given: argparse.Namespace, console: Console) -> Source:
    """What the arguments ask to export."""
    model = given.timm or timm_name(given.paths[0])
    if not model:
        if given.weights or given.labels or given.mean or given.std:
            raise ConfigError("--weights, --labels, --mean and --std go with timm models; a checkpoint holds its own")
        changes = {"passes": given.passes, "rate": given.dropout}
        return checkpoint_source(
            Path(given.paths[0]),
            dropout={key: value for key, value in changes.items() if value is not None},
            data=given.data,
            calibrate=given.calibrate,
            bfloat16=given.head_weights == "bfloat16",
        )
    if given.router not in ("auto", "original"):
        raise ConfigError(f"--router {given.router}: a timm model has one head, original")
    rate = TIMM_DROPOUT if given.dropout is None else given.dropout
    return timm_source(
        model,
        weights=given.weights,
        labels=given.labels,
        dropout=Dropout(rate=rate, passes=given.passes or TIMM_PASSES, seed=TIMM_SEED),
        preprocessing={"mean": given.mean, "std": given.std},
        say=console.print,
        bfloat16=given.head_weights == "bfloat16",
    )


def timm_name(source: str) -> str | None:
    """SOURCE where it can only be the name of a timm model: no path, and nothing of that name is here."""
    return None if os.sep in source or Path(source).exists() else source


def targets(text: str) -> tuple[Target, ...]:
    """Some of TARGETS, commas between them, in their order."""
    words = text.split(",")
    if wrong := [word for word in words if word not in TARGETS]:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} is none of {', '.join(TARGETS)}")
    return tuple(target for target in TARGETS if target in words)


def percentage(text: str) -> float:
    """A number from 0 to 100."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} does not lie between 0 and 100")
    return value


def per_channel(text: str) -> tuple[float, ...]:
    """One number for all channels, or three with commas between them."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) not in (1, 3) or not all(map(math.isfinite, values)):
        raise argparse.ArgumentTypeError(f"{text!r} is neither one number nor three with commas between them")
    return values * 3 if len(values) == 1 else values


def deviations(text: str) -> tuple[float, ...]:
    """As per_channel, above 0."""
    values = per_channel(text)
    if min(values) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0")
    return values


def positive(text: str) -> int:
    """An argument that counts something."""
    if not text.isdigit() or not 1 <= int(text) <= 1_000_000:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive whole number")
    return int(text)


def rate(text: str) -> float:
    """A dropout rate in (0, 1)."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} does not lie between 0 and 1")
    return value


class Help(argparse.HelpFormatter):
    """Leaves the lines of the epilog as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text == EXIT_CODES else super()._fill_text(text, width, indent)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    prog = sys.argv[0]
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} SOURCE BUNDLE [options]\n       {prog} --timm NAME [--weights FILE] [--labels FILE] BUNDLE",
        description="Compile SOURCE into a bundle: the checkpoint directory of a trained student, or the name of any "
        "timm classifier as it is (one head named original, uncertainty without training).",
        epilog=EXIT_CODES,
        formatter_class=Help,
    )
    parser.add_argument("paths", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--name", help="of the model in requests (default: the recipe's, or the timm model's)")
    parser.add_argument("--version", default="1", help="of the model, a whole number (default 1)")
    parser.add_argument(
        "--passes", type=positive, metavar="T", help="Monte-Carlo-dropout passes (default: the checkpoint's, or 32)"
    )
    parser.add_argument(
        "--router", default="auto", help="auto, a head, mean, min_entropy, paper, blend or gate (default auto)"
    )
    parser.add_argument(
        "--head-weights",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="bfloat16 rounds the heads' weights, which halves what the fused kernel reads; the parity table shows "
        "what it changes (default bfloat16)",
    )
    parser.add_argument(
        "--target",
        type=targets,
        default=("onnx",),
        metavar="T,T",
        help=f"of {', '.join(TARGETS)}: what else to make of the bundle, which is always made (default onnx)",
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="fp32",
        help="of the backbone; fp16 is for GPUs, int8 for CPUs and TensorRT (default fp32)",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FOLDER",
        help="real pictures, half of them to measure int8's ranges on, half to judge a lower precision by; in folders "
        "named after their classes, if labels are to count (default: the checkpoint's calibration split)",
    )
    parser.add_argument(
        "--max-drop",
        type=percentage,
        default=1.0,
        metavar="X",
        help="refuse a lower precision that loses more percentage points of top-1, or without labels changes more "
        "percent of the answers (default 1)",
    )
    parser.add_argument(
        "--fold-router", action="store_true", help="let the graph itself return the routed answer, for other servers"
    )
    parser.add_argument(
        "--repository",
        type=Path,
        metavar="DIR",
        help="Triton's, to put the model into as one more version (default: BUNDLE-triton)",
    )
    parser.add_argument("--force", action="store_true", help="replace a bundle that exists")
    parser.add_argument("--dry-run", action="store_true", help="load the source, print the plan, write nothing")
    parser.add_argument("--json", action="store_true", help="what was made, for machines; all other words go to stderr")
    group = parser.add_argument_group("from a checkpoint")
    group.add_argument(
        "--calibration-pictures",
        type=positive,
        default=5000,
        metavar="N",
        help="at most, for temperatures and router, and for guarantees as many others (default 5000)",
    )
    group.add_argument(
        "--data", type=Path, metavar="DIR", help="where the pictures lie now, if they moved since training"
    )
    group.add_argument(
        "--no-calibrate", dest="calibrate", action="store_false", help="temperatures 1, no fitted router"
    )
    group = parser.add_argument_group("from timm")
    group.add_argument(
        "--timm", metavar="NAME", help="the model, say tf_efficientnet_lite0, whatever else is called so here"
    )
    group.add_argument(
        "--weights", type=Path, metavar="FILE", help="safetensors or a state dict (default: the hub's cache)"
    )
    group.add_argument(
        "--labels", type=Path, metavar="FILE", help="class names, one a line or a JSON list (default: ImageNet's)"
    )
    group.add_argument(
        "--dropout", type=rate, metavar="Q", help=f"rate before the head (default {TIMM_DROPOUT}; a checkpoint's own)"
    )
    group.add_argument(
        "--mean", type=per_channel, metavar="M", help="of pixels in [0, 1], one number or R,G,B (default: timm's)"
    )
    group.add_argument("--std", type=deviations, metavar="S", help="likewise")
    return parser
