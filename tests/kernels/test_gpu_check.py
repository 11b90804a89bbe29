"""make gpu-check's own code: its verdicts and its tables, over the emulated card."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from tests.gpu_check import card, parity, times  # noqa: E402
from tests.gpu_check import report as program  # noqa: E402

from trivium.kernels.cuda import CudaLibrary  # noqa: E402

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def library(emulated_library: Path) -> CudaLibrary:
    library = CudaLibrary(emulated_library)
    library.functions.emulation_configure(1, 9, 1, 0)
    return library


def test_right_kernels_pass(library: CudaLibrary) -> None:
    lines, wrong = program.run_parity(library, parity.SMALL, CPU, graphs=False)
    assert wrong == []
    assert lines[0].startswith(f"{2 * len(parity.SMALL)} runs against the float64 reference")
    assert parity.check_streams(library, CPU, parity.SMALL[0], rounds=2) == ""


def test_wrong_answers_are_seen() -> None:
    case = parity.Case(3, 2, 6, 8, 4, poisoned=True)
    ref = parity.reference(*parity.draw(case, 1), "float32")
    assert parity.compare(ref, ref, False) == (0.0, 0.0, "")
    finite = np.nan_to_num(ref.divergence)
    assert parity.compare(ref._replace(divergence=finite), ref, False)[2] == "divergence: NaN in the wrong places"
    far = ref._replace(energy=ref.energy + 1e-3)
    assert parity.compare(far, ref, False)[2].startswith("statistics are off by")
    assert parity.compare(ref._replace(probabilities=ref.probabilities + 1e-5), ref, False)[2].startswith("prob")
    assert parity.compare(ref._replace(probabilities=ref.probabilities + 1e-5), ref, True)[2] == ""


def test_writing_too_little_or_too_much_is_seen(library: CudaLibrary) -> None:
    features, arrays = parity.draw(parity.Case(2, 2, 6, 8, 4), 1)
    with card.Heads(library, features, *arrays, parity.FLOAT32) as heads:
        with pytest.raises(card.UnwrittenOutput, match="probabilities: not written in whole"):
            heads.statistics()
        heads.run()
        heads.buffers[3][0] = 0.0
        with pytest.raises(card.UnwrittenOutput, match="divergence: written beyond its end"):
            heads.statistics()


def test_tables_have_a_row_for_each_shape(library: CudaLibrary) -> None:
    rows = times.measure(library, CPU, [(2, 16, 10, 4), (1, 8, 130, 2)], with_compile=False)
    table = program.kernel_table(rows)
    assert [line.split("|")[1:5] for line in table[-2:]] == [
        [" 2 ", " 16 ", " 10 ", " 4 "],
        [" 1 ", " 8 ", " 130 ", " 2 "],
    ]
    assert all(line.count("|") == table[-3].count("|") for line in table[-4:])
    tiny = times.VisionTransformer(size=32, width=32, depth=1, heads=2)
    backbone = program.backbone_table(times.measure_backbone(library, CPU, [1, 2], classes=10, model=tiny))
    assert [line.split("|")[1] for line in backbone[-2:]] == [" 1 ", " 2 "]


def test_torch_composite_is_the_reference() -> None:
    features, arrays = parity.draw(parity.Case(3, 3, 20, 16, 8), 1)
    w, b, tau, m = (torch.from_numpy(a) for a in arrays[:4])
    out = times.composite(times.Tensors(features, w.flatten(0, 1), b, tau, m / arrays.keep))
    for a, r in zip(out, parity.reference(features, arrays, "float32"), strict=True):
        np.testing.assert_allclose(a.numpy(), r, rtol=1e-4, atol=1e-5)


def test_a_machine_without_a_card_is_told_so_in_one_line() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA card")
    environment = {**os.environ, "PYTHONPATH": ".namespace"}
    command = [sys.executable, "-m", "tests.gpu_check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert result.returncode == 1
    assert result.stderr == "gpu-check: torch finds no CUDA device\n"


def test_a_python_without_torch_is_told_so_in_one_line() -> None:
    environment = {**os.environ, "PYTHONPATH": ".namespace"}
    command = [sys.executable, "-S", "-m", "tests.gpu_check"]  # -S: no site-packages
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert result.returncode == 1
    assert "has no torch and no numpy" in result.stderr
    assert result.stderr.count("\n") == 1
