"""Our calls and our fakes against NVIDIA's own interface: TensorRT 11 and 10.13, and cuda-bindings."""

from __future__ import annotations

import enum
import inspect
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trivium.runtime.device import card, done
from trivium.runtime.errors import EngineMismatch

from . import cuda, fake
from .stubs import VERSIONS, members, stubs

ROOT = Path(__file__).parents[2]
OURS = ["runtime/tensorrt.py", "runtime/device.py", "export/tensorrt.py"]
PROBE = "import tensorrt as trt\n\ndef misspelt(builder: trt.Builder) -> None:\n    builder.create_netwrk()\n"


@pytest.fixture(scope="module", params=VERSIONS)
def interface(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stubs(request.param, tmp_path_factory.mktemp("stubs"))


def test_pyright_finds_no_fault_in_our_calls(interface: Path, tmp_path: Path) -> None:
    """Beside ours it checks a misspelt call, which it must find; onnx and numpy, which cost minutes, are left out."""
    pyright = shutil.which("pyright", path=str(Path(sys.executable).parent))
    if pyright is None:
        pytest.skip("types of TensorRT were not checked: pip install 'pyright[nodejs]'")
    (tmp_path / "src").symlink_to(ROOT / ".namespace")
    (tmp_path / "typings").mkdir()
    for package in ("tensorrt", "tensorrt_bindings"):
        (tmp_path / "typings" / package).symlink_to(interface / package)
    # without a stub of its own, onnx would be taken for our module of that name
    anything = "from typing import Any\ndef __getattr__(name: str) -> Any: ...\n"
    (tmp_path / "typings" / "onnx").mkdir()
    (tmp_path / "typings" / "onnx" / "__init__.pyi").write_text(anything)
    (tmp_path / "probe.py").write_text(PROBE)
    settings = {
        "include": [*(f"src/trivium/{path}" for path in OURS), "probe.py"],
        "extraPaths": ["src"],
        "pythonVersion": "3.10",
        "venvPath": str(tmp_path),
        "venv": "none",
        "reportMissingImports": "none",
        "reportMissingModuleSource": "none",
    }
    (tmp_path / "none" / "lib" / "python3.10" / "site-packages").mkdir(parents=True)
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    ran = subprocess.run(
        [pyright, "--project", ".", "--outputjson"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    report = json.loads(ran.stdout)
    assert report["summary"]["filesAnalyzed"] == len(OURS) + 1
    found = [(Path(d["file"]).name, d["message"]) for d in report["generalDiagnostics"] if d["severity"] == "error"]
    assert [name for name, _ in found] == ["probe.py"], found
    assert "create_netwrk" in found[0][1]


def fakes() -> Iterator[tuple[str, type]]:
    for name, value in vars(fake).items():
        if isinstance(value, type) and value.__module__ == fake.__name__:
            yield name, value
    yield "ILogger.Severity", fake.ILogger.Severity


def test_the_fake_has_nothing_that_tensorrt_has_not(interface: Path) -> None:
    real = members(interface)
    own = {"INetworkDefinition": {"model"}, "Runtime": {"machine", "engine"}, "Builder": {"fails", "configs", "flags"}}
    own |= {"ICudaEngine": {"capturable", "ready"}, "OnnxParser": {"refused"}}
    for name, double in fakes():
        assert name in real, name
        if issubclass(double, enum.IntEnum):
            assert set(double.__members__) <= set(real[name]), name
            continue
        for member, value in vars(double).items():
            if member.startswith("_") or member in own.get(name, ()) or isinstance(value, type):
                continue
            assert member in real[name], f"{name}.{member}"
            if inspect.isfunction(value):
                parameters = list(inspect.signature(value).parameters)[1:]
                overloads = real[name][member]
                assert parameters in overloads or ["*"] in overloads, f"{name}.{member}: {parameters}, {overloads}"
    for name in ("Builder", "Runtime", "OnnxParser"):
        parameters = list(inspect.signature(getattr(fake, name)).parameters)
        assert parameters in real[name]["__init__"]


def real_cuda() -> Any:
    return pytest.importorskip(
        "cuda.bindings.runtime", reason="cuda-bindings was not checked: pip install 'trivium[tensorrt]'"
    )


def test_the_fake_card_has_nothing_that_cuda_has_not() -> None:
    real = real_cuda()
    machine = cuda.Machine()
    for name, value in vars(machine.module()).items():
        if not name.startswith("cuda"):
            continue
        if isinstance(value, type) and issubclass(value, enum.IntEnum):
            assert {member.name: int(member) for member in value} == {
                member.name: int(getattr(getattr(real, name), member.name)) for member in value
            }
        elif callable(value):
            line = (getattr(real, name).__doc__ or "").splitlines()[0]
            given = re.fullmatch(rf"{name}\((.*)\)", line)
            assert given is not None, line
            names = [re.split(r"[ :]+", part.split(":")[0].strip())[-1] for part in given[1].split(",") if part]
            assert names == list(inspect.signature(value).parameters), line
        else:
            assert value == int(getattr(real, name)), name


def test_real_cuda_bindings_say_that_there_is_no_card() -> None:
    real = real_cuda()
    if int(real.cudaGetDeviceCount()[0]) == 0 and real.cudaGetDeviceCount()[1]:
        assert done(real.cudaDriverGetVersion(), "ask") >= 12000
        assert card().compute_capability
        return
    with pytest.raises(EngineMismatch, match=r"CUDA could not count the cards: cudaError|no CUDA card") as caught:
        card()
    assert caught.value.reason == "no-card"
