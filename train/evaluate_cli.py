"""`trivium evaluate`: ask a bundle or checkpoint about clean and corrupted pictures; write and print what came out."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from trivium.runtime.errors import ConfigError

from .data.pictures import Pictures, load_described, load_pictures, load_same, parse_spec
from .data.shift_sets import ShiftSet, beside, open_shift
from .evaluation.adversarial import (
    ATTACKS,
    DEFAULT_ATTACKS,
    WORTH,
    attack_system,
    choose_answerers,
    open_system,
    parse_attacks,
    parse_eps,
    parse_threat,
)
from .evaluation.evaluate import evaluate
from .evaluation.gallery import album, gallery
from .evaluation.printed import show
from .evaluation.report import write_report
from .evaluation.results import write_csv, write_results
from .evaluation.subject import Subject, open_subject
from .evaluation.tally import choose_pictures
from .progress import bar
from .shifts.corruptions import TEST_CORRUPTIONS
from .shifts.styles import STYLES

RESULTS, TABLE, REPORT = "results.json", "results.csv", "report.html"


def main() -> None:
    """Evaluate as the command line says."""
    given = parser().parse_args()
    console = Console()
    for option, count in (
        ("--pictures", given.pictures),
        ("--attack-pictures", given.attack_pictures),
        ("--autoattack-pictures", given.autoattack_pictures),
    ):
        if count is not None and count < 1:
            raise ConfigError(f"{option} {count}: at least 1")
    threat = parse_threat(given.attack) if given.attack else None
    attacks, curve = parse_attacks(given.attacks), [parse_eps(text) for text in given.eps_curve.split(",") if text]
    with bar(console, "calibrating") as progress:
        subject: Subject = open_subject(given.model, progress=progress, engine=given.engine)
    if threat is not None:
        system = open_system(subject)
        choose_answerers(system, given.attack_answerers)  # a mistake is told before hours of work
    original: Subject | None = open_subject(given.original, as_original=True) if given.original else None
    pictures = test_pictures(given.data, subject, original, console)
    sets = shift_sets(given, subject, pictures)
    outside = {name: load_pictures(parse_spec(name), "test", subject.manifest.preprocessing) for name in given.ood}
    with bar(console, "asking") as progress:
        results, _ = evaluate(
            subject,
            pictures,
            original=original,
            count=given.pictures,
            seed=given.seed,
            left_out=given.leave_out,
            sets=sets,
            styles=given.styles,
            outside=outside,
            command=["trivium", "evaluate", *sys.argv[1:]],
            progress=progress,
        )
    if threat is not None:
        with bar(console, "attacking") as progress:
            found = attack_system(
                system,
                pictures,
                threat,
                attacks=attacks,
                answerers=given.attack_answerers,
                curve=curve,
                count=given.attack_pictures,
                autoattack_count=given.autoattack_pictures,
                autoattack_above=given.autoattack_above,
                seed=given.seed,
                progress=progress,
            )
        results = results.model_copy(update={"attacks": found})
    out = given.out
    chosen = choose_pictures(pictures, given.pictures, given.seed)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_results(results, out / RESULTS)
        write_csv(results, out / TABLE)
        shown = gallery(subject, pictures, chosen, seed=given.seed)
        same = album(subject, pictures, {each.name: each.pictures for each in sets}, seed=given.seed)
        write_report(results, shown, out / REPORT, same)
    except OSError as error:
        raise ConfigError(f"--out {out}: {error.strerror}") from None
    show(results, console)
    for name in (RESULTS, TABLE, REPORT):
        console.print(str(out / name), highlight=False, soft_wrap=True)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog=sys.argv[0], description=(
        "Measure a bundle or a checkpoint on clean pictures and under 15 corruptions x 5 severities: every head, every "
        "router, the oracles, calibration, flips against the original classifier; on request on shift sets, in other "
        "styles and against other data too. Writes results.json, results.csv and report.html; trivium report compares."
    ))  # fmt: skip
    p.add_argument("model", metavar="MODEL", help="a bundle or a checkpoint (directories)")
    p.add_argument(
        "--data", help="fashion-mnist, digits, a directory of class folders, or a .csv manifest, whose test split is "
        "used (default: the data that the model was trained on)",
    )  # fmt: skip
    p.add_argument(
        "--original", metavar="MODEL", help="a checkpoint whose original classifier, or a bundle whose answer, counts "
        "as the original (default: the checkpoint's own)",
    )  # fmt: skip
    p.add_argument(
        "--pictures",
        type=int,
        metavar="N",
        help="test pictures to corrupt, drawn by seed (default: all); clean figures are always of all",
    )
    p.add_argument(
        "--engine", choices=["local", "ray"], default="local",
        help="where a bundle answers: in this process, or in actors of Ray on the cluster that RAY_ADDRESS names; "
        "views are made here (default: local)",
    )  # fmt: skip
    p.add_argument("--seed", type=int, default=0, help="of the choice of pictures and of the corruptions (default: 0)")
    p.add_argument(
        "--leave-out", nargs="+", default=[], metavar="CORRUPTION",
        help=f"corruptions that enter no headline figure, of: {', '.join(TEST_CORRUPTIONS)}",
    )  # fmt: skip
    p.add_argument(
        "--shift", nargs="+", action="extend", default=[], metavar="NAME=PATH",
        help="a shift set: class folders or a .csv manifest of any name, or imagenet-c, -r, -a, -sketch, -v2 or "
        "objectnet as distributed; classes are matched by name, WordNet id or index (default: what the data brings "
        "with it in its folder shifts)",
    )  # fmt: skip
    p.add_argument(
        "--mapping", type=Path, metavar="FILE", help="ObjectNet's JSON of its classes to ImageNet's, if not beside it"
    )
    p.add_argument(
        "--styles", action="store_true", help=f"the pictures to corrupt in other styles too: {', '.join(STYLES)}"
    )
    p.add_argument(
        "--ood", nargs="+", action="extend", default=[], metavar="DATA",
        help="data of other classes, as for --data: how well each score tells its test split from this one",
    )  # fmt: skip
    p.add_argument(
        "--attack",
        metavar="NORM:EPS",
        help="attack a checkpoint within this radius, of pixels in [0, 1]: linf:8/255, l2:0.5",
    )
    p.add_argument(
        "--attacks", default=",".join(DEFAULT_ATTACKS), metavar="NAMES",
        help=f"with commas, of: {', '.join(ATTACKS)} (default: {','.join(DEFAULT_ATTACKS)}); AutoAttack, which is "
        "slow, is tried where PGD leaves more than --autoattack-above right",
    )  # fmt: skip
    p.add_argument(
        "--attack-answerers", nargs="+", metavar="NAME", help="heads and routers to attack, original, or default "
        "for the default router (default: original, every head, the default router)",
    )  # fmt: skip
    p.add_argument(
        "--attack-pictures", type=int, default=500, metavar="N", help="pictures to attack, drawn by seed (default: 500)"
    )
    p.add_argument(
        "--autoattack-pictures", type=int, metavar="N", help="those of them that AutoAttack is tried on (default: all)"
    )
    p.add_argument(
        "--autoattack-above", type=float, default=WORTH, metavar="SHARE",
        help=f"that PGD must leave right for AutoAttack to be tried (default: {WORTH:g})",
    )  # fmt: skip
    p.add_argument(
        "--eps-curve", default="", metavar="EPS,EPS...", help="further radii, for all attacks but AutoAttack: "
        "0,2/255,4/255",
    )  # fmt: skip
    p.add_argument(
        "--out", type=Path, metavar="DIR", default="evaluation", help="where the files go (default: evaluation)"
    )
    return p


def shift_sets(given: argparse.Namespace, subject: Subject, pictures: Pictures) -> list[ShiftSet]:
    """The sets of --shift, or else those that the data brings with it.

    Raises: ConfigError, as open_shift does, and where two have one name.
    """
    sets = [
        open_shift(
            text,
            subject.manifest.classes,
            subject.manifest.preprocessing,
            mapping=given.mapping,
            count=given.pictures,
            seed=given.seed,
        )
        for text in given.shift or beside(pictures)
    ]
    names = [each.name for each in sets]
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise ConfigError(f"--shift {twice[0]}: two sets of this name")
    return sets


def test_pictures(data: str | None, subject: Subject, original: Subject | None, console: Console) -> Pictures:
    """The test split of --data, or of what the model was trained on.

    Raises: ConfigError where neither names any data.
    """
    preprocessing = subject.manifest.preprocessing
    if data is None:
        for each in (subject, original):
            record = each.data_record() if each is not None else None
            if record is not None:
                return load_described(record, "test", preprocessing)
        raise ConfigError("the model's record does not say where its data lies: name it with --data")
    record = subject.data_record()
    trained_on = load_same(record, data, "test", preprocessing) if record else None
    if trained_on is not None:
        return trained_on
    console.print(f"data: {data} is not what the model was trained on; its own test split is used", highlight=False)
    return load_pictures(parse_spec(data), "test", preprocessing)
