"""`trivium top`: a live view of a running server, from its /metrics."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone

from rich.console import Console
from rich.live import Live

from . import top_view
from .errors import ConfigError, Unavailable
from .metrics import STAGES
from .scrape import Scrape, Window, scrape

ADDRESS = "127.0.0.1:8002"
TIMEOUT = 5.0
"""Seconds that a server has for an answer."""
HISTORY = 60
"""Frames whose rate is kept for the sparkline."""


@dataclass(frozen=True)
class Spread:
    """A histogram's values within the window; all None where there were none."""

    mean: float | None
    p50: float | None
    p90: float | None
    p99: float | None


@dataclass(frozen=True)
class Drift:
    """What the server says of its pictures beside the calibration pictures."""

    alarm: bool
    alarms: int
    """Since the server started."""
    evidence: float
    """log10."""
    limit: float
    """Of the evidence: there the alarm is raised."""
    pictures: int
    """In the window."""
    stability: dict[str, float]
    """Population stability index by statistic; empty before the window is full."""


@dataclass(frozen=True)
class Model:
    """One model and version."""

    name: str
    version: str
    kernels: str
    device: str
    requests: dict[str, int]
    """Since the server started, by status code."""
    requests_per_second: dict[str, float]
    pictures_per_second: float
    expired_per_second: float
    rejected_per_second: float
    cancelled_per_second: float
    expired: int
    """Since the server started, as the two below."""
    rejected: int
    cancelled: int
    stage_seconds: dict[str, Spread]
    head_share: dict[str, float | None]
    """Of the pictures answered in the window, how many each head answered."""
    predictive_entropy: dict[str, Spread]
    """Nats, by head, as the two below."""
    mutual_information: dict[str, Spread]
    divergence: Spread | None
    """Clean from robust; None where the model has not both."""
    drift: Drift | None = None
    """None where the bundle has nothing to compare with."""


@dataclass(frozen=True)
class Frame:
    """What there is to see at one moment: rates and quantiles are of the window before it."""

    server: str
    time: str
    window_seconds: float
    release: str
    uptime_seconds: float
    ready: bool
    in_flight: int
    queue_depth: int
    queue_age_seconds: float
    running: int
    instances: int
    held_bytes: int
    rss_bytes: int
    cpu_percent: float
    unknown_per_second: float
    """Requests for models that are not served."""
    denied_per_second: float
    loads_refused: int
    models: list[Model]


