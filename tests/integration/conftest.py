"""Real server processes on tiny real bundles."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.conftest import tiny_guarantees
from tests.processes import ServerProcess

if TYPE_CHECKING:
    from tests.triton.server import TritonServer

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
    """One server for all tests that do not stop it: models tiny (versions 1 and 3), single and guaranteed."""
    root = tmp_path_factory.mktemp("server")
    third = build_bundle(root / "third", version="3")
    single = build_bundle(root / "single", heads=("original",), name="single")
    guaranteed = build_bundle(root / "guaranteed", name="guaranteed", guarantees=tiny_guarantees())
    running = ServerProcess(root, tiny_bundle, third, single, guaranteed, "--instances", "2")
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
    single = build_bundle(root / "single", heads=("original",), name="single")
    guaranteed = build_bundle(root / "guaranteed", name="guaranteed", guarantees=tiny_guarantees())
    for bundle in (tiny_bundle, third, single, guaranteed):
        write_repository(bundle, repository, instances=2)
    config = repository / "tiny/config.pbtxt"
    served_all = config.read_text().replace("latest {\n    num_versions: 1\n  }", "all {\n  }")
    config.write_text(served_all)
    running = TritonServer(installation, repository, ["tiny", "single", "guaranteed"], root / "log.txt")
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
