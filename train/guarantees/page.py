"""The report of a verification: tables, a page of HTML, and the part of a Markdown page that holds the figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trivium.runtime.errors import ConfigError

from ..evaluation.charts import swatch
from ..evaluation.report import environment, percent, words
from .plots import POPULATION, RISK, SETS, SHARE, SHIFT, TEST, plots, sheet
from .verified import SLACK, RiskRow, Verified

PAGE = "guarantees.html.jinja"
BEGIN, END = "<!-- figures: trivium verify-guarantees -->", "<!-- end of figures -->"
MIXTURES = {
    "declared": "the declared mixture", "clean": "its clean pictures", "shifted": "its other pictures",
    "unseen": "corruptions never calibrated on",
}  # fmt: skip
SHOWN = (0.9, 0.95)
LEFT_OUT = {
    (MIXTURES["declared"], MIXTURES["declared"]), (MIXTURES["clean"], MIXTURES["clean"]),
    (MIXTURES["clean"], MIXTURES["declared"]),
}  # fmt: skip
"""Of the page of Markdown: mixtures calibrated on and asked about of which nothing new is to be told."""


@dataclass(frozen=True)
class Table:
    """Texts of a table; the first `names` columns are words, the rest numbers."""

    title: str
    note: str
    heads: list[str]
    rows: list[list[str]]
    names: int = 1
    mark: bool = False
    """Whether the default router's row stands out."""


def tables(found: Verified) -> list[Table]:
    """Everything that was found, but for what the plots show alone."""
    made = [sets_table(found), risks_table(found), conditions_table(found), shift_table(found), errors_table(found)]
    return made if found.harm is None else [*made[:2], harm_table(found), *made[2:]]


def sets_table(found: Verified) -> Table:
    rows = []
    for name, row in found.routers.items():
        for score in row.coverage:
            cells = [name, score]
            for promised in SHOWN:
                one = found.row(name, score, promised)
                cells += [percent(one.mean, 2), percent(one.kept), f"{one.size:.2f}"]
            rows.append(cells)
    heads = ["router", "score"]
    for promised in SHOWN:
        heads += [f"{percent(promised, 0)} %: coverage", f"above {percent(promised - SLACK, 0)}", "classes"]
    return Table(
        "Prediction sets",
        "Promised coverage, the measured one in percent of the test part (mean over splits), percent of the splits "
        f"above the promise less {percent(SLACK, 0)} points, and classes in a set.",
        heads, rows, names=2, mark=True,
    )  # fmt: skip


def risks_table(found: Verified) -> Table:
    def cells(label: list[str], row: RiskRow) -> list[str]:
        shares = (row.certified, row.answered, row.risk, row.broken_test, row.broken)
        return [*label, percent(row.max_risk), *(percent(share) for share in shares)]

    rows = [cells([found.router, "its own"], found.own)] if found.own is not None else []
    for name, router in found.routers.items():
        rows += [cells([name, max(router.chosen, key=router.chosen.__getitem__).replace("_", " ")], row)
                 for row in router.risks]  # fmt: skip
    return Table(
        "Abstention",
        "In percent: the bound on the error among answers; repetitions in which a request for it is served; pictures "
        "answered and errors among them on the test part; splits in which the test part exceeds the bound, draws in "
        f"which the population does: of these at most {percent(found.settings.delta, 0)} are promised, "
        f"{percent(found.allowed)} with two standard errors of {found.splits} draws. Each level holds by itself.",
        ["router", "ranked by", "bound", "served", "answered", "error", "broken, test part", "broken, population"],
        rows, names=2, mark=True,
    )  # fmt: skip


def harm_table(found: Verified) -> Table:
    harm = found.harm
    assert harm is not None
    accuracy = ", ".join(f"{name} {percent(value)}" for name, value in harm.accuracy.items())
    return Table(
        "The guard",
        f"Leaves the clean head for {harm.base} only as far as its harm is certified; in percent. Accuracy on the "
        f"declared mixture: {accuracy}. Without a guard {harm.base} costs {percent(harm.base_negative_flips)} of "
        "negative flips.",
        ["", "promised", "measured", "broken, test part", "broken, population"],
        [
            ["offered", "", percent(harm.offered), "", ""],
            ["pictures that leave the clean head", "", percent(harm.moved), "", ""],
            ["fall of clean accuracy", f"≤ {percent(harm.accuracy_loss_bound)}", percent(harm.accuracy_loss, 2),
             "", ""],
            ["negative flips", f"≤ {percent(harm.negative_flips_bound)}", percent(harm.negative_flips, 2), "", ""],
            ["either", f"≤ {percent(found.settings.delta, 0)} of draws", "",
             percent(harm.broken_test), percent(harm.broken)],
        ],
    )  # fmt: skip


