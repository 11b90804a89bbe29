"""Weights outside the model's file: found wherever ONNX allows them, refused where the bundle does not list them."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trivium.runtime.bundle import Manifest, open_bundle, read_manifest, seal
from trivium.runtime.errors import UnsafePath
from trivium.runtime.weights import MESSAGES, external_files

onnx = pytest.importorskip("onnx", reason="needs onnx: pip install 'trivium[export]'")


def test_the_table_of_messages_is_onnxs() -> None:
    """Walk onnx's own descriptors and keep every field from which external_data can be reached."""
    types = {name: value.DESCRIPTOR for name, value in vars(onnx).items() if name.endswith("Proto")}
    messages = {d.full_name: d for d in types.values()}
    todo = list(messages.values())
    while todo:
        for field in todo.pop().fields:
            if field.message_type is not None and field.message_type.full_name not in messages:
                messages[field.message_type.full_name] = field.message_type
                todo.append(field.message_type)
    leading = {messages["onnx.TensorProto"].full_name}
    while True:
        more = {
            name
            for name, descriptor in messages.items()
            if any(f.message_type is not None and f.message_type.full_name in leading for f in descriptor.fields)
        }
        if more <= leading:
            break
        leading |= more
    expected = {
        messages[name].name: {
            field.number: field.message_type.name
            for field in messages[name].fields
            if field.message_type is not None and field.message_type.full_name in leading
        }
        for name in leading
    }
    expected["TensorProto"] = {13: "StringStringEntryProto"}
    reachable, new = set(), {"ModelProto"}
    while new:
        reachable |= new
        new = {inner for name in new for inner in expected.get(name, {}).values()} - reachable
    assert {name: fields for name, fields in expected.items() if name in reachable} == MESSAGES


def outside(location: str) -> Any:
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[2], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="offset", value="0")
    tensor.external_data.add(key="location", value=location)
    return tensor


def in_initializer(model: Any, location: str) -> None:
    model.graph.initializer.append(outside(location))


def in_constant(model: Any, location: str) -> None:
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["w"], value=outside(location)))


def in_function(model: Any, location: str) -> None:
    model.functions[0].node.append(onnx.helper.make_node("Constant", [], ["w"], value=outside(location)))


def in_branch(model: Any, location: str) -> None:
    branch = onnx.helper.make_graph([], "branch", [], [], [outside(location)])
    model.graph.node.append(onnx.helper.make_node("If", ["c"], ["w"], then_branch=branch, else_branch=branch))


def in_sparse(model: Any, location: str) -> None:
    model.graph.sparse_initializer.append(onnx.SparseTensorProto(values=outside(location)))


PLACES = [in_initializer, in_constant, in_function, in_branch, in_sparse]


@pytest.mark.parametrize("place", PLACES)
def test_weights_outside_are_found_wherever_they_are(
    tiny_bundle: Path, tmp_path: Path, place: Callable[[Any, str], None]
) -> None:
    model = onnx.load(tiny_bundle / "model.onnx")
    model.doc_string = "a location"
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    assert external_files(tmp_path / "m.onnx") == set()
    place(model, "../größe.bin")
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    assert external_files(tmp_path / "m.onnx") == {"../größe.bin"}


def resealed(root: Path, location: str) -> Path:
    """Move the tiny model's convolution into a file of its own, which the model says lies at `location`."""
    model = onnx.load(root / "model.onnx")
    kernel = next(i for i in model.graph.initializer if i.name == "kernel")
    (root / "kernel.bin").write_bytes(onnx.numpy_helper.to_array(kernel).astype("<f4").tobytes())
    kernel.ClearField("raw_data")
    kernel.data_location = onnx.TensorProto.EXTERNAL
    kernel.external_data.add(key="location", value=location)
    (root / "model.onnx").write_bytes(model.SerializeToString())
    seal(root, read_manifest(root))
    return root


@pytest.mark.parametrize(
    "location", ["../secret.bin", "/etc/passwd", "sub/../kernel.bin", "", "*/_ORT_MEM_ADDR_/*", "./kernel.bin/"]
)
def test_a_bundle_whose_weights_lie_elsewhere_is_refused(tiny_bundle: Path, tmp_path: Path, location: str) -> None:
    root = Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))
    with pytest.raises(UnsafePath, match=r"^model\.onnx: its weights lie in '.*', which the manifest does not list$"):
        resealed(root, location)


def test_weights_in_a_listed_file_are_used(tiny_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install 'trivium[cpu]'")
    from trivium.runtime.engine import Engine

    root = resealed(Path(shutil.copytree(tiny_bundle, tmp_path / "copy")), "kernel.bin")
    manifest: Manifest = open_bundle(root).manifest
    assert "kernel.bin" in {file.path for file in manifest.files}
    Engine(open_bundle(root)).self_test()


@settings(max_examples=200, deadline=None)
@given(cut=st.integers(0, 5000), flip=st.integers(0, 255), length=st.integers(0, 30))
def test_any_bytes_are_read_or_refused(
    tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory, cut: int, flip: int, length: int
) -> None:
    data = bytearray((tiny_bundle / "model.onnx").read_bytes() + b"location")
    data[cut : cut + length] = bytes([flip]) * length
    path = tmp_path_factory.getbasetemp() / "fuzzed.onnx"
    path.write_bytes(data)
    try:
        found = external_files(path)
    except ValueError:
        found = set()
    assert all(isinstance(location, str) for location in found)
