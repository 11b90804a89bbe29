"""How `trivium top` looks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from .top import Drift, Frame, Model

BLOCKS = "▁▂▃▄▅▆▇█"
EIGHTHS = " ▏▎▍▌▋▊▉"
BAR = 12
"""Characters of a full bar."""
WIDE = 100
"""Columns in which a model's two halves stand side by side."""
LATE_SECONDS = 1.0
"""A queue whose oldest picture has waited longer is shown in red."""


def render(frame: Frame, rates: list[float], width: int = WIDE, height: int | None = None) -> RenderableType:
    """A frame, below it each model, in a line each where they would not fit a screen of `height` lines.

    Args:
        rates: requests per second of the frames so far.
    """
    wide = width >= WIDE
    lines = 7 + sum(
        4 + max(len(outcomes(one)) + 8, 3 * len(one.head_share) + 5) + 2 * (one.drift is not None)
        for one in frame.models
    )
    fits = height is None or (wide and lines <= height)
    models = [_model(model, wide) for model in frame.models] if fits else [_short(frame.models)]
    return Group(_head(frame), _server(frame, rates), *models)


def waiting(address: str) -> RenderableType:
    """Before the first frame."""
    return Text(f"trivium  {address}  looking ...", style="dim")


def gone(
    reason: str, last: Frame | None, rates: list[float], width: int = WIDE, height: int | None = None
) -> RenderableType:
    """The server does not answer: why, over what was seen last."""
    notice = Panel(Text(f"{reason}; trying again"), style="bold red", box=box.HEAVY)
    if last is None:
        return notice
    return Group(notice, render(last, rates, width, None if height is None else height - 3))


def _head(frame: Frame) -> RenderableType:
    line = Table.grid(expand=True, padding=(0, 2))
    line.add_column(no_wrap=True)
    line.add_column(justify="right", no_wrap=True, overflow="ellipsis")
    state = Text("● ready", "bold green") if frame.ready else Text("● not ready", "bold red")
    left = Text.assemble(("trivium ", "bold"), (frame.release, "dim"), f"  {frame.server}  ", state)
    right = Text(
        f"up {_duration(frame.uptime_seconds)}   window {frame.window_seconds:.1f} s   {frame.time[11:]}", "dim"
    )
    line.add_row(left, right)
    return line


