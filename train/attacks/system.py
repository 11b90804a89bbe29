"""The deployed system as one differentiable function: heads, fixed dropout masks, temperatures and router."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trivium.kernels import HeadStatistics, dropout_masks
from trivium.runtime.bundle import GateFeature, Manifest
from trivium.runtime.guarantees import ShiftDetector
from trivium.runtime.router import FLOOR, RULES, SHIFT_FEATURES, route, routers

from ..models.mc import ORIGINAL, Heads, TensorStatistics, mc_statistics, normalise, tensor_statistics
from .losses import Logits

LEAST = 1e-30
"""Of a probability whose logarithm is taken."""


class System:
    """A student or classifier the way its bundle answers, from pictures in [0, 1].

    What the heads say is what the exported graph computes, and which head answers is decided by the runtime's own
    router. A decision has no gradient; the backward pass goes through a soft twin of the rule instead
    (straight-through, Bengio et al. 2013), so that an attack also sees how to make the router choose another head.

    Args:
        model: in eval mode.
        manifest: heads, preprocessing, dropout and router; its calibration's temperatures, where it has one.
    """

    def __init__(self, model: Heads, manifest: Manifest) -> None:
        self.model, self.manifest = model, manifest
        self.heads = list(manifest.heads)
        self._weights, self._bias = (tensor.detach().float() for tensor in model.head_weights())
        self._keep = 1 - manifest.dropout.rate
        masks = dropout_masks(manifest.dropout.passes, self._weights.shape[2], self._keep, manifest.dropout.seed)
        known = manifest.calibration.temperature if manifest.calibration else {}
        self._temperature = self._weights.new_tensor([known.get(head, 1.0) for head in self.heads])
        self._masks = torch.as_tensor(masks, dtype=torch.float32, device=self.device)

    @property
    def device(self) -> torch.device:
        return self._weights.device

    @property
    def answerers(self) -> list[str]:
        """The original classifier, every head and every rule, by name."""
        return [*([] if ORIGINAL in self.heads else [ORIGINAL]), *routers(self.manifest)]

    def statistics(self, x: Tensor) -> TensorStatistics:
        """Of pictures [B, 3, H, W] in [0, 1], differentiable."""
        features = self.model.features(normalise(x, self.manifest.preprocessing))
        return tensor_statistics(features, self._weights, self._bias, self._temperature, self._masks, self._keep)

    def answers(self, x: Tensor, router: str) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1] -> log-probabilities [B, 1 + K, C]: the routed answer, then every head's."""
        found = self.statistics(x)
        weights = routing(found, self.manifest, router)
        routed = (weights[:, :, None] * found.probabilities).sum(1, keepdim=True)
        return torch.cat([routed, found.probabilities], 1).clamp(min=LEAST).log()

    def logits(self, answerer: str) -> Logits:
        """The function of pictures in [0, 1] whose highest output [B, C] is the answerer's answer."""
        if answerer == ORIGINAL and ORIGINAL not in self.heads:
            return lambda x: self.model.original_logits(normalise(x, self.manifest.preprocessing)).float()
        return lambda x: self.answers(x, answerer)[:, 0]

    @torch.no_grad()
    def class_ids(self, x: Tensor) -> dict[str, Tensor]:
        """Answerer -> its class for each picture, [B] on the CPU: statistics and router as they are deployed."""
        normalised = normalise(x.to(self.device), self.manifest.preprocessing)
        features = self.model.features(normalised)
        statistics = mc_statistics(
            features, self._weights, self._bias, self._temperature.cpu(), self._masks.cpu(), self._keep
        )
        found = {
            name: torch.from_numpy(route(statistics, self.manifest, name).class_id) for name in routers(self.manifest)
        }
        if ORIGINAL not in self.heads:
            found[ORIGINAL] = self.model.original_logits(normalised).argmax(1).cpu()
        return found


def routing(statistics: TensorStatistics, manifest: Manifest, router: str) -> Tensor:
    """Weights of the heads in the routed answer, [B, K]: the runtime's, with the gradient of the rule's soft twin."""
    if router in manifest.heads:
        weights = torch.zeros_like(statistics.energy)
        weights[:, manifest.heads.index(router)] = 1
        return weights
    plain = HeadStatistics(*(each.detach().cpu().numpy() for each in statistics))
    hard = torch.from_numpy(RULES[router](plain, manifest).weights).to(statistics.energy)
    soft = SOFT[router](statistics, manifest)
    return hard + (soft - soft.detach())


def _mean(statistics: TensorStatistics, manifest: Manifest) -> Tensor:
    return torch.full_like(statistics.energy, 1 / len(manifest.heads))


def _min_entropy(statistics: TensorStatistics, manifest: Manifest) -> Tensor:
    return lean(-statistics.predictive_entropy)


