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
}
DECIMALS = {"ratio_to_limit": 2, "efficiency": 2, "cpu_ms_per_request": 2, "client_cpu_ms": 3, "rps": 0, "rss_mb": 0}


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
    lines = [list(COLUMNS.values()), ["---"] * len(COLUMNS), *map(_cells, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(rows: Iterable[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([one.flat() for one in rows], indent=2) + "\n")


def _cells(one: Row) -> list[str]:
    found = one.flat()
    return [
        f"{value:.{DECIMALS.get(name, 1)}f}" if isinstance(value := found[name], float) else str(value)
        for name in COLUMNS
    ]
