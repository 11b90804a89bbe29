"""The engine on a real graph: bit-identical answers, its self-test, and models that are not what they say."""

import io
import json
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from trivium.kernels import HeadStatistics, custom_ops_library, kernel_counts, mc_heads_ref, pays
from trivium.runtime.bundle import Bundle, open_bundle, read_manifest, seal
from trivium.runtime.engine import OUTPUTS, Engine
from trivium.runtime.errors import EngineError, InvalidRequest, UnsafePath

onnx = pytest.importorskip("onnx", reason="needs onnx: pip install 'trivium[export]'")
pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install 'trivium[cpu]'")


@pytest.fixture(scope="module")
def engine(tiny_bundle: Path) -> Engine:
    return Engine(open_bundle(tiny_bundle))


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))


def resealed(root: Path, **changes: Any) -> Bundle:
    manifest = read_manifest(root)
    return seal(root, manifest.model_validate(manifest.model_dump() | changes))


def edit_model(root: Path, change: Callable[[Any], Any]) -> None:
    model = onnx.load(root / "model.onnx")
    change(model)
    (root / "model.onnx").write_bytes(model.SerializeToString())


def assert_same_bits(one: HeadStatistics, other: HeadStatistics) -> None:
    for name in OUTPUTS:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


def reference(bundle: Bundle, images: NDArray[np.uint8]) -> HeadStatistics:
    """The tiny model by NumPy in float64, from the constants in its own graph."""
    model = onnx.load(bundle.model_path)
    constants = {i.name: onnx.numpy_helper.to_array(i).astype(np.float64) for i in model.graph.initializer}
    normalised = (images - constants["mean"]) / constants["std"]
    n, size = len(images), images.shape[1] // 8
    patches = normalised.reshape(n, size, 8, size, 8, 3)
    features = np.tanh(np.einsum("nyaxbc,dcab->ndyx", patches, constants["kernel"])).reshape(n, -1)
    weights, bias, temperature, masks = (constants[f"heads.{n}"] for n in ("weights", "bias", "temperature", "masks"))
    return mc_heads_ref(features, weights, bias, temperature, masks, keep=1 - bundle.manifest.dropout.rate)


@pytest.mark.parametrize("kernels", ["off", "auto"])
def test_the_answers_are_the_definitions(tiny_bundle: Path, some_pictures: NDArray[np.uint8], kernels: Any) -> None:
    bundle = open_bundle(tiny_bundle)
    engine = Engine(bundle, kernels=kernels)
    found, expected = engine.run(some_pictures), reference(bundle, some_pictures)
    for name in OUTPUTS:
        values = getattr(found, name)
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, getattr(expected, name), rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("kernels", ["off", "auto"])
def test_an_answer_is_the_same_bit_for_bit_in_any_batch_and_after_a_restart(
    tiny_bundle: Path, some_pictures: NDArray[np.uint8], kernels: Any
) -> None:
    engine = Engine(open_bundle(tiny_bundle), kernels=kernels)
    whole = engine.run(some_pictures)
    again = Engine(open_bundle(tiny_bundle), kernels=kernels).run(some_pictures[::-1])
    assert_same_bits(whole, HeadStatistics(*(values[::-1] for values in again)))
    for i in range(len(some_pictures)):
        assert_same_bits(engine.run(some_pictures[i : i + 1]), HeadStatistics(*(v[i : i + 1] for v in whole)))


def test_an_answer_is_the_same_bit_for_bit_beside_other_threads(
    engine: Engine, some_pictures: NDArray[np.uint8]
) -> None:
    rows = [some_pictures[i : i + 1] for i in range(len(some_pictures))] * 20
    expected = [engine.run(row) for row in rows]
    with ThreadPoolExecutor(8) as pool:
        for one, other in zip(expected, pool.map(engine.run, rows), strict=True):
            assert_same_bits(one, other)


