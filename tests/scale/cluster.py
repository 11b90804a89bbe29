"""A simulated cluster: replicas that start, die and are started again, Kubernetes' autoscaler, and their clients."""

from __future__ import annotations

import math
import random
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import simpy
import yaml

from .simulation import Client, Job, Machine, Outcome, Poisson, Process, Replica, Service

AUTOSCALER = Path(__file__).parents[2] / "docker/kubernetes/base/autoscaler.yaml"
SYNC_SECONDS, TOLERANCE = 15.0, 0.1
"""Of the autoscaler: --horizontal-pod-autoscaler-sync-period and -tolerance."""
WINDOW_SECONDS = 120.0
"""Of the rates that it is told (docker/kubernetes/prometheus-adapter/values.yaml)."""


@dataclass(frozen=True)
class Plan:
    """What is simulated."""

    service: Service
    """On a replica's own cores: as many speeds as workers."""
    rates: Sequence[tuple[float, float]]
    """Requests a second, in steps from a second on."""
    seconds: float
    replicas: int
    """At the start."""
    workers: int = 4
    """Of a replica."""
    capacity: int = 256
    """Pictures in a replica's queue: max_queue."""
    start_seconds: float = 20.0
    """Until a new replica says that it is ready."""
    deaths: Sequence[float] = ()
    """When a replica dies."""
    clients: int = 200
    age_seconds: float = 60.0
    """After which clients connect anew, and learn of new replicas: connection_age_seconds."""
    timeout: float = 30.0
    seed: int = 0


@dataclass
class Autoscaler:
    """The algorithm of HorizontalPodAutoscaler v2, and the settings of a manifest.

    https://kubernetes.io/docs/tasks/run-application/horizontal-pod-autoscale/#algorithm-details
    """

    targets: Mapping[str, float]
    up: Sequence[Mapping[str, Any]]
    down: Sequence[Mapping[str, Any]]
    steady_seconds: float
    least: int
    most: int
    _history: deque[tuple[float, int]] = field(default_factory=deque)
    _wanted: deque[tuple[float, int]] = field(default_factory=deque)

    @classmethod
    def shipped(cls, most: int) -> Autoscaler:
        """As docker/kubernetes has it, but for the number of replicas."""
        spec = yaml.safe_load(AUTOSCALER.read_text())["spec"]
        pods = [metric["pods"] for metric in spec["metrics"]]
        targets = {one["metric"]["name"]: _quantity(one["target"]["averageValue"]) for one in pods}
        up, down = spec["behavior"]["scaleUp"], spec["behavior"]["scaleDown"]
        return cls(
            targets, up["policies"], down["policies"], down["stabilizationWindowSeconds"], spec["minReplicas"], most
        )

    def decide(self, now: float, current: int, sums: Mapping[str, float]) -> int:
        """How many replicas there should be.

        Args:
            current: those there are, the ones that start included.
            sums: of each metric over the replicas that are ready; the others count as 0.
        """
        wanted = self.least
        for name, target in self.targets.items():
            ratio = sums[name] / current / target
            wanted = max(wanted, current if abs(ratio - 1) <= TOLERANCE else math.ceil(ratio * current))
        self._wanted.append((now, wanted))
        while self._wanted[0][0] < now - self.steady_seconds:
            self._wanted.popleft()
        if wanted < current:
            wanted = min(current, max(number for _, number in self._wanted))
        self._history.append((now, current))
        if wanted > current:
            wanted = min(wanted, max(self._bound(policy, now, +1) for policy in self.up))
        elif wanted < current:
            wanted = max(wanted, min(self._bound(policy, now, -1) for policy in self.down))
        return max(self.least, min(self.most, wanted))

    def _bound(self, policy: Mapping[str, Any], now: float, sign: int) -> int:
        """Of a policy, from the number at the beginning of its period."""
        before = next(number for moment, number in self._history if moment >= now - policy["periodSeconds"])
        step = policy["value"] if policy["type"] == "Pods" else math.ceil(before * policy["value"] / 100)
        return int(before + sign * step)


