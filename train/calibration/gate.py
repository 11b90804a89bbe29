"""The learned gate: for each head a logistic model of whether it is right, and what it gains on unseen kinds of shift.

A gate may look at all heads or at one alone. The latter is the control of the former: what it gains cannot come from
comparing heads. So the gate of all heads is taken only where it beats every such control, otherwise the best of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import logit
from sklearn.linear_model import LogisticRegression

from trivium.runtime.bundle import GateFeature, GateRule, GateStatistic, Manifest
from trivium.runtime.router import gate_features, route

from ..evaluation.metrics import paired_bootstrap
from .comparison import by_picture, mixture_weights
from .observe import Observations

OWN: tuple[GateStatistic, ...] = ("predictive_entropy", "mutual_information", "energy", "max_probability")
"""Scores that a head has of its own; a pair of heads has the divergence."""
ALL = "gate on all heads"
LEAST_SPREAD = 1e-6
"""A score that varies less on calibration pictures is not magnified."""


class LearnedGate(NamedTuple):
    """A gate, and how gates answered pictures whose kind of shift they were not fitted on."""

    rule: GateRule
    answers: dict[str, NDArray[np.int64]]
    """Class ids [N] of the judged views: `gate` is the form taken, the others by their names."""


def learn_gate(
    fit: Observations, judged: Observations, manifest: Manifest, clean_share: float = 0.5, seed: int = 0
) -> LearnedGate:
    """Fit gates that look at all heads and at one alone, and take one of these forms.

    The forms are compared on the judged pictures, each answered by a gate that was fitted without the picture's kind
    of shift; the rule returned is fitted on all kinds.

    Args:
        manifest: of the model; at least two heads.
        clean_share: weight of clean views in fits and comparison.
        seed: of the bootstrap.
    """
    heads = manifest.heads
    forms = {ALL: heads} | {f"gate on {head} alone": [head] for head in heads}
    answers = {name: answer_unseen(fit, judged, manifest, seen, clean_share) for name, seen in forms.items()}
    score = {name: by_picture(judged, answered == judged.labels, clean_share) for name, answered in answers.items()}
    control = max((name for name in forms if name != ALL), key=lambda name: score[name].mean())
    taken = ALL if paired_bootstrap(score[ALL] - score[control], seed=seed).low > 0 else control
    answers["gate"] = answers.pop(taken)
    return LearnedGate(fit_gate(fit, heads, forms[taken], clean_share), answers)


def answer_unseen(
    fit: Observations, judged: Observations, manifest: Manifest, seen: Sequence[str], clean_share: float = 0.5
) -> NDArray[np.int64]:
    """Class ids [N] of the judged views: a picture's clean and its one shifted view are answered by a gate that was
    fitted without this kind of shift."""
    shifted = ~judged.clean
    shift = dict(zip(judged.picture[shifted].tolist(), judged.kind[shifted].tolist(), strict=True))
    unseen = np.array([shift.get(picture, "") for picture in judged.picture.tolist()])
    answers = np.empty(len(judged.labels), np.int64)
    for kind in np.unique(unseen):
        rule = fit_gate(fit.take(fit.kind != kind), manifest.heads, seen, clean_share)
        rows = unseen == kind
        answers[rows] = route(judged.take(rows).statistics, with_gate(manifest, rule), "gate").class_id
    return answers


def fit_gate(observed: Observations, heads: Sequence[str], seen: Sequence[str], clean_share: float = 0.5) -> GateRule:
    """For each head a logistic regression of "it is right" on standardised scores; the largest log-odds answers.

    Against one softmax over the heads, fitted to which of them are right, this lost least where the heads do not
    differ and gained as much where they do. A head that is always right or always wrong has an intercept alone.

    Args:
        seen: heads whose scores the gate looks at.
        clean_share: weight of clean views among all.
    """
    scores = scores_of(seen)
    values = gate_features(observed.statistics, scores, heads)
    share = mixture_weights(observed, clean_share) * len(values)
    center = np.average(values, axis=0, weights=share)
    spread = np.sqrt(np.average((values - center) ** 2, axis=0, weights=share))
    scale = np.where(spread > LEAST_SPREAD, spread, 1.0)
    standard = (values - center) / scale
    right = observed.statistics.probabilities.argmax(2) == observed.labels[:, None]
    intercept, weights = dict[str, float](), dict[str, NDArray[np.float64]]()
    for k, head in enumerate(heads):
        if 0 < right[:, k].sum() < len(right):
            model = LogisticRegression(C=1.0, max_iter=1000).fit(standard, right[:, k], sample_weight=share)
            intercept[head], weights[head] = float(model.intercept_[0]), model.coef_[0]
        else:
            intercept[head] = float(logit((right[:, k].sum() + 0.5) / (len(right) + 1)))
            weights[head] = np.zeros(len(scores))
    return GateRule(
        intercept=intercept,
        features=[
            GateFeature(
                statistic=statistic,
                heads=whose,
                center=float(center[column]),
                scale=float(scale[column]),
                weights={head: float(weights[head][column]) for head in heads},
            )
            for column, (statistic, whose) in enumerate(scores)
        ],
    )


def scores_of(heads: Sequence[str]) -> list[tuple[GateStatistic, list[str]]]:
    """(statistic, whose) of every score of these heads and their pairs."""
    own: list[tuple[GateStatistic, list[str]]] = [(name, [head]) for head in heads for name in OWN]
    return own + [("divergence", list(pair)) for pair in itertools.combinations(heads, 2)]


def with_gate(manifest: Manifest, rule: GateRule) -> Manifest:
    """The same manifest with this gate."""
    return manifest.model_copy(update={"router": manifest.router.model_copy(update={"gate": rule})})
