"""A server's /metrics seen from outside: one scrape, and what happened between two."""

from __future__ import annotations

import http.client
import math
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from time import monotonic, time

from prometheus_client.parser import text_string_to_metric_families

from .errors import ConfigError, Unavailable

Labels = frozenset[tuple[str, str]]
SIZE_LIMIT = 64 << 20
"""Bytes of an answer that are read."""


@dataclass(frozen=True)
class Scrape:
    """All samples of one moment."""

    moment: float
    """Of time.monotonic()."""
    wall: float
    """Seconds since 1970."""
    samples: dict[str, dict[Labels, float]]
    """Name -> labels -> value."""

    def select(self, name: str, **labels: str) -> Iterator[tuple[dict[str, str], float]]:
        """The samples of a name that have these labels among theirs."""
        wanted = labels.items()
        for found, value in self.samples.get(name, {}).items():
            if wanted <= found:
                yield dict(found), value

    def total(self, name: str, **labels: str) -> float:
        """Their sum."""
        return sum(value for _, value in self.select(name, **labels))


def scrape(address: str, timeout: float) -> Scrape:
    """Ask HOST:PORT.

    Raises: Unavailable where nobody answers; ConfigError where it is no trivium server's HTTP port.
    """
    # a proxy has no business between a person and a server named by address
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{address}/metrics", timeout=timeout) as response:
            text = response.read(SIZE_LIMIT).decode()
    except urllib.error.HTTPError as error:
        raise ConfigError(f"{address}: no trivium server; it has no /metrics (HTTP {error.code})") from None
    except (http.client.HTTPException, UnicodeError, ValueError):
        raise ConfigError(f"{address}: no HTTP answer; it must be the port of /metrics, not of gRPC") from None
    except OSError as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        reason = (cause.strerror if isinstance(cause, OSError) else None) or str(cause)
        if isinstance(cause, TimeoutError):
            reason = f"no answer in {timeout:g} s"
        raise Unavailable(f"{address}: {reason}") from None
    moment, wall = monotonic(), time()
    samples: dict[str, dict[Labels, float]] = {}
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                samples.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
    except ValueError:
        samples = {}
    if "trivium_build_info" not in samples:
        raise ConfigError(f"{address}: its /metrics are not a trivium server's")
    return Scrape(moment, wall, samples)


class Window:
    """What happened between two scrapes; a counter that fell was started anew, and counts from zero."""

    def __init__(self, before: Scrape, after: Scrape) -> None:
        self._before = before
        self._after = after
        self.seconds = max(after.moment - before.moment, 1e-9)

    def gained(self, name: str, **labels: str) -> float:
        """By how much counters grew, in sum."""
        old = self._before.samples.get(name, {})
        wanted = labels.items()
        grown = 0.0
        for found, value in self._after.samples.get(name, {}).items():
            if wanted <= found:
                before = old.get(found, 0.0)
                grown += value - before if value >= before else value
        return grown

    def rate(self, name: str, **labels: str) -> float:
        """As gained, per second."""
        return self.gained(name, **labels) / self.seconds

    def mean(self, name: str, **labels: str) -> float | None:
        """Of a histogram's values; None where there are none."""
        count = self.gained(f"{name}_count", **labels)
        return self.gained(f"{name}_sum", **labels) / count if count else None

    def quantile(self, q: float, name: str, **labels: str) -> float | None:
        """Of a histogram's values, by linear interpolation in its bucket, as PromQL's histogram_quantile.

        None where there are none; the highest finite bound where it lies above.
        """
        texts = {found["le"] for found, _ in self._after.select(f"{name}_bucket", **labels)}
        grown = [(float(text), self.gained(f"{name}_bucket", **labels, le=text)) for text in texts]
        return quantile(q, sorted(grown))


def quantile(q: float, buckets: list[tuple[float, float]]) -> float | None:
    """Of cumulative buckets, (upper bound, count up to it), ascending and with +Inf last."""
    if not buckets or buckets[-1][1] <= 0:
        return None
    rank = q * buckets[-1][1]
    lower = below = 0.0
    for bound, count in buckets:
        if count >= rank and count > below:
            if math.isinf(bound):
                return lower
            return lower + (bound - lower) * (rank - below) / (count - below)
        lower, below = bound, count
    return lower
