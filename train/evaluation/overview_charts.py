"""Charts that compare methods, as inline SVG: accuracy against cost, bars, accuracy against the radius of attacks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise

from markupsafe import Markup, escape

from ..models.mc import ORIGINAL
from .charts import MARKS, Frame, Series, mark, stroke, svg
from .report import KNOWN
from .results import Diagram, Diagrams
from .summary import Spread

COLORS = (
    "--c-clean",
    "--c-robust",
    "--c-combined",
    "--c-mean",
    "--c-paper",
    "--c-blend",
    "--c-min-entropy",
    "--c-gate",
)
Point = tuple[float, float]
LOGARITHMIC = 8.0
"""Ratio of the largest to the least cost from which on costs are drawn as logarithms."""


def series(names: Sequence[str]) -> dict[str, Series]:
    """A colour, mark and dash for every row; the colours come again with other marks, and grey is the original's."""
    found = {name: KNOWN[name] for name in names if name == ORIGINAL}
    for i, name in enumerate(name for name in names if name != ORIGINAL):
        turn = i // len(COLORS)
        found[name] = Series(
            name, COLORS[i % len(COLORS)], MARKS[(i + turn) % len(MARKS)], dash="" if turn == 0 else f"{5 - turn} 3"
        )
    return {name: found[name] for name in names}


def pareto(
    points: Mapping[Series, tuple[Spread, Spread]],
    numbers: Sequence[int],
    across: str,
    up: str,
    reference: float | None = None,
) -> Markup:
    """Accuracy (0 to 1, up) against cost in seconds (across), each with its spread; numbers: of the rows. The dashed
    steps join the points that none beats at both; reference: the original's accuracy, which costs nothing."""
    costs = [x.mean for x, _ in points.values()]
    log = min(costs) > 0 and max(costs) / min(costs) >= LOGARITHMIC
    scale: Callable[[float], float] = math.log10 if log else float
    heights = [y.mean + sign * (y.deviation or 0) for _, y in points.values() for sign in (-1, 1)]
    heights += [] if reference is None else [reference]
    bottom, top = _outward(min(heights), max(heights))
    left, right = (math.log10(min(costs) / 1.5), math.log10(max(costs) * 1.5)) if log else (0.0, max(costs) * 1.12)
    frame = Frame(620, 360, x=(left, right), y=(bottom, top), left=44, right=16, bottom=38)
    parts = [frame.grid({scale(c): _seconds(c) for c in _costs(left, right, log)}, _ticks(bottom, top))]
    parts += _axes(frame, across, up)
    if reference is not None:
        (x0, level), (x1, _) = frame.at(left, reference), frame.at(right, reference)
        line = f'x1="{x0}" y1="{level}" x2="{x1}" y2="{level}" stroke="var(--c-original)" stroke-dasharray="5 3"'
        parts.append(f'<line {line}/><text class="tick" x="{x1 - 4}" y="{level - 4}" text-anchor="end">original</text>')
    path = [frame.at(scale(seconds), share) for seconds, share in front([(x.mean, y.mean) for x, y in points.values()])]
    if len(path) > 1:
        steps = " ".join(f"L{after[0]} {before[1]}L{after[0]} {after[1]}" for before, after in pairwise(path))
        parts.append(f'<path class="ideal" fill="none" d="M{path[0][0]} {path[0][1]}{steps}"/>')
    taken: list[tuple[float, float]] = []
    for number, (one, (x, y)) in zip(numbers, points.items(), strict=True):
        px, py = frame.at(scale(x.mean), y.mean)
        for low, high in _whiskers(frame, scale, x, y):
            parts.append(
                f'<line x1="{low[0]}" y1="{low[1]}" x2="{high[0]}" y2="{high[1]}" '
                f'stroke="var({one.color})" stroke-width="1.2" opacity="0.6"/>'
            )
        title = f"{one.name}: {100 * y.mean:.1f} % for {x.mean:,.0f} s"
        parts.append(f"<g><title>{escape(title)}</title>{mark(one, px, py, 4.5)}</g>")
        # a number that would lie on another goes to the other side
        side = -1 if any(abs(px + 8 - tx) < 14 and abs(py - ty) < 10 for tx, ty in taken) else 1
        taken.append((px + 8 * side, py))
        anchor = "start" if side > 0 else "end"
        parts.append(f'<text class="label" x="{px + 8 * side}" y="{py - 4}" text-anchor="{anchor}">{number}</text>')
    return svg(frame.width, frame.height, "".join(parts), label=f"{up} against {across}")


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (cost, accuracy) than which no other is both no dearer and more accurate, cheapest first."""
    best: list[tuple[float, float]] = []
    for cost, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or accuracy > best[-1][1]:
            best.append((cost, accuracy))
    return best


def bars(rows: Mapping[Series, Spread | None], label: str) -> Markup:
    """A bar a row, in percent, with its spread; numbers are the rows'."""
    height, left, width = 17, 24, 330
    room = width - left - 46
    parts = [
        f'<line class="grid" x1="{x:.1f}" y1="0" x2="{x:.1f}" y2="{height * len(rows)}"/>'
        for x in (left + room * share for share in (0.25, 0.5, 0.75, 1.0))
    ]
    for i, (one, found) in enumerate(rows.items()):
        y = i * height
        parts.append(f'<text class="label" x="{left - 5}" y="{y + 12}" text-anchor="end">{i + 1}</text>')
        if found is None:
            parts.append(f'<text class="tick" x="{left + 4}" y="{y + 12}">–</text>')
            continue
        length = room * found.mean
        title = f"<title>{escape(one.name)}: {100 * found.mean:.1f} %</title>"
        parts.append(
            f'<rect x="{left}" y="{y + 2}" width="{max(length, 0.5):.1f}" height="{height - 4}" rx="2" '
            f'fill="var({one.color})">{title}</rect>'
        )
        end = length
        if found.deviation:
            low, high = length - room * found.deviation, length + room * found.deviation
            end = max(end, high)
            parts.append(
                f'<line x1="{left + low:.1f}" y1="{y + height / 2}" x2="{left + high:.1f}" y2="{y + height / 2}" '
                'stroke="var(--ink)" stroke-width="1.2"/>'
            )
        text = f"{100 * found.mean:.1f}"
        parts.append(f'<text class="tick" x="{left + end + 5:.1f}" y="{y + 12}">{text}</text>')
    return svg(width, height * len(rows), "".join(parts), label=label)


