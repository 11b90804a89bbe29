"""What servers cost beside their engine, measured so that a noisy machine does not matter much.

    python -m tests.bench.serve            writes build/bench/serve.json
    python -m tests.bench.serve --peers    the same with other servers, on the same graph with the same kernels

All servers of a model are up at once and visited in turn, the others halted meanwhile (SIGSTOP: some burn a quarter of
a core while nobody asks), with bare ONNX Runtime between any two visits. Efficiency is ONNX
Runtime's CPU milliseconds a picture over the server's, within the same half minute; the limit is the pictures a second
of as many bare ONNX Runtime threads as the servers have workers. The clients share the machine's cores with the server;
client_cpu_ms says what each request costs them.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from .serving import load, peers, pictures, report, servers
from .serving.limit import Limit, Probe, probing
from .serving.servers import Server

ROOT = Path(__file__).parents[2]
WARM_SECONDS = 0.5
IDLE_SECONDS = 3.0
OPEN_CONNECTIONS = 64
OPEN_MS = 1.0
"""No open loop where the engine's call is shorter: no server comes near such an engine's limit."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.serve", description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="+", default=["lite0", "tiny"], help="lite0, tiny or bundle directories")
    parser.add_argument("--peers", nargs="*", choices=peers.NAMES, help="other servers too, all or these", default=None)
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 4, 16], help="clients of the closed loops")
    parser.add_argument("--open", nargs="*", type=float, default=[], metavar="SHARE", help="open loops, of the limit")
    parser.add_argument("--jpeg", action="store_true", help="ours a second time, with JPEG pictures twice the size")
    parser.add_argument("--streams", type=int, default=1, help="gRPC requests at a time on each connection")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each visit")
    parser.add_argument("--rounds", type=int, default=3, help="visits of every row")
    parser.add_argument("--instances", type=int, default=2, help="workers of every server")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--out", type=Path, default=ROOT / "build/bench/serve.json")
    given = parser.parse_args()
    # so that a time limit from outside ends the servers too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    rows = [row for model in given.models for row in measure(model, given)]
    report.write(rows, given.out)
    print(report.markdown(rows) if given.markdown else report.table(rows))
    print(report.summary(rows))
    print(given.out)
    if missing := set(given.models) - {row.model for row in rows if row.server == "trivium"}:
        raise SystemExit(f"trivium itself has no figures on {', '.join(sorted(missing))}")


def measure(model: str, given: argparse.Namespace) -> list[report.Row]:
    """Rows of every server under every load."""
    folder = given.out.parent
    bundle = Path(model) if Path(model).is_dir() else folder / f"bundle-{model}"
    if not bundle.is_dir():
        pictures.build(model, bundle)
    program = load.compiled(folder / "serving")
    picture = pictures.picture(bundle)
    loads: list[tuple[int, float]] = [(clients, 0.0) for clients in given.concurrency]
    visits: dict[tuple[str, int, float], list[report.Visit]] = {}
    with ExitStack() as stack:
        probe = stack.enter_context(probing(bundle))
        if probe.measure(given.instances, WARM_SECONDS).ms >= OPEN_MS:
            loads += [(OPEN_CONNECTIONS, share) for share in given.open]
        up: list[servers.Running] = []
        for name, make in candidates(bundle, picture, given).items():
            print(f"starting {name} for {model}", flush=True)
            try:
                up.append(stack.enter_context(servers.running(make(), program, program.parent / bundle.name)))
            except servers.Unavailable as error:
                print(f"{name} is left out: {error}", flush=True)
        idle = dict(zip(up, idle_percent(up), strict=True))
        for one in up:
            one.pause()
        for _ in range(given.rounds):
            for clients, share in loads:
                before = probe_both(probe, clients, given)
                for one in list(up):
                    found = visit(one, program, clients, share * before[0].rps, given)
                    if found is None:
                        up.remove(one)
                        continue
                    after = probe_both(probe, clients, given)
                    visits.setdefault((one.server.name, clients, share), []).append(found.beside(before, after))
                    before = after
        return [
            report.row(
                one.server.name,
                model,
                clients,
                f"{share:g} open" if share else "closed",
                one.ready_s,
                idle[one],
                visits[one.server.name, clients, share],
            )
            for clients, share in loads
            for one in idle
            if (one.server.name, clients, share) in visits
        ]


