"""The wheel in an environment of its own with the extra `cpu` alone: predict and serve work, and there is no torch."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import venv
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
from numpy.typing import NDArray
from PIL import Image

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(900)


def run(*command: object, **options: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def slim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin directory of a fresh environment that holds the wheel, built from this tree, with [cpu]."""
    directory = tmp_path_factory.mktemp("slim")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", directory, ROOT)
    (wheel,) = directory.glob("*.whl")
    assert wheel.name.startswith("trivium-")
    assert "-py3-none-" in wheel.name, "one wheel must serve every Python"
    venv.create(directory / "venv", with_pip=True)
    binaries = directory / "venv" / "bin"
    run(binaries / "python", "-m", "pip", "install", "--quiet", f"{wheel}[cpu]")
    return binaries


def test_it_holds_neither_torch_nor_sources(slim: Path) -> None:
    packages = {row["name"] for row in json.loads(run(slim / "pip", "list", "--format", "json").stdout)}
    assert "trivium" in packages
    assert not packages & {"torch", "timm", "torchvision", "onnx", "scipy", "scikit-learn"}
    files = run(slim / "pip", "show", "--files", "trivium").stdout
    assert "kernels/libtrivium.so" in files
    assert "runtime/libtrivium_http2.so" in files
    assert "csrc" not in files


def test_predict(slim: Path, tiny_bundle: Path, some_pictures: NDArray[np.uint8], tmp_path: Path) -> None:
    for i, picture in enumerate(some_pictures[:2]):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
    done = run(slim / "trivium", "predict", tiny_bundle, tmp_path / "0.png", tmp_path / "1.png", "--json", cwd=tmp_path)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 2
    assert all(row["label"].startswith("class ") for row in rows)


def test_a_stage_whose_extra_is_missing_answers_with_the_pip_line(slim: Path, tmp_path: Path) -> None:
    for command in ("train", "export", "evaluate", "data"):
        done = subprocess.run(
            [slim / "trivium", command, "x"], capture_output=True, text=True, check=False, cwd=tmp_path
        )
        assert done.returncode == 2
        assert "pip install 'trivium[" in done.stderr
        assert "Traceback" not in done.stderr


def test_serve(slim: Path, tiny_bundle: Path, some_pictures: NDArray[np.uint8], tmp_path: Path) -> None:
    ready = tmp_path / "ready.json"
    command = [
        slim / "trivium",
        "serve",
        tiny_bundle,
        "--grpc-port",
        "0",
        "--http-port",
        "0",
        "--ready-file",
        ready,
        "--grace-seconds",
        "0",
        "--transport",
        "http2",
    ]
    server = subprocess.Popen(
        [str(word) for word in command], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        for _ in range(300):
            if ready.exists() or server.poll() is not None:
                break
            time.sleep(0.1)
        assert ready.exists(), server.communicate(timeout=5)[0]
        address = json.loads(ready.read_text())["grpc"]
        with triton.InferenceServerClient(address) as client:
            tensor = triton.InferInput("image", [1, 32, 32, 3], "UINT8")
            tensor.set_data_from_numpy(some_pictures[:1])
            answer = client.infer("tiny", [tensor]).as_numpy("probabilities")
        assert abs(answer.sum() - 1) < 1e-5
        maps = Path(f"/proc/{server.pid}/maps").read_text()
        assert "libtorch" not in maps
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
    finally:
        server.kill()
        server.wait()