def radius_lines(lines: Mapping[Series, Mapping[float, Spread]], across: str, label: str) -> Markup:
    """Accuracy (0 to 1) against the radius of an attack, with spreads."""
    widest = max(eps for line in lines.values() for eps in line)
    frame = Frame(620, 320, x=(0, widest * 1.03), left=44, right=16, bottom=38)
    radii = sorted({eps for line in lines.values() for eps in line})
    apart = [eps for i, eps in enumerate(radii) if i == 0 or eps - radii[i - 1] > widest / 14]
    level = across.startswith("Linf") and all(abs(eps * 255 - round(eps * 255)) < 1e-3 for eps in radii)
    names = {eps: f"{round(eps * 255)}/255" if level and eps else f"{eps:g}" for eps in apart}
    parts = [frame.grid(names, {v / 4: f"{25 * v}" for v in range(5)}), *_axes(frame, across, "robust accuracy, %")]
    for one, line in lines.items():
        points = [(*frame.at(eps, found.mean), eps, found) for eps, found in sorted(line.items())]
        path = " ".join(f"{x},{y}" for x, y, _, _ in points)
        parts.append(f'<polyline fill="none" {stroke(one)} points="{path}"/>')
        for x, y, eps, found in points:
            if found.deviation:
                (_, low), (_, high) = (
                    frame.at(eps, found.mean - found.deviation),
                    frame.at(eps, found.mean + found.deviation),
                )
                parts.append(f'<line x1="{x}" y1="{low}" x2="{x}" y2="{high}" stroke="var({one.color})"/>')
            title = f"<title>{escape(one.name)}, radius {eps:g}: {100 * found.mean:.1f} %</title>"
            parts.append(f"<g>{title}{mark(one, x, y, 3.4)}</g>")
    return svg(frame.width, frame.height, "".join(parts), label=label)


def pooled(found: Sequence[Diagrams]) -> Diagrams:
    """The reliability diagram of all answers of several runs together."""
    return Diagrams(clean=_pool([each.clean for each in found]), corrupted=_pool([each.corrupted for each in found]))


def _pool(diagrams: Sequence[Diagram]) -> Diagram:
    counts = [sum(column) for column in zip(*(each.counts for each in diagrams), strict=True)]

    def mean(parts: Sequence[Sequence[float | None]]) -> list[float | None]:
        totals = [
            sum((value or 0) * each.counts[i] for value, each in zip(column, diagrams, strict=True))
            for i, column in enumerate(zip(*parts, strict=True))
        ]
        return [total / count if count else None for total, count in zip(totals, counts, strict=True)]

    confidence, accuracy = mean([each.confidence for each in diagrams]), mean([each.accuracy for each in diagrams])
    return Diagram(edges=diagrams[0].edges, counts=counts, confidence=confidence, accuracy=accuracy)


def _axes(frame: Frame, across: str, up: str) -> list[str]:
    middle = (frame.left + frame.width - frame.right) / 2
    return [
        f'<text class="tick" x="{middle}" y="{frame.height - 6}" text-anchor="middle">{escape(across)}</text>',
        f'<text class="tick" x="12" y="{frame.height / 2 - 10}" text-anchor="middle" '
        f'transform="rotate(-90 12 {frame.height / 2 - 10})">{escape(up)}</text>',
    ]


def _whiskers(frame: Frame, scale: Callable[[float], float], x: Spread, y: Spread) -> Iterator[tuple[Point, Point]]:
    if y.deviation:
        yield frame.at(scale(x.mean), y.mean - y.deviation), frame.at(scale(x.mean), y.mean + y.deviation)
    if x.deviation and x.mean > x.deviation:
        yield frame.at(scale(x.mean - x.deviation), y.mean), frame.at(scale(x.mean + x.deviation), y.mean)


def _outward(low: float, high: float) -> tuple[float, float]:
    """Ends of an axis of shares about these values, on twentieths."""
    margin = max(0.1 * (high - low), 0.01)
    return max(math.floor((low - margin) * 20) / 20, 0.0), min(math.ceil((high + margin) * 20) / 20, 1.0)


def _ticks(low: float, high: float) -> dict[float, str]:
    step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2) if (high - low) / step <= 7 or step == 0.2)
    first = math.ceil(low / step - 1e-9)
    return {i * step: f"{100 * i * step:g}" for i in range(first, int(high / step + 1e-9) + 1)}


def _costs(left: float, right: float, log: bool) -> list[float]:
    if log:
        powers = range(math.floor(left) - 1, math.ceil(right) + 1)
        found = [m * 10.0**power for power in powers for m in (1, 2, 5)]
        return [each for each in found if left <= math.log10(each) <= right]
    step = 10 ** math.floor(math.log10(right / 2))
    step *= next(m for m in (1, 2, 5, 10) if right / (step * m) <= 7)
    return [i * step for i in range(int(right / step) + 1)]


def _seconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 1 or value == 0 else f"{value:g}"
