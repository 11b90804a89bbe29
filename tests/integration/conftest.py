"""Real server processes on tiny real bundles."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests import processes

if TYPE_CHECKING:
    from tests.triton.server import TritonServer

START_SECONDS = 60
"""A loaded machine is slow to start anything; tests of the start-up time look at the process's own clock."""


class ServerProcess:
    """`trivium serve` as a process, with ports of the system's choice."""

    def __init__(self, directory: Path, *arguments: object, environment: dict[str, str] | None = None) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        ready = directory / "ready.json"
        command = [sys.executable, "-m", "trivium", "serve", *map(str, arguments)]
        command += ["--grpc-port", "0", "--http-port", "0", "--ready-file", str(ready)]
        self.log = directory / "stderr.txt"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, env={**os.environ, **(environment or {})}
            )
        end = time.monotonic() + START_SECONDS
        while not ready.exists():
            if self.process.poll() is not None or time.monotonic() > end:
                self.process.kill()
                raise RuntimeError(f"the server did not start:\n{self.log.read_text()}")
            time.sleep(0.02)
        self.ready = json.loads(ready.read_text())
        self.url: str = self.ready["grpc"]

    def get(self, path: str, method: str = "GET") -> tuple[int, str]:
        """Status and body of an HTTP request."""
        request = urllib.request.Request(f"http://{self.ready['http']}{path}", method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metrics(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        """Every sample by name and labels."""
        families = text_string_to_metric_families(self.get("/metrics")[1])
        return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the samples that have these labels."""
        wanted = set(labels.items())
        return sum(value for (found, has), value in self.metrics().items() if found == name and wanted <= has)

    def wait_until(self, condition: Callable[[], bool], seconds: float = 30.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "the server did not get there in time"
            time.sleep(0.005)

    def stop(self, number: signal.Signals = signal.SIGINT, seconds: float = 30.0) -> int:
        """Send a signal and wait; the exit status."""
        try:
            return processes.stop(self.process, number, seconds)
        finally:
            assert self.process.stdout is not None
            self.process.stdout.close()


Serve = Callable[..., ServerProcess]


@pytest.fixture(scope="session")
def server_process() -> type[ServerProcess]:
    """The class, for fixtures whose servers outlive a test."""
    return ServerProcess


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """serve(bundle, "--flag", value, ...) starts a server that ends with the test."""
    started: list[ServerProcess] = []

    def start(*arguments: object, environment: dict[str, str] | None = None) -> ServerProcess:
        started.append(ServerProcess(tmp_path / f"server{len(started)}", *arguments, environment=environment))
        return started[-1]

    yield start
    for server in started:
        server.stop(signal.SIGKILL)


@pytest.fixture(scope="session")
def server(
    tiny_bundle: Path,
    single_head_bundle: Path,
    build_bundle: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[ServerProcess]:
    """One server for all tests that do not stop it: models tiny (versions 1 and 3) and single."""
    root = tmp_path_factory.mktemp("server")
    third = build_bundle(root / "third", version="3")
    single = build_bundle(root / "single", heads=("original",), name="single")
    running = ServerProcess(root, tiny_bundle, third, single, "--instances", "2")
    yield running
    assert running.stop() == 0, running.log.read_text()


@pytest.fixture(scope="session")
def triton_server(
    tiny_bundle: Path,
    build_bundle: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[TritonServer]:
    """A real tritonserver with the models of `server`, from a repository that export wrote."""
    from tests.triton.server import TritonServer, Unavailable, find

    from trivium.export.triton import write_repository

    try:
        installation = find()
    except Unavailable as reason:
        pytest.skip(str(reason))
    root = tmp_path_factory.mktemp("triton")
    repository = root / "models"
    third = build_bundle(root / "third", version="3")
    for bundle in (tiny_bundle, third, build_bundle(root / "single", heads=("original",), name="single")):
        write_repository(bundle, repository, instances=2)
    config = repository / "tiny/config.pbtxt"
    served_all = config.read_text().replace("latest {\n    num_versions: 1\n  }", "all {\n  }")
    config.write_text(served_all)
    running = TritonServer(installation, repository, ["tiny", "single"], root / "log.txt")
    yield running
    running.stop()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student with untrained but differing heads, and scikit-learn's digits to calibrate it on."""
    torch = pytest.importorskip("torch", reason="students need torch: pip install 'trivium[export]'")
    from trivium.runtime.bundle import Dropout, Preprocessing
    from trivium.train.checkpoint import Architecture, CheckpointMeta, Cost, save_checkpoint
    from trivium.train.data.pictures import DataSpec, load_pictures
    from trivium.train.models.backbone import create, split
    from trivium.train.models.student import Student

    torch.manual_seed(0)
    heads = ("clean", "robust", "combined")
    settings = Preprocessing(height=28, width=28, resize=28, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    pictures = load_pictures(DataSpec(kind="digits", calibration=0.2, limit=60), "calibration", settings)
    name = "trivium_resnet10_tiny"
    student = Student(split(create(name, 10), 28, 28), heads, 1, "copied", 0.5)
    for parameter in student.heads.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    meta = CheckpointMeta(
        name="digits",
        classes=pictures.classes,
        heads=list(heads),
        preprocessing=settings,
        dropout=Dropout(rate=0.5, passes=8, seed=3),
        architecture=Architecture(model=name, depth=1, tail="copied"),
        data=pictures.describe(),
        recipe={"data": {"kind": "digits"}, "original": {"weights": "/home/someone/weights.pth"}},
        costs={"student": Cost(cpu_seconds=1.5)},
        packages={"torch": torch.__version__},
        weights_sha256="",
    )
    return save_checkpoint(tmp_path_factory.mktemp("checkpoints") / "student", student, meta)
