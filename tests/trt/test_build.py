"""Operators, the graph as TensorRT's parser takes it, and the builder over a fake TensorRT.

Every graph here was parsed by onnx and ONNX Runtime; no TensorRT library took part.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from trivium.export import tensorrt as ours
from trivium.export.graph import mc_heads_function
from trivium.export.half import half_precision
from trivium.export.operators import UnsupportedOperator, check_operators, operator_list, operators_of, refusals
from trivium.export.tensorrt import build_engine, prepare, profiles
from trivium.runtime.bundle import Plan, open_bundle
from trivium.runtime.engine import OUTPUTS
from trivium.runtime.errors import ConfigError, EngineError, EngineMismatch

from . import cuda

BYTES = (1, 8, 8, 3)


def loaded(bundle: Path) -> onnx.ModelProto:
    return onnx.load(open_bundle(bundle).model_path)


def answers(model: onnx.ModelProto, images: NDArray[np.uint8]) -> list[NDArray[Any]]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(OUTPUTS, {"image": images}))


def one_node(
    op_type: str, *, domain: str = "", inputs: tuple[str, ...] = ("x",), constants: Any = None, **attributes: Any
) -> onnx.ModelProto:
    """x [1, 8, 8, 3] -> one node."""
    node = helper.make_node(op_type, list(inputs), ["y"], name="it", domain=domain, **attributes)
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, BYTES) for name in inputs if name == "x"]
        + [helper.make_tensor_value_info(name, TensorProto.INT64, [1]) for name in inputs if name == "axes"],
        [helper.make_empty_tensor_value_info("y")],
        constants or [],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("other", 1)])


def integers(name: str, *values: int) -> onnx.TensorProto:
    return helper.make_tensor(name, TensorProto.INT64, [len(values)], values)


def test_the_list_is_whole() -> None:
    known = operator_list()
    supported, unsupported = set(known["supported"]), set(known["unsupported"])
    assert not supported & unsupported
    standard = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
    assert unsupported - standard <= {"ImageDecoder"}
    restricted = {
        name for key in ("constant_inputs", "zero_inputs", "outputs", "ones", "attributes") for name in known[key]
    }
    assert restricted <= supported
    assert {node.op_type for node in mc_heads_function().node} <= supported


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (one_node("Det"), "operator Det of node 'it' in the graph: not supported"),
        (one_node("Swish"), "operator Swish of node 'it' in the graph: not in its list"),
        (one_node("Relu", domain="other"), "operator other::Relu of node 'it' in the graph: no standard operator"),
        (one_node("ReduceSum", inputs=("x", "axes")), "its input 'axes' must be a constant"),
        (one_node("MaxPool", kernel_shape=[2, 2], dilations=[2, 2]), "its dilations must be 1"),
        (one_node("Resize", inputs=("x",), mode="cubic"), "its mode is cubic, which must be nearest or linear"),
        (
            one_node(
                "QuantizeLinear",
                inputs=("x", "scale", "zero"),
                constants=[
                    helper.make_tensor("scale", TensorProto.FLOAT, [], [0.1]),
                    helper.make_tensor("zero", TensorProto.INT8, [], [3]),
                ],
            ),
            "its zero point 'zero' must be 0",
        ),
    ],
)
def test_what_tensorrt_does_not_take_is_refused_by_name(model: onnx.ModelProto, text: str) -> None:
    with pytest.raises(UnsupportedOperator) as caught:
        check_operators(model)
    assert text in str(caught.value)
    assert str(caught.value).startswith("TensorRT 10.15 does not take operator ")
    assert "\n" not in str(caught.value)


def test_what_tensorrt_takes_passes() -> None:
    check_operators(one_node("ReduceSum", inputs=("x", "a"), constants=[integers("a", 1)]))
    check_operators(one_node("MaxPool", kernel_shape=[2, 2], dilations=[1, 1]))
    check_operators(one_node("Softmax", axis=1))


def test_bodies_and_functions_are_looked_into() -> None:
    body = helper.make_graph(
        [helper.make_node("Det", ["x"], ["y"], name="deep")], "body", [], [helper.make_empty_tensor_value_info("y")]
    )
    branch = one_node("If", inputs=("condition",), then_branch=body, else_branch=body)
    assert {refusal.where for refusal in refusals(branch)} == {"the then_branch of it", "the else_branch of it"}

    model = one_node("Mine", domain="other")
    model.functions.append(
        helper.make_function(
            "other", "Mine", ["a"], ["b"], [helper.make_node("Det", ["a"], ["b"], name="inner")],
            [helper.make_opsetid("", 20)],
        )
    )  # fmt: skip
    with pytest.raises(UnsupportedOperator, match="operator Det of node 'inner' in function Mine: not supported"):
        check_operators(model)


def test_a_graph_that_is_none_is_one_line() -> None:
    with pytest.raises(UnsupportedOperator, match=r"its types cannot be inferred: .*Output 1 is out of bounds"):
        check_operators(one_node("TopK", inputs=("x", "k"), constants=[integers("k", 2)]))


def test_an_opset_beyond_the_list_is_refused() -> None:
    model = one_node("Relu")
    model.opset_import[0].version = 99
    with pytest.raises(UnsupportedOperator, match=r"opset 99: TensorRT .* takes 9 to 24"):
        check_operators(model)


def test_a_bundles_graph_needs_preparing(tiny_bundle: Path, some_pictures: NDArray[np.uint8]) -> None:
    model = loaded(tiny_bundle)
    found = {(refusal.operator, refusal.reason) for refusal in refusals(model)}
    assert ("ReduceMean", "its input 'axes_23__1' must be a constant") in found
    prepared = prepare(model)
    assert list(refusals(prepared)) == []
    assert len(prepared.functions) == 0
    assert [o.domain for o in prepared.opset_import] == [""]
    assert not any(i.data_type == TensorProto.UINT8 for i in prepared.graph.initializer)
    for a, b in zip(answers(prepared, some_pictures), answers(model, some_pictures), strict=True):
        np.testing.assert_array_equal(a, b)
    assert model == loaded(tiny_bundle), "the caller's model stays as it was"


def test_pixels_are_moved_as_floats(tiny_bundle: Path, some_pictures: NDArray[np.uint8]) -> None:
    """torch's exporter transposes the uint8 picture before it casts it, which TensorRT's parser refuses."""
    model = loaded(tiny_bundle)
    nodes = model.graph.node
    assert nodes[0].op_type == "Cast"
    transpose = helper.make_node("Transpose", ["image"], ["moved"], name="move", perm=[0, 2, 1, 3])
    nodes.insert(0, helper.make_node("Transpose", ["moved"], ["back"], name="move_back", perm=[0, 2, 1, 3]))
    nodes.insert(0, transpose)
    nodes[2].input[0] = "back"
    refused = {refusal.node: refusal.reason for refusal in refusals(model)}
    assert refused["move"] == "uint8 is taken as input or output of a network only"
    prepared = prepare(model)
    assert list(refusals(prepared)) == []
    for a, b in zip(answers(prepared, some_pictures), answers(model, some_pictures), strict=True):
        np.testing.assert_array_equal(a, b)


def test_half_precision_is_of_the_backbone_alone(tiny_bundle: Path, some_pictures: NDArray[np.uint8]) -> None:
    model = loaded(tiny_bundle)
    for half in (half_precision(model), prepare(model, "fp16")):
        types = {i.name: i.data_type for i in half.graph.initializer}
        assert types["kernel"] == TensorProto.FLOAT16
        assert types["heads.weights"] == types["heads.bias"] == TensorProto.FLOAT
        assert [o.type.tensor_type.elem_type for o in half.graph.output] == [TensorProto.FLOAT] * 5
        for a, b in zip(answers(half, some_pictures), answers(model, some_pictures), strict=True):
            assert 0 < np.abs(a - b).max() < 0.02
    once = half_precision(model)
    assert half_precision(once) == once
    assert answers(prepare(once, "fp16"), some_pictures[:1])[0].dtype == np.float32
    with pytest.raises(ValueError, match="no MCHeads node"):
        half_precision(one_node("Relu"))


def test_int8_needs_a_quantised_graph(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="export it with --precision int8"):
        build_engine(tiny_bundle, tmp_path / "x.plan", precision="int8")


def test_a_plan_is_built_and_recorded(tensorrt: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    target = tmp_path / "model.plan"
    plan = build_engine(tiny_bundle, target, max_batch=16, workspace_bytes=123 << 20)
    assert plan == Plan(
        path="model.plan", tensorrt="11.4.0.106", card="NVIDIA Fake 100", compute_capability="9.0", driver="13.2",
        precision="fp32", max_batch=16,
    )  # fmt: skip
    content = json.loads(target.read_bytes())
    picture = [32, 32, 3]
    assert content["profiles"] == [[[1, *picture]] * 3, [[2, *picture], [16, *picture], [16, *picture]]]
    assert tensorrt.Builder.flags == [1 << tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED]
    config = tensorrt.Builder.configs[0]
    assert config.pools == {tensorrt.MemoryPoolType.WORKSPACE: 123 << 20}
    assert config.flags == 0, "fp32 is not rounded to TF32"
    assert config.cache is None

    half = build_engine(tiny_bundle, target, precision="fp16", max_batch=1)
    assert half.precision == "fp16"
    assert json.loads(target.read_bytes())["profiles"] == [[[1, *picture]] * 3]
    assert tensorrt.Builder.configs[1].flags == 1 << tensorrt.BuilderFlag.TF32


def test_the_timing_cache_is_kept(tensorrt: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    cache = tmp_path / "timing.cache"
    for times in (1, 2):
        build_engine(tiny_bundle, tmp_path / "model.plan", timing_cache=cache)
        assert cache.read_bytes() == b"measured " * times
    cache.write_bytes(b"of another card")
    build_engine(tiny_bundle, tmp_path / "model.plan", timing_cache=cache)
    assert cache.read_bytes() == b"measured "
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.plan", "timing.cache"]
    with pytest.raises(ConfigError, match=r"timing\.cache: No such file"):
        build_engine(tiny_bundle, tmp_path / "model.plan", timing_cache=tmp_path / "none" / "timing.cache")


def test_an_unsupported_operator_is_found_before_tensorrt_is_looked_for(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    model = loaded(tiny_bundle)
    model.graph.node.append(helper.make_node("Det", ["features"], ["unused"], name="odd"))
    monkeypatch.setattr(ours.onnx, "load", lambda _: model)
    with pytest.raises(UnsupportedOperator, match="operator Det of node 'odd'"):
        build_engine(tiny_bundle, tmp_path / "model.plan")
    assert list(tmp_path.iterdir()) == []


def test_without_tensorrt_or_card(
    tensorrt: Any, machine: cuda.Machine, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.cards = 0
    with pytest.raises(EngineMismatch, match="no CUDA card"):
        build_engine(tiny_bundle, tmp_path / "model.plan")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EngineMismatch, match=r"TensorRT cannot be imported .* pip install 'trivium\[tensorrt\]'"):
        build_engine(tiny_bundle, tmp_path / "model.plan")
    assert list(tmp_path.iterdir()) == []


def test_what_tensorrt_refuses_is_one_line(tensorrt: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    tensorrt.OnnxParser.refused = "Tanh"
    with pytest.raises(EngineError, match="could not parse operator Tanh of node '': this parser has no such importer"):
        build_engine(tiny_bundle, tmp_path / "model.plan")
    tensorrt.OnnxParser.refused = ""
    tensorrt.Builder.fails = True
    with pytest.raises(EngineError, match="could not build the plan; the log says why"):
        build_engine(tiny_bundle, tmp_path / "model.plan")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("max_batch", [0, 4097])
def test_a_batch_that_cannot_be(tensorrt: Any, tiny_bundle: Path, tmp_path: Path, max_batch: int) -> None:
    with pytest.raises(ConfigError, match="max_batch must lie between 1 and 4096"):
        build_engine(tiny_bundle, tmp_path / "model.plan", max_batch=max_batch)


def test_a_graph_for_one_picture(
    tensorrt: Any, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(tiny_bundle)
    for value in (model.graph.input[0], *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    monkeypatch.setattr(ours.onnx, "load", lambda _: model)
    target = tmp_path / "model.plan"
    with pytest.raises(ConfigError, match="takes batches of 1 alone, so max_batch cannot be 64"):
        build_engine(tiny_bundle, target)
    assert build_engine(tiny_bundle, target, max_batch=1).max_batch == 1
    assert json.loads(target.read_bytes())["profiles"] == []


def test_profiles_hold_every_batch() -> None:
    for max_batch in (1, 2, 3, 64):
        ranges = profiles(max_batch)
        assert all(low <= typical <= high for low, typical, high in ranges)
        for size in range(1, max_batch + 1):
            assert any(low <= size <= high for low, _, high in ranges)


def test_a_manifest_lists_its_plans(planned: Callable[..., Path]) -> None:
    bundle = open_bundle(planned())
    assert [plan.path for plan in bundle.manifest.plans] == ["model.plan"]
    assert "model.plan" in [file.path for file in bundle.manifest.files]
    document = bundle.manifest.model_dump(mode="json")
    document["plans"][0]["path"] = "absent.plan"
    with pytest.raises(ValueError, match=r"absent.plan is not among the listed files"):
        type(bundle.manifest).model_validate(document)


def test_operators_of_the_demo_model_kind(tiny_bundle: Path) -> None:
    assert {"MCHeads", "Conv", "ReduceMean"} <= operators_of(loaded(tiny_bundle))