class Cluster:
    """Runs a plan."""

    def __init__(self, plan: Plan, autoscaler: Autoscaler | None = None) -> None:
        self._plan, self._autoscaler = plan, autoscaler
        self._env = simpy.Environment()
        self._rng = np.random.default_rng(plan.seed)
        self._random = random.Random(plan.seed)
        self._ready = [self._new() for _ in range(plan.replicas)]
        self._starting = 0
        lookup = lambda: list(self._ready)  # noqa: E731
        self._clients = [Client(self._env, lookup, plan.timeout, self._random) for _ in range(plan.clients)]
        self._found: list[tuple[float, float]] = []
        self._asked = 0
        self.counts: list[tuple[float, int]] = []
        """Seconds, replicas that are ready."""

    def run(self) -> Outcome:
        env, plan = self._env, self._plan
        env.process(self._arrive())
        for client in self._clients:
            env.process(self._connect_anew(client))
        for moment in plan.deaths:
            env.timeout(moment).callbacks.append(lambda _: self._die())
        if self._autoscaler is not None:
            env.process(self._scale(self._autoscaler))
        env.process(self._count())
        # and as long as anybody may wait for an answer
        env.run(until=plan.seconds + plan.timeout)
        failures: Counter[str] = Counter()
        for client in self._clients:
            failures.update(client.failures)
        starts, latencies = np.array(self._found).T
        return Outcome(starts, latencies, self._asked, self._asked - len(self._found), dict(failures))

    def _new(self) -> Replica:
        plan = self._plan
        return Replica(self._env, Machine(self._env, plan.service, self._rng), plan.workers, plan.capacity)

    def _arrive(self) -> Process:
        env, clients = self._env, self._clients
        for moment in Poisson(self._plan.rates, self._rng).times(self._plan.seconds):
            yield env.timeout(moment - env.now)
            self._asked += 1
            client = clients[int(self._random.random() * len(clients))]
            client.send(Job(moment, client, self._done))

    def _done(self, job: Job) -> None:
        seconds = self._env.now - job.start
        if seconds <= self._plan.timeout:
            self._found.append((job.start, seconds))
        assert job.client is not None
        job.client.answered()

    def _connect_anew(self, client: Client) -> Process:
        yield self._env.timeout(self._random.random() * self._plan.age_seconds)
        while True:
            client.look_up()
            yield self._env.timeout(self._plan.age_seconds)

    def _die(self) -> None:
        replica = self._ready.pop(self._random.randrange(len(self._ready)))
        for job in replica.die():
            assert job.client is not None
            job.client.broken(job)
        self._start(1)

    def _start(self, number: int) -> None:
        self._starting += number

        def ready(_: Any) -> None:
            self._starting -= 1
            self._ready.append(self._new())

        for _ in range(number):
            self._env.timeout(self._plan.start_seconds).callbacks.append(ready)

    def _scale(self, autoscaler: Autoscaler) -> Process:
        samples: deque[dict[Replica, tuple[float, int, float]]] = deque(maxlen=1 + round(WINDOW_SECONDS / SYNC_SECONDS))
        while True:
            yield self._env.timeout(SYNC_SECONDS)
            now = {one: (one.queue_seconds, one.answered, one.busy_seconds) for one in self._ready}
            samples.append(now)
            sums = dict.fromkeys(("trivium_queue_seconds", "trivium_busy_ratio"), 0.0)
            for replica, (queue, answered, busy) in now.items():
                first = next(index for index, sample in enumerate(samples) if replica in sample)
                queue0, answered0, busy0 = samples[first][replica]
                seconds = SYNC_SECONDS * (len(samples) - 1 - first)
                if seconds:
                    sums["trivium_queue_seconds"] += (queue - queue0) / max(answered - answered0, 1)
                    sums["trivium_busy_ratio"] += (busy - busy0) / seconds / self._plan.workers
            if len(samples) < 2:
                continue
            current = len(self._ready) + self._starting
            wanted = autoscaler.decide(self._env.now, current, sums)
            if wanted > current:
                self._start(wanted - current)
            for _ in range(current - wanted):
                self._drain()

    def _drain(self) -> None:
        """Of one that is sent away no client loses anything: it answers what it has."""
        if len(self._ready) > 1:
            self._ready.pop().alive = False

    def _count(self) -> Process:
        while True:
            self.counts.append((self._env.now, len(self._ready)))
            yield self._env.timeout(1.0)


def _quantity(text: str) -> float:
    """Of Kubernetes: 20m is 0.02."""
    return float(text[:-1]) / 1000 if text.endswith("m") else float(text)
