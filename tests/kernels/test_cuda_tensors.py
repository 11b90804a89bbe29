"""The CUDA kernels over torch tensors, on the emulated card, whose memory is the CPU's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trivium.kernels import mc_heads_ref
from trivium.kernels.cuda_tensors import CudaHeads

from .cases import make_inputs

torch = pytest.importorskip("torch", reason="torch is not installed")


@pytest.fixture
def heads(emulated_library: Path) -> Iterator[CudaHeads]:
    heads = CudaHeads(emulated_library)
    heads.library.functions.emulation_configure(1, 9, 1, 0)
    yield heads
    heads.close()
    assert heads.library.functions.emulation_live_bytes() == 0


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_of_every_type(heads: CudaHeads, own: bool, dtype: Any) -> None:
    i = make_inputs(3, 2, 20, 16, 8, own_features=own)
    h, w, b, tau, m = (torch.from_numpy(a) for a in (i.features, i.weights, i.bias, i.temperature, i.masks))
    h = h.to(dtype)
    ref = mc_heads_ref(h.float().numpy(), *i.arguments()[1:])  # type: ignore[arg-type]
    for a, r in zip(heads(h, w, b, tau, m, i.keep, stream=0), ref, strict=True):
        np.testing.assert_allclose(a.numpy(), r, rtol=1e-5, atol=1e-5)


def test_weights_are_packed_once_and_anew_when_written_to(heads: CudaHeads) -> None:
    i = make_inputs(1, 2, 5, 8, 4)
    h, w, b, tau, m = (torch.from_numpy(a) for a in (i.features, i.weights, i.bias, i.temperature, i.masks))
    first = heads(h, w, b, tau, m, i.keep, stream=0)
    live = heads.library.functions.emulation_live_bytes()
    again = heads(h, w, b, tau, m, i.keep, stream=0)
    assert torch.equal(first[0], again[0])
    assert heads.library.functions.emulation_live_bytes() == live
    w.mul_(0)
    assert not torch.equal(heads(h, w, b, tau, m, i.keep, stream=0)[0], first[0])
    for _ in range(10):
        heads(h, w.clone(), b, tau, m, i.keep, stream=0)
    assert len(heads._models) == 4


def test_tensors_of_inference_mode_are_never_remembered(heads: CudaHeads) -> None:
    i = make_inputs(1, 2, 5, 8, 4)
    with torch.inference_mode():
        h, w, b, tau, m = (torch.from_numpy(a) for a in (i.features, i.weights, i.bias, i.temperature, i.masks))
        first = heads(h, w, b, tau, m, i.keep, stream=0)
        w.mul_(0)
        assert not torch.equal(heads(h, w, b, tau, m, i.keep, stream=0)[0], first[0])
    assert len(heads._models) == 0
