"""The folded router chooses as the NumPy router does: on random statistics, on ties, and where they are not numbers."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from tests.conftest import tiny_guarantees

from trivium.export.graph import OUTPUT_AXES, OUTPUTS
from trivium.export.router_graph import ROUTED, fold_router, folded, outputs, score_threshold
from trivium.kernels import HeadStatistics
from trivium.runtime.bundle import Manifest
from trivium.runtime.promises import abstentions, prediction_sets, terms
from trivium.runtime.router import logistic, route, shift_probability

HEADS, CLASSES = ("clean", "robust", "combined"), 5
RULES = ("clean", "robust", "combined", "mean", "min_entropy", "paper", "blend", "gate")
FLAT = {"divergence": 0.0, "mutual_information": 0.0, "energy": 1.0}
"""Weights of a blend rule that takes no logarithm into account, so that a tie is a tie in any runtime."""

GATE = {
    "intercept": {"clean": 0.25, "robust": 0.0, "combined": 0.25},
    "features": [
        {
            "statistic": name,
            "heads": of,
            "center": center,
            "scale": scale,
            "weights": dict(zip(HEADS, weights, strict=True)),
        }
        for name, of, center, scale, weights in (
            ("divergence", ["clean", "robust"], 0.8, 0.3, (-1.0, 0.5, 0.7)),
            ("divergence", ["combined", "robust"], 0.5, 0.5, (0.3, -0.1, 0.2)),
            ("predictive_entropy", ["clean"], 0.5, 0.25, (-0.5, 0.25, 0.125)),
            ("mutual_information", ["combined"], 0.5, 0.5, (0.0, 0.5, -0.5)),
            ("energy", ["robust"], -10.0, 3.0, (0.2, -0.4, 0.1)),
            ("max_probability", ["clean"], 0.75, 0.25, (1.0, -1.0, 0.0)),
        )
    ],
}
PART = {"intercept": {"robust": 0.0, "combined": 0.0}, "features": [
    {"statistic": "max_probability", "heads": ["clean"], "center": 0.5, "scale": 0.25,
     "weights": {"robust": -1.0, "combined": 1.0}}]}  # fmt: skip
"""A gate between two of the heads by a score of the third, which meets its tie exactly."""


GUARD = {"threshold": 0.6, "accuracy_loss": 0.01, "negative_flips": 0.01, "delta": 0.05}
"""Of a guard, whose detector is the blend rule's."""
ALL = (*RULES, "guard")


def promised(quantile: float, least: float | None, max_risk: float | None = 0.1, **changes: Any) -> dict[str, Any]:
    """Guarantees with the same thresholds for every router."""
    row: dict[str, Any] = {"lac": [quantile], "raps": [quantile], "confidence": "max_probability", "least": [least]}
    levels: dict[str, Any] = {"coverages": [0.9], "coverage": 0.9, "risks": [0.1], "max_risk": max_risk}
    row |= changes.pop("row", {})
    rows = dict.fromkeys(ALL, row)
    drift = {"pictures": 3, "edges": {}, "counts": {"class_id": [3, 0, 0, 0, 0]}, "head": "clean"}
    return tiny_guarantees() | levels | {"routers": rows, "drift": drift} | changes


def manifest_of(
    router: str,
    gate: Any = GATE,
    paper: Any = MappingProxyType({}),
    base: str = "combined",
    guarantees: dict[str, Any] | None = None,
    **blend: Any,
) -> Manifest:
    rule = {
        "weights": {"divergence": 1.0, "mutual_information": 0.5, "energy": 0.25},
        "center": {"divergence": -1.0, "mutual_information": 0.2, "energy": -10.5},
        "scale": {"divergence": 0.4, "mutual_information": 0.2, "energy": 1.5},
        "intercept": 0.1,
        "threshold": 0.5,
    }
    return Manifest.model_validate(
        {
            "name": "m",
            "classes": [f"class {i}" for i in range(CLASSES)],
            "heads": list(HEADS),
            "preprocessing": {"height": 8, "width": 8, "mean": (0, 0, 0), "std": (1, 1, 1)},
            "dropout": {"rate": 0.5, "passes": 4, "seed": 0},
            "router": {
                "default": router,
                "paper": {"divergence_threshold": 0.4, "entropy_scale": {"clean": 0.5, "robust": 0.75}} | paper,
                "blend": rule | blend,
                "gate": gate,
                "guard": rule | blend | GUARD | {"base": base},
            },
            "guarantees": guarantees,
            "files": [{"path": "model.onnx", "size": 0, "sha256": "0" * 64}],
        }
    )