def conditions_table(found: Verified) -> Table:
    levels = [level for level in found.conditions[0].coverage if float(level) in SHOWN] if found.conditions else []
    return Table(
        "Under other mixtures",
        "Nothing is promised where the pictures are not like those of calibration; this is what happened. In percent; "
        "answered and error are at the bundle's own bound on risk.",
        ["router", "calibrated on", "asked about", *(f"coverage at {percent(float(level), 0)}" for level in levels),
         "classes", "answered", "error"],
        [
            [row.router, MIXTURES[row.calibrated_on], MIXTURES[row.asked_about],
             *(percent(row.coverage[level]) for level in levels), f"{row.size:.2f}",
             percent(row.answered), percent(row.risk)]
            for row in found.conditions
        ],
        names=3,
    )  # fmt: skip


def shift_table(found: Verified) -> Table:
    shift = found.shift
    rows = [
        ["views like those that it was fitted on", f"{shift.calibrated:.3f}"],
        ["all corruptions never calibrated on", f"{shift.unseen:.3f}"],
        *([words(kind), f"{value:.3f}"] for kind, value in sorted(shift.kinds.items(), key=lambda item: -item[1])),
    ]
    return Table(
        "Shift score",
        "How well it tells a picture as it is from the same picture shifted, AUROC. Its probabilities are off by "
        f"{percent(shift.ece)} points on average (expected calibration error, corruptions never calibrated on, even "
        "odds). It says nothing about error.",
        ["shifted by", "AUROC"], rows,
    )  # fmt: skip


def errors_table(found: Verified) -> Table:
    rows = []
    for name, router in found.routers.items():
        ranks = [f"{value:.3f}" for value in router.errors.values()]
        rows.append([name, percent(router.accuracy), *ranks])
    kinds = [kind.replace("_", " ") for kind in found.routers[found.router].errors]
    return Table(
        "What ranks errors",
        "Accuracy on the declared mixture in percent, and AUROC for errors by each confidence. Abstaining on the least "
        f"sure fifth of {found.router}'s answers removes {percent(found.removed.declared)} % of the errors on the "
        f"declared mixture, {percent(found.removed.unseen)} % on its clean pictures with corruptions never calibrated "
        "on for the others.",
        ["router", "accuracy", *kinds], rows, mark=True,
    )  # fmt: skip


def render(found: Verified) -> str:
    """The page as text."""
    named = [*SETS.values(), TEST, POPULATION, SHARE, RISK, SHIFT]
    return environment().get_template(PAGE).render(
        v=found,
        ninety=found.row(found.router, found.settings.score, 0.9),
        slack=SLACK,
        worst=found.worst(),
        plots=plots(found),
        legend=[(swatch(one), one.name) for one in named],
        tables=tables(found),
    )  # fmt: skip


