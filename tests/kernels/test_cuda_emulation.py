"""The CUDA sources, kernels and host code alike, run by the emulated card against the float64 reference.

What this cannot show: that real hardware orders memory as the emulation does, cuBLASLt itself, and speed.
"""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from trivium.kernels import HeadStatistics, dropout_masks, mc_heads_ref
from trivium.kernels import cuda as binding


class Inputs(NamedTuple):
    features: NDArray[np.float32]
    weights: NDArray[np.float32]
    bias: NDArray[np.float32]
    temperature: NDArray[np.float32]
    masks: NDArray[np.uint8]
    keep: float


def draw(batch: int, heads: int, classes: int, units: int, passes: int, keep: float = 0.5, own: bool = False) -> Inputs:
    rng = np.random.default_rng([batch, heads, classes, units, passes])
    shape = (batch, heads, units) if own else (batch, units)
    return Inputs(
        rng.normal(size=shape).astype(np.float32),
        (rng.normal(size=(heads, classes, units)) / np.sqrt(units)).astype(np.float32) * 2,
        rng.normal(size=(heads, classes)).astype(np.float32),
        rng.uniform(0.5, 2.0, heads).astype(np.float32),
        dropout_masks(passes, units, keep, seed=5),
        keep,
    )


class Card:
    """The emulated card: what the product's binding needs, and memory behind which no byte may be touched."""

    def __init__(self, path: Path) -> None:
        self.library = binding.CudaLibrary(path)
        self.c = self.library.functions
        self.c.emulation_allocate.argtypes, self.c.emulation_allocate.restype = [ctypes.c_int64], ctypes.c_void_p
        self.c.emulation_free.argtypes = [ctypes.c_void_p]
        self.c.emulation_fail.argtypes, self.c.emulation_fail.restype = [ctypes.c_int64], ctypes.c_int64
        self.c.emulation_launches.restype = self.c.emulation_live_bytes.restype = ctypes.c_int64
        self.configure()

    def configure(self, devices: int = 1, major: int = 9, clusters: int = 1, order: int = 0) -> None:
        self.c.emulation_configure(devices, major, clusters, order)

    def upload(self, array: NDArray) -> int:
        address = self.c.emulation_allocate(max(array.nbytes, 1))
        ctypes.memmove(address, np.ascontiguousarray(array).ctypes.data, array.nbytes)
        return int(address)

    def pack(self, x: Inputs, arithmetic: int = binding.FLOAT32) -> binding.CudaModel:
        heads, classes, units = x.weights.shape
        shape = binding.Shape(heads, 1 if x.features.ndim == 2 else heads, classes, units, len(x.masks))
        arrays = (x.weights, x.bias, x.temperature, x.masks)
        return binding.CudaModel(self.library, shape, x.keep, arithmetic, *(a.ctypes.data for a in arrays))

    def run(
        self, model: binding.CudaModel, features: NDArray, feature_type: int = binding.FLOAT32, stages: tuple = (7,)
    ) -> HeadStatistics:
        b, k, c = len(features), model.shape.heads, model.shape.classes
        shapes = ((b, k, c), (b, k), (b, k), (b, k, k), (b, k))
        out = HeadStatistics(*(np.full(shape, 123.0, np.float32) for shape in shapes))
        size = model.workspace_bytes(b)
        block = int(self.c.emulation_allocate(size + 256))
        addresses = [self.upload(a) for a in out]
        source = self.upload(features)
        try:
            for stage in stages:
                model.run(source, feature_type, b, tuple(addresses), -(-block // 256) * 256, size, stages=stage)  # type: ignore[arg-type]
            for array, address in zip(out, addresses, strict=True):
                ctypes.memmove(array.ctypes.data, address, array.nbytes)
        finally:
            for address in (block, source, *addresses):
                self.c.emulation_free(address)
        return out

    def statistics(self, x: Inputs, arithmetic: int = binding.FLOAT32) -> HeadStatistics:
        with closing(self.pack(x, arithmetic)) as model:
            return self.run(model, x.features)


@pytest.fixture
def card(emulated_library: Path) -> Iterator[Card]:
    card = Card(emulated_library)
    yield card
    card.c.emulation_fail(-1)
    assert card.c.emulation_live_bytes() == 0


def assert_close(out: HeadStatistics, ref: HeadStatistics) -> None:
    """Probabilities to 1e-6, statistics to 1e-5 of their size or of one nat."""
    np.testing.assert_allclose(out.probabilities, ref.probabilities, rtol=0, atol=1e-6)
    for name in HeadStatistics._fields[1:]:
        np.testing.assert_allclose(getattr(out, name), getattr(ref, name), rtol=1e-5, atol=1e-5, err_msg=name)


GRID = [
    # B, K, C, D, T, keep, own
    (2, 3, 10, 20, 32, 0.5, False),
    (1, 3, 1000, 40, 32, 0.5, False),
    (1, 2, 1024, 17, 64, 0.5, True),
    (3, 4, 129, 33, 7, 0.7, True),
    (2, 1, 128, 9, 1, 0.9, False),
    (2, 2, 127, 8, 128, 0.5, False),
    (1, 8, 5, 3, 2, 0.5, False),
    (5, 1, 1, 1, 1, 1.0, False),
    (33, 2, 3, 7, 9, 0.25, False),
    (1, 3, 1025, 16, 6, 0.5, True),
    (1, 2, 2000, 12, 5, 0.5, False),
    (1, 2, 21843, 6, 4, 0.5, False),
]


@pytest.mark.parametrize("shape", GRID)
@pytest.mark.parametrize(("major", "clusters"), [(9, 1), (8, 1)])
def test_float32_agrees_with_the_reference(card: Card, shape: tuple, major: int, clusters: int) -> None:
    x = draw(*shape)
    card.configure(major=major, clusters=clusters)
    assert_close(card.statistics(x), mc_heads_ref(*x))


@pytest.mark.parametrize(
    ("heads", "classes", "major", "clusters", "launches"),
    [
        (3, 100, 9, 1, 2),  # expand, one cluster of three heads
        (3, 100, 9, 0, 3),  # a slice of a card too small for it: divergences by a kernel of their own
        (3, 100, 8, 1, 3),
        (9, 4, 9, 1, 3),  # more heads than a cluster may have blocks
        (3, 1025, 9, 1, 4),  # expand, rows, means, divergences
    ],
)
def test_the_card_decides_which_kernels_run(
    card: Card, heads: int, classes: int, major: int, clusters: int, launches: int
) -> None:
    x = draw(2, heads, classes, 8, 4)
    card.configure(major=major, clusters=clusters)
    before = card.c.emulation_launches()
    assert_close(card.statistics(x), mc_heads_ref(*x))
    assert card.c.emulation_launches() - before == launches


def test_bfloat16_is_the_reference_of_rounded_weights_and_features(card: Card) -> None:
    x = draw(3, 3, 50, 64, 32)
    rounded = x._replace(weights=to_bfloat16(x.weights), features=to_bfloat16(x.features))
    assert_close(card.statistics(x, binding.BFLOAT16), mc_heads_ref(*rounded))
    error = np.abs(card.statistics(x, binding.BFLOAT16).probabilities - mc_heads_ref(*x).probabilities).max()
    assert 0 < error < 2e-2


def test_half_features_are_read_as_they_are(card: Card) -> None:
    x = draw(1, 2, 20, 31, 7, 0.8)
    half = x.features.astype(np.float16)
    half[0, 3:9] = [65504.0, 6.104e-5, 5.96e-8, -1.2e-7, -0.0, 3e-5]  # the largest, the least normal, subnormals
    x.weights[:, :, 3:9] /= np.maximum(np.abs(half[0, 3:9].astype(np.float32)), 1e-8)
    with closing(card.pack(x)) as model:
        assert_close(card.run(model, half, binding.FLOAT16), mc_heads_ref(half, *x[1:]))


def test_bfloat16_features_are_read_as_they_are(card: Card) -> None:
    x = draw(3, 2, 20, 31, 8, own=True)
    narrow = to_bfloat16(x.features)
    words = (narrow.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    with closing(card.pack(x)) as model:
        assert_close(card.run(model, words, binding.BFLOAT16), mc_heads_ref(narrow, *x[1:]))


@pytest.mark.parametrize("classes", [10, 1000, 1200])
def test_a_poisoned_picture_spoils_no_other(card: Card, classes: int) -> None:
    x = draw(4, 2, classes, 12, 6, own=True)
    x.masks[:, 5] = 0  # a unit that every pass drops still counts
    x.features[0, 1, 5], x.features[2, 0, 3] = np.nan, -np.inf
    out, ref = card.statistics(x), mc_heads_ref(*x)
    for a in out:
        assert np.isnan(a[[0, 2]]).all()
        assert np.isfinite(a[[1, 3]]).all()
    assert_close(out, ref)


@pytest.mark.parametrize("classes", [10, 1000, 1200])
def test_outliers_ties_and_tiny_numbers(card: Card, classes: int) -> None:
    x = draw(3, 3, classes, 16, 8)
    x.features[0, 2] = 1e4
    x.features[1] = 0.0
    x.features[2] = 1e-40
    x.bias[0], x.temperature[0] = 0.0, 1.0
    out, ref = card.statistics(x), mc_heads_ref(*x)
    assert np.isfinite(out.divergence).all()
    np.testing.assert_allclose(out.probabilities, ref.probabilities, rtol=0, atol=1e-4)
    np.testing.assert_allclose(out.divergence, ref.divergence, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(out.energy, ref.energy, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out.predictive_entropy[1:, 0], np.log(classes), rtol=1e-6)
    assert (out.mutual_information[1, 0] >= 0).all()


@pytest.mark.parametrize("classes", [100, 1000, 1100])
def test_no_order_of_threads_changes_a_bit(card: Card, classes: int) -> None:
    """What a race would do."""
    x = draw(1, 3, classes, 8, 8)
    outs = []
    for order in range(9):
        card.configure(order=order)
        outs.append(card.statistics(x))
    for out in outs[1:]:
        for a, b in zip(out, outs[0], strict=True):
            np.testing.assert_array_equal(a, b)


def test_slabs_hide_inside_a_run(card: Card) -> None:
    """More pictures than one slab holds, and what is left over at the end."""
    x = draw(300, 1, 2, 3, 2)
    with closing(card.pack(x)) as model:
        assert model.workspace_bytes(300) == model.workspace_bytes(256)
        assert_close(card.run(model, x.features), mc_heads_ref(*x))


def test_stages_alone_add_up_to_a_run(card: Card) -> None:
    x = draw(7, 3, 30, 10, 16)
    with closing(card.pack(x)) as model:
        out = card.run(model, x.features, stages=(binding.EXPAND, binding.PRODUCT, binding.STATISTICS))
        for a, b in zip(out, card.run(model, x.features), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("classes", [20, 1100])
def test_any_failing_call_is_an_error_and_leaks_nothing(card: Card, classes: int) -> None:
    x = draw(2, 2, classes, 8, 4)
    card.configure(major=8)
    card.c.emulation_fail(-1)
    card.pack(x).close()
    packing = card.c.emulation_fail(-1)
    assert packing > 10
    for nth in range(packing):
        card.c.emulation_fail(nth)
        with pytest.raises(binding.CudaError, match="emulated error"):
            card.pack(x)
        card.c.emulation_fail(-1)
        assert card.c.emulation_live_bytes() == 0, nth

    model = card.pack(x)
    outputs, features = [card.upload(np.zeros(4 * classes, np.float32)) for _ in range(5)], card.upload(x.features)
    size = model.workspace_bytes(2)
    block = int(card.c.emulation_allocate(size + 256))
    arguments = (features, binding.FLOAT32, 2, tuple(outputs), -(-block // 256) * 256, size)
    card.c.emulation_fail(-1)
    model.run(*arguments)  # type: ignore[arg-type]
    calls = card.c.emulation_fail(-1)
    assert calls >= 4
    for nth in range(calls):
        card.c.emulation_fail(nth)
        with pytest.raises(binding.CudaError, match="emulated error"):
            model.run(*arguments)  # type: ignore[arg-type]
    card.c.emulation_fail(-1)
    for address in (*outputs, features, block):
        card.c.emulation_free(address)
    model.close()


def test_refusals_say_what_is_wrong(card: Card) -> None:
    x = draw(1, 2, 4, 8, 4)
    for change, words in [
        ({"masks": np.full((4, 8), 2, np.uint8)}, "masks must hold 0 and 1 only"),
        ({"temperature": np.array([1.0, 0.0], np.float32)}, "temperatures must be positive"),
        ({"keep": 0.0}, r"keep must lie in \(0, 1\]"),
    ]:
        with pytest.raises(binding.CudaError, match=words):
            card.pack(x._replace(**change))  # type: ignore[arg-type]
    with pytest.raises(binding.CudaError, match="arithmetic must be"):
        card.pack(x, arithmetic=1)
    model = card.pack(x)
    for stale in ((3, 64), (0, 8)):
        with pytest.raises(binding.CudaError, match=r"features must be|workspace must"):
            model.run(64, stale[0], 1, (64, 64, 64, 64, 64), 256, stale[1])
    with pytest.raises(binding.CudaError, match="aligned to 256"):
        model.run(64, 0, 1, (64, 64, 64, 64, 64), 128, model.workspace_bytes(1))
    model.close()
    card.configure(major=7)
    assert card.library.devices() == 0
    with pytest.raises(binding.CudaError, match=r"compute capability 8\.0 is needed"):
        card.pack(x)
    card.configure(devices=0)
    assert card.library.devices() == 0
    with pytest.raises(binding.CudaError, match="no CUDA device"):
        card.pack(x)


def test_a_missing_cublaslt_is_named(emulated_library: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    copy = tmp_path / "libheads.so"  # the choice is made once per loaded library
    shutil.copy(emulated_library, copy)
    monkeypatch.setenv("TRIVIUM_CUBLASLT", str(tmp_path / "nothing.so"))
    with pytest.raises(binding.CudaError, match=r"cuBLASLt 12 or 13 cannot be loaded .*nothing\.so"):
        Card(copy).pack(draw(1, 1, 2, 2, 2))


def to_bfloat16(array: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rounded to nearest even, kept as float32."""
    bits = array.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded & np.uint32(0xFFFF0000)).view(np.float32)