def graph_of(manifest: Manifest, arithmetic: Any = "float64") -> onnx.ModelProto:
    """The folded router alone, on statistics that are given to it."""
    sizes = {"K": len(manifest.heads), "C": CLASSES}
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", *(sizes[axis] for axis in OUTPUT_AXES[name])])
        for name in OUTPUTS
    ]
    given = [helper.make_tensor_value_info(f"given.{v.name}", TensorProto.FLOAT, None) for v in values]
    for value, like in zip(given, values, strict=True):
        value.type.CopyFrom(like.type)
    nodes = [helper.make_node("Identity", [g.name], [v.name]) for g, v in zip(given, values, strict=True)]
    graph = helper.make_graph(nodes, "statistics", given, values)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return fold_router(model, manifest, arithmetic)


def both(model: onnx.ModelProto) -> list[Callable[[HeadStatistics], list[Any]]]:
    """The graph in ONNX Runtime and in the reference evaluator."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    reference = ReferenceEvaluator(model)

    def feed(statistics: HeadStatistics) -> dict[str, Any]:
        return {f"given.{name}": value for name, value in statistics._asdict().items()}

    names = [output.name for output in model.graph.output if output.name not in OUTPUTS]
    return [lambda s: session.run(names, feed(s)), lambda s: reference.run(names, feed(s))]


def check(manifest: Manifest, runners: list[Callable[[HeadStatistics], list[Any]]], statistics: HeadStatistics) -> None:
    expected = route(statistics, manifest)
    names, asked = folded(manifest).heads, terms(manifest)
    for run in runners:
        probabilities, class_id, head, *others = run(statistics)
        assert (probabilities.dtype, class_id.dtype, head.dtype) == (np.float32, np.int64, np.int64)
        assert [names[i] for i in head] == expected.head
        np.testing.assert_array_equal(class_id, expected.class_id)
        np.testing.assert_array_equal(probabilities, expected.probabilities)
        found = dict(zip(outputs(folded(manifest))[3:], others, strict=True))
        answered = expected.class_id >= 0
        if "prediction_set" in found:
            assert manifest.guarantees is not None
            assert asked is not None
            sets = prediction_sets(expected, manifest.guarantees, asked.quantile) & answered[:, None]
            np.testing.assert_array_equal(found["prediction_set"], sets)
        if "abstain" in found:
            assert asked is not None
            abstain = abstentions(expected, statistics, manifest, asked) | ~answered
            np.testing.assert_array_equal(found["abstain"], abstain)


GRAPHS = {router: (manifest_of(router), both(graph_of(manifest_of(router)))) for router in RULES}
# A threshold that a probability can meet exactly: sigmoid(0).
PLAIN: dict[str, Any] = {
    "weights": FLAT,
    "center": dict.fromkeys(FLAT, 0.0),
    "scale": dict.fromkeys(FLAT, 1.0),
    "intercept": 0.0,
}
TIED = manifest_of("blend", **PLAIN)
GRAPHS["blend, tied"] = (TIED, both(graph_of(TIED)))
THREE = manifest_of(
    "paper",
    paper={
        "uncertainty": "mutual_information",
        "among": list(HEADS),
        "entropy_scale": {"clean": 0.5, "robust": 0.75, "combined": 0.5},
    },
)
GRAPHS["paper, among three"] = (THREE, both(graph_of(THREE)))
for base in ("robust", "mean", "blend", "gate"):
    GUARDED = manifest_of("guard", base=base)
    GRAPHS[f"guard, {base}"] = (GUARDED, both(graph_of(GUARDED)))
# thresholds that a probability can meet exactly: 0.4 is below the float32 nearest to it
for name, router, guarantees in (
    ("promised", "combined", promised(0.6, 0.4)),
    ("promised, mixed", "mean", promised(0.75, 0.5)),
    ("promised, guard", "guard", promised(0.0, float(np.float32(0.4)))),
    ("promised, nothing", "robust", promised(1.0, None)),
):
    PROMISING = manifest_of(router, base="mean", guarantees=guarantees, **PLAIN)
    GRAPHS[name] = (PROMISING, both(graph_of(PROMISING)))
PARTIAL = manifest_of("gate", PART)
GRAPHS["gate, of two heads"] = (PARTIAL, both(graph_of(PARTIAL)))


def random_statistics(seed: int, rows: int) -> HeadStatistics:
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(CLASSES, rng.uniform(0.1, 2)), (rows, len(HEADS)))
    log_p = np.log(np.maximum(p, 1e-30))
    entropy = -(p * log_p).sum(-1)
    divergence = (p[:, :, None] * (log_p[:, :, None] - log_p[:, None])).sum(-1).clip(0)
    information = entropy * rng.uniform(0, 0.5, entropy.shape)
    columns = (p, entropy, information, divergence, rng.normal(-10, 3, entropy.shape))
    return HeadStatistics(*(column.astype(np.float32) for column in columns))


@pytest.mark.parametrize("name", GRAPHS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), rows=st.integers(1, 9))
def test_random_statistics(name: str, seed: int, rows: int) -> None:
    check(*GRAPHS[name], random_statistics(seed, rows))


coarse = st.sampled_from([0.0, 0.25, 0.4, 0.5, 0.75])
"""Few values, so that classes, entropies, ratios and thresholds meet exactly."""


@st.composite
def tied_statistics(draw: st.DrawFn) -> HeadStatistics:
    rows, heads = draw(st.integers(1, 4)), len(HEADS)

    def array(*shape: int, values: st.SearchStrategy[float] = coarse) -> np.ndarray:
        size = int(np.prod(shape))
        return np.array(draw(st.lists(values, min_size=size, max_size=size)), np.float32).reshape(shape)

    energy = array(rows, heads, values=st.sampled_from([-1e-6, -0.0, 0.0, 1e-45, 1.0]))
    return HeadStatistics(
        array(rows, heads, CLASSES), array(rows, heads), array(rows, heads), array(rows, heads, heads), energy
    )


@pytest.mark.parametrize("name", [name for name in GRAPHS if name != "blend" and not name.startswith("guard")])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(statistics=tied_statistics())
def test_ties(name: str, statistics: HeadStatistics) -> None:
    check(*GRAPHS[name], statistics)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32))
def test_the_blend_rule_on_either_side_of_its_threshold(seed: int) -> None:
    """As near as the logarithm's last bits allow: a relative 1e-13 beside the picture's own probability."""
    statistics = random_statistics(seed, 1)
    probe = manifest_of("blend")
    assert probe.router.blend is not None
    probability = float(shift_probability(statistics, probe.router.blend, probe.heads)[0])
    for threshold in (probability * (1 - 1e-13), probability * (1 + 1e-13)):
        if 0 < threshold < 1 - 1e-9:
            manifest = manifest_of("blend", threshold=threshold)
            check(manifest, both(graph_of(manifest)), statistics)


@pytest.mark.parametrize("name", GRAPHS)
def test_what_is_not_a_number_is_no_class(name: str) -> None:
    whole = random_statistics(3, 4)
    manifest, runners = GRAPHS[name]
    broken = HeadStatistics(*(value.copy() for value in whole))
    for value in broken:
        value[1] = np.nan
    check(manifest, runners, broken)
    assert route(broken, manifest).class_id[1] == -1
    # one head alone, as no graph of ours makes it
    partial = HeadStatistics(*(value.copy() for value in whole))
    partial.probabilities[2, 1, 3] = partial.predictive_entropy[2, 1] = np.nan
    check(manifest, runners, partial)


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.5, 0.987654321, 1.0])
def test_the_threshold_of_the_score_is_the_routers(threshold: float) -> None:
    bound = score_threshold(threshold)
    if threshold == 1.0:
        assert bound == np.inf
        return
    assert logistic(bound) <= threshold
    assert logistic(np.nextafter(bound, np.inf)) > threshold


def test_what_cannot_be_folded_is_left_out() -> None:
    whole = folded(manifest_of("mean", guarantees=promised(0.7, 0.6)))
    assert (whole.coverage, whole.max_risk) == (0.9, 0.1)
    for changes, left in (
        ({"score": "raps"}, ("abstain",)),
        ({"row": {"confidence": "predictive_entropy"}}, ("prediction_set",)),
        ({"max_risk": None}, ("prediction_set",)),
    ):
        manifest = manifest_of("mean", guarantees=promised(0.7, 0.6, **changes))
        assert outputs(folded(manifest)) == (*ROUTED, *left)
        assert [one.name for one in graph_of(manifest).graph.output][-len(left) :] == list(left)
    assert outputs(folded(manifest_of("mean"))) == ROUTED
    assert folded(manifest_of("guard", base="blend")).heads == [*HEADS, "clean+combined"]
    assert folded(manifest_of("guard", base="robust")).heads == list(HEADS)


def test_float32_arithmetic_chooses_the_same_away_from_thresholds_and_needs_no_doubles() -> None:
    statistics = random_statistics(5, 200)
    for router in ALL:
        manifest = manifest_of(router, guarantees=promised(0.7, 0.6))
        model = graph_of(manifest, "float32")
        types = {i.data_type for i in model.graph.initializer}
        assert TensorProto.DOUBLE not in types
        assert not any(a.i == TensorProto.DOUBLE for n in model.graph.node for a in n.attribute if a.name == "to")
        probabilities, class_id, head, *_ = both(model)[0](statistics)
        expected = route(statistics, manifest)
        assert [folded(manifest).heads[i] for i in head] == expected.head
        np.testing.assert_array_equal(class_id, expected.class_id)
        np.testing.assert_allclose(probabilities, expected.probabilities, atol=1e-6)
