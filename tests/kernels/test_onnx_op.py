"""ai.trivium::MCHeads inside the installed ONNX Runtime, and one model.onnx through every implementation."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from trivium.kernels import HeadStatistics, custom_ops_library, kernel_counts, mc_heads_ref
from trivium.kernels.native import library
from trivium.kernels.onnx_op import MODE_ENTRY, THREADS_ENTRY, WEIGHTS_ENTRY

from .cases import Inputs, assert_close, make_inputs

onnx = pytest.importorskip("onnx", reason="graphs are made with onnx: pip install 'trivium[export]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'trivium[cpu]'")


def model_of(inputs: Inputs, *, constant: bool = True) -> Any:
    """A graph of one MCHeads behind an Identity; its other inputs are initialisers or, too, inputs of the graph."""
    from onnx import TensorProto, helper

    from trivium.export.graph import IR_VERSION, OPSET, append_heads

    shape = ["N", *inputs.features.shape[1:]]
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["features"])],
        "heads",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, shape)],
    )
    base = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    model = append_heads(base, "features", *inputs.arguments()[1:])
    if not constant:
        for initializer in model.graph.initializer:
            value = helper.make_tensor_value_info(initializer.name, initializer.data_type, list(initializer.dims))
            model.graph.input.append(value)
        del model.graph.initializer[:]
    return model


def session(model: Any, *, fused: bool = True, level: str = "ORT_ENABLE_ALL", **entries: str) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 4
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    for name, value in entries.items():
        entry = {"weights": WEIGHTS_ENTRY, "mode": MODE_ENTRY, "threads": THREADS_ENTRY}[name]
        options.add_session_config_entry(entry, value)
    if fused:
        options.register_custom_ops_library(str(custom_ops_library()))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(runtime: Any, features: NDArray[np.float32], **others: Any) -> HeadStatistics:
    return HeadStatistics(*runtime.run(None, {"x": features, **others}))


@pytest.mark.parametrize("own_features", [False, True])
@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_ALL"])
def test_the_fused_operator_runs_in_the_functions_place(level: str, own_features: bool) -> None:
    inputs = make_inputs(5, 3, 100, 64, 32, own_features=own_features)
    runtime = session(model_of(inputs), level=level)
    before = kernel_counts()
    out = run(runtime, inputs.features)
    assert kernel_counts().operators == before.operators + 1
    assert_close(out, mc_heads_ref(*inputs.arguments()))


@pytest.mark.parametrize("passes", [32, 7])
def test_one_file_one_answer(passes: int) -> None:
    """ONNX Runtime with and without the operator, the reference evaluator and the definition agree."""
    from onnx.reference import ReferenceEvaluator

    inputs = make_inputs(3, 3, 50, 40, passes)
    inputs.features[1, 5] = np.nan
    model = model_of(inputs)
    expected = mc_heads_ref(*inputs.arguments())
    before = kernel_counts()
    assert_close(run(session(model, fused=False), inputs.features), expected)
    assert_close(HeadStatistics(*ReferenceEvaluator(model).run(None, {"x": inputs.features})), expected)
    assert kernel_counts().operators == before.operators
    assert_close(run(session(model), inputs.features), expected)
    after = kernel_counts()
    assert after.operators == before.operators + 1
    assert after.poisoned == before.poisoned + 1


def test_settings_of_a_session() -> None:
    inputs = make_inputs(4, 3, 70, 64, 32)
    model, expected = model_of(inputs), mc_heads_ref(*inputs.arguments())
    exact = run(session(model), inputs.features)
    rounded = run(session(model, weights="bfloat16"), inputs.features)
    assert np.abs(rounded.probabilities - expected.probabilities).max() > 1e-6
    np.testing.assert_allclose(rounded.probabilities, expected.probabilities, atol=5e-3)
    for other in (session(model, threads="2"), session(model, weights="float32")):
        for a, e in zip(run(other, inputs.features), exact, strict=True):
            np.testing.assert_array_equal(a, e)
    np.testing.assert_allclose(
        run(session(model, mode="hybrid"), inputs.features).probabilities, expected.probabilities, atol=0.02
    )


@pytest.mark.parametrize(
    ("entries", "line"),
    [
        ({"weights": "int4"}, "trivium.mcheads.weights must be float32, bfloat16 or auto, got int4"),
        ({"mode": "fast"}, "trivium.mcheads.mode must be exact or hybrid, got fast"),
        ({"threads": "0"}, "trivium.mcheads.threads must be 1 to 256, got 0"),
        ({"threads": "two"}, "trivium.mcheads.threads must be 1 to 256, got two"),
    ],
)
def test_unknown_settings_are_refused(entries: dict[str, str], line: str) -> None:
    with pytest.raises(Exception, match=line):
        session(model_of(make_inputs(1, 1, 2, 3, 4)), **entries)  # type: ignore[arg-type]


def test_weights_may_be_inputs() -> None:
    inputs = make_inputs(2, 2, 20, 16, 8)
    runtime = session(model_of(inputs, constant=False))
    names = ("weights", "bias", "temperature", "masks")
    first = dict(zip((f"heads.{n}" for n in names), inputs.arguments()[1:5], strict=True))
    assert_close(run(runtime, inputs.features, **first), mc_heads_ref(*inputs.arguments()))
    other = make_inputs(2, 2, 20, 16, 8, seed=1)
    second = dict(zip((f"heads.{n}" for n in names), other.arguments()[1:5], strict=True))
    assert_close(run(runtime, other.features, **second), mc_heads_ref(*other.arguments()))


def test_an_empty_batch() -> None:
    inputs = make_inputs(1, 2, 5, 8, 4)
    out = run(session(model_of(inputs)), inputs.features[:0])
    assert [a.shape for a in out] == [(0, 2, 5), (0, 2), (0, 2), (0, 2, 2), (0, 2)]


def test_inputs_that_do_not_fit_are_refused() -> None:
    model = model_of(make_inputs(1, 2, 5, 8, 4))
    for initializer in model.graph.initializer:
        if initializer.name == "heads.masks":
            initializer.CopyFrom(onnx.numpy_helper.from_array(np.full((4, 8), 2, np.uint8), "heads.masks"))
    with pytest.raises(Exception, match="masks must be 0 or 1"):
        session(model)


GET_API = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
GET_VERSION = ctypes.CFUNCTYPE(ctypes.c_void_p)
CREATE_STATUS = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)


class ApiBase(ctypes.Structure):
    _fields_ = (("get_api", GET_API), ("get_version", GET_VERSION))


@pytest.mark.parametrize(("version", "newest"), [(b"2.0.0", 40), (b"1.9.0", 9)])
def test_an_unknown_onnx_runtime_is_refused(version: bytes, newest: int) -> None:
    """A stand-in for ONNX Runtime, whose real versions other than the installed one cannot be had here."""
    lines: list[bytes] = []

    def create_status(code: int, line: bytes) -> int:
        lines.append(line)
        return 1

    slot, text = CREATE_STATUS(create_status), ctypes.create_string_buffer(version)
    table = (ctypes.c_void_p * 1)(ctypes.cast(slot, ctypes.c_void_p))
    base = ApiBase(
        GET_API(lambda number: ctypes.addressof(table) if number <= newest else None),
        GET_VERSION(lambda: ctypes.addressof(text)),
    )
    register = library().RegisterCustomOps
    register.restype = ctypes.c_void_p
    assert register(None, ctypes.byref(base)) == 1
    assert lines == [b"MCHeads knows ONNX Runtime 1.17 and later 1.x, not " + version]
