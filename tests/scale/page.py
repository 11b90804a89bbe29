"""The tables of docker/CAPACITY.md and its plot, from what was measured and simulated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trivium.train.evaluation.charts import Frame

if TYPE_CHECKING:
    from .capacity import Results

BEGIN, END = "<!-- written by make simulate -->\n", "<!-- end -->\n"
STYLE = """
text { font: 11px system-ui, sans-serif; fill: #57606a }
.title { font-weight: 600; fill: #1f2328 }
.grid { stroke: #d0d7de; stroke-width: 0.7 }
polyline { fill: none; stroke-width: 1.7; stroke-linejoin: round }
.first { stroke: #0969da } .second { stroke: #bc4c00; stroke-dasharray: 5 3 }
.key-first { fill: #0969da } .key-second { fill: #bc4c00 }
rect { fill: #ffffff }
"""
WIDTH, HEIGHT = 380.0, 190.0
Points = Sequence[tuple[float, float]]


def tables(results: Results) -> str:
    """In Markdown."""
    lines = [
        f"{results.model} on {results.cores} cores: one picture costs {results.cpu_ms:.1f} CPU-ms and takes "
        f"{results.service_ms:.1f} ms of a replica that comes from another, {results.cold_ms:.1f} ms of one that was "
        f"idle; {results.slowdown:.2f} times that where every core is busy, {results.sharing:.2f} times its fair share "
        f"where cores are shared; {results.others:.1f} threads of other programs want them. {results.replicas} "
        "replicas of one worker:",
        "",
        "| load | requests/s, real | simulated | p50, ms, real | simulated | p99, ms, real | simulated |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {one.load} | {one.rps:.1f} | {one.simulated_rps:.1f} ({_off(one.simulated_rps, one.rps)}) "
        f"| {one.p50_ms:.1f} | {one.simulated_p50_ms:.1f} ({_off(one.simulated_p50_ms, one.p50_ms)}) "
        f"| {one.p99_ms:.1f} | {one.simulated_p99_ms:.1f} ({_off(one.simulated_p99_ms, one.p99_ms)}) |"
        for one in results.compared
    ]
    if results.steady:
        lines += [
            "",
            f"{results.rate:,.0f} requests/s, simulated; replicas of four workers with a core each, one of which dies:",
            "",
            "| utilisation | replicas | p50, ms | p99, ms | failed attempts | requests lost |",
            "|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {one.utilisation:.2f} | {one.replicas} | {one.p50_ms:.1f} | {one.p99_ms:.1f} "
            f"| {one.failures:,} | {one.lost:,} |"
            for one in results.steady
        ]
    if scaling := results.scaling:
        failures = ", ".join(f"{count:,} {status}" for status, count in scaling["failures"].items()) or "none"
        lines += [
            "",
            f"The autoscaler, simulated, where {results.rate / 2:,.0f} requests/s become {results.rate:,.0f} at once: "
            f"{scaling['replicas'][0]} replicas become {scaling['replicas'][-1]}; of {scaling['asked']:,} requests "
            f"{scaling['lost']:,} are lost (failed attempts: {failures}).",
        ]
    return "\n".join(lines) + "\n"


def renew(results: Results, folder: Path) -> None:
    """Write plot and tables where they stand.

    Raises: SystemExit where the page has no place for them.
    """
    path = folder / "CAPACITY.md"
    text = path.read_text()
    if BEGIN not in text or END not in text:
        raise SystemExit(f"{path} does not say where the tables belong")
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    path.write_text(f"{head}{BEGIN}\n{tables(results)}\n{END}{tail}")
    (folder / "capacity.svg").write_text(plot(results))


def plot(results: Results) -> str:
    """SVG of its own: latency, real and simulated, and the autoscaler's three curves."""
    shares = [0.5 + index for index in range(100)]
    real, simulated = (list(zip(results.latencies_ms[name], shares, strict=True)) for name in ("real", "simulated"))
    worst = max(real[-1][0], simulated[-1][0])
    panels = [
        panel(
            f"{results.replicas} replicas, {results.compared[-1].load}: % answered within ms",
            {"real": real, "simulated": simulated},
            (0, worst),
            (0, 100),
        )
    ]
    if scaling := results.scaling:
        seconds = scaling["seconds"]
        over = (0.0, seconds[-1])

        def curve(name: str, scale: float = 1.0) -> Points:
            return [(x, scale * y) for x, y in zip(seconds, scaling[name], strict=True) if y is not None]

        rates = {"asked": curve("asked_rps", 1e-3), "answered": curve("answered_rps", 1e-3)}
        count = {"replicas": curve("replicas")}
        p99 = {"p99": curve("p99_ms")}
        panels += [
            panel("autoscaler: thousand requests/s, over s", rates, over, (0, _top(rates))),
            panel("autoscaler: replicas ready, over s", count, over, (0, _top(count))),
            panel("autoscaler: p99, ms, over s", p99, over, (0, _top(p99))),
        ]
    body = "".join(
        f'<g transform="translate({index % 2 * WIDTH:g} {index // 2 * HEIGHT:g})">{one}</g>'
        for index, one in enumerate(panels)
    )
    width, height = WIDTH * min(2, len(panels)), HEIGHT * ((len(panels) + 1) // 2)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}">'
    return f'{head}<style>{STYLE}</style><rect width="{width:g}" height="{height:g}"/>{body}</svg>\n'


def panel(title: str, curves: Mapping[str, Points], x: tuple[float, float], y: tuple[float, float]) -> str:
    """One or two curves."""
    frame = Frame(WIDTH, HEIGHT, x, y, left=42, right=14, top=26, bottom=24)
    parts = [f'<text class="title" x="12" y="15">{title}</text>', frame.grid(_ticks(*x), _ticks(*y))]
    for index, (name, points) in enumerate(curves.items()):
        css = ("first", "second")[index]
        path = " ".join("{},{}".format(*frame.at(*point)) for point in points)
        parts.append(f'<polyline class="{css}" points="{path}"/>')
        if len(curves) > 1:
            where = f'x="{WIDTH - 14:g}" y="{HEIGHT - 48 + 14 * index:g}" text-anchor="end"'
            parts.append(f'<text class="key-{css}" {where}>{name}</text>')
    return "".join(parts)


def _ticks(least: float, most: float) -> dict[float, str]:
    step = next(s * 10**e for e in range(-3, 7) for s in (1, 2, 5) if (most - least) / (s * 10**e) <= 6)
    return {least + i * step: f"{least + i * step:g}" for i in range(int((most - least) / step + 1e-9) + 1)}


def _top(curves: Mapping[str, Points]) -> float:
    return 1.08 * max(value for points in curves.values() for _, value in points)


def _off(simulated: float, real: float) -> str:
    return f"{simulated / real - 1:+.0%}"
