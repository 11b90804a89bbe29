"""The library's surface: its symbols, its refusals, its choice of instruction set."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from trivium.kernels import MCHeads, backend, mc_heads, pays
from trivium.kernels.native import TOP_CLASSES, library, library_path

from .cases import make_inputs

CSRC = Path(__file__).parents[2] / "kernels" / "csrc"


def declared(header: str, macro: str) -> set[str]:
    return set(re.findall(rf"^{macro} [\w\s*]*?\*?(\w+)\(", (CSRC / header).read_text(), re.MULTILINE))


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not on the PATH")
def test_exported_symbols_are_the_headers() -> None:
    listing = subprocess.run(
        ["nm", "-D", "--defined-only", str(library_path())], capture_output=True, text=True, check=True
    ).stdout
    exported = {line.split()[-1] for line in listing.splitlines()}
    expected = declared("mcheads.h", "MCHEADS_API")
    assert "mcheads_run" in expected
    assert "RegisterCustomOps" in expected
    if any(name.startswith("mcheads_cuda_") for name in exported):
        expected |= declared("mcheads_cuda.h", "MCHEADS_CUDA_API")
    assert exported == expected


def test_constants_agree_with_the_header() -> None:
    assert f"#define MCHEADS_TOP {TOP_CLASSES}\n" in (CSRC / "mcheads.h").read_text()


@pytest.mark.parametrize(("name", "line"), [("neon9", "no kernels for neon9"), ("x" * 100, "no kernels for xxx")])
def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, line: str) -> None:
    monkeypatch.setenv("TRIVIUM_ISA", name)
    with pytest.raises(ValueError, match=line):
        backend()
    with pytest.raises(ValueError, match=line):
        mc_heads(*make_inputs(1, 1, 2, 3, 4).arguments())


def test_the_instruction_set_is_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(1, 1, 2, 3, 4)
    monkeypatch.setenv("TRIVIUM_ISA", "scalar")
    heads = MCHeads(*inputs.arguments()[1:])
    monkeypatch.delenv("TRIVIUM_ISA")
    assert heads.isa == "scalar"
    assert backend() in ("scalar", "avx2", "avx512")


def test_arguments_that_do_not_fit_are_refused() -> None:
    i = make_inputs(2, 2, 3, 8, 4)
    with pytest.raises(ValueError, match="features must be"):
        mc_heads(i.features[:, :7], i.weights, i.bias, i.temperature, i.masks, 0.5)
    with pytest.raises(ValueError, match="weights must be"):
        mc_heads(i.features, i.weights[0], i.bias, i.temperature, i.masks, 0.5)
    with pytest.raises(ValueError, match="masks must be 0 or 1"):
        mc_heads(i.features, i.weights, i.bias, i.temperature, i.masks * 2, 0.5)
    with pytest.raises(ValueError, match="temperatures must be positive"):
        mc_heads(i.features, i.weights, i.bias, i.temperature * 0, i.masks, 0.5)
    with pytest.raises(ValueError, match="keep must lie"):
        mc_heads(i.features, i.weights, i.bias, i.temperature, i.masks, 0.0)
    for threads in (0, 257):
        with pytest.raises(ValueError, match="threads must be"):
            mc_heads(*i.arguments(), threads=threads)


def test_an_empty_batch_is_no_error() -> None:
    i = make_inputs(1, 2, 3, 8, 4)
    out = mc_heads(i.features[:0], *i.arguments()[1:])
    assert [a.shape for a in out] == [(0, 2, 3), (0, 2), (0, 2), (0, 2, 2), (0, 2)]


def test_scratch_is_checked() -> None:
    i = make_inputs(1, 1, 3, 8, 4)
    heads = MCHeads(*i.arguments()[1:])
    lib = library()
    size = lib.mcheads_scratch(heads._handle, 1, 1, 1)
    buffer = np.empty(size + 128, np.uint8)
    aligned = -(-buffer.ctypes.data // 64) * 64
    out = np.empty(64, np.float32).ctypes.data
    run = [heads._handle, i.features.ctypes.data, 1, 1, out, out, out, out, out]
    assert lib.mcheads_run(*run, aligned, size - 1, 1) == 1
    assert lib.mcheads_error() == b"scratch is too small"
    assert lib.mcheads_run(*run, aligned + 4, size, 1) == 1
    assert lib.mcheads_error() == b"scratch must be aligned to 64 bytes"
    assert lib.mcheads_run(*run, None, size, 1) == 1
    assert lib.mcheads_run(*run, aligned, size, 1) == 0


def test_a_handle_is_freed_with_its_model() -> None:
    i = make_inputs(1, 1, 3, 8, 4)
    assert isinstance(MCHeads(*i.arguments()[1:])._handle, ctypes.c_void_p)


@pytest.mark.parametrize(("isa", "expected"), [("scalar", False), ("avx2", True), ("avx512", True)])
def test_the_operator_pays_where_vectors_are_wide(monkeypatch: pytest.MonkeyPatch, isa: str, expected: bool) -> None:
    monkeypatch.setenv("TRIVIUM_ISA", isa)
    try:
        assert pays() is expected
    except ValueError as error:
        pytest.skip(str(error))
