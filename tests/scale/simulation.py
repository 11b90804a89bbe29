"""A discrete-event simulation (simpy) of replicas and their clients: queues, workers, shared cores, deaths.

A replica is what `trivium serve` is: some workers behind one queue of bounded length. A client is what
trivium.runtime.Client is: it takes the replicas that it knows in turn, and asks again by the same policy and budget,
whose code runs here. What a request costs is drawn from times that were measured.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Any, TypeAlias

import numpy as np
import simpy
from numpy.typing import NDArray

from trivium.runtime.retries import RetryBudget, RetryPolicy

Process: TypeAlias = "Generator[simpy.Event, Any, None]"
BLOCK = 4096
"""Random numbers drawn at a time."""
LOOK_UP_SECONDS = 5.0
"""Least time between two look-ups of a name, as runtime/connection.py has it."""


@dataclass(frozen=True)
class Service:
    """What requests cost."""

    seconds: NDArray[np.float64]
    """Measured, each of one request that had a machine to itself, and whose worker came from another."""
    cold: NDArray[np.float64] | None = None
    """The same where the worker had nothing to do before, and the caches held something else; None: alike."""
    speeds: tuple[float, ...] = (1.0,)
    """How fast each runs where 1, 2, ... run on a machine, against one alone; one for each core. More than there are
    cores share them equally."""
    shared: NDArray[np.float64] | None = None
    """Measured where more ran than there are cores, and pushed each other out of the caches and from core to core; over
    what fair shares of the cores would have made of it. None: nothing but fair shares."""
    others: float = 0.0
    """Threads of other programs that want the same cores, as fair shares of them go."""

    def speed(self, running: int) -> float:
        cores = len(self.speeds)
        if running <= cores:
            return self.speeds[running - 1]
        return self.speeds[-1] * (cores + self.others) / (running + self.others)


class Job:
    """One request, from the moment it is meant to start."""

    __slots__ = ("attempts", "begun", "client", "done", "entered", "replica", "start")

    def __init__(self, start: float, client: Client | None, done: Callable[[Job], None]) -> None:
        self.start, self.client, self.done = start, client, done
        self.attempts = 0
        self.entered = self.begun = 0.0
        """When a queue took it, and a worker."""
        self.replica: Replica | None = None


class Drawn:
    """Measurements, one after the other at random."""

    def __init__(self, measured: NDArray[np.float64], rng: np.random.Generator) -> None:
        self._measured, self._rng = measured, rng
        self._next: list[float] = []

    def next(self) -> float:
        if not self._next:
            self._next = self._rng.choice(self._measured, BLOCK).tolist()
        return self._next.pop()


class Machine:
    """Cores that all work on it shares equally; its own clock shows how much each has been given."""

    def __init__(self, env: simpy.Environment, service: Service, rng: np.random.Generator) -> None:
        self._env, self._service = env, service
        self._clock = self._since = 0.0
        self._ends: list[tuple[float, int, Job]] = []
        self._turn = self._serial = 0
        self._warm = Drawn(service.seconds, rng)
        self._cold = self._warm if service.cold is None else Drawn(service.cold, rng)
        self._shared = Drawn(np.ones(1) if service.shared is None else service.shared, rng)

    def begin(self, job: Job, *, cold: bool) -> None:
        """Give it a share of the cores; cold: its worker had nothing to do before."""
        self._advance()
        seconds = (self._cold if cold else self._warm).next()
        if len(self._ends) >= len(self._service.speeds):
            seconds *= self._shared.next()
        self._serial += 1
        heappush(self._ends, (self._clock + seconds, self._serial, job))
        self._foresee()

    def drop(self, jobs: set[Job]) -> None:
        self._advance()
        self._ends = [end for end in self._ends if end[2] not in jobs]
        heapify(self._ends)
        self._foresee()

    def _advance(self) -> None:
        now = self._env.now
        if self._ends:
            self._clock += (now - self._since) * self._service.speed(len(self._ends))
        self._since = now

    def _foresee(self) -> None:
        """The next end; whatever was foreseen before is void."""
        self._turn += 1
        if self._ends:
            seconds = max(0.0, self._ends[0][0] - self._clock) / self._service.speed(len(self._ends))
            self._env.timeout(seconds, self._turn).callbacks.append(self._ended)

    def _ended(self, event: Any) -> None:
        if event.value == self._turn:
            self._advance()
            job = heappop(self._ends)[2]
            self._foresee()
            assert job.replica is not None
            job.replica.ended(job)


class Replica:
    """A server. `queue_seconds`, `answered` and `busy_seconds` are sums, as its metrics are."""

    def __init__(self, env: simpy.Environment, machine: Machine, workers: int, capacity: int) -> None:
        self._env, self._machine, self._workers, self._capacity = env, machine, workers, capacity
        self._queue: deque[Job] = deque()
        self._running: set[Job] = set()
        self.alive = True
        self.queue_seconds = self.busy_seconds = 0.0
        self.answered = 0
        self._freed = -1.0
        """When it last answered."""

    def take(self, job: Job) -> bool:
        """Queue a request; False where there is no room."""
        if len(self._queue) >= self._capacity:
            return False
        job.replica, job.entered = self, self._env.now
        if len(self._running) < self._workers:
            self._begin(job)
        else:
            self._queue.append(job)
        return True

    def pushback_ms(self) -> int:
        """When to come back to a full queue (runtime/service.py)."""
        each = self.busy_seconds / self.answered if self.answered else 0.01
        return max(1, round(1000 * len(self._queue) / 2 * each / self._workers))

    def ended(self, job: Job) -> None:
        self._running.remove(job)
        self.answered += 1
        self.busy_seconds += self._env.now - job.begun
        self._freed = self._env.now
        if self._queue:
            self._begin(self._queue.popleft())
        job.done(job)

    def die(self) -> list[Job]:
        """End at once; what it had."""
        self.alive = False
        self._machine.drop(self._running)
        return [*self._running, *self._queue]

    def _begin(self, job: Job) -> None:
        self._running.add(job)
        job.begun = self._env.now
        self.queue_seconds += job.begun - job.entered
        self._machine.begin(job, cold=bool(self._env.now > self._freed))


class Client:
    """Takes turns among the replicas it knows. What `lookup` returns it learns when it connects anew."""

    def __init__(
        self, env: simpy.Environment, lookup: Callable[[], list[Replica]], timeout: float, rng: random.Random
    ) -> None:
        self._env, self._lookup, self._timeout, self._rng = env, lookup, timeout, rng
        self._policy = RetryPolicy()
        self._budget = RetryBudget(self._policy)
        self._known = lookup()
        self._next = rng.randrange(1 << 30)
        self._looked = 0.0
        self.failures: Counter[str] = Counter()
        self.lost = 0

    def look_up(self) -> None:
        self._looked = self._env.now
        self._known = self._lookup()

    def send(self, job: Job) -> None:
        job.attempts += 1
        self._next += 1
        while self._known and not (replica := self._known[self._next % len(self._known)]).alive:
            self._known.remove(replica)
        if not self._known:
            self._fail(job, "UNAVAILABLE", None)
        elif not replica.take(job):
            self._fail(job, "RESOURCE_EXHAUSTED", replica.pushback_ms())

    def broken(self, job: Job) -> None:
        """The replica that had the request is gone."""
        self._fail(job, "UNAVAILABLE", None)

    def answered(self) -> None:
        self._budget.succeeded()

    def _fail(self, job: Job, status: str, pushback: int | None) -> None:
        self.failures[status] += 1
        if status == "UNAVAILABLE" and self._env.now - self._looked >= LOOK_UP_SECONDS:
            self.look_up()
        remaining = job.start + self._timeout - self._env.now
        pause = None
        if self._budget.failed(status, True):
            pause = self._policy.pause(job.attempts, pushback, remaining, self._rng.random())
        if pause is None:
            self.lost += 1
        else:
            self._env.timeout(pause, job).callbacks.append(lambda event: self.send(event.value))


class Poisson:
    """Arrivals of a rate that changes in steps: (seconds since the start, requests a second from there on)."""

    def __init__(self, steps: Sequence[tuple[float, float]], rng: np.random.Generator) -> None:
        self._steps, self._rng = steps, rng

    def rate(self, moment: float) -> float:
        return self._steps[bisect_right(self._steps, (moment, float("inf"))) - 1][1]

    def times(self, until: float) -> Iterator[float]:
        """When requests start. A gap that reaches over a step has the rate of its beginning."""
        moment = 0.0
        while True:
            for gap in self._rng.exponential(1.0, BLOCK):
                moment += gap / self.rate(moment)
                if moment >= until:
                    return
                yield moment


@dataclass(frozen=True)
class Outcome:
    starts: NDArray[np.float64]
    """Of every answered request, seconds since the simulation's start."""
    latencies: NDArray[np.float64]
    """Seconds, from when it was meant to start."""
    asked: int
    lost: int
    failures: dict[str, int]
    """Failed attempts by status."""

    def after(self, moment: float) -> NDArray[np.float64]:
        """Latencies of what started since a moment."""
        return self.latencies[self.starts >= moment]


