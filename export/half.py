"""float16 in the graph: the backbone computes in half precision, the heads and all behind them stay float32."""

from __future__ import annotations

import logging
import warnings

import onnx
from onnx import TensorProto

from .graph import DOMAIN, IR_VERSION, OP_TYPE


def half_precision(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose backbone, from the input to the features that enter MCHeads, has float16 weights and arithmetic.

    Inputs and outputs keep their types. Weights beyond float16's range are cut to it. A backbone that is float16
    already stays as it is.

    Raises: ValueError where the model has no MCHeads node.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    heads = next((node for node in model.graph.node if (node.domain, node.op_type) == (DOMAIN, OP_TYPE)), None)
    if heads is None:
        raise ValueError(f"the model has no {OP_TYPE} node")
    features = heads.input[0]
    front, back = _split(model.graph, features)
    used = {name for node in front for name in node.input}
    if any(i.name in used and i.data_type == TensorProto.FLOAT16 for i in model.graph.initializer):
        result = onnx.ModelProto()
        result.CopyFrom(model)
        return result

    backbone = onnx.ModelProto()
    backbone.CopyFrom(model)
    del backbone.functions[:], backbone.graph.node[:], backbone.graph.output[:], backbone.graph.initializer[:]
    del backbone.graph.value_info[:]
    backbone.graph.node.extend(front)
    backbone.graph.initializer.extend(i for i in model.graph.initializer if i.name in used)
    inferred = onnx.shape_inference.infer_shapes(backbone)
    backbone.graph.output.extend(value for value in inferred.graph.value_info if value.name == features)
    level = logging.getLogger("onnxruntime").level
    logging.getLogger("onnxruntime").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            converted = convert_float_to_float16(backbone, keep_io_types=True)
    finally:
        logging.getLogger("onnxruntime").setLevel(level)

    result = onnx.ModelProto()
    result.CopyFrom(model)
    result.ir_version = max(result.ir_version, IR_VERSION)
    del result.graph.node[:], result.graph.initializer[:], result.graph.value_info[:]
    result.graph.node.extend([*converted.graph.node, *back])
    behind = {name for node in back for name in node.input}
    known = {i.name for i in converted.graph.initializer}
    result.graph.initializer.extend(converted.graph.initializer)
    result.graph.initializer.extend(i for i in model.graph.initializer if i.name in behind - known)
    onnx.checker.check_model(result, full_check=True)
    return result


def _split(graph: onnx.GraphProto, value: str) -> tuple[list[onnx.NodeProto], list[onnx.NodeProto]]:
    """The nodes that a value depends on, and the others, each in their order."""
    needed = {value}
    front = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            front.append(node)
    front.reverse()
    taken = {id(node) for node in front}
    return front, [node for node in graph.node if id(node) not in taken]
