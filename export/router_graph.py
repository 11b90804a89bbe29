"""The folded router: a manifest's default rule as standard ONNX ops behind MCHeads, for servers without Python.

Three outputs join the five of MCHeads: `routed_probabilities` float32 [N, C], `class_id` int64 [N] (-1 where the answer
is not a number) and `head` int64 [N], which indexes the manifest's heads or, one beyond them, their mixture. Each rule
is runtime.router's, operation by operation in float64, so that ties fall as they do there. One thing is not the same
instruction: the logarithms of the rules blend and guard, whose last bits a runtime may round otherwise than Python.

A bundle's guarantees add two more, at the coverage and the risk of a request that names none: `prediction_set` bool
[N, C] where sets are by LAC, and `abstain` bool [N] where answers are ranked by their probability. Both are comparisons
of float32 probabilities with float32 thresholds, which say exactly what runtime.promises says in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from math import log
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import ArrayLike, NDArray
from onnx import TensorProto, helper, numpy_helper

from trivium.runtime.bundle import FoldedRouter, GateFeature, Manifest
from trivium.runtime.guarantees import ShiftDetector
from trivium.runtime.promises import Terms, least_probability, terms
from trivium.runtime.router import FLOOR, SHIFT_FEATURES, logistic

from .graph import OUTPUTS

ROUTED = ("routed_probabilities", "class_id", "head")
PROMISED = ("prediction_set", "abstain")
PREFIX = "router."
MIXTURES = {"mean": "mean", "blend": "clean+combined"}
"""Rule -> what the router calls an answer that mixes heads."""
Arithmetic = Literal["float64", "float32"]
FAR = 1000.0
"""Scores beyond this have a sigmoid of 0 or 1 in float64."""


def fold_router(model: onnx.ModelProto, manifest: Manifest, arithmetic: Arithmetic = "float64") -> onnx.ModelProto:
    """A copy of a bundle's model that answers by the manifest's default router itself.

    Args:
        model: whose outputs hold the five of MCHeads.
        arithmetic: float32 for TensorRT, which has no float64: statistics within its rounding of a threshold may then
            be answered by another head than by runtime.router.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    batch = next(output for output in graph.output if output.name == OUTPUTS[0]).type.tensor_type.shape.dim[0]
    rows = batch.dim_value or batch.dim_param or "N"
    fold = Fold(graph, manifest, arithmetic)
    probabilities, head = RULES.get(manifest.router.default, one_head)(fold)
    fold.answer(probabilities, head)
    types = {
        ROUTED[0]: (TensorProto.FLOAT, [rows, len(manifest.classes)]),
        ROUTED[1]: (TensorProto.INT64, [rows]),
        ROUTED[2]: (TensorProto.INT64, [rows]),
        PROMISED[0]: (TensorProto.BOOL, [rows, len(manifest.classes)]),
        PROMISED[1]: (TensorProto.BOOL, [rows]),
    }
    fold.promise(folded(manifest), terms(manifest))
    graph.output.extend(helper.make_tensor_value_info(name, *types[name]) for name in outputs(folded(manifest)))
    onnx.checker.check_model(result, full_check=True)
    return result


def folded(manifest: Manifest) -> FoldedRouter:
    """What the manifest says of the folded router: what each value of the output `head` stands for."""
    router, guarantees = manifest.router.default, manifest.guarantees
    mixture = MIXTURES.get(router)
    if router == "guard":
        assert manifest.router.guard is not None, "the manifest's validator asks for it"
        mixture = MIXTURES.get(manifest.router.guard.base)
    record = FoldedRouter(router=router, heads=[*manifest.heads, *([mixture] if mixture else [])])
    if guarantees is None:
        return record
    ranked = guarantees.routers[router].confidence == "max_probability"
    levels = {
        "coverage": guarantees.coverage if guarantees.score == "lac" else None,
        "max_risk": guarantees.max_risk if ranked else None,
    }
    return record.model_copy(update=levels)


def outputs(record: FoldedRouter) -> tuple[str, ...]:
    """What the folded router adds to a graph's outputs."""
    promised = zip(PROMISED, (record.coverage, record.max_risk), strict=True)
    return (*ROUTED, *(name for name, level in promised if level is not None))