def closed_loop(service: Service, replicas: int, clients: int, seconds: float, seed: int = 0) -> Outcome:
    """Replicas of one worker on one machine, each with so many clients that wait for their answer and ask again."""
    env = simpy.Environment()
    machine = Machine(env, service, np.random.default_rng(seed))
    found: list[tuple[float, float]] = []

    def again(job: Job) -> None:
        found.append((job.start, env.now - job.start))
        assert job.replica is not None
        job.replica.take(Job(env.now, None, again))

    for _ in range(replicas):
        replica = Replica(env, machine, 1, clients)
        for _ in range(clients):
            replica.take(Job(0.0, None, again))
    env.run(until=seconds)
    starts, latencies = np.array(found).T
    return Outcome(starts, latencies, len(found), 0, {})


def open_loop(service: Service, replicas: int, rate: float, seconds: float, seed: int = 0) -> Outcome:
    """Replicas of one worker on one machine, each asked by clients of its own at random, `rate` in all."""
    rng = np.random.default_rng(seed)
    env = simpy.Environment()
    machine = Machine(env, service, rng)
    running = [Replica(env, machine, 1, 1 << 30) for _ in range(replicas)]
    found: list[tuple[float, float]] = []

    def done(job: Job) -> None:
        found.append((job.start, env.now - job.start))

    def arrive() -> Process:
        for moment in Poisson([(0.0, rate)], rng).times(seconds):
            yield env.timeout(moment - env.now)
            running[rng.integers(replicas)].take(Job(moment, None, done))

    env.process(arrive())
    env.run()
    starts, latencies = np.array(found).T
    return Outcome(starts, latencies, len(found), 0, {})
