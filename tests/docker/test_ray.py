"""docker/ray and Ray Train: messages that can be pickled; the application and a training run in a real Ray."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from numpy.typing import NDArray
from tests.processes import free_ports
from tritonclient.grpc import service_pb2

from trivium.runtime import Client
from trivium.runtime.errors import InvalidRequest, UnknownModel
from trivium.runtime.predictor import Predictor

RAY = Path(__file__).parents[2] / "docker/ray"
TRAINING = Path(__file__).parents[2] / "docker/training"
START = """
import signal, sys, threading
import ray, serve_app
from ray import serve
from ray.serve.config import gRPCOptions

bundle, port, http = sys.argv[1:]
told = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: told.set())
ray.init(num_cpus=1, include_dashboard=False, logging_level="error")
servicer = "tritonclient.grpc.service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server"
serve.start(
    http_options={"host": "127.0.0.1", "port": int(http)},
    grpc_options=gRPCOptions(port=int(port), grpc_servicer_functions=[servicer]),
)
serve.run(serve_app.build(serve_app.Arguments(bundle=bundle)))
print("ready", flush=True)
told.wait()
serve.shutdown()
ray.shutdown()
"""


def test_messages_survive_pickling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray does it to each; tritonclient alone cannot."""
    message = service_pb2.ModelInferRequest(model_name="a")
    monkeypatch.delitem(sys.modules, "grpc_service_pb2", raising=False)
    with pytest.raises(pickle.PicklingError, match="grpc_service_pb2"):
        pickle.dumps(message)
    monkeypatch.syspath_prepend(str(RAY))
    try:
        assert pickle.loads(pickle.dumps(message)) == message
    finally:
        sys.modules.pop("grpc_service_pb2", None)


@pytest.fixture
def application(tiny_bundle: Path) -> Iterator[str]:
    """The address of an application with one replica."""
    if find_spec("ray") is None or find_spec("ray.serve") is None or find_spec("starlette") is None:
        pytest.skip("Ray Serve is not installed: pip install 'ray[serve]'")
    ports = [str(port) for port in free_ports(2)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(RAY), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        # on a busy machine Ray ends proxies that take longer than its 5 s to start, again and again
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    }
    words = [sys.executable, "-c", START, str(tiny_bundle), *ports]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment, cwd=RAY)
    try:
        assert process.stdout is not None
        assert any(line.strip() == "ready" for line in process.stdout), "Ray Serve did not start"
        yield f"127.0.0.1:{ports[0]}"
    finally:
        process.terminate()
        try:
            process.wait(120)
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_application_answers_as_the_server_does(
    application: str, tiny_bundle: Path, some_pictures: NDArray[np.uint8]
) -> None:
    local = Predictor.load(tiny_bundle)
    with Client(application, timeout=60) as client:
        assert list(client.metadata().heads) == local.manifest.heads
        for found, picture in zip(client.predict(list(some_pictures)), some_pictures, strict=True):
            assert np.array_equal(found.probabilities, local.infer(picture).probabilities)
        with pytest.raises(InvalidRequest, match="router"):
            client.predict(some_pictures[:1], router="nobody")
    with Client(application, "other", timeout=60) as client, pytest.raises(UnknownModel, match="no model 'other'"):
        client.predict(list(some_pictures[:1]))


TRAIN = """
import sys
import ray
import ray_train

ray.init(num_cpus=4, include_dashboard=False, logging_level="error")
ray_train.run()
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_training_run_outlives_a_worker(tmp_path: Path) -> None:
    """Ray Train starts both again, and the run ends with the weights of an undisturbed one."""
    if any(find_spec(name) is None for name in ("torch", "ray", "tensorboardX")):
        pytest.skip("Ray Train is not installed: pip install 'ray[train]'")
    from tests.unit.test_distributed import RECIPE, close

    recipe, out = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    path = os.pathsep.join([str(TRAINING), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    more = ["--set", "student.schedule.epochs=6"]
    words = ["--workers", "2", "--storage", str(tmp_path / "storage"), "--", str(recipe), "--out", str(out), *more]
    with (tmp_path / "log.txt").open("w") as log:
        process = subprocess.Popen([sys.executable, "-c", TRAIN, *words], stdout=log, stderr=log, env=environment)
        try:
            end = time.monotonic() + 300
            while not (out / "student/epoch-0001/state.json").exists():
                assert process.poll() is None, (tmp_path / "log.txt").read_text()
                assert time.monotonic() < end
                time.sleep(0.01)
            workers = [one for one in psutil.Process(process.pid).children(recursive=True) if is_worker(one)]
            assert len(workers) == 2
            workers[1].kill()
            assert not (out / "checkpoint.json").exists()
            assert process.wait(300) == 0, (tmp_path / "log.txt").read_text()
        finally:
            process.kill()
    assert "student: resumed after epoch" in (tmp_path / "log.txt").read_text()
    alone = [sys.executable, "-m", "trivium", "train", str(recipe), "--out", str(tmp_path / "alone"), *more]
    assert subprocess.run(alone, capture_output=True, check=False).returncode == 0
    close(out, tmp_path / "alone", 1e-4)


def is_worker(process: psutil.Process) -> bool:
    """Whether it is one of those that Ray gave the training to."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return any("RayTrainWorker" in word for word in process.cmdline())
    return False