class Fold:
    """Adds nodes to a graph; values are known by their names."""

    def __init__(self, graph: onnx.GraphProto, manifest: Manifest, arithmetic: Arithmetic) -> None:
        self.graph, self.manifest = graph, manifest
        self.type = TensorProto.DOUBLE if arithmetic == "float64" else TensorProto.FLOAT
        self.dtype = np.dtype(arithmetic)
        self.count = 0

    def op(self, op_type: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """One node; returns the name of its output."""
        self.count += 1
        name = f"{PREFIX}{op_type}_{self.count}"
        self.graph.node.append(helper.make_node(op_type, inputs, [output or name], name=name, **attributes))
        return output or name

    def constant(self, value: ArrayLike, dtype: Any = None) -> str:
        """An initialiser in the fold's arithmetic, or of the type given."""
        self.count += 1
        name = f"{PREFIX}constant_{self.count}"
        array: NDArray[Any] = np.asarray(value, dtype or self.dtype)
        self.graph.initializer.append(numpy_helper.from_array(array, name))
        return name

    def integers(self, *values: int) -> str:
        """An initialiser int64 [len(values)]."""
        return self.constant(values, np.int64)

    def place(self, head: str) -> int:
        return self.manifest.heads.index(head)

    def exact(self, statistic: str, *indices: int) -> str:
        """One number a picture, [N], of a statistic [N, K] or [N, K, K], in the fold's arithmetic."""
        for index in indices:
            statistic = self.op("Gather", statistic, self.constant(index, np.int64), axis=1)
        return self.op("Cast", statistic, to=self.type)

    def symmetric_divergence(self, i: int, j: int) -> str:
        total = self.op("Add", self.exact("divergence", i, j), self.exact("divergence", j, i))
        return self.op("Mul", self.constant(0.5), total)

    def head_probabilities(self, k: int) -> str:
        """[N, C] of one head, float32."""
        return self.op("Gather", "probabilities", self.constant(k, np.int64), axis=1)

    def weighted(self, weight: float, k: int) -> str:
        """[N, C]: a head's probabilities times a weight, in the fold's arithmetic."""
        return self.op("Mul", self.constant(weight), self.op("Cast", self.head_probabilities(k), to=self.type))

    def every(self, index: int) -> str:
        """The same index for each picture, int64 [N]."""
        batch = self.op("Shape", "energy", start=0, end=1)
        return self.op("Expand", self.integers(index), batch)

    def chosen(self, head: str) -> str:
        """[N, C]: for each picture the probabilities of the head that `head`, int64 [N], names."""
        return self.op("GatherND", "probabilities", self.op("Unsqueeze", head, self.integers(1)), batch_dims=1)

    def answer(self, probabilities: str, head: str) -> None:
        """The three outputs, from the answer's probabilities [N, C] and its head [N]."""
        self.op("Cast", probabilities, output=ROUTED[0], to=TensorProto.FLOAT)
        missing = self.op("IsNaN", ROUTED[0])
        likeliest = self.op("ArgMax", ROUTED[0], axis=1, keepdims=0)
        broken = self.op("ReduceMax", self.op("Cast", missing, to=TensorProto.INT32), self.integers(1), keepdims=0)
        nowhere = self.op("Cast", broken, to=TensorProto.BOOL)
        self.op("Where", nowhere, self.integers(-1), likeliest, output=ROUTED[1])
        self.op("Identity", head, output=ROUTED[2])

    def promise(self, record: FoldedRouter, asked: Terms | None) -> None:
        """The outputs that the guarantees add; where there is no answer, an empty set and an abstention."""
        if asked is None:
            return
        known = self.op("GreaterOrEqual", ROUTED[1], self.constant(0, np.int64))
        if record.coverage is not None:
            likely = self.op("GreaterOrEqual", ROUTED[0], self.constant(least_probability(asked.quantile), np.float32))
            classes = self.integers(*range(len(self.manifest.classes)))
            answered = self.op("Equal", self.op("Unsqueeze", ROUTED[1], self.integers(1)), classes)
            inside = self.op("Or", likely, answered)
            self.op("And", inside, self.op("Unsqueeze", known, self.integers(1)), output=PROMISED[0])
        if record.max_risk is not None:
            highest = self.op("ReduceMax", ROUTED[0], self.integers(1), keepdims=0)
            sure = self.op("GreaterOrEqual", highest, self.constant(float32_above(asked.least), np.float32))
            self.op("Not", self.op("And", known, sure), output=PROMISED[1])


def one_head(fold: Fold) -> tuple[str, str]:
    """The head that is the rule's name."""
    k = fold.place(fold.manifest.router.default)
    return fold.head_probabilities(k), fold.every(k)


def mean(fold: Fold) -> tuple[str, str]:
    count = len(fold.manifest.heads)
    total = fold.weighted(1 / count, 0)
    for k in range(1, count):
        total = fold.op("Add", total, fold.weighted(1 / count, k))
    return total, fold.every(count)


def min_entropy(fold: Fold) -> tuple[str, str]:
    # NumPy takes the first entropy that is not a number for the least
    broken = fold.op("IsNaN", "predictive_entropy")
    entropy = fold.op("Where", broken, fold.constant([-np.inf], np.float32), "predictive_entropy")
    head = fold.op("ArgMin", entropy, axis=1, keepdims=0)
    return fold.chosen(head), head


def paper(fold: Fold) -> tuple[str, str]:
    rule = fold.manifest.router.paper
    assert rule is not None, "the manifest's validator asks for it"
    clean, robust, combined = (fold.place(name) for name in ("clean", "robust", "combined"))
    divergence = fold.symmetric_divergence(clean, robust)
    agree = fold.op("LessOrEqual", divergence, fold.constant(rule.divergence_threshold))
    relative = {
        name: fold.op("Div", fold.exact(rule.uncertainty, fold.place(name)), fold.constant(rule.entropy_scale[name]))
        for name in rule.among
    }
    surest, least = fold.integers(fold.place(rule.among[0])), relative[rule.among[0]]
    for name in rule.among[1:]:
        surer = fold.op("LessOrEqual", least, relative[name])
        surest = fold.op("Where", surer, surest, fold.integers(fold.place(name)))
        least = fold.op("Where", surer, least, relative[name])
    head = fold.op("Where", agree, fold.integers(combined), surest)
    return fold.chosen(head), head


def blend(fold: Fold) -> tuple[str, str]:
    rule = fold.manifest.router.blend
    assert rule is not None, "the manifest's validator asks for it"
    clean, combined = fold.place("clean"), fold.place("combined")
    shifted = is_shifted(fold, rule, rule.threshold)
    mixed = fold.op("Add", fold.weighted(0.5, clean), fold.weighted(0.5, combined))
    probabilities = fold.op(
        "Where", fold.op("Unsqueeze", shifted, fold.integers(1)), fold.weighted(1.0, combined), mixed
    )
    count = len(fold.manifest.heads)
    return probabilities, fold.op("Where", shifted, fold.integers(combined), fold.integers(count))


def gate(fold: Fold) -> tuple[str, str]:
    rule = fold.manifest.router.gate
    assert rule is not None, "the manifest's validator asks for it"
    answering = [head for head in fold.manifest.heads if head in rule.intercept]
    score = fold.constant([[rule.intercept[head] for head in answering]])
    for feature in rule.features:
        centred = fold.op("Sub", gate_feature(fold, feature), fold.constant(feature.center))
        standard = fold.op("Unsqueeze", fold.op("Div", centred, fold.constant(feature.scale)), fold.integers(1))
        weights = fold.constant([[feature.weights[head] for head in answering]])
        score = fold.op("Add", score, fold.op("Mul", standard, weights))
    score = fold.op("Where", fold.op("IsNaN", score), fold.constant([np.inf]), score)
    places = fold.integers(*(fold.place(head) for head in answering))
    head = fold.op("Gather", places, fold.op("ArgMax", score, axis=1, keepdims=0))
    return fold.chosen(head), head


def guard(fold: Fold) -> tuple[str, str]:
    rule = fold.manifest.router.guard
    assert rule is not None, "the manifest's validator asks for it"
    clean = fold.place("clean")
    shifted = is_shifted(fold, rule, rule.threshold)
    if rule.base in RULES:
        probabilities, head = RULES[rule.base](fold)
    else:
        place = fold.place(rule.base)
        probabilities, head = fold.head_probabilities(place), fold.every(place)
    exact = fold.op("Cast", probabilities, to=fold.type)
    answer = fold.op("Where", fold.op("Unsqueeze", shifted, fold.integers(1)), exact, fold.weighted(1.0, clean))
    return answer, fold.op("Where", shifted, head, fold.integers(clean))


def is_shifted(fold: Fold, detector: ShiftDetector, threshold: float) -> str:
    """bool [N]: whether the probability of a shift exceeds the threshold."""
    heads = fold.manifest.heads
    clean = fold.place("clean")

    def divergence() -> str:
        if "robust" not in heads:
            return fold.constant(log(FLOOR))
        return floored_log(fold, fold.symmetric_divergence(clean, fold.place("robust")))

    features = {
        "divergence": divergence,
        "mutual_information": lambda: floored_log(fold, fold.exact("mutual_information", clean)),
        "energy": lambda: fold.exact("energy", clean),
    }
    score = fold.op("Expand", fold.constant([detector.intercept]), fold.op("Shape", "energy", start=0, end=1))
    for name in SHIFT_FEATURES:
        if name in detector.weights:
            centred = fold.op("Sub", features[name](), fold.constant(detector.center[name]))
            weighted = fold.op("Mul", fold.constant(detector.weights[name]), centred)
            score = fold.op("Add", score, fold.op("Div", weighted, fold.constant(detector.scale[name])))
    return fold.op("Greater", score, fold.constant(score_threshold(threshold)))


RULES: dict[str, Callable[[Fold], tuple[str, str]]] = {
    "mean": mean,
    "min_entropy": min_entropy,
    "paper": paper,
    "blend": blend,
    "gate": gate,
    "guard": guard,
}
"""By name; each returns the names of the answer's probabilities [N, C] and of its head, int64 [N]."""


def gate_feature(fold: Fold, feature: GateFeature) -> str:
    """[N], as runtime.router.gate_features has it."""
    places = [fold.place(head) for head in feature.heads]
    if feature.statistic == "divergence":
        return fold.op("Sqrt", fold.symmetric_divergence(*places))
    if feature.statistic == "energy":
        return fold.exact("energy", *places)
    if feature.statistic != "max_probability":
        return fold.op("Sqrt", fold.exact(feature.statistic, *places))
    # what is not a number must come out as such, which ReduceMax does not promise
    probabilities = fold.head_probabilities(*places)
    infinity = fold.constant([np.inf], np.float32)
    marked = fold.op("Where", fold.op("IsNaN", probabilities), infinity, probabilities)
    highest = fold.op("ReduceMax", marked, fold.integers(1), keepdims=0)
    known = fold.op("Where", fold.op("IsInf", highest), fold.constant([np.nan], np.float32), highest)
    return fold.op("Cast", known, to=fold.type)


def floored_log(fold: Fold, value: str) -> str:
    return fold.op("Log", fold.op("Add", fold.constant(FLOOR), value))


def float32_above(value: float) -> np.float32:
    """The least float32 that is not below a float64, so that a float32 is at least the one where it is the other."""
    nearest = np.float32(value)
    return nearest if float(nearest) >= value else np.nextafter(nearest, np.float32(np.inf))


def score_threshold(threshold: float) -> float:
    """The largest score whose probability of a shift, as the router computes it, does not exceed a rule's threshold.

    So the graph compares scores, and the rounding of exp, which is not the same in every runtime, decides nothing.
    """

    def shifted(score: float) -> bool:
        return logistic(score) > threshold

    if not shifted(FAR):
        return np.inf
    low, high = -FAR, FAR
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (low, middle) if shifted(middle) else (middle, high)
    return low
