"""Imports point one way, and the runtime starts without torch: each module is imported in a fresh interpreter."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAGES = ["kernels", "runtime", "train", "export"]
HEAVY = {
    "kernels": ["torch", "timm", "onnx", "onnxruntime", "grpc", "pydantic", "PIL"],
    "runtime": ["torch", "timm", "onnx", "scipy", "sklearn", "matplotlib"],
    "train": ["onnx", "onnxscript", "tensorrt"],
    "export": [],
}
"""Packages that a stage must not load by being imported."""
ON_DEMAND = {"trivium.kernels.torch_op"}
"""Modules that exist to bring another package in."""


def modules(stage: str) -> list[str]:
    names = [f"trivium.{stage}.{p.stem}" for p in sorted((ROOT / stage).glob("*.py")) if not p.stem.startswith("__")]
    return [f"trivium.{stage}"] + [name for name in names if name not in ON_DEMAND]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_loads_only_stages_to_its_left(stage: str) -> None:
    later = STAGES[STAGES.index(stage) + 1 :]
    code = (
        "import importlib, sys\n"
        f"for name in {modules(stage)!r}: importlib.import_module(name)\n"
        f"wrong = [m for m in {HEAVY[stage] + [f'trivium.{s}' for s in later]!r} if m in sys.modules]\n"
        "print(*wrong)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
