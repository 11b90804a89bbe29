"""How `trivium top` looks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from .top import Frame, Model, Spread

BLOCKS = "▁▂▃▄▅▆▇█"
EIGHTHS = " ▏▎▍▌▋▊▉"
BAR = 12
"""Characters of a full bar."""
LATE_SECONDS = 1.0
"""A queue whose oldest picture has waited longer is shown in red."""


def render(frame: Frame, rates: list[float]) -> RenderableType:
    """A frame, below it each model; `rates` are requests per second of the frames so far."""
    return Group(_head(frame), _server(frame, rates), *(_model(model) for model in frame.models))


def waiting(address: str) -> RenderableType:
    """Before the first frame."""
    return Text(f"trivium  {address}  looking ...", style="dim")


def gone(reason: str, last: Frame | None, rates: list[float]) -> RenderableType:
    """The server does not answer: why, over what was seen last."""
    notice = Panel(Text(f"{reason}; trying again"), style="bold red", box=box.HEAVY)
    return Group(notice) if last is None else Group(notice, render(last, rates))


def _head(frame: Frame) -> RenderableType:
    line = Table.grid(expand=True, padding=(0, 2))
    line.add_column()
    line.add_column(justify="right")
    state = Text("● ready", "bold green") if frame.ready else Text("● not ready", "bold red")
    left = Text.assemble(("trivium ", "bold"), (frame.release, "dim"), f"  {frame.server}  ", state)
    right = Text(f"up {_duration(frame.uptime_seconds)}   last {frame.window_seconds:.1f} s   {frame.time}", "dim")
    line.add_row(left, right)
    return line


def _server(frame: Frame, rates: list[float]) -> RenderableType:
    requests = sum(sum(model.requests_per_second.values()) for model in frame.models) + frame.unknown_per_second
    pictures = sum(model.pictures_per_second for model in frame.models)
    late = frame.queue_age_seconds > LATE_SECONDS
    table = Table.grid(padding=(0, 3), expand=True)
    for _ in range(4):
        table.add_column(ratio=1, no_wrap=True)
    busy = frame.running / frame.instances if frame.instances else 0.0
    table.add_row(
        _pair("requests/s", _number(requests)),
        _pair("pictures/s", _number(pictures)),
        _pair("in flight", str(frame.in_flight)),
        _pair("CPU", f"{frame.cpu_percent:.0f} %"),
    )
    table.add_row(
        _pair("queue", f"{frame.queue_depth} pictures"),
        _pair("oldest", _seconds(frame.queue_age_seconds), "bold red" if late else "bold"),
        _pair("workers", f"{frame.running}/{frame.instances} ").append_text(_bar(busy, "cyan", 6)),
        _pair("memory", f"{frame.rss_bytes / 1e6:.0f} MB"),
    )
    troubles = [
        (frame.unknown_per_second, f"{_number(frame.unknown_per_second)}/s for models not served"),
        (frame.denied_per_second, f"{_number(frame.denied_per_second)}/s denied"),
        (frame.loads_refused, f"{frame.loads_refused} bundles refused since the start"),
    ]
    notes = [text for count, text in troubles if count]
    rows: list[RenderableType] = [table]
    if rates:
        rows.append(Text.assemble(("requests/s ", "dim"), (sparkline(rates), "cyan"), (f" to {max(rates):.0f}", "dim")))
    if notes:
        rows.append(Text(" · ".join(notes), "yellow"))
    return Panel(Group(*rows), box=box.ROUNDED, border_style="dim")


def _model(model: Model) -> RenderableType:
    body = Table.grid(padding=(0, 4), expand=True)
    body.add_column(ratio=10)
    body.add_column(ratio=11)
    body.add_row(Group(_outcomes(model), "", _stages(model)), Group(_heads(model), "", _uncertainty(model)))
    title = Text.assemble((f" {model.name} ", "bold"), (f"version {model.version} ", ""))
    subtitle = Text(f" {model.kernels} kernels on {model.device} ", "dim")
    return Panel(
        body, title=title, title_align="left", subtitle=subtitle, subtitle_align="right", box=box.ROUNDED,
        border_style="dim",
    )  # fmt: skip


def _outcomes(model: Model) -> RenderableType:
    table = Table(box=None, pad_edge=False, expand=True, header_style="dim")
    table.add_column("status", no_wrap=True)
    table.add_column("per second", justify="right", no_wrap=True)
    for code, rate in sorted(model.requests_per_second.items(), key=lambda one: -one[1]):
        table.add_row(Text(code, "green" if code == "OK" else "yellow" if rate else "dim"), _number(rate))
    troubles = (
        ("shed", model.rejected_per_second, model.rejected),
        ("expired", model.expired_per_second, model.expired),
        ("cancelled", model.cancelled_per_second, model.cancelled),
    )
    line = Text()
    for name, rate, total in troubles:
        style = "yellow" if rate else "dim" if not total else ""
        line.append(f"{name} {_number(rate)}/s ", style).append(f"({total})   ", "dim")
    return Group(table, line)


def _stages(model: Model) -> RenderableType:
    table = Table(box=None, pad_edge=False, expand=True, header_style="dim")
    table.add_column("stage, ms", no_wrap=True)
    for name in ("p50", "p99", "mean"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", width=BAR)
    total = model.stage_seconds["total"].mean
    for stage, spread in model.stage_seconds.items():
        share = min(1.0, (spread.mean or 0.0) / total) if total else 0.0
        table.add_row(
            Text(stage, "bold" if stage == "total" else ""),
            *(_milliseconds(value) for value in (spread.p50, spread.p99, spread.mean)),
            _bar(share, "blue") if stage != "total" else "",
        )
    return table


def _heads(model: Model) -> RenderableType:
    table = Table(box=None, pad_edge=False, expand=True, header_style="dim")
    table.add_column("answered by", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    table.add_column("", width=BAR)
    for head, share in model.head_share.items():
        table.add_row(head, "–" if share is None else f"{100 * share:.0f} %", _bar(share or 0.0, "magenta"))
    return table


def _uncertainty(model: Model) -> RenderableType:
    table = Table(box=None, pad_edge=False, expand=True, header_style="dim")
    table.add_column("nats", no_wrap=True)
    for name in ("p50", "p90"):
        table.add_column(f"entropy {name}", justify="right")
    for name in ("p50", "p90"):
        table.add_column(f"MI {name}", justify="right")
    for head, entropy in model.predictive_entropy.items():
        information = model.mutual_information[head]
        table.add_row(head, *(_nats(one) for one in (entropy.p50, entropy.p90, information.p50, information.p90)))
    if model.divergence is not None:
        divergence: Spread = model.divergence
        table.add_row("KL clean-robust", _nats(divergence.p50), _nats(divergence.p90), "", "")
    return table


def sparkline(values: list[float]) -> str:
    """One character a value, from zero to the largest."""
    top = max(values, default=0.0)
    return "".join(BLOCKS[min(7, int(value / top * 8))] if top > 0 else BLOCKS[0] for value in values)


def _bar(share: float, color: str, width: int = BAR) -> Text:
    whole, part = divmod(round(max(0.0, min(1.0, share)) * width * 8), 8)
    filled = "█" * whole + (EIGHTHS[part] if part else "")
    return Text.assemble((filled, color), ("·" * (width - len(filled)), "dim"))


def _pair(name: str, value: str, style: str = "bold") -> Text:
    return Text.assemble((f"{name} ", "dim"), (value, style))


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.2f}" if value < 1 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    value = 1e3 * seconds
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _nats(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _seconds(value: float) -> str:
    return f"{1e3 * value:.0f} ms" if value < 1 else f"{value:.1f} s"


def _duration(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour} h"
    return f"{hour} h {minute} min" if hour else f"{minute} min {second} s" if minute else f"{second} s"
