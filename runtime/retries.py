"""Retries: which failed calls are asked again, after what pause, how many of them, and their count (gRFC A6)."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

RETRYABLE = frozenset({"UNAVAILABLE", "RESOURCE_EXHAUSTED"})
"""Statuses of a server that is away or full: an inference that met one may be asked again."""
ACTOR_AWAY = re.compile(r"The actor died unexpectedly|The actor \S+ is unavailable")
"""How the message of Ray's ActorDiedError or ActorUnavailableError begins; a traceback that quotes one begins
otherwise."""
PUSHBACK = "grpc-retry-pushback-ms"
"""Trailing metadata by which a server says when to come back."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Names and meanings are those of gRPC's retryPolicy and retryThrottling."""

    max_attempts: int = 4
    """Of one request, the first included."""
    initial_backoff: float = 0.05
    """Seconds: bound of the random pause before the first retry."""
    max_backoff: float = 1.0
    """Seconds."""
    backoff_multiplier: float = 2.0
    max_tokens: float = 100.0
    """A failure costs a token, and with half of them left or fewer nothing is asked again. A server that dies fails all
    that it was asked at once, so there are tokens for some dozen concurrent requests."""
    token_ratio: float = 0.1
    """What a success gives back: retries are at most this share of a long stream of requests."""
    ray_actors: bool = False
    """Ask again too where Ray Serve says INTERNAL because the actor that should have answered is dead or cannot be
    reached. Any other INTERNAL is an error at once, as ever."""

    def retryable(self, status: str, details: str) -> bool:
        """Whether a failure is one of a server that is away or full."""
        return status in RETRYABLE or (
            self.ray_actors and status == "INTERNAL" and ACTOR_AWAY.match(details) is not None
        )

    def pause(self, attempts: int, pushback: int | None, remaining: float, draw: float) -> float | None:
        """Seconds to wait before a request is asked again; None where it is not.

        Args:
            attempts: how often it was asked.
            pushback: milliseconds the server asked for; negative where it wants no retry, None where it said nothing.
            remaining: seconds until the deadline.
            draw: uniform in [0, 1); without pushback the pause is this share of the backoff ("full jitter"), so that
                clients that failed together do not come back together.
        """
        if attempts >= self.max_attempts:
            return None
        if pushback is None:
            seconds = draw * min(self.max_backoff, self.initial_backoff * self.backoff_multiplier ** (attempts - 1))
        elif pushback >= 0:
            seconds = pushback / 1000
        else:
            return None
        return seconds if seconds < remaining else None


@dataclass(frozen=True, slots=True)
class ClientStatistics:
    """What became of all that a client has sent so far, of whatever kind: attempts = answers + failed ones."""

    attempts: int
    retries: int
    """Of the attempts, those that followed a failed one."""
    failures: dict[str, int]
    """Failed attempts, by the name of their gRPC status."""
    throttled: int
    """Retries that the budget forbade."""

    @property
    def failed(self) -> int:
        return sum(self.failures.values())


class RetryBudget:
    """Tokens that all requests of a client share, so that an overloaded server is not asked ever more; and counts."""

    def __init__(self, policy: RetryPolicy) -> None:
        self._max = self._tokens = policy.max_tokens
        self._ratio = policy.token_ratio
        self._lock = threading.Lock()
        self._attempts = self._retries = self._throttled = 0
        self._failures: Counter[str] = Counter()

    def asked(self, again: bool) -> None:
        """Note an attempt."""
        with self._lock:
            self._attempts += 1
            self._retries += again

    def failed(self, status: str, retryable: bool) -> bool:
        """Note a failure; whether it may be asked again."""
        with self._lock:
            self._failures[status] += 1
            if not retryable:
                return False
            self._tokens = max(0.0, self._tokens - 1)
            allowed = self._tokens > self._max / 2
            self._throttled += not allowed
            return allowed

    def succeeded(self) -> None:
        with self._lock:
            self._tokens = min(self._max, self._tokens + self._ratio)

    def statistics(self) -> ClientStatistics:
        with self._lock:
            return ClientStatistics(self._attempts, self._retries, dict(self._failures), self._throttled)


def pushback_ms(metadata: Iterable[tuple[str, str | bytes]] | None) -> int | None:
    """What trailing metadata asks for: milliseconds, None for nothing, -1 where it cannot be read (gRFC A6)."""
    for key, value in metadata or ():
        if key == PUSHBACK:
            text = value.decode("ascii", "replace") if isinstance(value, bytes) else value
            return int(text) if text.isascii() and text.isdecimal() else -1
    return None