def test_batches_for_evaluation_agree(engine: Engine, some_pictures: NDArray[np.uint8]) -> None:
    one_by_one, batched = engine.run(some_pictures), engine.run_batch(some_pictures, batch=5)
    for name in OUTPUTS:
        np.testing.assert_allclose(getattr(batched, name), getattr(one_by_one, name), rtol=1e-4, atol=1e-5)


def test_which_kernels_run_is_said(tiny_bundle: Path) -> None:
    off = Engine(open_bundle(tiny_bundle), kernels="off")
    assert (off.kernels, off.kernels_reason) == ("function", "switched off")
    auto = Engine(open_bundle(tiny_bundle))
    assert auto.kernels in ("fused", "function")
    assert auto.kernels_reason


def test_the_fused_kernel_runs_where_it_is_said_to_and_only_there(
    tiny_bundle: Path, some_pictures: NDArray[np.uint8]
) -> None:
    try:
        custom_ops_library()
    except FileNotFoundError as error:
        pytest.skip(f"the kernels are not built: {error}")
    automatic = len(some_pictures) if pays() else 0
    for kernels, calls in (("on", len(some_pictures)), ("auto", automatic), ("off", 0)):
        engine = Engine(open_bundle(tiny_bundle), kernels=kernels)  # type: ignore[arg-type]
        assert engine.kernels == ("fused" if calls else "function")
        before = kernel_counts().operators
        engine.run(some_pictures)
        assert kernel_counts().operators - before == calls


