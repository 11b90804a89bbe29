"""Which ONNX operators TensorRT takes: its own list, kept as data, and the check of a graph against it.

The list is tensorrt_operators.yaml, with the version it was written for. A graph is refused here, by the name of the
operator and of its node, before any builder starts. Beside the list stands one rule that holds for all operators:
uint8 exists for TensorRT at a network's inputs and outputs only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
import onnx
import yaml
from numpy.typing import NDArray
from onnx import TensorProto, helper, inliner, numpy_helper, shape_inference

from trivium.runtime.errors import ClientError

STANDARD = ("", "ai.onnx")


class UnsupportedOperator(ClientError):
    """A graph that TensorRT cannot take; the text names the operator, its node and where that stands."""


class Refusal(NamedTuple):
    """One node that TensorRT does not take."""

    operator: str
    """With its domain, where that is not the standard's."""
    node: str
    where: str
    """"the graph", or the function or the node's body that holds it."""
    reason: str

    def __str__(self) -> str:
        return f"operator {self.operator} of node {self.node!r} in {self.where}: {self.reason}"


@cache
def operator_list() -> dict[str, Any]:
    """tensorrt_operators.yaml."""
    text = resources.files(__package__).joinpath("tensorrt_operators.yaml").read_text(encoding="utf-8")
    document: dict[str, Any] = yaml.safe_load(text)
    return document


def check_operators(model: onnx.ModelProto) -> None:
    """Refuse a model that holds anything TensorRT does not take.

    Args:
        model: as it would be given to TensorRT's parser; model-local functions are looked into.

    Raises: UnsupportedOperator, which names the first and counts the others.
    """
    known = operator_list()
    opset = next((o.version for o in model.opset_import if o.domain in STANDARD), 0)
    low, high = known["opsets"]
    if not low <= opset <= high:
        raise UnsupportedOperator(f"opset {opset}: TensorRT {known['tensorrt']} takes {low} to {high}")
    found = list(refusals(model))
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise UnsupportedOperator(f"TensorRT {known['tensorrt']} does not take {found[0]}{more}")


def refusals(model: onnx.ModelProto) -> Iterator[Refusal]:
    """Every node that TensorRT does not take, functions inlined; the standard operators of any opset."""
    functions = {(function.domain, function.name) for function in model.functions}
    for function in model.functions:
        yield from _unknown(function.node, f"function {function.name}", functions)
    yield from _unknown(model.graph.node, "the graph", functions)
    flat = inliner.inline_local_functions(model) if model.functions else model
    yield from _restricted(flat)


def operators_of(model: onnx.ModelProto) -> set[str]:
    """Names of the operators of graph and functions, those of bodies included."""
    names = {node.op_type for _, node in _walk(model.graph.node, "")}
    return names.union(*({node.op_type for _, node in _walk(function.node, "")} for function in model.functions))


def _walk(nodes: Any, where: str) -> Iterator[tuple[str, onnx.NodeProto]]:
    for node in nodes:
        yield where, node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _walk(graph.node, f"the {attribute.name} of {_name(node)}")


def _name(node: onnx.NodeProto) -> str:
    return node.name or next((output for output in node.output if output), "")


def _unknown(nodes: Any, where: str, functions: set[tuple[str, str]]) -> Iterator[Refusal]:
    known = operator_list()
    for place, node in _walk(nodes, where):
        if node.domain in STANDARD:
            if node.op_type in known["supported"]:
                continue
            reason = "not supported" if node.op_type in known["unsupported"] else "not in its list"
            yield Refusal(node.op_type, _name(node), place, reason)
        elif (node.domain, node.op_type) not in functions:
            yield Refusal(f"{node.domain}::{node.op_type}", _name(node), place, "no standard operator")


def _restricted(model: onnx.ModelProto) -> Iterator[Refusal]:
    """Refusals of what the list restricts, in a model without functions."""
    constants = constants_of(model.graph)
    try:
        inferred = shape_inference.infer_shapes(model)
    except shape_inference.InferenceError as error:
        reason = " ".join(str(error).split())[:300]
        raise UnsupportedOperator(
            f"TensorRT cannot take this graph, for its types cannot be inferred: {reason}"
        ) from None
    results = {output.name for output in model.graph.output}
    bytes_inside = {
        value.name
        for value in inferred.graph.value_info
        if value.type.tensor_type.elem_type == TensorProto.UINT8 and value.name not in results
    }
    for where, node in _walk(model.graph.node, "the graph"):
        for reason in _broken(node, constants):
            yield Refusal(node.op_type, _name(node), where, reason)
        if bytes_inside.intersection(node.output) - constants.keys():
            yield Refusal(node.op_type, _name(node), where, "uint8 is taken as input or output of a network only")


def constants_of(graph: onnx.GraphProto) -> dict[str, NDArray[Any]]:
    """Values of initialisers and Constant nodes, by name; what is computed from them is no constant for the parser."""
    known = {initializer.name: numpy_helper.to_array(initializer) for initializer in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            value = node.attribute[0]
            if value.name == "value":
                known[node.output[0]] = numpy_helper.to_array(value.t)
            elif value.name in ("value_float", "value_int", "value_floats", "value_ints"):
                known[node.output[0]] = np.array(helper.get_attribute_value(value))
    return known


def _broken(node: onnx.NodeProto, constants: Mapping[str, NDArray[Any]]) -> Iterator[str]:
    known = operator_list()
    inputs = dict(enumerate(node.input))
    for position in known["constant_inputs"].get(node.op_type, ()):
        if inputs.get(position) and inputs[position] not in constants:
            yield f"its input {inputs[position]!r} must be a constant"
    for position in known["zero_inputs"].get(node.op_type, ()):
        name = inputs.get(position)
        if name and (name not in constants or np.any(constants[name].astype(np.int64))):
            yield f"its zero point {name!r} must be 0"
    outputs = known["outputs"].get(node.op_type)
    if outputs is not None and any(node.output[outputs:]):
        yield f"only its first {outputs} output may be used"
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute if not a.ref_attr_name}
    for name in known["ones"].get(node.op_type, ()):
        if any(element != 1 for element in attributes.get(name, ())):
            yield f"its {name} must be 1"
    for name, allowed in known["attributes"].get(node.op_type, {}).items():
        given = attributes.get(name, allowed[0])
        given = given.decode() if isinstance(given, bytes) else given
        if given not in allowed:
            yield f"its {name} is {given}, which must be {' or '.join(map(str, allowed))}"
