"""Every CUDA kernel against the float64 reference: shapes, types, outliers, poison, streams, graphs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from trivium.kernels import HeadStatistics, dropout_masks, mc_heads_ref
from trivium.kernels.cuda import BFLOAT16, FLOAT32, CudaError, CudaLibrary

from .card import Heads, UnwrittenOutput, capture

ARITHMETICS = {"float32": FLOAT32, "bfloat16": BFLOAT16}
PROBABILITY_TOLERANCE = 2e-6
STATISTIC_TOLERANCE = 2e-5
"""Twice what is asked of the CPU kernels: in which order cuBLASLt adds is not ours to choose."""
OUTLIER_TOLERANCE = 1e-4
"""Of size, or absolute: logits of 1e4 leave float32 three digits behind the point."""


class Case(NamedTuple):
    batch: int
    heads: int
    classes: int
    units: int
    passes: int
    keep: float = 0.5
    own: bool = False
    features: torch.dtype = torch.float32
    outliers: bool = False
    poisoned: bool = False


class Arrays(NamedTuple):
    weights: NDArray[np.float32]
    bias: NDArray[np.float32]
    temperature: NDArray[np.float32]
    masks: NDArray[np.uint8]
    keep: float


class Outcome(NamedTuple):
    case: Case
    arithmetic: str
    probability_error: float
    statistic_error: float
    problem: str


SMALL = [
    Case(2, 3, 10, 20, 32),
    Case(3, 4, 129, 33, 7, 0.7, own=True),
    Case(2, 3, 1000, 64, 16, poisoned=True),
    Case(2, 2, 1025, 16, 6, own=True, poisoned=True),
]
"""Each kernel once: what the sanitizers watch."""

ALL = [
    *SMALL,
    *(Case(b, 3, c, d, 32) for b in (1, 8, 64, 256) for c in (10, 1000) for d in (96, 1281)),
    *(Case(3, k, 1000, 768, t) for k in (1, 2, 3, 4) for t in (1, 2, 31, 64, 128)),
    *(Case(5, 3, c, 257, 16) for c in (1, 2, 3, 127, 128, 129, 1023, 1024, 1025, 2000)),
    *(Case(33, 2, 7, d, 9, 0.25, own=True) for d in (1, 3, 8, 2049, 4096)),
    *(Case(9, 3, 1000, 768, 32, features=t, own=o) for t in (torch.float16, torch.bfloat16) for o in (False, True)),
    *(Case(4, 3, c, 512, 32, outliers=True) for c in (10, 1000, 1500)),
    *(Case(6, 3, c, 100, 8, own=o, poisoned=True) for c in (10, 1000, 1500) for o in (False, True)),
    Case(2, 3, 21843, 768, 16),
    Case(300, 9, 20, 64, 8),
    Case(1, 8, 1000, 64, 32),
]

STREAMS = Case(16, 3, 1000, 768, 32)


def draw(case: Case, seed: int) -> tuple[torch.Tensor, Arrays]:
    rng = np.random.default_rng([seed, *(int(v) for v in case[:5])])
    shape = (case.batch, case.heads, case.units) if case.own else (case.batch, case.units)
    features = rng.normal(size=shape).astype(np.float32)
    if case.outliers:
        features[rng.random(shape) < 0.01] = 1e4
        features[-1] = 0.0
    if case.poisoned:
        features.reshape(case.batch, -1)[0, 0] = np.nan
        features.reshape(case.batch, -1)[-1, -1] = np.inf
    arrays = Arrays(
        (rng.normal(size=(case.heads, case.classes, case.units)) * 2 / np.sqrt(case.units)).astype(np.float32),
        rng.normal(size=(case.heads, case.classes)).astype(np.float32),
        rng.uniform(0.5, 2.0, case.heads).astype(np.float32),
        dropout_masks(case.passes, case.units, case.keep, seed),
        case.keep,
    )
    return torch.from_numpy(features).to(case.features), arrays


def reference(features: torch.Tensor, arrays: Arrays, arithmetic: str) -> HeadStatistics:
    """What the kernel should give; bfloat16 is exact but for its rounding of weights and of features / keep."""
    h = features.float()
    if arithmetic == "bfloat16":
        scale = np.float32(1.0) / np.float32(arrays.keep)
        h = (h * float(scale)).bfloat16().float()
        weights = torch.from_numpy(arrays.weights).bfloat16().float().numpy()
        unscaled = h.numpy().astype(np.float64) * arrays.keep
        return mc_heads_ref(unscaled, weights, *arrays[1:])
    return mc_heads_ref(h.numpy(), *arrays)


def compare(out: HeadStatistics, ref: HeadStatistics, outliers: bool) -> tuple[float, float, str]:
    """Largest error of probabilities, of statistics (relative above one nat), and what is wrong with them."""
    problem = ""
    errors = []
    for name, a, r in zip(HeadStatistics._fields, out, ref, strict=True):
        if not (np.isnan(a) == np.isnan(r)).all():
            problem = problem or f"{name}: NaN in the wrong places"
        scale = np.maximum(1.0, np.abs(r)) if name != "probabilities" else 1.0
        errors.append(float(np.nanmax(np.abs(a - r) / scale, initial=0.0)))
    tolerances = (PROBABILITY_TOLERANCE, STATISTIC_TOLERANCE) if not outliers else (OUTLIER_TOLERANCE,) * 2
    worst = (errors[0], max(errors[1:]))
    for error, tolerance, what in zip(worst, tolerances, ("probabilities", "statistics"), strict=True):
        if error > tolerance:
            problem = problem or f"{what} are off by {error:.1e}, {tolerance:.0e} is allowed"
    return *worst, problem


def check(library: CudaLibrary, cases: list[Case], device: torch.device, graphs: bool = True) -> Iterator[Outcome]:
    """Run each case twice in each arithmetic, poisoned in between, the second time through a captured graph."""
    for case in cases:
        features, arrays = draw(case, seed=1)
        for arithmetic, code in ARITHMETICS.items():
            with Heads(library, features.to(device), *arrays, code) as heads:
                try:
                    heads.run()
                    out = heads.statistics()
                    replay = capture(heads.run, device) if graphs else heads.run
                    heads.poison()
                    replay()
                    again = heads.statistics()
                except (CudaError, UnwrittenOutput) as e:
                    yield Outcome(case, arithmetic, np.nan, np.nan, str(e))
                    continue
            p, s, problem = compare(out, reference(features, arrays, arithmetic), case.outliers)
            if not all(np.array_equal(a, b, equal_nan=True) for a, b in zip(again, out, strict=True)):
                problem = problem or "a second run gives other bits"
            yield Outcome(case, arithmetic, p, s, problem)


def check_streams(library: CudaLibrary, device: torch.device, case: Case = STREAMS, rounds: int = 20) -> str:
    """One model each on two streams at once, features changed between runs; what is wrong, or nothing."""
    runs = []
    for seed in (1, 2):
        features, arrays = draw(case, seed)
        runs.append((features, arrays, Heads(library, features.to(device, copy=True), *arrays, FLOAT32)))
    streams: list[torch.cuda.Stream | None] = [None for _ in runs]
    if device.type == "cuda":
        streams = [torch.cuda.Stream(device) for _ in runs]
        torch.cuda.synchronize()
    for _ in range(rounds):
        for stream, (features, _, heads) in zip(streams, runs, strict=True):
            with torch.cuda.stream(stream):
                heads.features.zero_()
                heads.run()
                heads.features.copy_(features)
                heads.run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    problem = ""
    for features, arrays, heads in runs:
        problem = problem or compare(heads.statistics(), reference(features, arrays, "float32"), False)[2]
        heads.model.close()
    return problem