def frame(address: str, before: Scrape, after: Scrape) -> Frame:
    """What two scrapes of a server say."""
    window = Window(before, after)
    release = next((labels["release"] for labels, _ in after.select("trivium_build_info")), "")
    engines = [labels for labels, _ in after.select("trivium_engine_info")]
    return Frame(
        server=address,
        time=datetime.fromtimestamp(after.wall, timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z"),
        window_seconds=window.seconds,
        release=release,
        uptime_seconds=max(0.0, after.wall - after.total("process_start_time_seconds")),
        ready=after.total("trivium_ready") == 1,
        in_flight=int(after.total("trivium_in_flight_requests")),
        queue_depth=int(after.total("trivium_queue_depth")),
        queue_age_seconds=after.total("trivium_queue_age_seconds"),
        running=int(after.total("trivium_running_pictures")),
        instances=int(after.total("trivium_instances")),
        held_bytes=int(after.total("trivium_held_bytes")),
        rss_bytes=int(after.total("process_resident_memory_bytes")),
        cpu_percent=100 * window.rate("process_cpu_seconds_total"),
        unknown_per_second=window.rate("trivium_requests_total", model=""),
        denied_per_second=window.rate("trivium_denied_total"),
        loads_refused=int(after.total("trivium_loads_total", outcome="refused")),
        models=[
            _model(window, after, engine)
            for engine in sorted(engines, key=lambda one: (one["model"], int(one["version"])))
        ],
    )


def _model(window: Window, after: Scrape, engine: dict[str, str]) -> Model:
    key = {"model": engine["model"], "version": engine["version"]}
    codes = sorted(labels["code"] for labels, _ in after.select("trivium_requests_total", **key))
    # in the order of the bundle's heads, with whatever else a router chose behind
    heads = list(dict.fromkeys(one["head"] for one, _ in after.select("trivium_predictive_entropy_nats_count", **key)))
    chosen = list(dict.fromkeys([*heads, *(one["head"] for one, _ in after.select("trivium_routed_total", **key))]))
    answered = {head: window.gained("trivium_routed_total", **key, head=head) for head in chosen}
    pictures = sum(answered.values())
    divergence = "trivium_divergence_nats"
    return Model(
        name=engine["model"],
        version=engine["version"],
        kernels=engine["kernels"],
        device=engine["device"],
        requests={code: int(after.total("trivium_requests_total", **key, code=code)) for code in codes},
        requests_per_second={code: window.rate("trivium_requests_total", **key, code=code) for code in codes},
        pictures_per_second=pictures / window.seconds,
        expired_per_second=window.rate("trivium_expired_total", **key),
        rejected_per_second=window.rate("trivium_rejected_total", **key),
        cancelled_per_second=window.rate("trivium_cancelled_total", **key),
        expired=int(after.total("trivium_expired_total", **key)),
        rejected=int(after.total("trivium_rejected_total", **key)),
        cancelled=int(after.total("trivium_cancelled_total", **key)),
        stage_seconds={stage: _spread(window, "trivium_stage_seconds", **key, stage=stage) for stage in STAGES},
        head_share={head: count / pictures if pictures else None for head, count in answered.items()},
        predictive_entropy={h: _spread(window, "trivium_predictive_entropy_nats", **key, head=h) for h in heads},
        mutual_information={h: _spread(window, "trivium_mutual_information_nats", **key, head=h) for h in heads},
        divergence=_spread(window, divergence, **key) if any(after.select(f"{divergence}_count", **key)) else None,
        drift=_drift(after, key),
    )


def _drift(after: Scrape, key: dict[str, str]) -> Drift | None:
    if not any(after.select("trivium_drift_alarm", **key)):
        return None
    return Drift(
        alarm=after.total("trivium_drift_alarm", **key) == 1,
        alarms=int(after.total("trivium_drift_alarms_total", **key)),
        evidence=after.total("trivium_drift_evidence", **key),
        limit=after.total("trivium_drift_evidence_limit", **key),
        pictures=int(after.total("trivium_drift_window_pictures", **key)),
        stability={labels["statistic"]: value for labels, value in after.select("trivium_drift_psi", **key)},
    )


def _spread(window: Window, name: str, **labels: str) -> Spread:
    p50, p90, p99 = (window.quantile(q, name, **labels) for q in (0.5, 0.9, 0.99))
    return Spread(window.mean(name, **labels), p50, p90, p99)


def frames(address: str, interval: float) -> Iterator[Frame | Unavailable]:
    """A frame each interval, for ever; where the server is gone, why, until it is there again.

    Raises: Unavailable, ConfigError where it does not answer at first.
    """
    before: Scrape | None = scrape(address, TIMEOUT)
    while True:
        time.sleep(interval)
        try:
            after = scrape(address, TIMEOUT)
        except Unavailable as error:
            before = None
            yield error
            continue
        except ConfigError as error:
            # another program has its port by now
            before = None
            yield Unavailable(str(error))
            continue
        if before is not None:
            yield frame(address, before, after)
        before = after


def main() -> None:
    """Show a server until interrupted.

    Raises: Unavailable, ConfigError where there is no server at the address.
    """
    parser = argparse.ArgumentParser(prog=sys.argv[0], description="A live view of a running server.")
    parser.add_argument(
        "server", nargs="?", default=ADDRESS, metavar="HOST:PORT", help=f"its HTTP address (default {ADDRESS})"
    )
    parser.add_argument("--interval", type=float, default=2.0, metavar="SECONDS", help="between looks (default 2)")
    parser.add_argument("--once", action="store_true", help="print one frame and exit")
    parser.add_argument("--json", action="store_true", help="print each frame as one JSON object a line")
    options = parser.parse_args()
    if not 0.1 <= options.interval <= 3600:
        raise ConfigError(f"--interval must be 0.1 to 3600 seconds, got {options.interval:g}")
    address = _address(options.server)
    console = Console(highlight=False)
    if options.json or options.once or not console.is_terminal:
        _print(address, options.interval, options.once, options.json, console)
        return
    rates: deque[float] = deque(maxlen=HISTORY)
    last: Frame | None = None
    with Live(top_view.waiting(address), console=console, screen=True, auto_refresh=False) as live:
        for found in frames(address, options.interval):
            if isinstance(found, Frame):
                last = found
                rates.append(sum(sum(model.requests_per_second.values()) for model in found.models))
                live.update(top_view.render(found, list(rates), *console.size), refresh=True)
            else:
                live.update(top_view.gone(str(found), last, list(rates), *console.size), refresh=True)


def _print(address: str, interval: float, once: bool, as_json: bool, console: Console) -> None:
    for found in frames(address, interval):
        if isinstance(found, Unavailable):
            if once:
                raise found
            print(f"{found}; trying again", file=sys.stderr, flush=True)
        elif as_json:
            print(json.dumps(asdict(found)), flush=True)
        else:
            console.print(top_view.render(found, [], console.width))
        if once:
            return


def _address(text: str) -> str:
    host, _, port = text.rpartition(":")
    if (
        not host
        or not port.isdecimal()
        or not 0 < int(port) < 65536
        or not host.isprintable()
        or set(host) & set("/@ ")
    ):
        raise ConfigError(f"expected HOST:PORT, got {text!r}")
    return text