def test_auto_leaves_the_kernel_where_it_does_not_pay(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        custom_ops_library()
    except FileNotFoundError as error:
        pytest.skip(f"the kernels are not built: {error}")
    monkeypatch.setenv("TRIVIUM_ISA", "scalar")
    auto = Engine(open_bundle(tiny_bundle))
    assert (auto.kernels, "does not pay" in auto.kernels_reason) == ("function", True)
    assert Engine(open_bundle(tiny_bundle), kernels="on").kernels == "fused"


@pytest.mark.parametrize("library", ["absent", "no library"])
def test_a_kernel_library_that_cannot_be_used(
    tiny_bundle: Path, some_pictures: NDArray[np.uint8], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    path = tmp_path / "libother.so"
    if library == "no library":
        path.write_bytes(b"\x7fELF nonsense")
    monkeypatch.setattr("trivium.runtime.engine.custom_ops_library", lambda: path)
    engine = Engine(open_bundle(tiny_bundle))
    assert engine.kernels == "function"
    assert "cannot be registered" in engine.kernels_reason
    engine.self_test()
    with pytest.raises(EngineError, match="cannot be registered"):
        Engine(open_bundle(tiny_bundle), kernels="on")


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((1, 32, 33, 3), np.uint8),
        np.zeros((0, 32, 32, 3), np.uint8),
        np.zeros((32, 32, 3), np.uint8),
        np.zeros((1, 3, 32, 32), np.uint8),
        np.zeros((1, 32, 32, 3), np.float32),
    ],
)
def test_pictures_that_do_not_fit(engine: Engine, images: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^pictures must be uint8 \[N, 32, 32, 3\] with N >= 1, got "):
        engine.run(images)


def test_the_self_test_passes_and_notices_other_weights(copy: Path) -> None:
    Engine(open_bundle(copy)).self_test()

    def scale(model: Any) -> None:
        bias = next(i for i in model.graph.initializer if i.name == "heads.bias")
        bias.CopyFrom(
            onnx.numpy_helper.from_array(
                onnx.numpy_helper.to_array(bias) + np.repeat(np.array([0.5, 0], np.float32), 5), bias.name
            )
        )

    edit_model(copy, scale)
    with pytest.raises(EngineError, match=r"^self-test: probabilities differs by 0\.\d+ from the answer recorded"):
        Engine(resealed(copy)).self_test()


@pytest.mark.parametrize("tensor", ["mean", "std", "kernel", "heads.weights", "heads.bias", "heads.temperature"])
def test_the_self_test_notices_one_percent_of_noise_in_one_tensor(copy: Path, tensor: str) -> None:
    def disturb(model: Any) -> None:
        found = next(i for i in model.graph.initializer if i.name == tensor)
        values = onnx.numpy_helper.to_array(found)
        noise = np.random.default_rng(0).normal(1, 0.01, values.shape).astype(np.float32)
        found.CopyFrom(onnx.numpy_helper.from_array(values * noise, tensor))

    edit_model(copy, disturb)
    with pytest.raises(EngineError, match=r"^self-test: .* differs by "):
        Engine(resealed(copy)).self_test()


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
@pytest.mark.parametrize("kernels", ["on", "off"])
def test_every_implementation_passes_with_room(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, isa: str, kernels: Any
) -> None:
    monkeypatch.setenv("TRIVIUM_ISA", isa)
    monkeypatch.setattr("trivium.runtime.engine.SELF_TEST_TOLERANCE", dict.fromkeys(OUTPUTS, 1e-5))
    try:
        engine = Engine(open_bundle(tiny_bundle), kernels=kernels)
    except EngineError as error:
        pytest.skip(str(error))
    engine.self_test()


def test_models_in_8_bits_have_a_wider_tolerance(copy: Path) -> None:
    def disturb(model: Any) -> None:
        bias = next(i for i in model.graph.initializer if i.name == "heads.bias")
        values = onnx.numpy_helper.to_array(bias)
        bias.CopyFrom(onnx.numpy_helper.from_array(values + np.linspace(0, 3e-3, 10, dtype=np.float32), bias.name))

    def quantize(model: Any) -> None:
        scale = onnx.numpy_helper.from_array(np.float32(1 / 255), "scale")
        zero = onnx.numpy_helper.from_array(np.uint8(0), "zero_point")
        model.graph.initializer.extend([scale, zero])
        model.graph.node.append(onnx.helper.make_node("QuantizeLinear", ["mean", "scale", "zero_point"], ["unused"]))

    edit_model(copy, disturb)
    with pytest.raises(EngineError, match=r"more than 0\.0001 "):
        Engine(resealed(copy)).self_test()
    edit_model(copy, quantize)
    Engine(resealed(copy)).self_test()


def test_the_self_test_notices_what_is_not_a_number(copy: Path) -> None:
    def poison(model: Any) -> None:
        std = next(i for i in model.graph.initializer if i.name == "std")
        std.CopyFrom(onnx.numpy_helper.from_array(np.full(3, np.nan, np.float32), "std"))

    edit_model(copy, poison)
    with pytest.raises(EngineError, match="differs by nan"):
        Engine(resealed(copy)).self_test()
    with pytest.raises(EngineError, match="black picture is not finite"):
        Engine(resealed(copy, golden=None)).self_test()


def test_golden_answers_with_a_pickle_inside_are_not_unpickled(copy: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "executed",))

    np.savez(copy / "golden.npz", image=np.array([Evil()], object), allow_pickle=True)
    assert pickle.dumps(Evil())
    with pytest.raises(EngineError, match=r"^self-test: golden\.npz cannot be read: .*allow_pickle=False"):
        Engine(resealed(copy)).self_test()
    assert not (tmp_path / "executed").exists()


def npy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    return file.getvalue()


