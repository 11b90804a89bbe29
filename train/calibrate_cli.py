"""`trivium calibrate`: put into a bundle what may be promised of its answers, found on labelled pictures."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import shutil
import sys
from pathlib import Path
from typing import get_args

from rich.console import Console

from trivium.runtime.bundle import MANIFEST, rewrite_manifest
from trivium.runtime.errors import ConfigError
from trivium.runtime.guarantees import SetScore
from trivium.runtime.predictor import Predictor
from trivium.runtime.staging import staging

from .calibration.calibrate import describe
from .guarantees.calibrate import Settings, calibrate_bundle
from .guarantees.data import CalibrationSplit, calibration_data
from .guarantees.summary import show
from .guarantees.views import COMPONENTS, parse_mixture
from .progress import bar

DEFAULT = Settings()
MIX = ",".join(f"{name}={part:g}" for name, part in DEFAULT.mixture.items())
PICTURES = 5000


def main() -> None:
    """Calibrate as the command line says."""
    given = parser().parse_args()
    console = Console(highlight=False, soft_wrap=True)
    settings = settings_of(given)
    if given.pictures < 1:
        raise ConfigError(f"--pictures {given.pictures}: at least 1")
    if given.out is not None and os.path.lexists(given.out):
        raise ConfigError(f"--out {given.out} exists")
    predictor = Predictor.load(given.bundle)
    folded = predictor.manifest.folded_router
    if folded is not None and (folded.coverage is not None or folded.max_risk is not None):
        raise ConfigError(
            f"{given.bundle}: its graph itself builds sets or abstains by the guarantees of its export; "
            "calibrate one that was exported without --fold-router"
        )
    pictures, order = calibration_data(predictor.manifest, given.data, given.split, console.print)
    data = describe(pictures) if given.split != "all" else describe(pictures).replace("test split", "all pictures")
    settings = settings.model_copy(update={"data": data})
    root = Path(given.bundle)
    with contextlib.nullcontext(root) if given.out is None else staging(given.out) as target:
        if given.out is not None:
            # file by file: of a folder that nobody may write to, the copy is to be rewritten
            for name in [MANIFEST, *(file.path for file in predictor.manifest.files)]:
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / name, target / name)
        with bar(console, "calibrating") as progress:
            found = calibrate_bundle(
                predictor, pictures, settings, limit=given.pictures, order=order, progress=progress
            )
        rewrite_manifest(target, found.manifest)
    show(found, console)
    console.print(f"wrote {(given.out or root) / MANIFEST}", markup=False)


def settings_of(given: argparse.Namespace) -> Settings:
    """What the arguments ask to be promised.

    Raises: ConfigError for a share that is none.
    """
    shares = {
        name: share(f"--{name.replace('_', '-')}", getattr(given, name))
        for name in ("coverage", "max_risk", "delta", "accuracy_loss", "negative_flips")
        if getattr(given, name) is not None
    }
    if not (math.isfinite(given.raps_penalty) and given.raps_penalty >= 0):
        raise ConfigError(f"--raps-penalty {given.raps_penalty:g}: at least 0")
    for option in ("raps_free_ranks", "seed"):
        if getattr(given, option) < 0:
            raise ConfigError(f"--{option.replace('_', '-')} {getattr(given, option)}: at least 0")
    return Settings.model_validate(
        {
            "mixture": parse_mixture(given.mix),
            "score": given.score,
            "raps_penalty": given.raps_penalty,
            "raps_free_ranks": given.raps_free_ranks,
            "drift": given.drift,
            "seed": given.seed,
            **shares,
        }
    )


def share(option: str, value: float) -> float:
    """A share that an option gives.

    Raises: ConfigError.
    """
    if not 0 < value < 1:
        promise = ": no number of pictures promises that" if option == "--coverage" and value == 1 else ""
        raise ConfigError(f"{option} {value:g}: must lie between 0 and 1, without both{promise}")
    return value


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog=sys.argv[0], description=(
        "Find on labelled pictures what may be promised of a bundle's answers: prediction sets that hold the right "
        "class as often as asked for, abstention that keeps the share of errors below a bound, a guard that loses few "
        "of the clean head's right answers. Rewrites the bundle's manifest, or that of a copy."
    ))  # fmt: skip
    p.add_argument("bundle", metavar="BUNDLE", help="a bundle (directory)")
    p.add_argument(
        "--data", metavar="SOURCE", help="fashion-mnist, renditions, digits, a directory of class folders, or a .csv "
        "manifest; pictures like those to be answered, with labels (default: the data that the model was trained on)",
    )  # fmt: skip
    p.add_argument(
        "--split", choices=get_args(CalibrationSplit), default="calibration", help="of the data (default: calibration)"
    )
    p.add_argument(
        "--mix", default=MIX, metavar="PART=SHARE,...",
        help="what the promises hold for: each picture is seen in one view drawn from these shares, of "
        f"{', '.join(list(COMPONENTS)[:3])} or single corruptions (default: %(default)s)",
    )  # fmt: skip
    p.add_argument(
        "--coverage", type=float, default=DEFAULT.coverage, metavar="P",
        help="share of sets that hold the right class, where a request names none (default: %(default)s)",
    )  # fmt: skip
    p.add_argument(
        "--max-risk", type=float, metavar="R", help="share of errors among answers, where a request names none "
        "(default: the least that leaves four fifths answered)",
    )  # fmt: skip
    p.add_argument(
        "--delta", type=float, default=DEFAULT.delta, metavar="P",
        help="probability with which a bound on risk or harm may fail (default: %(default)s)",
    )  # fmt: skip
    p.add_argument(
        "--score", choices=get_args(SetScore), default=DEFAULT.score, help="by which sets are built; lac gives the "
        "smallest ones, raps spreads them by difficulty (default: %(default)s)",
    )  # fmt: skip
    p.add_argument("--raps-penalty", type=float, default=DEFAULT.raps_penalty, metavar="X", help="0 makes raps aps")
    p.add_argument("--raps-free-ranks", type=int, default=DEFAULT.raps_free_ranks, metavar="N")
    p.add_argument(
        "--accuracy-loss", type=float, default=DEFAULT.accuracy_loss, metavar="R",
        help="of clean pictures, that a guard may cost (default: %(default)s)",
    )  # fmt: skip
    p.add_argument(
        "--negative-flips", type=float, default=DEFAULT.negative_flips, metavar="R",
        help="share of pictures that a guard may get wrong where the clean head is right (default: %(default)s)",
    )  # fmt: skip
    p.add_argument(
        "--drift", choices=("clean", "mixture"), default=DEFAULT.drift,
        help="views that a server compares its pictures with (default: %(default)s)",
    )  # fmt: skip
    p.add_argument(
        "--pictures", type=int, default=PICTURES, metavar="N", help="at most, a quarter of them for what has to be "
        "chosen beforehand (default: %(default)s)",
    )  # fmt: skip
    p.add_argument("--seed", type=int, default=0, help="of the choice of pictures and of their views (default: 0)")
    p.add_argument("--out", type=Path, metavar="DIR", help="a copy of the bundle to write (default: in place)")
    return p
