"""What a bundle's guarantees say of an answer: its prediction set, whether to abstain, how probable a shift is.

Everything looks at one picture's row alone, in float64 from the float32 probabilities of the routed answer. The
functions that calibration ranks pictures by are those that a server decides with.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Mapping
from functools import lru_cache
from math import inf
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trivium.kernels import HeadStatistics

from .bundle import Manifest
from .errors import InvalidRequest
from .guarantees import Confidence, Guarantees, RouterGuarantees, SetScore
from .router import Floats, Routed, shift_probability, unknown_router

PROMISED = ("prediction_set", "abstain", "shift_score")
"""Outputs of a model whose bundle has guarantees, and of no other."""
LEVELS = ("coverage", "max_risk")
"""Parameters of a request to such a model."""
WITHOUT = "its bundle has no guarantees; run: trivium calibrate BUNDLE"
LEAST = 5e-324
"""Nothing positive is less: what stands in for 0 where a logarithm is taken that is then multiplied by 0."""
_ONE = int(np.float32(1).view(np.uint32))


class Terms(NamedTuple):
    """What a request asks of the guarantees: thresholds of the router that answers, and what to look up at all."""

    quantile: float
    """Of the conformity scores: the greatest that a class of the set has."""
    confidence: Confidence
    least: float
    """Confidence at which an answer is given: -inf gives all, inf none."""
    outputs: Collection[str] = PROMISED
    """Those of PROMISED that are asked for."""
    coverage: float | None = None
    """What is promised: as the request named it, or the bundle's own."""
    max_risk: float | None = None
    """Likewise; None where nothing is abstained from."""


def terms(
    manifest: Manifest,
    router: str | None = None,
    coverage: float | None = None,
    max_risk: float | None = None,
    outputs: Collection[str] = PROMISED,
) -> Terms | None:
    """The terms of one request; None for a bundle without guarantees, of which none is asked.

    A coverage between two certified levels takes the next higher one, a risk the next lower one. Where the bundle's own
    risk was certified neither for this router nor at any lower level, no answer is given.

    Raises: InvalidRequest for an unknown router, or a coverage or risk outside of what was certified, with the range.
    """
    found = manifest.guarantees
    if found is None:
        if coverage is not None or max_risk is not None:
            raise no_guarantees(manifest.name, "max_risk" if coverage is None else "coverage")
        return None
    name = manifest.router.default if router is None else router
    own = found.routers.get(name)
    if own is None:
        raise unknown_router(name, manifest.routers())
    level = bisect_left(found.coverages, found.coverage) if coverage is None else coverage_level(found, coverage)
    if max_risk is not None:
        least = own.least[risk_level(found, name, max_risk)]
        assert least is not None, "risk_level returns certified levels alone"
    elif found.max_risk is None:
        least = -inf
    else:
        certified = certified_least(found, own, found.max_risk)
        least = inf if certified is None else certified
    return Terms(
        own.lac[level] if found.score == "lac" else own.raps[level],
        own.confidence,
        least,
        outputs,
        found.coverage if coverage is None else coverage,
        found.max_risk if max_risk is None else max_risk,
    )


def number(name: str, value: object) -> float:
    """A level as it came: a number, or text that holds one.

    Raises: InvalidRequest.
    """
    try:
        if isinstance(value, (float, int, str)) and not isinstance(value, bool):
            return float(value)
    except (ValueError, OverflowError):
        pass
    raise InvalidRequest(f"parameter {name!r} must be a number, got {value!r:.100}")


def ranges(manifest: Manifest) -> dict[str, Any] | None:
    """What a request may ask for, and of which pictures it holds; None without guarantees.

    The `router`, `coverage` and `max_risk` (or None) where a request names none, the least and greatest of `coverages`,
    those of `risks` for each router that has some, and the `mixture`.
    """
    found = manifest.guarantees
    if found is None:
        return None
    certified = {
        router: [risk for risk, least in zip(found.risks, own.least, strict=True) if least is not None]
        for router, own in found.routers.items()
    }
    return {
        "router": manifest.router.default,
        "coverage": found.coverage,
        "coverages": [found.coverages[0], found.coverages[-1]],
        "max_risk": found.max_risk,
        "risks": {router: [risks[0], found.risks[-1]] for router, risks in certified.items() if risks},
        "mixture": found.mixture,
    }


def check(
    offered: Mapping[str, Any] | None, model: str, router: str | None, coverage: float | None, max_risk: float | None
) -> None:
    """Refuse what a model would refuse, by what it says of itself: its `ranges`.

    Raises: InvalidRequest.
    """
    for name, level in zip(LEVELS, (coverage, max_risk), strict=True):
        if level is None:
            continue
        if offered is None:
            raise no_guarantees(model, name)
        if name == "coverage":
            _within(name, level, *offered["coverages"])
            continue
        own = offered["router"] if router is None else router
        if own not in offered["risks"]:
            raise no_risk(own)
        lowest, highest = offered["risks"][own]
        _within(name, level, lowest, highest, f" for router {own!r}")


def no_guarantees(model: str, parameter: str) -> InvalidRequest:
    """What a request for a level is answered by a model without guarantees."""
    return InvalidRequest(f"parameter {parameter!r} cannot be used for model {model!r}; {WITHOUT}")


def no_risk(router: str) -> InvalidRequest:
    """What a request for a risk is answered where none was certified."""
    return InvalidRequest(f"no 'max_risk' can be kept: none was certified for router {router!r}")


def _within(name: str, value: float, lowest: float, highest: float, where: str = "") -> None:
    if not lowest <= value <= highest:  # nor what is not a number
        raise InvalidRequest(f"parameter {name!r} must be from {lowest:g} to {highest:g}{where}, got {value:g}")


