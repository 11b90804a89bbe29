"""What a person sees of one evaluation on a terminal."""

from __future__ import annotations

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from .adversarial import ATTACKS
from .results import Attacks, Difference, MeanCorruptionError, Results, Two


def show(results: Results, console: Console) -> None:
    """Print the readable part."""
    data, model = results.data, results.model
    views = len(results.corruptions) - len(results.left_out)
    console.print(
        f"\n{model.name} on {data.pictures} pictures of {data.source} ({data.split}), {data.corrupted} of them "
        f"under {views} corruptions x {len(results.severities)} severities too; original: {model.original}",
        highlight=False,
    )
    if results.left_out:
        console.print(f"left out of all figures, since seen before: {', '.join(results.left_out)}")
    console.print(headline(results))
    default = results.default
    if default.over_original is not None and default.role != "original":
        over = default.over_original
        console.print(
            f"{default.name} (default router) against the original: clean {points(over.clean)}, "
            f"corrupted {points(over.corrupted)}"
        )
    if len(model.heads) > 1:
        show_bounds(results, console)
    if results.mce is not None:
        show_mce("made corruptions", results.mce, default.name, console)
    if results.shifts:
        console.print(shift_table(results))
        for name, shift in results.shifts.items():
            if shift.note:
                console.print(f"{name}: {shift.note}", highlight=False)
            if shift.mce is not None:
                show_mce(name, shift.mce, default.name, console)
    ranked = sorted(results.detection, key=lambda each: -(each.shift or 0))[:3]
    found = ", ".join(f"{each.score} {each.shift:.3f}" for each in ranked if each.shift is not None)
    console.print(f"shift detection (AUROC), best three: {found}")
    for name, other in results.ood.items():
        best = sorted(other.auroc.items(), key=lambda each: -(each[1] or 0))[:3]
        found = ", ".join(f"{score} {value:.3f}" for score, value in best if value is not None)
        console.print(f"against {other.pictures} pictures of {name} (AUROC), best three: {found}")
    if results.attacks is not None:
        show_attacks(results.attacks, default.name, console)
    console.print(f"{results.cpu_seconds:.0f} CPU-s, {results.wall_seconds:.0f} s")


def show_bounds(results: Results, console: Console) -> None:
    """Print what routing could gain, and what of it each rule does."""
    bounds = results.bounds
    console.print(
        f"best single head: {bounds.best_head} ({pair(bounds.best_head_accuracy)}); oracle over heads "
        f"{pair(bounds.oracle)}; perfect-domain oracle {pair(bounds.domain_oracle)} (% clean / corrupted)"
    )
    for rule, share in bounds.captured.items():
        if share is not None:
            console.print(f"  {rule} captures {100 * share:+.0f} % of the gap from best head to oracle")


def headline(results: Results) -> Table:
    """Every answerer, in percent."""
    table = Table(box=SIMPLE, caption="% clean / corrupted; → default router", caption_justify="left")
    table.add_column("")
    for name in ("accuracy", "negative flips", "ECE", "acc. at 80 %"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in results.answerers:
        flips = pair(each.negative_flips) if each.negative_flips and each.role != "original" else "-"
        table.add_row(
            ("→ " if each.default else "  ") + each.name,
            pair(each.accuracy),
            flips,
            pair(each.ece),
            pair(each.accuracy_at_80),
            style="bold" if each.default else "dim" if each.role == "original" else None,
        )
    return table


def show_mce(what: str, found: MeanCorruptionError, default: str, console: Console) -> None:
    """Print the default's mean corruption error and whose errors are 100."""
    if default in found.values:
        whose = "AlexNet's" if found.yardstick == "alexnet" else "the original's"
        console.print(f"mCE of {default} on {what}: {found.values[default]:.1f} ({whose} errors are 100)")


def shift_table(results: Results) -> Table:
    """Every answerer on every shift, in percent."""
    default = results.default.name
    table = Table(
        box=SIMPLE, caption="% right / negative flips; (seen): training drew such views", caption_justify="left"
    )
    table.add_column("")
    for name, shift in results.shifts.items():
        table.add_column(name if shift.counted else f"{name} (seen)", justify="right", no_wrap=True)
    for each in results.answerers:
        cells = [shift.answerers[each.name] for shift in results.shifts.values()]
        flips = [
            "-" if c.negative_flips is None or each.role == "original" else percent(c.negative_flips) for c in cells
        ]
        table.add_row(
            ("→ " if each.default else "  ") + each.name,
            *(f"{percent(cell.accuracy)} / {flip}" for cell, flip in zip(cells, flips, strict=True)),
            style="bold" if each.name == default else "dim" if each.role == "original" else None,
        )
    return table


def show_attacks(found: Attacks, default: str, console: Console) -> None:
    """Print every answerer under every attack, in percent: at the radius asked for, then along the curve."""
    attacks = [name for name in ATTACKS if name in found.steps]
    radii = sorted({row.eps for row in found.rows if row.eps > 0})
    cells = {(row.answerer, row.attack, row.eps): percent(row.accuracy) for row in found.rows}
    for eps in [found.eps, *(each for each in radii if each != found.eps)]:
        shown = [name for name in attacks if any((who, name, eps) in cells for who in found.clean)]
        caption = f"% right under attack, {found.norm} {eps:g}, {found.pictures} pictures"
        if "adaptive" in shown:
            caption += "; adaptive: what also survives the others"
        table = Table(box=SIMPLE, caption=caption, caption_justify="left")
        for column in ("", "clean", *shown):
            table.add_column(column, justify="right" if column else "left", no_wrap=True)
        for name, clean in found.clean.items():
            table.add_row(
                ("→ " if name == default else "  ") + name,
                percent(clean),
                *(cells.get((name, attack, eps), "-") for attack in shown),
                style="bold" if name == default else None,
            )
        console.print(table)
    console.print(f"attacks: {found.cpu_seconds:.0f} CPU-s, {found.wall_seconds:.0f} s")


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def pair(values: Two) -> str:
    """Two shares in percent."""
    return f"{percent(values.clean)} / {percent(values.corrupted)}"


def points(difference: Difference) -> str:
    """A difference in percentage points with its interval."""
    return f"{100 * difference.mean:+.1f} points ({100 * difference.low:+.1f} to {100 * difference.high:+.1f})"
