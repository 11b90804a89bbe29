"""Plots of a verification as inline SVG, in the report's colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jinja2 import Environment
from markupsafe import Markup, escape

from ..evaluation.charts import Frame, Series, mark, stroke, svg
from .verified import Verified

Point = tuple[float, float]
SETS = {"lac": Series("lac", "--c-clean", "circle"), "raps": Series("raps", "--c-robust", "square", dash="5 3")}
TEST, POPULATION = Series("test part", "--c-robust", "square", dash="5 3"), Series("population", "--c-clean", "circle")
RISK, SHARE = Series("error among answers", "--c-robust", "square"), Series("answered", "--c-clean", "circle")
SHIFT = Series("shift score", "--c-blend", "diamond")
WIDTH, HEIGHT = 360.0, 260.0


def plots(found: Verified) -> dict[str, Markup]:
    """Title -> plot, of the default router."""
    own = found.routers[found.router]
    covered = {SETS[score]: rows for score, rows in own.coverage.items()}
    bands = [[(row.promised, row.low) for row in own.coverage["lac"]]]
    bands[0] += [(row.promised, row.high) for row in reversed(own.coverage["lac"])]
    served = [row for row in own.risks if row.answered is not None and row.risk is not None]
    rates = [rate for row in own.risks for rate in (row.broken_test, row.broken)]
    edge = max([found.allowed, *rates]) * 1.1
    widest = max(row.size for rows in own.coverage.values() for row in rows)
    bins = [
        (confidence, share)
        for confidence, share, count in zip(
            found.shift.reliability.confidence, found.shift.reliability.accuracy, found.shift.reliability.counts,
            strict=True,
        )
        if confidence is not None and share is not None and count >= 10
    ]  # fmt: skip
    risks = (0.0, max(row.max_risk for row in own.risks))
    return {
        "Coverage of the sets against the promise": curves(
            {one: [(row.promised, row.mean) for row in rows] for one, rows in covered.items()},
            (0.8, 1.0), (0.78, 1.0), "promised, %", "coverage, %", ideal=True, bands=bands,
        ),
        "Classes in a set": curves(
            {one: [(row.promised, row.size) for row in rows] for one, rows in covered.items()},
            (0.8, 1.0), (0.0, max(2.0, 1.05 * widest)), "promised, %", "classes", percent=False,
        ),
        "How often a bound on risk is broken": curves(
            {
                TEST: [(row.max_risk, row.broken_test) for row in own.risks],
                POPULATION: [(row.max_risk, row.broken) for row in own.risks],
            },
            risks, (0.0, edge), "bound on the error among answers, %", "broken, % of repetitions",
            levels={"delta": found.settings.delta, "and 2 standard errors": found.allowed},
        ),
        "Answers given, and errors among them": curves(
            {
                SHARE: [(row.max_risk, row.answered or 0.0) for row in served],
                RISK: [(row.max_risk, row.risk or 0.0) for row in served],
            },
            risks, (0.0, 1.0), "bound on the error among answers, %", "%", ideal=True,
        ),
        "Shift score against the share of shifted pictures": curves(
            {SHIFT: bins}, (0.0, 1.0), (0.0, 1.0), "shift score, %", "shifted, %", ideal=True
        ),
    }  # fmt: skip


def curves(
    lines: Mapping[Series, Sequence[Point]],
    x: Point,
    y: Point,
    across: str,
    up: str,
    *,
    ideal: bool = False,
    bands: Sequence[Sequence[Point]] = (),
    levels: Mapping[str, float] | None = None,
    percent: bool = True,
) -> Markup:
    """Lines with marks. ideal: the diagonal; bands: areas behind; levels: name -> a horizontal line; percent: of y."""
    frame = Frame(WIDTH, HEIGHT, x=x, y=y, left=40, right=12, bottom=36)
    ys = ticks(*y)
    parts = [frame.grid(
        {value: f"{100 * value:g}" for value in ticks(*x)},
        {value: f"{100 * value:g}" if percent else f"{value:g}" for value in ys},
    )]  # fmt: skip
    for band in bands:
        outline = " ".join(f"{px},{py}" for px, py in (frame.at(*point) for point in band))
        parts.append(f'<polygon points="{outline}" fill="var(--c-clean)" opacity="0.18"/>')
    if ideal:
        low, high = max(x[0], y[0]), min(x[1], y[1])
        (x0, y0), (x1, y1) = frame.at(low, low), frame.at(high, high)
        parts.append(f'<line class="ideal" x1="{x0}" y1="{y0}" x2="{x1}" y2="{y1}"/>')
    for name, level in (levels or {}).items():
        (x0, height), (x1, _) = frame.at(x[0], level), frame.at(x[1], level)
        parts.append(f'<line class="ideal" x1="{x0}" y1="{height}" x2="{x1}" y2="{height}"/>')
        parts.append(f'<text class="tick" x="{x1 - 2}" y="{height - 3}" text-anchor="end">{escape(name)}</text>')
    for one, points in lines.items():
        at = [frame.at(*point) for point in points]
        parts.append(f'<polyline fill="none" {stroke(one)} points="{" ".join(f"{a},{b}" for a, b in at)}"/>')
        for (px, py), (value, height) in zip(at, points, strict=True):
            shown = f"{100 * height:.1f} %" if percent else f"{height:.2f}"
            title = f"<title>{escape(one.name)} at {100 * value:.3g} %: {shown}</title>"
            parts.append(f"<g>{title}{mark(one, px, py, 2.6)}</g>")
    middle = (frame.left + frame.width - frame.right) / 2
    parts.append(f'<text class="tick" x="{middle}" y="{frame.height - 4}" text-anchor="middle">{escape(across)}</text>')
    turned = f'transform="rotate(-90 10 {frame.height / 2})"'
    parts.append(f'<text class="tick" x="10" y="{frame.height / 2}" text-anchor="middle" {turned}>{escape(up)}</text>')
    return svg(frame.width, frame.height, "".join(parts), label=f"{up} against {across}")


def ticks(low: float, high: float) -> list[float]:
    """Round values of an axis, about five."""
    step = next(
        (one for one in (0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.5, 1, 2, 5, 10, 20, 50) if (high - low) / one <= 6), 100
    )
    first = -int(-low / step // 1) if low <= 0 else int(low / step + 1 - 1e-9)
    return [round(i * step, 6) for i in range(first, int(high / step + 1e-9) + 1)]


def sheet(found: Verified, pages: Environment) -> str:
    """Coverage, broken bounds and answers as one SVG file, for a page of Markdown."""
    chosen = list(plots(found).items())
    chosen = [chosen[0], chosen[2], chosen[3]]
    style = pages.get_template("style.css.jinja").render()
    parts = []
    for i, (title, plot) in enumerate(chosen):
        left = i * (WIDTH + 10)
        inner = str(plot).replace("<svg ", f'<svg x="{left}" y="24" width="{WIDTH}" height="{HEIGHT}" ', 1)
        parts.append(f'<text class="label" x="{left + 40}" y="15" font-weight="600">{escape(title)}</text>{inner}')
    width, height = len(chosen) * (WIDTH + 10), HEIGHT + 28
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" font-family="system-ui, sans-serif">\n<style>{style}</style>\n'
        f'<rect width="100%" height="100%" fill="var(--card)"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )
