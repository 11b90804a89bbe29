"""How many replicas a load takes: measured on this machine, simulated beside it, then simulated for a load beyond it.

    python -m tests.scale.capacity                   measures, compares, projects; writes build/bench/capacity.json
    python -m tests.scale.capacity --docs docker     also capacity.svg and the tables of CAPACITY.md

Calibration, by a client for each replica that asks again as soon as it is answered: one replica alone; one on each
core, for how much they slow each other down; all, for what sharing the cores costs. And all, each asked now and then,
for what a picture takes that finds its replica idle. Predicted from that, and compared: four replicas on the same
cores with queues before them, in a closed loop and in open ones. Calibration and runs take turns, so that both see
the same machine; what else it does stands beside the figures.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tests.bench.serving import load, pictures, servers

from trivium.runtime.cpus import usable_cpus

from . import page
from .cluster import Autoscaler, Cluster, Plan
from .simulation import Outcome, Service, closed_loop, open_loop

ROOT = Path(__file__).parents[2]
WARM_SECONDS = 0.5
CLIENTS = 2
"""Of each replica in the closed loop."""
OPEN_CLIENTS = 64
"""Of each in an open one: as many as may wait for it."""
SPARSE_RATE = 2.5
"""Requests a second of each replica that hardly ever meet."""
THROUGHPUT, P99 = 0.10, 0.20
"""How far the simulation may be off."""
SIMULATED_REQUESTS = 200_000
UTILISATIONS = (0.5, 0.6, 0.7, 0.8, 0.9)
WORKERS = 4
SETTLED_SECONDS, STEADY_SECONDS, DEATH_SECONDS = 2.0, 20.0, 10.0
STEP_SECONDS, SCALE_SECONDS = 60.0, 300.0


@dataclass(frozen=True)
class Visit:
    """Some replicas under some load."""

    latencies: NDArray[np.float64]
    rps: float
    cpu_ms: float
    """Of the servers, a request."""
    others: float
    """Threads that wanted a CPU and are neither a client's nor a replica's, where all of these are busy."""


@dataclass(frozen=True)
class Compared:
    """One load, real and simulated."""

    load: str
    rps: float
    simulated_rps: float
    p50_ms: float
    simulated_p50_ms: float
    p99_ms: float
    simulated_p99_ms: float

    @property
    def agrees(self) -> bool:
        near = abs(self.simulated_rps / self.rps - 1) <= THROUGHPUT
        return near and abs(self.simulated_p99_ms / self.p99_ms - 1) <= P99


@dataclass(frozen=True)
class Steady:
    """A load that stays, on replicas enough for a utilisation, one of which dies."""

    utilisation: float
    replicas: int
    p50_ms: float
    p99_ms: float
    failures: int
    lost: int


@dataclass
class Results:
    model: str
    cores: int
    replicas: int
    cpu_ms: float
    """Of one picture, in a server that runs alone."""
    service_ms: float
    """The same by the clock, seen by its client."""
    cold_ms: float
    """The same of a replica that had nothing to do before."""
    slowdown: float
    """Of it where every core has a replica that is busy."""
    sharing: float
    """What it takes where more replicas are busy than there are cores, over its fair share of them."""
    others: float
    """Threads of other programs that wanted the cores meanwhile."""
    rate: float
    compared: list[Compared] = field(default_factory=list)
    latencies_ms: dict[str, list[float]] = field(default_factory=dict)
    """Quantiles 0.5 to 99.5 % of the last open loop, real and simulated."""
    steady: list[Steady] = field(default_factory=list)
    scaling: dict[str, Any] = field(default_factory=dict)

    @property
    def agrees(self) -> bool:
        return all(one.agrees for one in self.compared)


class Replicas:
    """Running servers of one worker each, halted while they are not asked."""

    def __init__(self, running: Sequence[servers.Running], program: Path) -> None:
        self._running, self._program = running, program
        self._seed = 0

    def visit(self, count: int, clients: int, seconds: float, rate: float = 0.0) -> Visit:
        """Load the first `count` of them, with `rate` in all or, at 0, a closed loop of so many clients each."""
        chosen = self._running[:count]
        for one in chosen:
            one.resume()
        try:
            with ThreadPoolExecutor(count) as pool:
                self._ask(pool, chosen, 1, WARM_SECONDS, 0.0)
                cpu = sum(one.cpu_seconds() for one in chosen)
                with Runnable() as runnable:
                    found = self._ask(pool, chosen, clients, seconds, rate / count)
                cpu = sum(one.cpu_seconds() for one in chosen) - cpu
        finally:
            for one in chosen:
                one.pause()
        latencies = np.concatenate([one.latencies for one in found])
        if failed := sum(one.failed for one in found):
            raise SystemExit(f"{failed} requests failed: {found[0].reason}")
        others = max(0.0, runnable.mean - count)
        return Visit(latencies, sum(one.rps for one in found), 1e3 * cpu / len(latencies), others)

    def _ask(
        self, pool: ThreadPoolExecutor, chosen: Sequence[servers.Running], clients: int, seconds: float, rate: float
    ) -> list[load.Load]:
        ask = partial(load.run, self._program, seconds=seconds, connections=clients, rate=rate)
        # replicas are not to be asked at the same moments
        seeds = range(self._seed, self._seed + len(chosen))
        self._seed += len(chosen)
        return list(pool.map(lambda one, seed: ask(one.target, seed=seed), chosen, seeds))


@dataclass(frozen=True)
class Calibration:
    """What the simulation is told: visits of few replicas, of all without a queue, and of idle ones."""

    cores: int
    replicas: int
    alone: list[Visit] = field(default_factory=list)
    """One replica, always busy."""
    busy: list[Visit] = field(default_factory=list)
    """One on every core."""
    sharing: list[Visit] = field(default_factory=list)
    """All, more than there are cores."""
    sparse: list[Visit] = field(default_factory=list)
    """All, each asked so seldom that it has nothing to do."""

    def service(self) -> Service:
        warm, cold = _seconds(self.alone), _seconds(self.sparse)
        others = float(np.mean([one.others for one in (*self.alone, *self.busy)]))
        # evenly less with each core that is busy
        least = min(1.0, float(warm.mean() / _seconds(self.busy).mean()))
        speeds = tuple(np.linspace(1.0, least, self.cores).tolist()) if self.cores > 1 else (1.0,)
        fair = Service(warm, cold, speeds, others=others)
        shared = _seconds(self.sharing) * fair.speed(self.replicas) / warm.mean()
        return replace(fair, shared=shared)


def _seconds(visits: Sequence[Visit]) -> NDArray[np.float64]:
    return np.concatenate([one.latencies for one in visits])


class Runnable(threading.Thread):
    """Counts, twenty times a second, the machine's threads that run or want to, save itself."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._end = threading.Event()
        self._counts: list[int] = []

    @property
    def mean(self) -> float:
        return float(np.mean(self._counts)) if self._counts else 0.0

    def run(self) -> None:
        while not self._end.wait(0.05):
            (line,) = (line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("procs_running"))
            self._counts.append(int(line.split()[1]) - 1)

    def __enter__(self) -> Runnable:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self.join()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.scale.capacity", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="lite0", help="lite0, tiny or a bundle's directory")
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each open loop; of the others a third")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--open", nargs="+", type=float, default=[0.5, 0.7], metavar="SHARE", help="of the capacity")
    parser.add_argument("--rate", type=float, default=10_000, help="requests a second to project to; 0 for none")
    parser.add_argument("--out", type=Path, default=ROOT / "build/bench/capacity.json")
    parser.add_argument("--docs", type=Path, help="directory of CAPACITY.md, whose tables and plot are to be renewed")
    given = parser.parse_args()
    # so that a time limit from outside ends the servers too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    results, service = compare(given)
    if given.rate:
        project(results, service)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(asdict(results), indent=1) + "\n")
    print(page.tables(results))
    if given.docs is not None:
        page.renew(results, given.docs)
    if not results.agrees:
        raise SystemExit(f"the simulation is further than {THROUGHPUT:.0%} or {P99:.0%} from the real run")


def compare(given: argparse.Namespace) -> tuple[Results, Service]:
    """Measure and simulate the same; what is measured of a request."""
    bundle = Path(given.model) if Path(given.model).is_dir() else ROOT / "build/bench" / f"bundle-{given.model}"
    if not bundle.is_dir():
        pictures.build(given.model, bundle)
    program = load.compiled(ROOT / "build/bench/serving")
    picture = pictures.picture(bundle)
    server = servers.trivium(bundle, 1, picture, pictures.expected(bundle, picture.pixels))
    cores = min(usable_cpus(), given.replicas)
    seen = Calibration(cores, given.replicas)
    closed: list[Visit] = []
    opened: dict[float, list[Visit]] = {}
    with ExitStack() as stack:
        running = []
        for index in range(given.replicas):
            folder = program.parent / f"replica{index}"
            running.append(stack.enter_context(servers.running(server, program, folder)))
            running[-1].pause()
        replicas = Replicas(running, program)
        for _ in range(given.rounds):
            seen.alone.append(replicas.visit(1, 1, given.seconds / 3))
            seen.busy.append(replicas.visit(cores, 1, given.seconds / 3))
            seen.sharing.append(replicas.visit(given.replicas, 1, given.seconds / 3))
            seen.sparse.append(replicas.visit(given.replicas, 1, given.seconds, SPARSE_RATE * given.replicas))
            if not opened:
                # the rates of all rounds
                simulated = closed_loop(seen.service(), given.replicas, CLIENTS, 60)
                capacity = len(simulated.latencies) / 60
                opened = {round(share * capacity, 1): [] for share in given.open}
            closed.append(replicas.visit(given.replicas, CLIENTS, given.seconds / 3))
            for rate, visits in opened.items():
                visits.append(replicas.visit(given.replicas, OPEN_CLIENTS, given.seconds, rate))
    service = seen.service()
    results = Results(
        model=picture.model,
        cores=cores,
        replicas=given.replicas,
        cpu_ms=float(np.mean([one.cpu_ms for one in seen.alone])),
        service_ms=1e3 * float(service.seconds.mean()),
        cold_ms=1e3 * float(_seconds(seen.sparse).mean()),
        slowdown=1 / service.speeds[-1],
        sharing=1.0 if service.shared is None else float(service.shared.mean()),
        others=service.others,
        rate=given.rate,
    )
    seconds = SIMULATED_REQUESTS / capacity
    found = closed_loop(service, given.replicas, CLIENTS, seconds)
    text = f"closed, {CLIENTS} clients a replica"
    results.compared.append(compared(text, closed, found, len(found.latencies) / seconds))
    for rate, visits in opened.items():
        found = open_loop(service, given.replicas, rate, seconds)
        text = f"open, {rate:g}/s"
        results.compared.append(compared(text, visits, found, len(found.latencies) / seconds))
        shares = np.linspace(0.005, 0.995, 100)
        real = _seconds(visits)
        for name, values in (("real", real), ("simulated", found.latencies)):
            results.latencies_ms[name] = (1e3 * np.quantile(values, shares)).round(3).tolist()
    return results, service


