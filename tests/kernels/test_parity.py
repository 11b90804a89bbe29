"""The fused CPU kernel against the float64 definition, on every instruction set that this machine has."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from trivium.kernels import HeadStatistics, MCHeads, backend, kernel_counts, mc_heads, mc_heads_ref

from .cases import BFLOAT16_ROUNDING, Inputs, assert_close, make_inputs

FLOAT32_ROUNDING = 2.0**-24


@pytest.fixture(params=["scalar", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TRIVIUM_ISA", request.param)
    try:
        assert backend() == request.param
    except ValueError as error:
        pytest.skip(str(error))
    return str(request.param)


def grid() -> list[tuple[int, int, int, int, int, float, bool]]:
    """(B, K, C, D, T, keep, own features): every extreme at least once, the rest drawn, all affordable."""
    cases = [
        (1, 1, 1, 1, 1, 1.0, False),
        (33, 4, 2, 1, 128, 0.5, False),
        (33, 3, 10, 512, 32, 0.5, False),
        (2, 3, 1000, 1280, 32, 0.5, False),
        (1, 1, 2000, 777, 127, 0.8, False),
        (1, 4, 33, 4096, 31, 0.5, True),
        (1, 2, 17, 4095, 128, 0.5, False),
        (3, 2, 21843, 40, 4, 0.5, False),
    ]
    rng = np.random.default_rng(1)
    while len(cases) < 40:
        b, k = int(rng.choice([1, 2, 3, 4, 5, 7, 8, 33])), int(rng.integers(1, 5))
        c = int(rng.choice([1, 2, 5, 16, 31, 32, 33, 63, 64, 65, 100, 129, 500, 2000]))
        d = int(rng.choice([1, 2, 3, 15, 16, 17, 31, 33, 64, 100, 333, 1000, 2048]))
        t = int(rng.choice([1, 2, 3, 5, 6, 7, 12, 13, 16, 24, 32, 37, 64, 99, 128]))
        if b * k * c * d * t <= 60_000_000:
            cases.append((b, k, c, d, t, float(rng.choice([0.5, 0.5, 0.8, 0.3, 1.0])), bool(rng.integers(2))))
    return cases


@pytest.mark.parametrize("case", grid(), ids=lambda c: "-".join(map(str, c)))
def test_float32_weights(isa: str, case: tuple[int, int, int, int, int, float, bool]) -> None:
    b, k, c, d, t, keep, own = case
    inputs = make_inputs(b, k, c, d, t, keep=keep, own_features=own)
    assert_close(mc_heads(*inputs.arguments()), mc_heads_ref(*inputs.arguments()))


def test_bfloat16_weights_stay_within_their_rounding(isa: str, record_property: Callable[[str, object], None]) -> None:
    inputs = make_inputs(4, 3, 1000, 1280, 32)
    actual, expected = mc_heads(*inputs.arguments(), weight_type="bfloat16"), mc_heads_ref(*inputs.arguments())
    error = float(np.abs(actual.probabilities - expected.probabilities).max())
    record_property("largest_probability_error", error)
    print(f"bfloat16 weights, D 1280, C 1000, T 32, {isa}: largest error of a probability {error:.2e}")
    # |dp| <= |dz| / 2, and every term of z is off by at most its share of the rounding.
    assert error <= inputs.logit_bound() * BFLOAT16_ROUNDING / 2
    assert error <= 5e-3
    for a, e in zip(actual[1:], expected[1:], strict=True):
        np.testing.assert_allclose(a, e, rtol=5e-3, atol=5e-3)


def test_weights_that_are_bfloat16_already_lose_nothing(isa: str) -> None:
    inputs = make_inputs(3, 3, 200, 300, 32)
    rounded = (inputs.weights.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    exact = Inputs(inputs.features, rounded, inputs.bias, inputs.temperature, inputs.masks, inputs.keep)
    heads = MCHeads(*exact.arguments()[1:], weight_type="auto")
    assert heads.weight_type == "bfloat16"
    assert_close(heads(exact.features), mc_heads_ref(*exact.arguments()))
    assert MCHeads(*inputs.arguments()[1:], weight_type="auto").weight_type == "float32"


@pytest.mark.parametrize("outlier", [1e4, -1e4])
def test_outliers(isa: str, outlier: float) -> None:
    inputs = make_inputs(5, 3, 100, 257, 32, keep=0.5)
    inputs.features[1, 13] = outlier
    inputs.features[3, [0, 100, 256]] = outlier
    # Logits in the thousands hold fewer digits behind the point; the rounding of their terms is what may be seen.
    error = inputs.logit_bound() * FLOAT32_ROUNDING * 4
    actual, expected = mc_heads(*inputs.arguments()), mc_heads_ref(*inputs.arguments())
    usual = [0, 2, 4]
    assert_close(HeadStatistics(*(a[usual] for a in actual)), HeadStatistics(*(e[usual] for e in expected)))
    assert_close(actual, expected, error)


def test_equal_logits(isa: str) -> None:
    inputs = make_inputs(3, 3, 77, 50, 31)
    inputs.weights[:] = 0
    inputs.bias[:] = 5
    out = mc_heads(*inputs.arguments())
    np.testing.assert_allclose(out.probabilities, 1 / 77, atol=1e-7)
    np.testing.assert_allclose(out.predictive_entropy, np.log(77), rtol=1e-6)
    np.testing.assert_allclose(out.mutual_information, 0, atol=1e-6)
    np.testing.assert_allclose(out.divergence, 0, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-40, 1e-30])
def test_denormals(isa: str, scale: float) -> None:
    inputs = make_inputs(2, 2, 40, 33, 7, keep=0.8)
    inputs.features[0] *= scale
    inputs.weights[0] *= scale
    assert_close(mc_heads(*inputs.arguments()), mc_heads_ref(*inputs.arguments()))


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("own_features", [False, True])
def test_poisoned_pictures_answer_nan_and_are_counted(isa: str, poison: float, own_features: bool) -> None:
    inputs = make_inputs(7, 3, 40, 65, 32, own_features=own_features)
    clean = mc_heads(*inputs.arguments())
    inputs.features[2, ..., 64] = poison
    inputs.features[6, ..., 0] = poison
    before = kernel_counts()
    out = mc_heads(*inputs.arguments())
    after = kernel_counts()
    assert after.poisoned - before.poisoned == 2
    assert after.pictures - before.pictures == 7
    others = [0, 1, 3, 4, 5]
    for a, c in zip(out, clean, strict=True):
        assert np.isnan(a[[2, 6]]).all()
        np.testing.assert_array_equal(a[others], c[others])


def test_logits_beyond_float32_are_poison_and_not_plausible(isa: str) -> None:
    inputs = make_inputs(2, 2, 10, 16, 8)
    inputs.features[1] = 3e38
    inputs.weights[:] = np.abs(inputs.weights)
    out = mc_heads(*inputs.arguments())
    for a in out:
        assert np.isnan(a[1]).all()
        assert np.isfinite(a[0]).all()


@pytest.mark.parametrize("weight_type", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["exact", "hybrid"])
@pytest.mark.parametrize(("passes", "own_features", "classes"), [(32, False, 70), (37, True, 20), (128, False, 130)])
def test_batch_invariance(isa: str, weight_type: str, mode: str, passes: int, own_features: bool, classes: int) -> None:
    inputs = make_inputs(33, 3, classes, 100, passes, own_features=own_features, logits=8.0)
    heads = MCHeads(*inputs.arguments()[1:], weight_type=weight_type, mode=mode)  # type: ignore[arg-type]
    whole = heads(inputs.features)
    for start, stop in ((0, 1), (1, 3), (3, 8), (32, 33)):
        for a, w in zip(heads(inputs.features[start:stop]), whole, strict=True):
            np.testing.assert_array_equal(a, w[start:stop])
    for a, w in zip(heads(inputs.features[:5], threads=3), whole, strict=True):
        np.testing.assert_array_equal(a, w[:5])


def test_masks_need_not_be_antithetic(isa: str) -> None:
    inputs = make_inputs(2, 2, 30, 64, 32)
    masks = np.random.default_rng(0).integers(0, 2, inputs.masks.shape, np.uint8)
    masks[5], masks[6] = 0, 1
    other = Inputs(inputs.features, inputs.weights, inputs.bias, inputs.temperature, masks, 0.5)
    assert_close(mc_heads(*other.arguments()), mc_heads_ref(*other.arguments()))


def test_hybrid_is_near_where_a_few_classes_hold_the_probability(isa: str) -> None:
    flat = make_inputs(6, 3, 300, 128, 32, logits=1.0)
    # A few classes stand out, as behind a trained backbone.
    bias = flat.bias.copy()
    bias[:, :5] += 9
    inputs = Inputs(flat.features, flat.weights, bias, flat.temperature, flat.masks, flat.keep)
    before = kernel_counts().fallbacks
    actual, expected = mc_heads(*inputs.arguments(), mode="hybrid"), mc_heads_ref(*inputs.arguments())
    assert kernel_counts().fallbacks == before
    assert np.abs(actual.probabilities - expected.probabilities).max() < 0.01
    for a, e in zip(actual[1:], expected[1:], strict=True):
        assert np.abs(a - e).max() < 0.05


def test_hybrid_falls_back_to_the_exact_answer_where_the_tail_is_heavy(isa: str) -> None:
    inputs = make_inputs(6, 3, 300, 128, 32, logits=0.5)
    before = kernel_counts().fallbacks
    hybrid = mc_heads(*inputs.arguments(), mode="hybrid")
    assert kernel_counts().fallbacks == before + 6
    for h, e in zip(hybrid, mc_heads(*inputs.arguments()), strict=True):
        np.testing.assert_array_equal(h, e)