def candidates(bundle: Path, picture: pictures.Picture, given: argparse.Namespace) -> dict[str, Callable[[], Server]]:
    """What to start, by name."""
    expected = pictures.expected(bundle, picture.pixels)
    ours = partial(servers.trivium, bundle, given.instances, picture)
    found: dict[str, Callable[[], Server]] = {"trivium": partial(ours, expected)}
    if given.jpeg:
        decoded = pictures.expected(bundle, pictures.decoded(bundle, picture))
        found["trivium, JPEG"] = partial(ours, decoded, jpeg=True)
    if given.peers is not None:
        for name in given.peers or peers.NAMES:
            found[name] = partial(peers.peer, name, given.out.parent, bundle, given.instances, picture, expected)
    return found


@dataclass(frozen=True)
class Visited:
    """One server under one load, before it is compared."""

    load: load.Load
    cpu_seconds: float
    memory_mb: tuple[float, float]

    def beside(self, before: tuple[Limit, Limit], after: tuple[Limit, Limit]) -> report.Visit:
        """Compared with the probes before and after."""
        found = self.load
        count = len(found.latencies) + found.failed
        ms = 1e3 * self.cpu_seconds / count
        rss, pss = self.memory_mb
        return report.Visit(
            rps=found.rps,
            ratio_to_limit=2 * found.rps / (before[0].rps + after[0].rps),
            cpu_ms_per_request=ms,
            efficiency=(before[1].cpu_ms + after[1].cpu_ms) / 2 / ms,
            p50_ms=1e3 * float(np.quantile(found.latencies, 0.5)),
            p99_ms=1e3 * float(np.quantile(found.latencies, 0.99)),
            rss_mb=rss,
            pss_mb=pss,
            client_cpu_ms=found.client_cpu_ms,
            engine_ms=(before[1].ms + after[1].ms) / 2,
            failed=found.failed / count,
        )


def visit(
    server: servers.Running, program: Path, clients: int, rate: float, given: argparse.Namespace
) -> Visited | None:
    """Resume a server, warm it, load it, and halt it again; None, said aloud, where it fails."""
    streams = given.streams if server.server.protocol == "grpc" and clients % given.streams == 0 else 1
    ask = partial(load.run, program, server.target, connections=clients // streams, streams=streams)
    server.resume()
    try:
        ask(seconds=WARM_SECONDS)
        cpu = server.cpu_seconds()
        found = ask(seconds=given.seconds, rate=rate)
        cpu = server.cpu_seconds() - cpu
        memory = server.memory_mb()
    except load.LoadFailed as error:
        print(f"{server.server.name} gives up at {clients} clients: {error}", flush=True)
        return None
    server.pause()
    return Visited(found, cpu, memory)


def probe_both(probe: Probe, clients: int, given: argparse.Namespace) -> tuple[Limit, Limit]:
    """Bare ONNX Runtime with a thread for each worker, and with as many as so few clients can keep busy."""
    seconds = given.seconds / 3
    limit = probe.measure(given.instances, seconds)
    return limit, limit if clients >= given.instances else probe.measure(clients, seconds)


def idle_percent(up: list[servers.Running]) -> list[float]:
    """CPU of each server while none is asked, in percent of one core."""
    time.sleep(2.0)
    before, start = [server.cpu_seconds() for server in up], time.monotonic()
    time.sleep(IDLE_SECONDS)
    wall = time.monotonic() - start
    return [100 * (server.cpu_seconds() - cpu) / wall for server, cpu in zip(up, before, strict=True)]


if __name__ == "__main__":
    main()
