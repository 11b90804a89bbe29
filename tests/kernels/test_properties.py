"""What holds for any input: signs and bounds of the statistics, classes without an order, batches without effect."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from trivium.kernels import MCHeads, dropout_masks, mc_heads

from .cases import Inputs

QUICK = settings(max_examples=200, deadline=None)


@st.composite
def any_inputs(draw: st.DrawFn) -> Inputs:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    b, k, c, d, t = (draw(st.integers(1, n)) for n in (9, 4, 80, 70, 40))
    scale = 10.0 ** draw(st.integers(-3, 2))
    keep = draw(st.sampled_from([0.2, 0.5, 0.9, 1.0]))
    own = draw(st.booleans())
    return Inputs(
        (rng.standard_normal((b, k, d) if own else (b, d)) * scale).astype(np.float32),
        rng.standard_normal((k, c, d)).astype(np.float32),
        rng.standard_normal((k, c)).astype(np.float32),
        rng.uniform(0.2, 5, k).astype(np.float32),
        dropout_masks(t, d, keep, draw(st.integers(0, 2**64 - 1))),
        keep,
    )


@QUICK
@given(any_inputs(), st.sampled_from(["exact", "hybrid"]))
def test_bounds(inputs: Inputs, mode: str) -> None:
    out = mc_heads(*inputs.arguments(), mode=mode)  # type: ignore[arg-type]
    classes = inputs.weights.shape[1]
    # Rounding of a sum of C probabilities.
    slack = 1e-5
    np.testing.assert_allclose(out.probabilities.sum(-1), 1, atol=slack)
    assert (out.probabilities >= 0).all()
    assert (out.divergence >= 0).all()
    assert (np.diagonal(out.divergence, axis1=1, axis2=2) == 0).all()
    assert (out.mutual_information >= 0).all()
    assert (out.mutual_information <= out.predictive_entropy + slack).all()
    assert (out.predictive_entropy <= np.log(classes) + slack).all()


@QUICK
@given(any_inputs(), st.randoms(use_true_random=False))
def test_classes_have_no_order(inputs: Inputs, random: object) -> None:
    order = np.arange(inputs.weights.shape[1])
    random.shuffle(order)  # type: ignore[attr-defined]
    h, w, b, tau, m, keep = inputs.arguments()
    straight = mc_heads(h, w, b, tau, m, keep)
    shuffled = mc_heads(h, w[:, order], b[:, order], tau, m, keep)
    np.testing.assert_allclose(shuffled.probabilities, straight.probabilities[..., order], atol=1e-6)
    for a, e in zip(shuffled[1:], straight[1:], strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5)


@QUICK
@given(any_inputs(), st.sampled_from(["float32", "bfloat16"]))
def test_batches_have_no_effect(inputs: Inputs, weight_type: str) -> None:
    heads = MCHeads(*inputs.arguments()[1:], weight_type=weight_type)  # type: ignore[arg-type]
    whole = heads(inputs.features)
    for i in range(len(inputs.features)):
        for a, w in zip(heads(inputs.features[i : i + 1]), whole, strict=True):
            np.testing.assert_array_equal(a[0], w[i])
