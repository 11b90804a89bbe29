"""`trivium verify-guarantees`: calibrate a bundle again and again, and measure whether its promises hold."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from trivium.runtime.bundle import Manifest
from trivium.runtime.errors import ConfigError
from trivium.runtime.predictor import Predictor

from .calibrate_cli import share
from .data.shift_sets import beside, open_shift
from .evaluation.report import percent
from .guarantees.calibrate import Settings
from .guarantees.data import calibration_data
from .guarantees.page import put_figures, render
from .guarantees.pool import Source, look_at, sources_of
from .guarantees.verified import Verified, write_verified
from .guarantees.verify import SHARE, SPLITS, verify
from .guarantees.views import COMPONENTS, parse_mixture
from .progress import bar

RESULTS, REPORT, CACHE = "guarantees.json", "guarantees.html", "pool.npz"


def main() -> None:
    """Verify as the command line says."""
    given = parser().parse_args()
    console = Console(highlight=False, soft_wrap=True)
    for option, count in (("--splits", given.splits), ("--pictures", given.pictures)):
        if count is not None and count < 1:
            raise ConfigError(f"{option} {count}: at least 1")
    if given.seed < 0:
        raise ConfigError(f"--seed {given.seed}: at least 0")
    calibrating = share("--share", given.share)
    predictor = Predictor.load(given.bundle)
    settings = settings_of(predictor.manifest, given)
    sources = pool_of(given, predictor.manifest, console)
    with bar(console, "asking") as progress:
        pool = look_at(predictor, sources, settings.mixture, given.seed, given.pictures, given.out / CACHE, progress)
    with bar(console, "calibrating") as progress:
        found = verify(
            predictor.manifest,
            pool,
            settings,
            command=" ".join(["trivium", "verify-guarantees", *sys.argv[1:]]),
            data={each.name: min(len(each.pictures), given.pictures or len(each.pictures)) for each in sources},
            splits=given.splits,
            share=calibrating,
            seed=given.seed,
            progress=progress,
        )
    try:
        given.out.mkdir(parents=True, exist_ok=True)
        for path in (given.out / RESULTS, *([given.results] if given.results else [])):
            write_verified(found, path)
        (given.out / REPORT).write_text(render(found), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}") from None
    if given.page:
        put_figures(given.page, found)
    show(found, console)
    for name in (RESULTS, REPORT):
        console.print(str(given.out / name), markup=False)


def settings_of(manifest: Manifest, given: argparse.Namespace) -> Settings:
    """What to promise: what the bundle promises, or else the defaults, changed by the arguments.

    Raises: ConfigError.
    """
    promised: dict[str, Any] = {}
    if (found := manifest.guarantees) is not None:
        same = ("mixture", "coverage", "score", "raps_penalty", "raps_free_ranks", "delta")
        promised = {name: getattr(found, name) for name in same}
    if (guard := manifest.router.guard) is not None:
        promised |= {"accuracy_loss": guard.accuracy_loss, "negative_flips": guard.negative_flips}
    for name in ("max_risk", "delta", "accuracy_loss", "negative_flips"):
        if (value := getattr(given, name)) is not None:
            promised[name] = share(f"--{name.replace('_', '-')}", value)
    if given.mix is not None:
        promised["mixture"] = parse_mixture(given.mix)
    return Settings.model_validate(promised)


def pool_of(given: argparse.Namespace, manifest: Manifest, console: Console) -> list[Source]:
    """The pictures to verify on.

    Raises: ConfigError.
    """
    pictures, _ = calibration_data(manifest, given.data, given.split, console.print)
    named = [] if given.alone else given.shift or beside(pictures)
    sets = [open_shift(text, manifest.classes, manifest.preprocessing) for text in named]
    return sources_of(pictures, sets, manifest.classes)


def show(found: Verified, console: Console) -> None:
    """The readable part."""
    default, score = found.router, found.settings.score
    for promised in (0.9, 0.95):
        row = found.row(default, score, promised)
        console.print(
            f"sets of {default} at {percent(promised, 0)} %: coverage {percent(row.mean, 2)} %, "
            f"{percent(row.kept)} % of the splits above the promise less 2 points, {row.size:.2f} classes"
        )
    test, population = found.worst()
    console.print(
        f"bounds on risk, worst of all routers and levels: broken in {percent(population)} % of draws from the "
        f"population, on {percent(test)} % of test parts; allowed {percent(found.settings.delta)} %, "
        f"{percent(found.allowed)} % with two standard errors"
    )
    if found.harm is not None:
        console.print(
            f"guard: clean accuracy falls by {percent(found.harm.accuracy_loss, 2)} points, negative flips "
            f"{percent(found.harm.negative_flips, 2)} %; bounds broken in {percent(found.harm.broken)} % of draws from "
            f"the population, on {percent(found.harm.broken_test)} % of test parts"
        )
    console.print(
        f"abstaining on a fifth removes {percent(found.removed.declared)} % of the errors, "
        f"{percent(found.removed.unseen)} % with unseen corruptions; shift_score tells those with an AUROC "
        f"of {found.shift.unseen:.3f}"
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog=sys.argv[0], description=(
        "Verify what trivium calibrate promises: look once at a pool of labelled pictures, then calibrate on part of "
        "it again and again and measure coverage, risk and harm on the rest. Writes guarantees.json and "
        "guarantees.html; what the bundle said of the pictures is kept, so that a repetition asks nothing again."
    ))  # fmt: skip
    p.add_argument("bundle", metavar="BUNDLE", help="a bundle (directory), with guarantees or without")
    p.add_argument(
        "--data", metavar="SOURCE", help="fashion-mnist, renditions, digits, a directory of class folders, or a .csv "
        "manifest (default: the data that the model was trained on)",
    )  # fmt: skip
    p.add_argument(
        "--split", choices=("test", "all"), default="test",
        help="of the data; all is for data that training saw nothing of (default: test)",
    )  # fmt: skip
    p.add_argument(
        "--shift", nargs="+", action="extend", default=[], metavar="NAME=PATH", help="shift sets that join the pool, "
        "as for trivium evaluate (default: what the data brings with it in its folder shifts)",
    )  # fmt: skip
    p.add_argument("--alone", action="store_true", help="the split alone, no shift set")
    p.add_argument(
        "--mix", metavar="PART=SHARE,...", help="the mixture to calibrate and test on, of "
        f"{', '.join(list(COMPONENTS)[:3])} or single corruptions (default: the bundle's, or half clean, half "
        "corrupted)",
    )  # fmt: skip
    p.add_argument(
        "--max-risk", type=float, metavar="R", help="the bundle's own bound, instead of what each split finds"
    )
    p.add_argument("--delta", type=float, metavar="P", help="as of trivium calibrate (default: the bundle's, or 0.1)")
    p.add_argument("--accuracy-loss", type=float, metavar="R", help="likewise (default: the bundle's, or 0.01)")
    p.add_argument("--negative-flips", type=float, metavar="R", help="likewise (default: the bundle's, or 0.02)")
    p.add_argument(
        "--splits", type=int, default=SPLITS, metavar="N", help="repetitions of each kind (default: %(default)s)"
    )
    p.add_argument(
        "--share", type=float, default=SHARE, metavar="P", help="of the pool that calibrates (default: %(default)s)"
    )
    p.add_argument("--pictures", type=int, metavar="N", help="of each part of the pool at most (default: all)")
    p.add_argument("--seed", type=int, default=0, help="of the views and the splits (default: 0)")
    p.add_argument(
        "--out", type=Path, metavar="DIR", default="verification", help="where the files go (default: verification)"
    )
    p.add_argument("--results", type=Path, metavar="FILE.json", help="guarantees.json here as well")
    p.add_argument(
        "--page", type=Path, metavar="FILE.md", help="put the figures into this page of Markdown, between its marks, "
        "and the plots beside it",
    )  # fmt: skip
    return p