def markdown(found: Verified) -> str:
    """The figures that the acceptance of guarantees asks for, in Markdown."""
    default = found.router
    ninety = found.row(default, found.settings.score, 0.9)
    mixture = ", ".join(f"{percent(share, 0)} % {name}" for name, share in found.settings.mixture.items())
    pool = " + ".join(f"{name} {count:,}" for name, count in found.data.items())
    sets, risks, mixtures = sets_table(found), risks_table(found), conditions_table(found)
    bounds = {percent(bound) for bound in (0.02, 0.05, 0.1, 0.2)}
    others = {(name, found.settings.score) for name in ("clean", "guard")}
    asked = [row for row in mixtures.rows if (row[1], row[2]) not in LEFT_OUT]
    shift, removed = found.shift, found.removed
    worst, *_, best = sorted(shift.kinds, key=shift.kinds.__getitem__)
    lines = [
        f"### {found.model}",
        "",
        f"{found.splits} splits of {sum(found.data.values()):,} pictures ({pool}): {found.tuning:,} for choices, "
        f"{found.calibration:,} for the promises, {found.test:,} to test. Mixture: {mixture}. Default router: "
        f"{default}. `{found.command}`",
        "",
        *grid(sets.heads, [row for row in sets.rows if row[0] == default or (row[0], row[1]) in others], 2),
        "",
        *grid(
            risks.heads,
            [row for row in risks.rows if row[0] == default and (row[1] == "its own" or row[2] in bounds)],
            2,
        ),
        "",
        f"Bounds on risk broken, worst of all {len(found.routers)} routers and all levels: "
        f"{percent(found.worst()[1])} % of draws from the population, {percent(found.worst()[0])} % of test parts "
        f"(allowed: {percent(found.settings.delta, 0)} %, {percent(found.allowed)} % with two standard errors).",
    ]
    lines += ["", *grid(mixtures.heads, asked, 3), ""]
    if (harm := found.harm) is not None:
        accuracy = ", ".join(f"{name} {percent(value)}" for name, value in harm.accuracy.items())
        lines.append(
            f"- The guard, offered in {percent(harm.offered)} % of the splits, leaves the clean head for {harm.base} "
            f"on {percent(harm.moved)} % of the pictures: clean accuracy falls by {percent(harm.accuracy_loss, 2)} "
            f"points (at most {percent(harm.accuracy_loss_bound)} promised), negative flips "
            f"{percent(harm.negative_flips, 2)} % (at most {percent(harm.negative_flips_bound)}; "
            f"{percent(harm.base_negative_flips, 2)} without a guard); either bound broken in {percent(harm.broken)} % "
            f"of draws, on {percent(harm.broken_test)} % of test parts. Accuracy on the mixture, %: {accuracy}."
        )
    lines.append(
        f"- Sets of {percent(0.9, 0)} % hold {ninety.size:.2f} of {found.classes} classes on average.\n"
        f"- Abstaining on the least sure 20 % removes {percent(removed.declared)} % of the errors on the declared "
        f"mixture, {percent(removed.unseen)} % with corruptions never calibrated on.\n"
        f"- `shift_score`, AUROC: {shift.calibrated:.3f} on views like those that it was fitted on, "
        f"{shift.unseen:.3f} on corruptions never calibrated on (best {words(best)}, worst "
        f"{words(worst)}); expected calibration error there {shift.ece:.3f}.\n"
        f"- Errors of {default} ranked, AUROC: "
        + ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in found.routers[default].errors.items())
        + "."
    )
    return "\n".join(lines) + "\n"


def grid(heads: Sequence[str], rows: Sequence[Sequence[str]], names: int) -> list[str]:
    """A table's lines in Markdown."""
    rule = ["---"] * names + ["---:"] * (len(heads) - names)
    return [f"| {' | '.join(row)} |" for row in (heads, rule, *rows)]


def put_figures(page: Path, found: Verified) -> None:
    """Replace what a Markdown page says of this model between BEGIN and END, and write its plots beside the page.

    Raises: ConfigError where the page has no such part or cannot be written.
    """
    try:
        text = page.read_text(encoding="utf-8")
        before, begin, rest = text.partition(BEGIN)
        old, end, after = rest.partition(END)
        if not (begin and end):
            raise ConfigError(f"--page {page}: no part between {BEGIN} and {END}")
        blocks = {block.split("\n", 1)[0]: block for block in old.strip().split("\n### ") if block.strip()}
        blocks = {name.removeprefix("### "): block.removeprefix("### ") for name, block in blocks.items()}
        plot = page.with_name(f"{page.stem}-{found.model}.svg")
        image = (
            f"\n![Coverage, broken bounds and answers of {found.model}]({plot.name})\n\nBlue: lac, the population, the "
            "share answered. Orange: raps, the test part, the error among answers. Shaded: 95 % of the splits.\n"
        )
        blocks[found.model] = (markdown(found) + image).removeprefix("### ")
        body = "\n".join(f"### {block.strip()}\n" for _, block in sorted(blocks.items()))
        page.write_text(f"{before}{begin}\n\n{body}\n{end}{after}", encoding="utf-8")
        plot.write_text(sheet(found, environment()), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--page {error.filename}: {error.strerror}") from None
