"""Real tritonserver processes on repositories that export wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.triton.server import Installation, TritonServer, Unavailable, find

from trivium.export.triton import write_repository

Start = Callable[..., TritonServer]


@pytest.fixture(scope="session")
def installation() -> Installation:
    try:
        return find()
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def repositories(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny bundle as exported for a CPU, and as exported for a GPU but told to run on the CPU."""
    root = tmp_path_factory.mktemp("repositories")
    found = {"one by one": root / "cpu", "batched": root / "batched"}
    write_repository(tiny_bundle, found["one by one"], instances=2)
    write_repository(tiny_bundle, found["batched"], device="cuda")
    config = found["batched"] / "tiny/config.pbtxt"
    config.write_text(config.read_text().replace("KIND_GPU", "KIND_CPU").replace('"cuda"', '"cpu"'))
    return found


@pytest.fixture
def start(installation: Installation, tmp_path: Path) -> Iterator[Start]:
    """start(repository, [model], ...) starts a tritonserver that ends with the test."""
    started: list[TritonServer] = []

    def run(repository: Path, models: list[str], *arguments: str, python: Installation | None = None) -> TritonServer:
        log = tmp_path / f"triton{len(started)}.txt"
        started.append(TritonServer(python or installation, repository, models, log, arguments))
        return started[-1]

    yield run
    for server in started:
        server.stop()
