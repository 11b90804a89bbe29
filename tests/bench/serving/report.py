"""The table of a serving benchmark: rows from visits, as text, Markdown and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median


@dataclass(frozen=True)
class Visit:
    """What one visit to one server measured."""

    rps: float
    ratio_to_limit: float
    """Answers a second over the pictures a second of as many bare ONNX Runtime threads as the server has workers."""
    cpu_ms_per_request: float
    """Of the server's process tree."""
    efficiency: float
    """ONNX Runtime's CPU milliseconds a picture, just before and after, over the server's."""
    p50_ms: float
    p99_ms: float
    rss_mb: float
    pss_mb: float
    client_cpu_ms: float
    """Of one request."""
    engine_ms: float
    """Median call of bare ONNX Runtime, with as many threads as there are clients or workers, whichever is fewer."""
    failed: float
    """Share of the requests that were answered with an error."""


@dataclass(frozen=True)
class Row:
    """Medians over the visits of one server under one load."""

    server: str
    model: str
    concurrency: int
    load: str
    """"closed", or "0.8 open": requests at random moments, that share of the limit of them a second."""
    visits: int
    ready_s: float
    """From the start of the process to its first right answer."""
    idle_cpu_percent: float
    """CPU of the process tree while nobody asks."""
    median: Visit

    def flat(self) -> dict[str, object]:
        found = asdict(self)
        return found | found.pop("median")


def row(server: str, model: str, concurrency: int, load: str, ready_s: float, idle: float, visits: list[Visit]) -> Row:
    middle = Visit(**{field.name: median(getattr(visit, field.name) for visit in visits) for field in fields(Visit)})
    return Row(server, model, concurrency, load, len(visits), ready_s, idle, middle)


COLUMNS = {
    "server": "server",
    "model": "model",
    "concurrency": "clients",
    "load": "load",
    "rps": "requests/s",
    "ratio_to_limit": "of the limit",
    "efficiency": "efficiency",
    "cpu_ms_per_request": "CPU ms",
    "p50_ms": "p50 ms",
    "p99_ms": "p99 ms",
    "rss_mb": "RSS MB",
    "ready_s": "ready s",
    "idle_cpu_percent": "idle CPU %",
    "client_cpu_ms": "client CPU ms",
    "failed": "failed",
}
DECIMALS = {
    "failed": 3,
    "ratio_to_limit": 2,
    "efficiency": 2,
    "cpu_ms_per_request": 2,
    "client_cpu_ms": 3,
    "rps": 0,
    "rss_mb": 0,
}


def table(rows: Iterable[Row]) -> str:
    """Columns of text."""
    lines = [list(COLUMNS.values()), *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def markdown(rows: Iterable[Row]) -> str:
    """A table for each model, for a reader who wants to choose a server."""
    tables: dict[str, list[str]] = {}
    for one in rows:
        clients = f"{one.concurrency}" if one.load == "closed" else f"{one.load} loop"
        found = one.median
        cells = [one.server, clients, f"{found.rps:.0f}", f"{found.ratio_to_limit:.2f}", f"{found.efficiency:.2f}"]
        cells += [f"{found.cpu_ms_per_request:.2f}", f"{found.p50_ms:.1f} / {found.p99_ms:.1f}"]
        cells += [f"{found.rss_mb:.0f}", f"{one.ready_s:.1f}"]
        tables.setdefault(one.model, []).append(f"| {' | '.join(cells)} |")
    head = "| clients | requests/s | of the limit | efficiency | CPU ms | p50 / p99 ms | RSS MB | ready s |"
    return "\n\n".join("\n".join([f"| {name} {head}", "|---" * 9 + "|", *lines]) for name, lines in tables.items())


def summary(rows: Iterable[Row], ours: str = "trivium") -> str:
    """Our figures beside the best of the others' in the same run, beside the engine, and beside ourselves."""
    closed = [one for one in rows if one.load == "closed"]
    lines = []
    for mine in (one for one in closed if one.server == ours):
        found, where = mine.median, f"{mine.model}, {mine.concurrency} clients:"
        lines.append(f"{where} p50 is {found.p50_ms / found.engine_ms:.2f} times the engine's call")
        same = [one for one in closed if (one.model, one.concurrency) == (mine.model, mine.concurrency)]
        if others := [one for one in same if not one.server.startswith(ours)]:
            fast = max(others, key=lambda one: one.median.rps)
            lean = max(others, key=lambda one: one.median.efficiency)
            lines.append(
                f"{where} {found.rps / fast.median.rps:.3f} times the throughput of the fastest other, {fast.server}; "
                f"{lean.median.cpu_ms_per_request / found.cpu_ms_per_request:.3f} times the work per CPU second of the "
                f"leanest, {lean.server}"
            )
        at_four = [one for one in closed if (one.server, one.model, one.concurrency) == (ours, mine.model, 4)]
        if mine.concurrency == 16 and at_four:
            lines.append(f"{where} {found.rps / at_four[0].median.rps:.3f} times the throughput at 4")
    return "\n".join(lines)


def write(rows: Iterable[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([one.flat() for one in rows], indent=2) + "\n")


def _cells(one: Row) -> list[str]:
    found = one.flat()
    return [
        f"{value:.{DECIMALS.get(name, 1)}f}" if isinstance(value := found[name], float) else str(value)
        for name in COLUMNS
    ]
