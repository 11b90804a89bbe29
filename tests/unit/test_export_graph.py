"""MCHeads in ONNX: every runtime that reads the file gives what the float64 definition says."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from trivium.export.graph import OUTPUTS, append_heads, mc_heads_function
from trivium.kernels import HeadStatistics, dropout_masks, mc_heads_ref

Heads = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, float]
PROBABILITY_TOLERANCE = 1e-6
STATISTICS_TOLERANCE = 1e-5
LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")


def identity(shape: list[str | int], opset: int = 18) -> onnx.ModelProto:
    """A backbone that hands its input on as the features."""
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["features"])],
        "identity",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, shape)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def heads(k: int, c: int, d: int, t: int, keep: float, seed: int = 0) -> Heads:
    """Random weights, bias, temperature, masks and keep of K heads."""
    draw = np.random.default_rng(seed)
    return (
        draw.normal(size=(k, c, d)).astype(np.float32) / np.sqrt(d),
        draw.normal(size=(k, c)).astype(np.float32),
        draw.uniform(0.5, 2.0, k).astype(np.float32),
        dropout_masks(t, d, keep, seed),
        keep,
    )


def session(model: onnx.ModelProto, level: str = "ORT_ENABLE_ALL") -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def assert_agree(found: Any, expected: HeadStatistics) -> None:
    for name, a, b in zip(OUTPUTS, found, expected, strict=True):
        tolerance = PROBABILITY_TOLERANCE if name == "probabilities" else STATISTICS_TOLERANCE
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance, err_msg=name)
        assert a.dtype == np.float32


@pytest.mark.parametrize(
    ("b", "k", "c", "d", "t", "keep", "own", "opset"),
    [
        (3, 3, 10, 64, 32, 0.5, False, 18),
        (3, 3, 10, 64, 32, 0.5, True, 20),
        (2, 1, 2, 37, 7, 0.8, False, 21),
        (2, 4, 1, 5, 1, 1.0, True, 22),
        (1, 3, 1000, 129, 16, 0.9, False, 18),
    ],
)
def test_every_runtime_agrees_with_the_definition(
    b: int, k: int, c: int, d: int, t: int, keep: float, own: bool, opset: int
) -> None:
    arguments = heads(k, c, d, t, keep)
    shape = (b, k, d) if own else (b, d)
    model = append_heads(identity(["N", *shape[1:]], opset), "features", *arguments)
    onnx.checker.check_model(model, full_check=True)
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    expected = mc_heads_ref(x, *arguments)
    for level in LEVELS:
        assert_agree(session(model, level).run(list(OUTPUTS), {"x": x}), expected)
    assert_agree(ReferenceEvaluator(model).run(None, {"x": x}), expected)


def test_divergence_from_itself_is_exactly_zero_and_outputs_keep_their_bounds() -> None:
    arguments = heads(3, 10, 32, 8, 0.5)
    x = 30 * np.random.default_rng(2).normal(size=(20, 32)).astype(np.float32)
    y = dict(
        zip(
            OUTPUTS, session(append_heads(identity(["N", 32]), "features", *arguments)).run(None, {"x": x}), strict=True
        )
    )
    assert (np.einsum("bkk->bk", y["divergence"]) == 0).all()
    assert (y["divergence"] >= 0).all()
    assert (y["mutual_information"] >= 0).all()
    assert (y["mutual_information"] <= y["predictive_entropy"] + STATISTICS_TOLERANCE).all()


def test_large_logits_stay_finite() -> None:
    arguments = heads(2, 10, 32, 8, 0.5)
    x = np.full((1, 32), 1e4, np.float32)
    y = session(append_heads(identity(["N", 32]), "features", *arguments)).run(None, {"x": x})
    for a, b in zip(y, mc_heads_ref(x, *arguments), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("evil", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("own", [False, True])
def test_a_picture_that_is_not_finite_gives_nan_everywhere_and_only_there(evil: float, own: bool) -> None:
    arguments = heads(3, 10, 16, 8, 0.5)
    shape = (3, 3, 16) if own else (3, 16)
    model = append_heads(identity(["N", *shape[1:]]), "features", *arguments)
    x = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    clean = session(model).run(None, {"x": x})
    x[1].flat[2] = evil
    for runtime in (session(model).run, session(model, "ORT_DISABLE_ALL").run, ReferenceEvaluator(model).run):
        for before, after in zip(clean, runtime(None, {"x": x}), strict=True):
            assert np.isnan(after[1]).all()
            np.testing.assert_allclose(after[[0, 2]], before[[0, 2]], atol=1e-6)


def test_append_heads_leaves_the_backbone_as_it_was() -> None:
    backbone = identity(["N", 16])
    before = backbone.SerializeToString(deterministic=True)
    append_heads(backbone, "features", *heads(3, 10, 16, 8, 0.5))
    assert backbone.SerializeToString(deterministic=True) == before


def test_what_does_not_fit_is_refused() -> None:
    w, b, tau, m, keep = heads(3, 10, 16, 8, 0.5)
    with pytest.raises(ValueError, match="no output 'pooled'"):
        append_heads(identity(["N", 16]), "pooled", w, b, tau, m, keep)
    with pytest.raises(ValueError, match="features must be"):
        append_heads(identity(["N", 15]), "features", w, b, tau, m, keep)
    with pytest.raises(ValueError, match=r"masks must be \[T, 16\]"):
        append_heads(identity(["N", 16]), "features", w, b, tau, m[:, 1:], keep)
    with pytest.raises(ValueError, match="opset 18"):
        mc_heads_function(17)
    with pytest.raises(ValueError, match="opset 18"):
        append_heads(identity(["N", 16], opset=17), "features", w, b, tau, m, keep)


def test_the_module_needs_no_torch() -> None:
    code = "import sys, trivium.export.graph; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