def test_golden_answers_that_unpack_to_much_too_much(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trivium.runtime.engine.GOLDEN_LIMIT", 1_000_000)
    with zipfile.ZipFile(copy / "golden.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("image.npy", bytes(1_000_001))
    with pytest.raises(EngineError, match=r"golden\.npz cannot be read: \d+ bytes unpacked, more than"):
        Engine(resealed(copy)).self_test()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 nonsense", b"\x93NUMPY\x01\x00", npy()])
def test_golden_answers_that_cannot_be_read(copy: Path, content: bytes) -> None:
    (copy / "golden.npz").write_bytes(content)
    with pytest.raises(EngineError, match=r"^self-test: golden\.npz cannot be read: "):
        Engine(resealed(copy)).self_test()


def test_golden_answers_of_another_shape(copy: Path) -> None:
    with np.load(copy / "golden.npz") as archive:
        golden = dict(archive)
    np.savez(copy / "golden.npz", **golden | {"energy": golden["energy"][:, :2]})
    with pytest.raises(EngineError, match=r"energy is not finite \[4, 3\]"):
        Engine(resealed(copy)).self_test()
    np.savez(copy / "golden.npz", **golden | {"image": golden["image"][:, :8]})
    with pytest.raises(EngineError, match=r"^self-test: golden\.npz: pictures must be"):
        Engine(resealed(copy)).self_test()


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x08\x0a" * 1000, b"a location of nonsense"])
def test_a_file_that_is_no_model(copy: Path, content: bytes) -> None:
    (copy / "model.onnx").write_bytes(content)
    with pytest.raises((EngineError, UnsafePath), match=r"^model\.onnx: .+$"):
        Engine(resealed(copy))


def renamed_input(model: Any) -> None:
    model.graph.input[0].name = model.graph.node[0].input[0] = "picture"


def float_input(model: Any) -> None:
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT


def batch_of_four(model: Any) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4


def missing_output(model: Any) -> None:
    del model.graph.output[4]


@pytest.mark.parametrize(
    ("change", "changes", "reason"),
    [
        (renamed_input, {}, "its one input must be 'image'"),
        (float_input, {}, "its one input must be 'image', uint8"),
        (batch_of_four, {}, r"its input is \[4, 32, 32, 3\], not \[N, 32, 32, 3\]"),
        (missing_output, {}, "it has no output 'energy'"),
        (None, {"classes": ["a", "b"]}, r"its output probabilities is \['N', 3, 10\], the manifest says \['N', 3, 2\]"),
        (None, {"heads": ["clean", "robust"], "router": {"default": "clean"}}, "its output probabilities is"),
        (
            None,
            {"preprocessing": {"height": 24, "width": 32, "mean": [0, 0, 0], "std": [1, 1, 1]}},
            r"its input is \['N', 32, 32, 3\], not \[N, 24, 32, 3\]",
        ),
    ],
)
def test_a_model_that_is_not_the_manifests(
    copy: Path, change: Callable[[Any], Any] | None, changes: dict[str, Any], reason: str
) -> None:
    if change is not None:
        edit_model(copy, change)
    with pytest.raises(EngineError, match=rf"^model\.onnx: {reason}"):
        Engine(resealed(copy, **changes))


def test_without_onnxruntime_the_pip_line_is_given(tiny_bundle: Path) -> None:
    code = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        "sys.argv = ['trivium', 'predict', sys.argv[1], 'x.png']\n"
        "from trivium.runtime.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tiny_bundle)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "trivium predict: the package 'onnxruntime' is not installed; run: pip install 'trivium[cpu]'"
    )


def test_a_gpu_that_is_not_there(tiny_bundle: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has a CUDA provider")
    with pytest.raises(EngineError, match=r"no CUDA provider; run: .*trivium\[gpu\]"):
        Engine(open_bundle(tiny_bundle), device="cuda")


def test_a_model_for_one_picture_answers_many(copy: Path, some_pictures: NDArray[np.uint8]) -> None:
    def fix_batch(model: Any) -> None:
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1

    expected = Engine(open_bundle(copy)).run(some_pictures)
    edit_model(copy, fix_batch)
    engine = Engine(resealed(copy))
    assert_same_bits(engine.run(some_pictures), expected)
    assert_same_bits(engine.run_batch(some_pictures), expected)


def test_a_single_head(single_head_bundle: Path, some_pictures: NDArray[np.uint8]) -> None:
    bundle = open_bundle(single_head_bundle)
    found = Engine(bundle, kernels="off").run(some_pictures)
    assert json.loads((single_head_bundle / "manifest.json").read_text())["heads"] == ["original"]
    np.testing.assert_allclose(found.probabilities, reference(bundle, some_pictures).probabilities, atol=1e-5)
    assert (found.divergence == 0).all()
