"""Charts of the report as inline SVG; colours are the page's CSS variables, so that they follow light and dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from .results import Diagram, Diagrams, Histogram

MARKS = ("circle", "square", "triangle", "diamond")
LEAST_ANSWERS = 10
"""In a bin of confidence; fewer say nothing about accuracy and are not drawn."""


@dataclass(frozen=True)
class Series:
    """How one answerer is drawn everywhere: a colour variable, a mark and a dash, so that colour is not needed."""

    name: str
    color: str
    mark: str
    dash: str = ""
    width: float = 1.6


@dataclass(frozen=True)
class Frame:
    """A plot's box inside its SVG, and the ranges of its axes."""

    width: float
    height: float
    x: tuple[float, float] = (0.0, 1.0)
    y: tuple[float, float] = (0.0, 1.0)
    left: float = 30.0
    right: float = 8.0
    top: float = 8.0
    bottom: float = 20.0

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Data to SVG coordinates."""
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return (
            round(self.left + across * (self.width - self.left - self.right), 1),
            round(self.height - self.bottom - up * (self.height - self.top - self.bottom), 1),
        )

    def grid(self, xs: Mapping[float, str], ys: Mapping[float, str]) -> str:
        """Lines at the y ticks, labels at both."""
        parts = []
        for value, text in ys.items():
            x0, y = self.at(self.x[0], value)
            x1, _ = self.at(self.x[1], value)
            parts.append(f'<line class="grid" x1="{x0}" y1="{y}" x2="{x1}" y2="{y}"/>')
            parts.append(f'<text class="tick" x="{x0 - 4}" y="{y + 3}" text-anchor="end">{escape(text)}</text>')
        for value, text in xs.items():
            x, y = self.at(value, self.y[0])
            parts.append(f'<text class="tick" x="{x}" y="{y + 13}" text-anchor="middle">{escape(text)}</text>')
        return "".join(parts)


def swatch(series: Series) -> Markup:
    """The key of a series in a legend."""
    line = f'<line x1="0" y1="6" x2="26" y2="6" {stroke(series)}/>'
    return svg(26, 12, line + mark(series, 13, 6, 3.2), "swatch")


def severity_lines(lines: Mapping[Series, Sequence[float]], label: str) -> Markup:
    """Accuracy (0 to 1) against severity 0 to 5, 0 being clean; one small plot."""
    frame = Frame(220, 140, x=(-0.15, 5.15))
    parts = [frame.grid({s: str(s) for s in range(6)}, {v / 4: f"{25 * v}" for v in range(5)})]
    for series, values in lines.items():
        points = [frame.at(i, value) for i, value in enumerate(values)]
        parts.append(f'<polyline fill="none" {stroke(series)} points="{" ".join(f"{x},{y}" for x, y in points)}"/>')
        for i, ((x, y), value) in enumerate(zip(points, values, strict=True)):
            title = f"<title>{escape(series.name)}, severity {i}: {100 * value:.1f} %</title>"
            parts.append(f"<g>{title}{mark(series, x, y, 2.4)}</g>")
    return svg(frame.width, frame.height, "".join(parts), label=label)


def reliability_plot(series: Series, found: Diagrams) -> Markup:
    """Accuracy against confidence, clean filled and corrupted hollow; marks grow with the share of answers."""
    frame = Frame(220, 210, left=32, right=13, bottom=32)
    ticks = {v / 4: f"{25 * v}" for v in range(5)}
    x0, y0 = frame.at(0, 0)
    x1, y1 = frame.at(1, 1)
    middle = (x0 + x1) / 2
    parts = [
        frame.grid(ticks, ticks),
        f'<line class="ideal" x1="{x0}" y1="{y0}" x2="{x1}" y2="{y1}"/>',
        f'<text class="tick" x="{middle}" y="{frame.height - 4}" text-anchor="middle">confidence, %</text>',
    ]
    for diagram, hollow in ((found.corrupted, True), (found.clean, False)):
        points = [(*frame.at(c, a), share) for c, a, share in _bins(diagram)]
        dash = ' stroke-dasharray="4 3"' if hollow else ""
        path = " ".join(f"{x},{y}" for x, y, _ in points)
        parts.append(f'<polyline fill="none" stroke="var({series.color})" stroke-width="1.6"{dash} points="{path}"/>')
        fill = "var(--card)" if hollow else f"var({series.color})"
        for x, y, share in points:
            radius = round(2 + 5 * share**0.5, 1)
            title = f"<title>{100 * share:.1f} % of the {'corrupted' if hollow else 'clean'} answers</title>"
            parts.append(
                f'<circle cx="{x}" cy="{y}" r="{radius}" fill="{fill}" stroke="var({series.color})" '
                f'stroke-width="1.4">{title}</circle>'
            )
    return svg(frame.width, frame.height, "".join(parts), label=f"Reliability of {series.name}")


def entropy_histogram(name: str, found: Histogram) -> Markup:
    """Share of views by predictive entropy: clean filled, corrupted as an outline."""
    top = max(*found.clean, *found.corrupted, 1e-6)
    frame = Frame(320, 180, x=(0, found.edges[-1]), y=(0, top * 1.05), left=34, bottom=32)
    step = _step(top)
    ys = {step * i: f"{100 * step * i:g}" for i in range(int(top * 1.05 / step) + 1)}
    across = next(step for step in (0.1, 0.25, 0.5, 1.0, 2.0, 5.0) if found.edges[-1] / step <= 6)
    xs = {across * i: f"{across * i:g}" for i in range(int(found.edges[-1] / across) + 1)}
    parts = [frame.grid(xs, ys)]
    for left, right, share in zip(found.edges, found.edges[1:], found.clean, strict=False):
        (x, y), (x2, base) = frame.at(left, share), frame.at(right, 0)
        parts.append(
            f'<rect x="{x}" y="{y}" width="{max(x2 - x - 0.6, 0.4):.1f}" height="{base - y:.1f}" '
            'fill="var(--c-clean-data)" opacity="0.55"/>'
        )
    outline = []
    for left, right, share in zip(found.edges, found.edges[1:], found.corrupted, strict=False):
        outline += [frame.at(left, share), frame.at(right, share)]
    path = " ".join(f"{x},{y}" for x, y in outline)
    parts.append(f'<polyline fill="none" stroke="var(--c-corrupted-data)" stroke-width="2" points="{path}"/>')
    middle = frame.left + (frame.width - frame.left - frame.right) / 2
    parts.append(
        f'<text class="tick" x="{middle}" y="{frame.height - 4}" text-anchor="middle">predictive entropy, nats</text>'
    )
    return svg(frame.width, frame.height, "".join(parts), label=f"Predictive entropy of {name}")


def share_bars(shares: Mapping[str, Mapping[str, float]], series: Mapping[str, Series], label: str) -> Markup:
    """One stacked bar a severity: who answered."""
    row, left, width = 26, 52, 350
    parts = []
    for i, (severity, answered) in enumerate(shares.items()):
        y, x = 2 + i * row, float(left)
        text = "clean" if severity == "0" else severity
        parts.append(f'<text class="label" x="{left - 8}" y="{y + 14}" text-anchor="end">{text}</text>')
        for name, share in answered.items():
            if share <= 0:
                continue
            length = share * (width - left - 4)
            title = f"<title>{escape(name)}: {100 * share:.1f} %</title>"
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{max(length - 1, 0.5):.1f}" height="20" rx="2" '
                f'fill="var({series[name].color})">{title}</rect>'
            )
            if share >= 0.12:
                parts.append(
                    f'<text class="inbar" x="{x + length / 2:.1f}" y="{y + 14}" text-anchor="middle">'
                    f"{100 * share:.0f} %</text>"
                )
            x += length
    return svg(width, 2 + row * len(shares), "".join(parts), label=label)


def svg(width: float, height: float, body: str, css: str = "plot", label: str = "") -> Markup:
    role = f'role="img" aria-label="{escape(label)}"' if label else 'aria-hidden="true"'
    size = f' width="{width:g}" height="{height:g}"' if css == "swatch" else ""
    return Markup(f'<svg class="{css}" viewBox="0 0 {width:g} {height:g}"{size} {role}>{body}</svg>')


def stroke(series: Series) -> str:
    dash = f' stroke-dasharray="{series.dash}"' if series.dash else ""
    return f'stroke="var({series.color})" stroke-width="{series.width:g}" stroke-linejoin="round"{dash}'


def mark(series: Series, x: float, y: float, r: float) -> str:
    fill = f'fill="var({series.color})"'
    if series.mark == "square":
        return f'<rect x="{x - r:.1f}" y="{y - r:.1f}" width="{2 * r:g}" height="{2 * r:g}" {fill}/>'
    if series.mark == "triangle":
        return f'<path d="M{x:.1f} {y - 1.2 * r:.1f}l{1.2 * r:.1f} {2.1 * r:.1f}h{-2.4 * r:.1f}z" {fill}/>'
    if series.mark == "diamond":
        d = 1.3 * r
        return f'<path d="M{x:.1f} {y - d:.1f}l{d:.1f} {d:.1f}l{-d:.1f} {d:.1f}l{-d:.1f} {-d:.1f}z" {fill}/>'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:g}" {fill}/>'


def _bins(diagram: Diagram) -> list[tuple[float, float, float]]:
    """(confidence, accuracy, share of the answers) of the bins that are drawn."""
    total = sum(diagram.counts)
    columns = zip(diagram.confidence, diagram.accuracy, diagram.counts, strict=True)
    filled = [(c, a, count) for c, a, count in columns if c is not None and a is not None]
    return [(c, a, count / total) for c, a, count in filled if count >= min(LEAST_ANSWERS, max(diagram.counts))]


def _step(top: float) -> float:
    return next((step for step in (0.02, 0.05, 0.1, 0.2) if top / step <= 5), 0.25)
