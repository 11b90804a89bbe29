"""Exactness under fire: more clients than the server can bear, and every answer is its own or one proper status.

TRIVIUM_SOAK_SECONDS makes it last longer than the few seconds of the ordinary tests.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import psutil
import pytest
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2, service_pb2_grpc

from trivium.runtime.bundle import open_bundle, read_manifest, seal
from trivium.runtime.client_codec import read_response
from trivium.runtime.engine import Engine

from .clients import MAX_BATCH, Answers, Asker, Villains, content
from .reloads import Reloader, Timeline

if TYPE_CHECKING:
    from tests.integration.conftest import Serve, ServerProcess

SECONDS = float(os.environ.get("TRIVIUM_SOAK_SECONDS", "15"))
LONG = SECONDS > 60
QUEUE = 24
ASKERS = 2 * QUEUE // 3
"""A good request has 3 pictures on average: so many clients want twice of what the queue holds."""
RELOAD_SECONDS = 2.0 if LONG else 1.0
STOP_SECONDS = 5.0 if LONG else 1.0
GRACE, DRAIN = 0.5, 10.0
IDLE = ("trivium_in_flight_requests", "trivium_running_pictures", "trivium_queue_depth", "trivium_held_bytes")
GROWTH_BYTES = 24 << 20
"""Between the medians of two quarters; a leak of one request's pictures would be a hundred times as much."""


