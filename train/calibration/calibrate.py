"""Calibration: temperatures, the numbers of the routing rules, and which router answers by default.

Everything is fitted on one part of the calibration pictures and judged on the rest: clean, and shifted by corruptions
that no test uses and by augmentations, mixed in declared shares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

from trivium.runtime.bundle import BlendRule, Calibration, Dropout, PaperRule, RouterSettings
from trivium.runtime.errors import ConfigError
from trivium.runtime.router import routers, shift_probability, symmetric_divergence

from ..data.pictures import Pictures
from ..guarantees.shift import fit_detector
from ..models.mc import Heads
from ..sections import CalibrationSpec
from ..shifts.corruptions import CALIBRATION_CORRUPTIONS, SEVERITIES, corrupt
from ..shifts.views import Shifts, ShiftSpec
from .comparison import choose_router, compare_routers, provisional
from .gate import learn_gate, with_gate
from .observe import CLEAN, Observations, Observer

DOMAINS = {"clean": (True, False), "robust": (False, True)}
"""Head -> whether clean and shifted pictures are its own calibration domain; both for every other head."""
FIT_SHARE = 1 / 3
"""Of the calibration pictures: few numbers are fitted, while the choice of a router needs a narrow interval."""
LEAST_PICTURES = 30
SHIFTS = {
    "augmix": ShiftSpec(augmix=1, pixmix=0, mixing_set=64),
    "pixmix": ShiftSpec(augmix=0, pixmix=1, mixing_set=64),
}
"""Augmented views beside the corruptions: these four alone leave contrast and haze out, where heads differ most."""
KINDS = (*CALIBRATION_CORRUPTIONS, *SHIFTS)
DEFAULT = CalibrationSpec()
FALSE_ALARMS = 0.10
"""Share of clean pictures that the blend rule may take for shifted."""
LEAST_ENTROPY = 1e-6
"""nats; keeps the paper rule's divisors positive for a head that is always certain."""
LOGITS_LIMIT = 1 << 25
"""Pictures x passes x classes held at once while a temperature is fitted; beyond it the first pictures serve."""
CHUNK = 500
"""Calibration pictures decoded and corrupted at once."""


class Views(NamedTuple):
    """N views of calibration pictures as the model's features, before any temperature."""

    features: NDArray[np.float32]
    labels: NDArray[np.int64]
    original: NDArray[np.int64]
    kind: NDArray[np.str_]
    """[N]: "clean", or one of KINDS."""
    picture: NDArray[np.int64]
    """[N]: position of the picture, so that all its views stay in one part."""


