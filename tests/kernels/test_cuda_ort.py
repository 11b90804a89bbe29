"""ONNX Runtime runs the CUDA provider's operator, as the CPU provider's over the emulated card."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trivium.kernels import HeadStatistics, dropout_masks, mc_heads_ref

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

INPUTS = ("features", "weights", "bias", "temperature", "masks")
Model = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, float]


@pytest.fixture
def card(emulated_library: Path) -> Iterator[ctypes.CDLL]:
    card = ctypes.CDLL(str(emulated_library))
    card.emulation_live_bytes.restype = card.emulation_operators.restype = ctypes.c_int64
    card.emulation_fail.argtypes = [ctypes.c_int64]
    card.emulation_configure(1, 9, 1, 0)
    yield card
    card.emulation_fail(-1)
    gc.collect()
    assert card.emulation_live_bytes() == 0


def draw(heads: int, classes: int, units: int, passes: int) -> Model:
    rng = np.random.default_rng(7)
    return (
        rng.normal(size=(heads, classes, units)).astype(np.float32),
        rng.normal(size=(heads, classes)).astype(np.float32),
        rng.uniform(0.5, 2.0, heads).astype(np.float32),
        dropout_masks(passes, units, 0.5, 3),
        0.5,
    )


def session(library: Path, model: Model, own: bool = False, constant: bool = True) -> Any:
    """A graph of the one node; with constant=False everything is an input."""
    helper, proto = onnx.helper, onnx.TensorProto
    shape = ["N", *model[0].shape[:1], model[0].shape[2]] if own else ["N", model[0].shape[2]]
    inputs = [helper.make_tensor_value_info("features", proto.FLOAT, shape)]
    initializers = []
    for name, array in zip(INPUTS[1:], model[:4], strict=True):
        if constant:
            initializers.append(onnx.numpy_helper.from_array(array, name))
        else:
            kind = proto.UINT8 if name == "masks" else proto.FLOAT
            inputs.append(helper.make_tensor_value_info(name, kind, array.shape))
    outputs = [helper.make_tensor_value_info(n, proto.FLOAT, None) for n in HeadStatistics._fields]
    node = helper.make_node("MCHeads", INPUTS, HeadStatistics._fields, domain="ai.trivium", keep=model[4])
    graph = helper.make_graph([node], "heads", inputs, outputs, initializers)
    domains = [helper.make_opsetid("", 18), helper.make_opsetid("ai.trivium", 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.register_custom_ops_library(str(library))
    data = helper.make_model(graph, opset_imports=domains, ir_version=9).SerializeToString()
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def assert_close(out: list[np.ndarray], ref: HeadStatistics) -> None:
    for a, r in zip(out, ref, strict=True):
        np.testing.assert_allclose(a, r, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("constant", [False, True])
def test_batches_of_any_size(card: ctypes.CDLL, emulated_library: Path, own: bool, constant: bool) -> None:
    model = draw(3, 10, 12, 8)
    s = session(emulated_library, model, own, constant)
    rest = {} if constant else dict(zip(INPUTS[1:], model[:4], strict=True))
    before = card.emulation_operators()
    for batch in (2, 5, 1, 0):
        h = np.random.default_rng(batch).normal(size=(batch, 3, 12) if own else (batch, 12)).astype(np.float32)
        assert_close(s.run(None, {"features": h, **rest}), mc_heads_ref(h, *model))
    assert card.emulation_operators() - before == 3  # an empty batch asks nothing of the card


def test_threads_may_share_a_session(card: ctypes.CDLL, emulated_library: Path) -> None:
    model = draw(2, 20, 16, 16)
    s = session(emulated_library, model)
    features = [np.random.default_rng(i).normal(size=(1 + i % 3, 16)).astype(np.float32) for i in range(12)]
    with ThreadPoolExecutor(4) as pool:
        outs = list(pool.map(lambda h: s.run(None, {"features": h}), features))
    for h, out in zip(features, outs, strict=True):
        assert_close(out, mc_heads_ref(h, *model))


def test_failures_reach_the_caller(card: ctypes.CDLL, emulated_library: Path) -> None:
    model = draw(2, 4, 8, 4)
    s = session(emulated_library, model)
    h = np.ones((1, 8), np.float32)
    card.emulation_fail(0)
    with pytest.raises(Exception, match=r"emulated error|the card has failed"):
        s.run(None, {"features": h})
    card.emulation_fail(-1)
    assert_close(s.run(None, {"features": h}), mc_heads_ref(h, *model))
    card.emulation_configure(1, 7, 1, 0)
    with pytest.raises(Exception, match=r"compute capability 8\.0 is needed"):
        session(emulated_library, model).run(None, {"features": h})
