"""MCHeads in ONNX: the model-local function with its standard-ops body, its node, and how a backbone gets it.

Needs onnx and numpy alone. An ONNX Runtime that has the fused kernel registered runs that in the function's place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import ArrayLike
from onnx import helper, numpy_helper

from trivium.kernels import HeadStatistics, check_shapes

DOMAIN = "ai.trivium"
OP_TYPE = "MCHeads"
DOMAIN_VERSION = 1
OPSET = 18
"""Smallest opset of the body (reductions take their axes as an input from here on)."""
IR_VERSION = 10
IMAGE = "image"
OUTPUTS = HeadStatistics._fields
INPUTS = ("features", "weights", "bias", "temperature", "masks")
OUTPUT_AXES = {
    "probabilities": ("K", "C"),
    "predictive_entropy": ("K",),
    "mutual_information": ("K",),
    "divergence": ("K", "K"),
    "energy": ("K",),
}


def mc_heads_function(opset: int = OPSET) -> onnx.FunctionProto:
    """The definition of kernels.mc_heads_ref in standard ONNX ops, float32, for any B, K, C, T, D.

    Features [B, D] become [B, 1, D] and are broadcast over the heads; [B, K, D] pass as they are. No control flow, so
    that TensorRT can parse the body; softmax and entropies are taken of logits shifted by their maximum.

    Args:
        opset: of the standard ops, which must equal the model's, at least 18.

    Raises: ValueError for an older opset.
    """
    if opset < OPSET:
        raise ValueError(f"MCHeads needs opset {OPSET} or newer, got {opset}")
    nodes: list[onnx.NodeProto] = []

    def op(op_type: str, inputs: Sequence[str], output: str, **attributes: Any) -> None:
        nodes.append(helper.make_node(op_type, list(inputs), [output], **attributes))

    keep = onnx.AttributeProto(name="value_float", ref_attr_name="keep", type=onnx.AttributeProto.FLOAT)
    op("Constant", [], "keep_probability")
    nodes[-1].attribute.append(keep)
    for name, axis in (("axis_1", 1), ("axis_2", 2), ("axis_3", 3), ("any", -1)):
        op("Constant", [], name, value_ints=[axis])
    op("Constant", [], "axes_12", value_ints=[1, 2])
    op("Constant", [], "zero", value_float=0.0)
    op("Constant", [], "tiny", value_float=1e-30)

    # features [B, D] or [B, K, D] -> h [B, J, 1, D] with J = 1 or K
    op("Shape", ["features"], "batch", start=0, end=1)
    op("Shape", ["weights"], "units", start=2, end=3)
    op("Concat", ["batch", "any", "units"], "h_shape", axis=0)
    op("Reshape", ["features", "h_shape"], "h")
    op("Unsqueeze", ["h", "axis_2"], "h_row")

    # A runtime folds all of these into constants.
    op("CastLike", ["masks", "features"], "masks_float")
    op("Div", ["masks_float", "keep_probability"], "scaled_masks")
    op("Unsqueeze", ["temperature", "axes_12"], "tau")
    op("Transpose", ["weights"], "weights_t", perm=[0, 2, 1])
    op("Div", ["weights_t", "tau"], "scaled_weights")
    op("Unsqueeze", ["bias", "axis_1"], "bias_row")
    op("Div", ["bias_row", "tau"], "scaled_bias")

    # logits [B, K, T, C]
    op("Mul", ["h_row", "scaled_masks"], "dropped")
    op("MatMul", ["dropped", "scaled_weights"], "products")
    op("Add", ["products", "scaled_bias"], "logits")

    op("ReduceMax", ["logits", "axis_3"], "top", keepdims=1)
    op("Sub", ["logits", "top"], "shifted")
    op("Exp", ["shifted"], "exponentials")
    op("ReduceSum", ["exponentials", "axis_3"], "total", keepdims=1)
    op("Log", ["total"], "log_total")
    op("Add", ["top", "log_total"], "log_sum_exp")
    # H(p_t) = log sum e - (sum e s) / sum e: two terms of one sign, nothing cancels
    op("Mul", ["exponentials", "shifted"], "weighted")
    op("ReduceSum", ["weighted", "axis_3"], "weighted_total", keepdims=1)
    op("Div", ["weighted_total", "total"], "mean_shifted")
    op("Sub", ["log_total", "mean_shifted"], "entropies")
    op("Div", ["exponentials", "total"], "softmaxes")

    # means over the T passes
    op("Concat", ["axis_2", "axis_3"], "axes_23", axis=0)
    op("ReduceMean", ["softmaxes", "axis_2"], "mean", keepdims=0)
    op("ReduceMean", ["entropies", "axes_23"], "expected_entropy", keepdims=0)
    op("ReduceMean", ["log_sum_exp", "axes_23"], "mean_log_sum_exp", keepdims=0)

    op("Max", ["mean", "tiny"], "mean_floor")
    op("Log", ["mean_floor"], "log_mean")
    op("Mul", ["mean", "log_mean"], "mean_log_mean")
    op("ReduceSum", ["mean_log_mean", "axis_2"], "negative_entropy", keepdims=0)
    op("Neg", ["negative_entropy"], "entropy")
    op("Sub", ["entropy", "expected_entropy"], "information")
    op("Max", ["information", "zero"], "information_floor")

    # KL(p_i || p_j) [B, K, K], term by term, so that the diagonal is exactly 0
    op("Unsqueeze", ["mean", "axis_2"], "p_i")
    op("Unsqueeze", ["log_mean", "axis_2"], "log_p_i")
    op("Unsqueeze", ["log_mean", "axis_1"], "log_p_j")
    op("Sub", ["log_p_i", "log_p_j"], "log_ratio")
    op("Mul", ["p_i", "log_ratio"], "kl_terms")
    op("ReduceSum", ["kl_terms", "axis_3"], "kl", keepdims=0)
    op("Max", ["kl", "zero"], "kl_floor")

    # 0 * h is NaN where h is not finite: that picture gets NaN everywhere, whatever a runtime's Max makes of NaN
    op("Mul", ["h", "zero"], "h_zero")
    op("ReduceSum", ["h_zero", "axes_12"], "poison_3", keepdims=1)
    op("Squeeze", ["poison_3", "axis_2"], "poison_2")
    op("Neg", ["mean_log_sum_exp"], "free_energy")
    op("Add", ["mean", "poison_3"], "probabilities")
    op("Add", ["entropy", "poison_2"], "predictive_entropy")
    op("Add", ["information_floor", "poison_2"], "mutual_information")
    op("Add", ["kl_floor", "poison_3"], "divergence")
    op("Add", ["free_energy", "poison_2"], "energy")

    return helper.make_function(
        DOMAIN, OP_TYPE, list(INPUTS), list(OUTPUTS), nodes, [helper.make_opsetid("", opset)], ["keep"]
    )


def mc_heads_node(
    features: str,
    keep: float,
    *,
    weights: str = "heads.weights",
    bias: str = "heads.bias",
    temperature: str = "heads.temperature",
    masks: str = "heads.masks",
    outputs: Sequence[str] = OUTPUTS,
) -> onnx.NodeProto:
    """The one MCHeads node of a graph; all but `keep` are names of values in that graph."""
    return helper.make_node(
        OP_TYPE,
        [features, weights, bias, temperature, masks],
        list(outputs),
        name=OP_TYPE,
        domain=DOMAIN,
        keep=float(keep),
    )


def append_heads(
    model: onnx.ModelProto,
    features_output: str,
    weights: ArrayLike,
    bias: ArrayLike,
    temperature: ArrayLike,
    masks: ArrayLike,
    keep: float,
) -> onnx.ModelProto:
    """Give a backbone its heads: a copy of the model whose outputs are the five of HeadStatistics, float32.

    Args:
        model: a graph with the output `features_output`, float32 [N, D] or [N, K, D], of opset 18 or newer.
        weights, bias, temperature, masks, keep: as in kernels.mc_heads_ref.

    Raises: ValueError where shapes do not fit, the output does not exist or the opset is too old.
    """
    w, b, tau = (np.ascontiguousarray(a, np.float32) for a in (weights, bias, temperature))
    m = np.ascontiguousarray(masks, np.uint8)
    output = next((value for value in model.graph.output if value.name == features_output), None)
    if output is None:
        raise ValueError(f"the model has no output {features_output!r}")
    axes = [d.dim_value or d.dim_param or "?" for d in output.type.tensor_type.shape.dim]
    features = tuple(d if isinstance(d, int) else 1 for d in axes[:1]) + tuple(axes[1:])
    check_shapes(features, w.shape, b.shape, tau.shape, m.shape, keep)  # type: ignore[arg-type]
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)

    result = onnx.ModelProto()
    result.CopyFrom(model)
    result.functions.append(mc_heads_function(opset))
    result.ir_version = max(result.ir_version, IR_VERSION)
    if not any(o.domain == DOMAIN for o in result.opset_import):
        result.opset_import.append(helper.make_opsetid(DOMAIN, DOMAIN_VERSION))
    graph = result.graph
    for name, array in (("weights", w), ("bias", b), ("temperature", tau), ("masks", m)):
        graph.initializer.append(numpy_helper.from_array(array, f"heads.{name}"))
    graph.node.append(mc_heads_node(features_output, keep))
    del graph.output[:]
    sizes = {"K": w.shape[0], "C": w.shape[1]}
    for name in OUTPUTS:
        shape = [axes[0], *(sizes[axis] for axis in OUTPUT_AXES[name])]
        graph.output.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))
    return result