def compared(text: str, visits: Sequence[Visit], found: Outcome, simulated_rps: float) -> Compared:
    real = _seconds(visits)
    p50, p99 = quantiles_ms(real)
    simulated_p50, simulated_p99 = quantiles_ms(found.latencies)
    return Compared(
        load=text,
        rps=float(np.mean([one.rps for one in visits])),
        simulated_rps=simulated_rps,
        p50_ms=p50,
        simulated_p50_ms=simulated_p50,
        p99_ms=p99,
        simulated_p99_ms=simulated_p99,
    )


def quantiles_ms(seconds: NDArray[np.float64]) -> tuple[float, float]:
    """Median and 99th percentile, in ms."""
    p50, p99 = 1e3 * np.quantile(seconds, (0.5, 0.99))
    return float(p50), float(p99)


def project(results: Results, service: Service) -> None:
    """A load that no one machine bears: how busy replicas may be, and what the autoscaler makes of a step."""
    # on cores of its own, all of them busy, a picture takes its CPU time, and varies as it was measured to
    scale = 1e-3 * results.cpu_ms * results.slowdown / service.seconds.mean()
    cold = scale * (service.seconds if service.cold is None else service.cold)
    dedicated = Service(scale * service.seconds, cold, speeds=(1.0,) * WORKERS)
    # where there are enough, most find a worker that is idle
    needed = results.rate * float(cold.mean()) / WORKERS
    plan = partial(Plan, service=dedicated, workers=WORKERS)
    for utilisation in UTILISATIONS:
        count = round(needed / utilisation)
        print(f"simulating {count} replicas at {results.rate:g}/s", flush=True)
        rates = [(0.0, results.rate)]
        found = Cluster(plan(rates=rates, seconds=STEADY_SECONDS, replicas=count, deaths=(DEATH_SECONDS,))).run()
        p50, p99 = quantiles_ms(found.after(SETTLED_SECONDS))
        results.steady.append(Steady(needed / count, count, p50, p99, sum(found.failures.values()), found.lost))
    scaler = Autoscaler.shipped(2 * round(needed))
    busy = scaler.targets["trivium_busy_ratio"]
    print(f"simulating the autoscaler at a step to {results.rate:g}/s", flush=True)
    steps = [(0.0, results.rate / 2), (STEP_SECONDS, results.rate)]
    first = round(needed / 2 / busy)
    cluster = Cluster(plan(rates=steps, seconds=SCALE_SECONDS, replicas=first), scaler)
    found = cluster.run()
    edges = np.arange(0.0, SCALE_SECONDS + 1, 5.0)
    slots = np.digitize(found.starts, edges)
    each = [found.latencies[slots == index] for index in range(1, len(edges))]
    results.scaling = {
        "seconds": edges[:-1].tolist(),
        "asked_rps": [steps[int(edge >= STEP_SECONDS)][1] for edge in edges[:-1]],
        "answered_rps": [len(one) / 5 for one in each],
        "p99_ms": [round(1e3 * float(np.quantile(one, 0.99)), 2) if len(one) else None for one in each],
        "replicas": [count for moment, count in cluster.counts if moment % 5 == 0 and moment < SCALE_SECONDS],
        "asked": found.asked,
        "lost": found.lost,
        "failures": found.failures,
    }


if __name__ == "__main__":
    main()