def _paper(statistics: TensorStatistics, manifest: Manifest) -> Tensor:
    """Agreement delta / (delta + D), which is a half where the rule turns; else the surest."""
    rule = manifest.router.paper
    assert rule is not None
    clean, robust, combined = (manifest.heads.index(name) for name in ("clean", "robust", "combined"))
    delta = rule.divergence_threshold + FLOOR
    agree = delta / (delta + symmetric(statistics)[:, clean, robust])
    uncertainty: Tensor = getattr(statistics, rule.uncertainty)
    places = [manifest.heads.index(head) for head in rule.among]
    relative = uncertainty[:, places] / uncertainty.new_tensor([rule.entropy_scale[head] for head in rule.among])
    surest = (1 - agree[:, None]) * lean(-relative)
    return spread(statistics, [combined, *places], torch.cat([agree[:, None], surest], 1))


def _blend(statistics: TensorStatistics, manifest: Manifest) -> Tensor:
    """How far the detector's score lies above its threshold."""
    rule = manifest.router.blend
    assert rule is not None
    clean, combined = (manifest.heads.index(name) for name in ("clean", "combined"))
    unshifted, shifted = beyond(statistics, rule, rule.threshold, manifest.heads).unbind(1)
    return spread(statistics, [clean, combined], torch.stack([unshifted / 2, unshifted / 2 + shifted], 1))


def _guard(statistics: TensorStatistics, manifest: Manifest) -> Tensor:
    """The same, between the clean head and the guarded rule's own twin."""
    rule = manifest.router.guard
    assert rule is not None
    unshifted, shifted = beyond(statistics, rule, rule.threshold, manifest.heads).unbind(1)
    if rule.base in manifest.heads:
        base = spread(statistics, [manifest.heads.index(rule.base)], torch.ones_like(shifted)[:, None])
    else:
        base = SOFT[rule.base](statistics, manifest)
    return spread(statistics, [manifest.heads.index("clean")], unshifted[:, None]) + shifted[:, None] * base


def _gate(statistics: TensorStatistics, manifest: Manifest) -> Tensor:
    """The head of the highest score."""
    rule = manifest.router.gate
    assert rule is not None
    answering = [head for head in manifest.heads if head in rule.intercept]
    score = statistics.energy.new_tensor([rule.intercept[head] for head in answering]).expand(
        len(statistics.energy), -1
    )
    for feature in rule.features:
        standard = (gate_feature(statistics, feature, manifest.heads) - feature.center) / feature.scale
        score = score + standard[:, None] * score.new_tensor([feature.weights[head] for head in answering])
    return spread(statistics, [manifest.heads.index(head) for head in answering], lean(score))


def beyond(statistics: TensorStatistics, detector: ShiftDetector, threshold: float, heads: Sequence[str]) -> Tensor:
    """[B, 2], each row sums to 1: how far a picture's score lies below and above the threshold of a probability."""
    clean = heads.index("clean")
    score = torch.full_like(statistics.energy[:, 0], detector.intercept)
    for name in SHIFT_FEATURES:
        if name in detector.weights:
            if name == "divergence":
                feature = torch.log(FLOOR + symmetric(statistics)[:, clean, heads.index("robust")])
            elif name == "mutual_information":
                feature = torch.log(FLOOR + statistics.mutual_information[:, clean])
            else:
                feature = statistics.energy[:, clean]
            score = score + detector.weights[name] * (feature - detector.center[name]) / detector.scale[name]
    threshold = min(max(threshold, 1e-6), 1 - 1e-6)
    above = score - math.log(threshold / (1 - threshold))
    return lean(torch.stack([-above, above], 1))


def lean(scores: Tensor) -> Tensor:
    """Softmax of scores [B, G] brought within a range of 1, so that a choice far from its turning point has a gradient
    too."""
    reach = (scores.amax(1, keepdim=True) - scores.amin(1, keepdim=True)).detach().clamp(min=1)
    return torch.softmax(scores / reach, 1)


def spread(statistics: TensorStatistics, heads: Sequence[int], weights: Tensor) -> Tensor:
    """Weights [B, G] of some heads, by their places -> of all, [B, K]; those of a head named twice add up."""
    none = torch.zeros_like(statistics.energy)
    return none.index_add(1, torch.tensor(heads, device=none.device), weights)


def gate_feature(statistics: TensorStatistics, feature: GateFeature, heads: Sequence[str]) -> Tensor:
    """runtime.router.gate_features, one of them, [B]; the root's slope at 0 is finite here."""
    k = heads.index(feature.heads[0])
    if feature.statistic == "divergence":
        return symmetric(statistics)[:, k, heads.index(feature.heads[1])].clamp(min=1e-12).sqrt()
    if feature.statistic == "max_probability":
        return statistics.probabilities[:, k].amax(1)
    if feature.statistic == "energy":
        return statistics.energy[:, k]
    value: Tensor = getattr(statistics, feature.statistic)[:, k]
    return value.clamp(min=1e-12).sqrt()


def symmetric(statistics: TensorStatistics) -> Tensor:
    """[B, K, K]: (KL(p_i || p_j) + KL(p_j || p_i)) / 2 in nats."""
    return (statistics.divergence + statistics.divergence.transpose(1, 2)) / 2


SOFT: dict[str, Callable[[TensorStatistics, Manifest], Tensor]] = {
    "mean": _mean,
    "min_entropy": _min_entropy,
    "paper": _paper,
    "blend": _blend,
    "gate": _gate,
    "guard": _guard,
}
"""Rule -> weights [B, K] that move smoothly towards the head that the rule would choose."""