def coverage_level(found: Guarantees, coverage: float) -> int:
    """Place of the lowest coverage of the grid that is at least the one asked for.

    Raises: InvalidRequest.
    """
    levels = found.coverages
    _within("coverage", coverage, levels[0], levels[-1])
    return bisect_left(levels, coverage)


def certified_least(found: Guarantees, own: RouterGuarantees, max_risk: float) -> float | None:
    """The least confidence at the highest risk up to this one that was certified for a router; None where none was."""
    usable = own.least[: bisect_right(found.risks, max_risk)]
    return next((least for least in reversed(usable) if least is not None), None)


def risk_level(found: Guarantees, router: str, max_risk: float) -> int:
    """Place of the highest risk of the grid that is at most the one asked for and was certified for a router.

    Raises: InvalidRequest.
    """
    certified = [place for place, least in enumerate(found.routers[router].least) if least is not None]
    if not certified:
        raise no_risk(router)
    _within("max_risk", max_risk, found.risks[certified[0]], found.risks[-1], f" for router {router!r}")
    return certified[bisect_right(certified, bisect_right(found.risks, max_risk) - 1) - 1]


def conformity_scores(
    probabilities: NDArray[np.float32], class_id: NDArray[np.int64], score: SetScore, penalty: float, free_ranks: int
) -> Floats:
    """How ill each class conforms with its picture, float64 [N, C]; -inf for the answered class.

    lac: 1 - p (Sadinle et al. 2019). raps: the cumulative probability of the classes in descending order, equals by
    their number, up to and including this one, + penalty * max(0, rank - free_ranks), rank from 1 (Angelopoulos et al.
    2021, without its randomisation); a penalty of 0 is APS (Romano et al. 2020). That the answer belongs to every set
    is part of the score, so that coverage stays exact.
    """
    exact = probabilities.astype(np.float64)
    if score == "lac":
        scores = 1 - exact
    else:
        order = (-exact).argsort(1, kind="stable")
        ranks = np.arange(1, exact.shape[1] + 1)
        ranked = np.take_along_axis(exact, order, 1).cumsum(1) + penalty * np.maximum(0, ranks - free_ranks)
        scores = np.empty_like(exact)
        np.put_along_axis(scores, order, ranked, 1)
    scores[np.arange(len(scores)), class_id] = -np.inf
    return scores


def prediction_sets(routed: Routed, found: Guarantees, quantile: float) -> NDArray[np.bool_]:
    """[N, C]: the classes whose conformity score is at most the quantile; the answer is always one of them."""
    if found.score == "lac":
        sets: NDArray[np.bool_] = routed.probabilities >= least_probability(quantile)
    else:
        sets = np.zeros(routed.probabilities.shape, np.bool_)
        for row, order in enumerate((-routed.probabilities).argsort(1, kind="stable")):
            # conformity_scores sum by sum, up to the first that is too large: those behind it are larger
            total = 0.0
            for rank, label in enumerate(order, 1):
                total += routed.probabilities.item(row, label)
                if not total + found.raps_penalty * max(0, rank - found.raps_free_ranks) <= quantile:
                    break
                sets[row, label] = True
    for row, one in enumerate(routed.class_id.tolist()):
        sets[row, one] = True
    return sets


@lru_cache(maxsize=4096)
def least_probability(quantile: float) -> np.float32:
    """The least float32 p, in [0, 1], with 1 - p <= quantile in float64: one comparison says what a score would.

    quantile: of LAC, in [0, 1].
    """
    # the order of floats that are not negative is that of their bits
    bits = bisect_left(range(_ONE + 1), True, key=lambda one: 1 - float(np.uint32(one).view(np.float32)) <= quantile)
    return np.uint32(bits).view(np.float32)


def confidence(routed: Routed, statistics: HeadStatistics, manifest: Manifest, kind: Confidence) -> Floats:
    """What an answer is ranked by, float64 [N]: higher is surer.

    max_probability: of the answer. predictive_entropy: minus that of the answer's probabilities, nats.
    mutual_information: minus that of the head that answered, nats; of several the mean by their weights.
    """
    if kind == "max_probability":
        rows = enumerate(routed.class_id.tolist())
        return np.array([routed.probabilities.item(row, one) for row, one in rows], np.float64)
    if kind == "predictive_entropy":
        exact = routed.probabilities.astype(np.float64)
        # a running sum has one order, whatever the number of pictures
        total: Floats = (exact * np.log(np.maximum(exact, LEAST))).cumsum(1)[:, -1]
        return total
    if routed.weights is None:
        k = manifest.heads.index(routed.head[0]) if routed.head else 0
        own: Floats = np.negative(statistics.mutual_information[:, k], dtype=np.float64)
        return own
    information = statistics.mutual_information.astype(np.float64)
    mixed = np.zeros(len(information))
    for k, weight in enumerate(routed.weights.T):
        # the NaN of a head without weight must not spread
        np.subtract(mixed, weight * information[:, k], out=mixed, where=weight > 0)
    return mixed


def abstentions(routed: Routed, statistics: HeadStatistics, manifest: Manifest, asked: Terms) -> NDArray[np.bool_]:
    """[N]: True where the answer is less sure than the risk asked for allows."""
    if asked.least in (-inf, inf):
        return np.full(len(routed.class_id), asked.least == inf)
    return ~(confidence(routed, statistics, manifest, asked.confidence) >= asked.least)


def shift_scores(statistics: HeadStatistics, found: Guarantees, heads: list[str]) -> NDArray[np.float32]:
    """[N]: the probability that a picture is unlike the clean calibration pictures. It says nothing about error."""
    return shift_probability(statistics, found.shift, heads).astype(np.float32)