@pytest.fixture(scope="module")
def second_version(build_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle as version 2, with a bias that changes every answer."""
    onnx = pytest.importorskip("onnx")
    root = build_bundle(tmp_path_factory.mktemp("second") / "tiny", version="2")
    model = onnx.load(root / "model.onnx")
    bias = next(one for one in model.graph.initializer if one.name == "heads.bias")
    values = onnx.numpy_helper.to_array(bias)
    bias.CopyFrom(onnx.numpy_helper.from_array(np.roll(values, 1, axis=-1), bias.name))
    onnx.save(model, root / "model.onnx")
    with np.load(root / "golden.npz") as golden:
        image = golden["image"]
    (root / "golden.npz").unlink()
    manifest = read_manifest(root)
    engine = Engine(seal(root, manifest.model_copy(update={"golden": None})), kernels="off")
    np.savez(root / "golden.npz", image=image, **engine.run(image)._asdict())
    seal(root, manifest)
    return root


@pytest.fixture
def bad_version(tiny_bundle: Path, tmp_path: Path) -> Path:
    root = Path(shutil.copytree(tiny_bundle, tmp_path / "bad"))
    model = bytearray((root / "model.onnx").read_bytes())
    model[len(model) // 2] ^= 1
    (root / "model.onnx").write_bytes(model)
    return root


class Gauge(threading.Thread):
    """Looks at a process's memory, threads and open files four times a second."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._process = psutil.Process(pid)
        self._end = threading.Event()
        self.rss: list[int] = []
        self.threads: list[int] = []
        self.files: list[int] = []

    def run(self) -> None:
        while not self._end.wait(0.25):
            self.rss.append(self._process.memory_info().rss)
            self.threads.append(self._process.num_threads())
            self.files.append(self._process.num_fds())

    def stop(self) -> None:
        self._end.set()
        self.join(10)

    def quarters(self, values: list[int]) -> tuple[float, float]:
        """The medians of the second quarter of the time, after the warm-up, and of the last."""
        quarter = len(values) // 4
        return statistics.median(values[quarter : 2 * quarter]), statistics.median(values[3 * quarter :])


def test_every_answer_is_its_own_or_one_proper_status(
    serve: Serve,
    tiny_bundle: Path,
    second_version: Path,
    bad_version: Path,
    slow_bundle: Path,
    some_pictures: NDArray[np.uint8],
    tmp_path: Path,
) -> None:
    answers = Answers([tiny_bundle, second_version, slow_bundle], some_pictures)
    link = tmp_path / "current"
    link.symlink_to(tiny_bundle)
    # pictures of the tiny model are answered on the event loop where nothing waits, and by workers elsewhere
    server = serve(
        link, slow_bundle, "--max-queue", QUEUE, "--max-batch", MAX_BATCH, "--inline-ms", 1,
        "--grace-seconds", GRACE, "--drain-seconds", DRAIN,
    )  # fmt: skip
    reloader = Reloader(
        server.url, "tiny", link, {"1": tiny_bundle, "2": second_version}, bad_version, RELOAD_SECONDS
    )  # fmt: skip
    timelines = {"tiny": reloader.timeline, "slow": Timeline(open_bundle(slow_bundle).manifest.version)}
    villains = Villains(server.url, server.ready["http"], answers.encoded[0], SECONDS)
    askers = [Asker(seed, server.url, answers, timelines, SECONDS) for seed in range(ASKERS)]
    gauge = Gauge(server.process.pid)
    for thread in (villains, reloader, gauge, *askers):
        thread.start()

    time.sleep(SECONDS / 2)
    server.process.send_signal(signal.SIGSTOP)
    time.sleep(STOP_SECONDS)
    server.process.send_signal(signal.SIGCONT)
    woken = time.monotonic()
    for asker in askers:
        asker.join(SECONDS + 120)
        assert not asker.is_alive()
    gauge.stop()
    reloader.stop()
    server.wait_until(lambda: all(server.metric(name) == 0 for name in IDLE))
    report = summary(server, askers, reloader, villains, gauge)
    print("\n" + json.dumps(report, indent=1))

    assert [wrong for asker in askers for wrong in asker.wrong] + reloader.wrong == []
    requests = report["requests"]
    assert set(requests) >= {"OK", "DEADLINE_EXCEEDED", "CANCELLED", "INVALID_ARGUMENT", "NOT_FOUND"}
    assert {key for asker in askers for key in asker.versions} == {("tiny", "1"), ("tiny", "2"), ("slow", "1")}
    assert max(asker.last_ok for asker in askers) > woken
    assert server.metric("trivium_requests_total", code="INTERNAL") == 0
    assert server.metric("trivium_requests_total", code="UNKNOWN") == 0
    assert server.metric("trivium_loads_total", outcome="loaded") == 2 + reloader.turns
    assert server.metric("trivium_loads_total", outcome="refused") == reloader.refusals
    check_executions(report["pictures"])
    first, last = report["rss_bytes"]
    assert last - first < GROWTH_BYTES
    for name in ("threads", "files"):
        first, last = report[name]
        assert last <= first + 4, name

    terminate(server, answers)
    villains.close()


def check_executions(pictures: dict[str, Any]) -> None:
    """What workers took up was for those who got an answer, save what was running when its request ended.

    A picture of a request that ended was taken up before that or never: of the expired and cancelled ones, which waited
    behind a full queue, nearly all never were.
    """
    unanswered = pictures["executed"] - pictures["OK"]
    ended = pictures["DEADLINE_EXCEEDED"] + pictures["CANCELLED"]
    assert 0 <= unanswered <= pictures["INVALID_ARGUMENT"] + pictures["asked without reading"] + ended / 10


def summary(
    server: ServerProcess, askers: list[Asker], reloader: Reloader, villains: Villains, gauge: Gauge
) -> dict[str, Any]:
    """What happened, for the eye and for the checks; pictures by the status of their request."""
    requests = sum((asker.requests for asker in askers), Counter[str]())
    pictures = sum((asker.pictures for asker in askers), Counter[str]())
    executed = int(server.metric("trivium_executed_pictures_total"))
    return {
        "seconds": SECONDS,
        "clients": len(askers),
        "requests": dict(requests.most_common()),
        "pictures": {**pictures, "asked without reading": villains.asked, "executed": executed},
        "turns": reloader.turns,
        "refusals": reloader.refusals,
        "rss_bytes": gauge.quarters(gauge.rss),
        "threads": gauge.quarters(gauge.threads),
        "files": gauge.quarters(gauge.files),
    }


def terminate(server: ServerProcess, answers: Answers) -> None:
    """SIGTERM with a full queue: all that was accepted is answered or refused in words, within grace and drain time."""
    with grpc.insecure_channel(server.url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        chosen = list(range(4))
        message = service_pb2.ModelInferRequest(
            model_name="slow", raw_input_contents=[answers.pictures[chosen].tobytes()]
        )
        message.inputs.add(name="image", datatype="UINT8", shape=[len(chosen), 32, 32, 3])
        calls = [stub.ModelInfer.future(message) for _ in range(12)]
        server.wait_until(lambda: server.metric("trivium_queue_depth") > QUEUE / 3)
        server.process.send_signal(signal.SIGTERM)
        start = time.monotonic()
        codes = Counter(call.code().name for call in calls)
        assert set(codes) <= {"OK", "RESOURCE_EXHAUSTED", "UNAVAILABLE"}, codes
        assert codes["OK"] >= 2
        right = answers.right("slow", "1", None, chosen, False)
        for call in calls:
            if call.code() == grpc.StatusCode.OK:
                assert [content(one) for one in read_response(call.result())] == right
    assert server.process.wait(60) == 0
    # the time that a busy machine takes to end a process comes on top
    assert time.monotonic() - start < GRACE + DRAIN + 10
    log = server.log.read_text()
    assert [line for line in log.splitlines() if " ERROR " in line and "refused: DigestMismatch: " not in line] == []
    assert "Traceback" not in log