def _server(frame: Frame, rates: list[float]) -> RenderableType:
    requests = sum(sum(model.requests_per_second.values()) for model in frame.models) + frame.unknown_per_second
    pictures = sum(model.pictures_per_second for model in frame.models)
    late = frame.queue_age_seconds > LATE_SECONDS
    table = Table.grid(padding=(0, 3), expand=True)
    for _ in range(4):
        table.add_column(ratio=1, no_wrap=True)
    table.add_row(
        _pair("requests/s", _number(requests)),
        _pair("pictures/s", _number(pictures)),
        _pair("in flight", str(frame.in_flight)),
        _pair("CPU", f"{frame.cpu_percent:.0f} %"),
    )
    table.add_row(
        _pair("queue", str(frame.queue_depth)),
        _pair("oldest", _seconds(frame.queue_age_seconds), "bold red" if late else "bold"),
        _pair("workers busy", f"{frame.running}/{frame.instances}"),
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


def _model(model: Model, wide: bool) -> RenderableType:
    body = Table.grid(padding=(0, 4), expand=True)
    left, right = (_outcomes(model), "", _stages(model)), (_heads(model), "", _uncertainty(model))
    if wide:
        body.add_column(ratio=10)
        body.add_column(ratio=11)
        body.add_row(Group(*left), Group(*right))
    else:
        body.add_row(Group(*left, "", *right))
    rows: list[RenderableType] = [body] if model.drift is None else [body, "", _drift(model.drift)]
    title = Text.assemble((f" {model.name} ", "bold"), (f"version {model.version} ", ""))
    subtitle = Text(f" {model.kernels} kernels on {model.device} ", "dim")
    return Panel(
        Group(*rows), title=title, title_align="left", subtitle=subtitle, subtitle_align="right", box=box.ROUNDED,
        border_style="dim",
    )  # fmt: skip


def _drift(drift: Drift) -> RenderableType:
    """One line: the alarm, the evidence beside its limit, and the statistics that moved most."""
    state = Text("● pictures unlike the calibration's", "bold red") if drift.alarm else Text("● none", "green")
    moved = sorted(((value, name) for name, value in drift.stability.items()), reverse=True)
    told = ", ".join(f"{name.replace('_', ' ')} {value:.2f}" for value, name in moved)
    line = Text.assemble(
        ("drift ", "dim"),
        state,
        ("   evidence ", "dim"),
        f"10^{drift.evidence:.1f} of 10^{drift.limit:.1f}",
        ("   stability index ", "dim"),
        told or f"{drift.pictures} pictures so far",
    )
    line.no_wrap, line.overflow = True, "ellipsis"
    return line


def _outcomes(model: Model) -> RenderableType:
    table = Table(box=None, pad_edge=False, expand=True, header_style="dim")
    table.add_column("requests", no_wrap=True)
    table.add_column("per second", justify="right", no_wrap=True)
    table.add_column("in all", justify="right", no_wrap=True)
    for name, rate, total in outcomes(model):
        style = "green" if name == "OK" else "yellow" if rate else "" if total else "dim"
        table.add_row(Text(name, style), Text(_number(rate), style), Text(str(total), "dim"))
    return table


def outcomes(model: Model) -> list[tuple[str, float, int]]:
    """How requests ended, per second and since the start: answered, shed, expired, cancelled, by other status."""
    rates, totals = model.requests_per_second, model.requests
    known = [
        ("OK", rates.get("OK", 0.0), totals.get("OK", 0)),
        ("shed", model.rejected_per_second, model.rejected),
        ("expired", model.expired_per_second, model.expired),
        ("cancelled", model.cancelled_per_second, model.cancelled),
    ]
    told = {"OK", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "CANCELLED"}
    return known + [(code, rates[code], totals[code]) for code in sorted(rates) if code not in told]


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
    table.add_column("", no_wrap=True)
    for name in ("p50", "p90", "mean"):
        table.add_column(name, justify="right", no_wrap=True)
    rows = [("entropy", head, spread) for head, spread in model.predictive_entropy.items()]
    rows += [("mutual inf.", head, spread) for head, spread in model.mutual_information.items()]
    if model.divergence is not None:
        rows.append(("KL", "clean, robust", model.divergence))
    last = ""
    for name, head, spread in rows:
        table.add_row("" if name == last else name, head, *map(_nats, (spread.p50, spread.p90, spread.mean)))
        last = name
    return table


def _short(models: list[Model]) -> RenderableType:
    """A line for each model, for a screen that does not hold more."""
    table = Table(box=None, pad_edge=False, expand=True, header_style="dim")
    table.add_column("model", no_wrap=True)
    for name in ("req/s", "p50 ms", "p99 ms", "shed/s", "late/s", "other/s"):
        table.add_column(name, justify="right", min_width=6)
    table.add_column("answered by")
    for model in models:
        (_, good, _), (_, shed, _), (_, late, _), *others = outcomes(model)
        total = model.stage_seconds["total"]
        shares = sorted(((share, head) for head, share in model.head_share.items() if share), reverse=True)
        table.add_row(
            Text(f"{model.name}/{model.version}", "bold red" if model.drift and model.drift.alarm else ""),
            _number(good),
            *(_milliseconds(value) for value in (total.p50, total.p99)),
            *(Text(_number(rate), "yellow" if rate else "dim") for rate in (shed, late, sum(one[1] for one in others))),
            ", ".join(f"{head} {100 * share:.0f} %" for share, head in shares),
        )
    return Panel(table, box=box.ROUNDED, border_style="dim")


def sparkline(values: list[float]) -> str:
    """One character a value, from zero to the largest."""
    top = max(values, default=0.0)
    return "".join(BLOCKS[min(7, int(value / top * 8))] if top > 0 else BLOCKS[0] for value in values)


def _bar(share: float, color: str) -> Text:
    whole, part = divmod(round(max(0.0, min(1.0, share)) * BAR * 8), 8)
    filled = "█" * whole + (EIGHTHS[part] if part else "")
    return Text.assemble((filled, color), ("·" * (BAR - len(filled)), "dim"))


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