def calibrate(
    model: Heads,
    pictures: Pictures,
    dropout: Dropout,
    *,
    limit: int | None = 5000,
    spec: CalibrationSpec = DEFAULT,
    seed: int = 0,
    router: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[RouterSettings, Calibration]:
    """Calibrate a model on calibration pictures: each once as it is and once shifted.

    The k-th picture meets the (k mod 6)-th of KINDS: a corruption, of severities 1 to 5 in turn, or an augmentation.
    A third of the pictures serves the fits, the rest the comparison of routers, where a learned gate answers kinds of
    shift that it was not fitted on. The same arguments give the same numbers.

    Args:
        pictures: the calibration split.
        limit: pictures used at most, drawn by seed.
        spec: how temperatures and rules are fitted.
        router: takes the choice away from the comparison, which is recorded all the same.
        progress: told (pictures done, pictures in all).

    Returns: the router's settings, and the record, whose temperatures belong into the graph.
    Raises: ConfigError where there are fewer than 30 pictures, or the router asked for does not exist.
    """
    order = drawn(len(pictures), seed)[:limit]
    if len(order) < LEAST_PICTURES:
        raise ConfigError(f"calibration needs at least {LEAST_PICTURES} pictures, there are {len(order)}")
    observer = Observer(model, pictures.preprocessing, dropout)
    heads = observer.heads
    views = look_at_views(observer, pictures, order, seed, progress)
    fit = views.picture < round(FIT_SHARE * len(order))

    temperature = dict.fromkeys(heads, 1.0)
    if spec.temperatures:
        most = max(LEAST_PICTURES, LOGITS_LIMIT // (dropout.passes * len(pictures.classes)))
        for k, head in enumerate(heads):
            rows = np.flatnonzero(fit & domain_of(head, views.kind))[:most]
            temperature[head] = fit_temperature(observer.pass_logits(views.features[rows], k), views.labels[rows])

    statistics = observer.statistics(views.features, list(temperature.values()))
    observed = Observations(statistics, views.labels, views.original, views.kind, views.picture)
    settings = fit_rules(observed.take(fit), heads, spec)
    trial = provisional(pictures.classes, heads, pictures.preprocessing, dropout, settings)
    judged = observed.take(~fit)
    learned = None
    if len(heads) > 1:
        gate = learn_gate(observed.take(fit), judged, trial, spec.clean_share, seed)
        trial, learned = with_gate(trial, gate.rule), gate.answers
    null, candidates = compare_routers(judged, trial, spec.clean_share, seed, learned)
    chosen, why = choose_router(null, candidates)
    if router is not None:
        if router not in routers(trial):
            raise ConfigError(f"no router {router!r}; this model has: {', '.join(routers(trial))}")
        chosen, why = router, f"asked for; the comparison would have taken {chosen}: {why}"
    return trial.router.model_copy(update={"default": chosen}), Calibration(
        temperature={head: round(value, 6) for head, value in temperature.items()},
        mixture=mixture(judged, spec.clean_share),
        pictures=len(order),
        data=describe(pictures),
        seed=seed,
        routers=[candidate.row() for candidate in candidates],
        chosen_because=why,
    )


def drawn(count: int, seed: int) -> NDArray[np.int64]:
    """The order in which so many calibration pictures are used; what comes after a record's `pictures` was not seen."""
    return np.random.Generator(np.random.Philox(seed)).permutation(count)


def look_at_views(
    observer: Observer,
    pictures: Pictures,
    order: NDArray[np.intp],
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> Views:
    """Run a model on the pictures named by `order`, each clean and each shifted once."""
    found: list[Views] = []
    for start in range(0, len(order), CHUNK):
        chosen = order[start : start + CHUNK]
        position = np.arange(start, start + len(chosen))
        images = pictures.batch(chosen).permute(0, 2, 3, 1).contiguous().numpy()
        kinds = np.array(KINDS)[position % len(KINDS)]
        for view, kind in ((images, np.full(len(chosen), CLEAN)), (shifted(images, position, seed), kinds)):
            features, original = observer.look(view)
            found.append(Views(features, pictures.labels[chosen], original.argmax(1), kind, position))
        if progress is not None:
            progress(start + len(chosen), len(order))
    return Views(*(np.concatenate(column) for column in zip(*found, strict=True)))


def shifted(images: NDArray[np.uint8], position: NDArray[np.intp], seed: int) -> NDArray[np.uint8]:
    """One shifted view of each picture, uint8 [N, H, W, 3]; position, ascending, decides kind and severity."""
    out = np.empty_like(images)
    kind, severity = position % len(KINDS), 1 + position // len(KINDS) % 5
    first = int(position[0])
    for k, name in enumerate(KINDS):
        rows = np.flatnonzero(kind == k)
        if name in SHIFTS and rows.size:
            out[rows] = augmented(images[rows], SHIFTS[name], seed, first)
        for level in SEVERITIES if name not in SHIFTS else ():
            part = rows[severity[rows] == level]
            if part.size:
                out[part] = corrupt(images[part], name, level, seed, first)
    return out


def augmented(images: NDArray[np.uint8], spec: ShiftSpec, seed: int, first: int) -> NDArray[np.uint8]:
    """Training's shifted views of pictures, uint8 [N, H, W, 3], drawn from (seed, first)."""
    grey = bool((images[..., :1] == images).all())
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    shift = Shifts(spec, (images.shape[1], images.shape[2]), seed, grey)
    view = shift(x, torch.Generator().manual_seed(seed * 1_000_003 + first))
    return (view.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def fit_temperature(logits: ArrayLike, labels: ArrayLike) -> float:
    """The temperature that minimises the likelihood loss of Monte-Carlo dropout's mean (Guo et al. 2017, section 4.2,
    with the temperature inside each pass).

    Args:
        logits: [N, T, C], of T dropout passes, not tempered.
        labels: [N].

    Returns: tau in [1/20, 20] that minimises -mean_i log mean_t softmax(z_it / tau)[y_i].
    """
    z = np.asarray(logits)
    z = z - z.max(-1, keepdims=True)
    truth = np.take_along_axis(z, np.asarray(labels)[:, None, None], -1)[..., 0].astype(np.float64)

    def loss(log_temperature: float) -> float:
        tau = np.exp(log_temperature)
        log_normaliser = np.log(np.exp(z / tau).sum(-1, dtype=np.float64))
        return -float(logsumexp(truth / tau - log_normaliser, axis=1).mean() - np.log(z.shape[1]))

    found = minimize_scalar(loss, bounds=(-np.log(20), np.log(20)), method="bounded", options={"xatol": 1e-3})
    return float(np.exp(found.x))


def fit_paper(observed: Observations, heads: Sequence[str], spec: CalibrationSpec = DEFAULT) -> PaperRule:
    """delta and the scales of the paper's rule: a quantile, the 95th percentile unless told otherwise, of the
    symmetrised KL between clean and robust on clean pictures, and each head's mean uncertainty in nats on its own
    domain."""
    clean = observed.take(observed.clean).statistics
    divergence = symmetric_divergence(clean, heads.index("clean"), heads.index("robust"))
    uncertainty = getattr(observed.statistics, spec.uncertainty)
    scale = dict.fromkeys(heads, 1.0)
    if spec.normalised:
        own = {head: float(uncertainty[domain_of(head, observed.kind), k].mean()) for k, head in enumerate(heads)}
        scale = {head: max(value, LEAST_ENTROPY) for head, value in own.items()}
    return PaperRule(
        divergence_threshold=float(np.quantile(divergence, spec.agreement)),
        entropy_scale=scale,
        uncertainty=spec.uncertainty,
        among=["clean", "robust"] if spec.among == "two" else ["clean", "robust", "combined"],
    )


def fit_blend(observed: Observations, heads: Sequence[str]) -> BlendRule:
    """A detector of shifted pictures, with the threshold at which a tenth of the clean pictures counts as shifted."""
    detector = fit_detector(observed.statistics, ~observed.clean, heads)
    probability = shift_probability(observed.take(observed.clean).statistics, detector, heads)
    return BlendRule(**detector.model_dump(), threshold=float(np.quantile(probability, 1 - FALSE_ALARMS)))


def fit_rules(observed: Observations, heads: Sequence[str], spec: CalibrationSpec = DEFAULT) -> RouterSettings:
    """The numbers of those rules that a model with these heads can follow; its default is still to be chosen."""
    if not {"clean", "robust", "combined"} <= set(heads):
        return RouterSettings(default=heads[0])
    paper, blend = fit_paper(observed, heads, spec), fit_blend(observed, heads)
    return RouterSettings(default="combined", paper=paper, blend=blend)


def domain_of(head: str, kind: NDArray[np.str_]) -> NDArray[np.bool_]:
    """[N]: the views on which a head is calibrated: clean ones, shifted ones, or both."""
    clean, shifted = DOMAINS.get(head, (True, True))
    return np.where(kind == CLEAN, clean, shifted)


def mixture(observed: Observations, clean_share: float) -> dict[str, float]:
    """Weight of each kind of view in the comparison of routers; sums to 1."""
    kinds, counts = np.unique(observed.kind[~observed.clean], return_counts=True)
    shares = (1 - clean_share) * counts / counts.sum()
    return {CLEAN: clean_share} | {str(k): round(float(s), 6) for k, s in zip(kinds, shares, strict=True)}


def describe(pictures: Pictures) -> str:
    """Where the calibration pictures came from, in words."""
    document = pictures.describe()
    return f"{document['source']}, {pictures.split} split (seed {document['split_seed']})"
