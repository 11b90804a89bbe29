"""The commands of the Dockerfiles, carried out: built, started by nobody, healthy, asked, ended by their signal."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
from numpy.typing import NDArray
from tests.processes import free_ports
from tests.triton.server import Unavailable, unpack

from trivium.export.triton import write_repository

from .dockerfile import Stage, parse
from .rehearsal import ROOT, USER, Rehearsal

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
DOCKER = ROOT / "docker"
START_SECONDS = 240


@pytest.fixture(scope="module")
def python() -> Path:
    """The directory of an interpreter that stands for the images': it makes environments, and nobody may run it."""
    for candidate in ("/usr/bin/python3", sys._base_executable):  # type: ignore[attr-defined]
        program = Path(candidate)
        words = [program, "-c", "import ensurepip, venv, sys; sys.exit(sys.version_info < (3, 10))"]
        nobody = {"user": USER, "group": USER, "extra_groups": []} if os.geteuid() == 0 else {}
        with contextlib.suppress(OSError):
            if subprocess.run(words, capture_output=True, cwd="/", check=False, **nobody).returncode == 0:  # type: ignore[call-overload]
                return program.parent
    pytest.skip("no Python >= 3.10 with ensurepip that another user may run (Debian: apt-get install python3-venv)")


@pytest.fixture
def root() -> Iterator[Path]:
    """What stands for an image's /, where every user may read; pytest's own directories are for one user alone."""
    with tempfile.TemporaryDirectory(prefix="trivium-image-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder) / "root"


def healthy(rehearsal: Rehearsal, words: list[str], **changes: str) -> bool:
    return rehearsal.process(words, **changes).wait(60) == 0


def wait_until_healthy(rehearsal: Rehearsal, server: subprocess.Popen[bytes], words: list[str], **changes: str) -> None:
    for _ in range(START_SECONDS):
        if healthy(rehearsal, words, **changes):
            return
        assert server.poll() is None, rehearsal.log.read_text(errors="replace")[-8000:]
        time.sleep(1)
    pytest.fail(f"not healthy within {START_SECONDS} s")


def ask(address: str, picture: NDArray[np.uint8], model: str) -> NDArray[np.float32]:
    with triton.InferenceServerClient(address) as client:
        tensor = triton.InferInput("image", list(picture.shape), "UINT8")
        tensor.set_data_from_numpy(picture)
        answer: NDArray[np.float32] = client.infer(model, [tensor], client_timeout=60).as_numpy("probabilities")
        return answer


def written(root: Path) -> set[tuple[str, int]]:
    """Every file of an image with the moment of its last change."""
    return {(str(path), path.lstat().st_mtime_ns) for path in root.rglob("*") if path.is_symlink() or path.is_file()}


@contextlib.contextmanager
def started(rehearsal: Rehearsal, image: Stage, *more: str, **changes: str) -> Iterator[subprocess.Popen[bytes]]:
    server = rehearsal.process([*image.command("ENTRYPOINT"), *more], **changes)
    try:
        yield server
    finally:
        server.kill()
        server.wait()


def test_cpu(python: Path, root: Path, tiny_bundle: Path, some_pictures: NDArray[np.uint8]) -> None:
    rehearsal = Rehearsal(DOCKER / "Dockerfile.cpu", root, python)
    image = rehearsal.build()
    assert len(rehearsal.done) >= 7
    assert not any(path.name == "pip" for path in (root / "opt/trivium").rglob("bin/*")), "no installer in the image"
    copy_readable(tiny_bundle, root / "bundle")
    before = written(root)
    grpc, http = free_ports(2)
    ports = {"TRIVIUM_GRPC_PORT": str(grpc), "TRIVIUM_HTTP_PORT": str(http)}
    changes = ports | {"TRIVIUM_INSTANCES": "1", "TRIVIUM_GRACE_SECONDS": "1"}
    check = image.command("HEALTHCHECK")
    assert not healthy(rehearsal, check, **changes), "nothing runs yet"
    with started(rehearsal, image, **changes) as server:
        wait_until_healthy(rehearsal, server, check, **changes)
        if os.geteuid() == 0:
            assert re.search(rf"^Uid:\t{USER}\t", Path(f"/proc/{server.pid}/status").read_text(), re.MULTILINE)
        answer = ask(f"127.0.0.1:{ports['TRIVIUM_GRPC_PORT']}", some_pictures[:1], "tiny")
        assert abs(answer.sum() - 1) < 1e-5
        server.terminate()
        assert server.wait(60) == 0
    assert not healthy(rehearsal, check, **changes)
    assert written(root) == before, "the server wrote into its image"


def test_triton(root: Path, tiny_bundle: Path, some_pictures: NDArray[np.uint8]) -> None:
    try:
        installation = unpack()
    except Unavailable as reason:
        pytest.skip(str(reason))
    # the server is this machine's, and with it the Python that its back end is made for
    python = Path(sys._base_executable).parent  # type: ignore[attr-defined]
    rehearsal = Rehearsal(DOCKER / "Dockerfile.triton", root, python)
    image = rehearsal.build()
    write_repository(tiny_bundle, root / "models", instances=1)
    make_readable(root / "models")
    rehearsal.environment["LD_LIBRARY_PATH"] = installation.environment()["LD_LIBRARY_PATH"]
    rehearsal.environment["PATH"] += f":{installation.tritonserver / 'bin'}"
    http, grpc, metrics = free_ports(3)
    ports = [f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}"]
    check = [word.replace("8000", str(http)) for word in image.command("HEALTHCHECK")]
    back_ends = f"--backend-directory={installation.tritonserver / 'backends'}"
    rehearsal.nobody = readable(python) and readable(installation.tritonserver)
    with started(rehearsal, image, *ports, back_ends) as server:
        wait_until_healthy(rehearsal, server, check)
        answer = ask(f"127.0.0.1:{grpc}", some_pictures[:1], "tiny")
        assert abs(answer.sum() - 1) < 1e-5
        server.terminate()
        assert server.wait(90) == 0


@pytest.mark.parametrize(("name", "python_version"), [("cpu", "3.11"), ("gpu", "3.12"), ("triton", "3.10")])
def test_the_exact_versions_exist_for_the_image(name: str, python_version: str, tmp_path: Path) -> None:
    text = (DOCKER / f"requirements/{name}.txt").read_text(encoding="utf-8")
    # with hashes pip would download it all to see them
    exact = tmp_path / "exact.txt"
    exact.write_text("\n".join(re.findall(r"^[\w.-]+==[^\s\\]+", text, re.MULTILINE)), encoding="utf-8")
    words = ["install", "--dry-run", "--quiet", "--no-deps", "--ignore-installed", "--only-binary=:all:"]
    words += ["--python-version", python_version, "--target", str(tmp_path / "none"), "--requirement", str(exact)]
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in (34, 28, 27, 17)] + [
        "--platform=manylinux2014_x86_64"
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *words, *platforms], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_gpu_image_differs_from_the_rehearsed_one_by_its_base_alone() -> None:
    """Its commands need nvcc and a card; they are those of the CPU's image but for these words."""

    def commands(name: str) -> list[str]:
        return [text for stage in parse(DOCKER / name) for word, text in stage.instructions if word in ("RUN", "COPY")]

    cpu, gpu = commands("Dockerfile.cpu"), commands("Dockerfile.gpu")
    own = [
        text.replace("gpu.txt", "cpu.txt").replace("--config-settings=cmake.define.TRIVIUM_CUDA=ON ", "")
        for text in gpu
        if "apt-get" not in text
    ]
    assert own == [text for text in cpu if "apt-get" not in text]


def copy_readable(source: Path, target: Path) -> None:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    make_readable(target)


def make_readable(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def readable(path: Path) -> bool:
    """Whether any user gets there."""
    return all(part.stat().st_mode & 0o001 for part in (path, *path.resolve().parents))
