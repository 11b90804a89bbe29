"""Accuracy under attack: of the original, of every head and of the routed answer, on the same pictures."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from trivium.runtime.errors import ConfigError
from trivium.runtime.router import routers

from ..attacks.adaptive import adaptive
from ..attacks.apgd import apgd
from ..attacks.autoattack import autoattack, require
from ..attacks.ball import Norm
from ..attacks.pgd import pgd
from ..attacks.system import System
from ..data.pictures import Pictures
from ..models.mc import ORIGINAL
from .results import Attacked, Attacks, short
from .subject import CheckpointSubject, Subject
from .tally import choose_pictures, labels_for

ATTACKS = ("transfer", "pgd", "apgd", "autoattack", "adaptive")
DEFAULT_ATTACKS = ("transfer", "pgd", "apgd", "adaptive")
STEPS = {"transfer": 50, "pgd": 20, "apgd": 50, "autoattack": 100, "adaptive": 50}
"""Gradient steps; adaptive takes as many in each attempt."""
WORTH = 0.05
"""AutoAttack is spared an answerer whose accuracy under PGD is not above this."""
BATCH = 64
PIXELS = 64 * 224 * 224
"""That AutoAttack works on at once: its late stages have few pictures left, and small batches cost twice as much."""

Tell = Callable[[int, int], None]


@dataclass(frozen=True)
class Threat:
    """Who attacks: a norm and a radius in units of pixels in [0, 1]."""

    norm: Norm
    eps: float


def parse_threat(text: str) -> Threat:
    """linf:8/255, l2:0.5.

    Raises: ConfigError.
    """
    norm, colon, eps = text.strip().lower().partition(":")
    if norm not in ("linf", "l2") or not colon:
        raise ConfigError(f"--attack {text}: a norm and a radius are meant, as linf:8/255 or l2:0.5")
    return Threat("linf" if norm == "linf" else "l2", parse_eps(eps))


def parse_eps(text: str) -> float:
    """A radius as a decimal number or a fraction.

    Raises: ConfigError.
    """
    try:
        value = float(Fraction(text.strip()))
    except (ValueError, ZeroDivisionError):
        raise ConfigError(f"{text.strip()!r} is no radius: write it as 0.03 or 8/255") from None
    if value < 0:
        raise ConfigError(f"a radius of {text.strip()} is negative")
    return value


def parse_attacks(text: str) -> tuple[str, ...]:
    """Names with commas, in the order in which they are run.

    Raises: ConfigError where one is unknown, or AutoAttack's package is absent.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in ATTACKS]:
        raise ConfigError(f"no attack {unknown[0]!r}; there are: {', '.join(ATTACKS)}")
    if not names:
        raise ConfigError(f"--attacks names none of: {', '.join(ATTACKS)}")
    if "autoattack" in names:
        require()
    return tuple(name for name in ATTACKS if name in names)


def attack_system(
    system: System,
    pictures: Pictures,
    threat: Threat,
    *,
    attacks: Sequence[str] = DEFAULT_ATTACKS,
    answerers: Sequence[str] | None = None,
    curve: Sequence[float] = (),
    count: int | None = None,
    autoattack_count: int | None = None,
    autoattack_above: float = WORTH,
    seed: int = 0,
    progress: Tell | None = None,
) -> Attacks:
    """Attack each answerer with each attack.

    Pictures are changed in floating point, every channel on its own, and not rounded to 8 bits; a grey picture may
    thus gain colour. Only pictures that the answerer gets right are attacked. An answer counts as robust where the
    runtime's own router, on the statistics as deployed, still gives it.

    Args:
        answerers: names of heads and routers, "original", or "default" for the default router; None takes the
            original, all heads and the default router.
        curve: further radii, for all attacks but AutoAttack.
        count: pictures to attack at most, drawn by seed.
        autoattack_count: those of them that AutoAttack, which is slow, is tried on; None: all.
        autoattack_above: the share that PGD must leave right for it to be tried.
        progress: told (attacks done, attacks in all).

    Raises: ConfigError where an answerer is unknown, or data and model do not fit.
    """
    began, cpu = time.perf_counter(), time.process_time()
    targets = choose_answerers(system, answerers)
    chosen = choose_pictures(pictures, count, seed)
    labels = torch.from_numpy(labels_for(pictures, system.manifest.classes)[chosen]).to(system.device)
    x = pictures.batch(chosen).to(system.device).float() / 255
    bench = Bench(system, x, labels, threat.norm, seed, autoattack_count)
    radii = sorted({threat.eps, *curve})
    plan = [
        (target, attack, eps)
        for target in targets
        for attack in attacks
        for eps in radii
        if applies(system, target, attack) and (attack != "autoattack" or eps == threat.eps)
    ]
    rows = []
    for done, (target, attack, eps) in enumerate(plan):
        if attack != "autoattack" or bench.accuracy(target, "pgd", eps) > autoattack_above:
            bench.run(target, attack, eps)
            rows.append(
                Attacked(answerer=target, attack=attack, eps=short(eps), accuracy=bench.accuracy(target, attack, eps))
            )
        if progress is not None:
            progress(done + 1, len(plan))
    return Attacks(
        norm=threat.norm,
        eps=short(threat.eps),
        pictures=len(x),
        autoattack_pictures=int(bench.few.sum()) if "autoattack" in attacks else None,
        seed=seed,
        steps={name: STEPS[name] for name in attacks},
        clean={target: short(bench.right[target].float().mean().item()) for target in targets},
        rows=rows,
        cpu_seconds=round(time.process_time() - cpu, 1),
        wall_seconds=round(time.perf_counter() - began, 1),
    )


def open_system(subject: Subject) -> System:
    """The subject as a differentiable function.

    Raises: ConfigError where it has no gradient.
    """
    if not isinstance(subject, CheckpointSubject):
        raise ConfigError(f"{subject.path}: attacks need gradients, which a bundle has not: name its checkpoint")
    return System(subject.model, subject.manifest)


def choose_answerers(system: System, names: Sequence[str] | None) -> list[str]:
    """Distinct names of answerers, "default" resolved; None: the original, all heads and the default router.

    Raises: ConfigError.
    """
    default = system.manifest.router.default
    if names is None:
        wanted = [name for name in system.answerers if name == ORIGINAL or name in system.heads] + [default]
    else:
        wanted = [default if name == "default" else name for name in names]
    if unknown := [name for name in wanted if name not in system.answerers]:
        raise ConfigError(f"no answerer {unknown[0]!r} to attack; there are: default, {', '.join(system.answerers)}")
    return list(dict.fromkeys(wanted))


def applies(system: System, answerer: str, attack: str) -> bool:
    """Whether an attack says something of an answerer: the original is the source of transfer, and what one head
    answers alone needs no attack on routing."""
    if attack == "transfer":
        return answerer != ORIGINAL
    if attack == "adaptive":
        rules = set(routers(system.manifest)) - set(system.heads)
        return answerer in rules or answerer == system.manifest.router.default
    return True


class Bench:
    """Pictures under attack, and who is still right about them."""

    def __init__(
        self, system: System, x: Tensor, labels: Tensor, norm: Norm, seed: int, few: int | None = None
    ) -> None:
        self.system, self.x, self.labels, self.norm, self.seed = system, x, labels, norm, seed
        self.few = torch.zeros(len(x), dtype=torch.bool)
        """bool [N]: which pictures AutoAttack is tried on; spread over all, as they may lie class by class."""
        self.few[torch.linspace(0, len(x) - 1, min(few or len(x), len(x))).round().long()] = True
        self.right = self._right(x, torch.arange(len(x)))
        """Answerer -> bool [N], on clean pictures."""
        self.robust: dict[tuple[str, str, float], Tensor] = {}
        """(answerer, attack, eps) -> bool [N]."""
        self._transferred: dict[float, dict[str, Tensor]] = {}

    def accuracy(self, answerer: str, attack: str, eps: float) -> float:
        """Under one attack, on the pictures that it was tried on; 1 where it has not been run."""
        robust = self.robust.get((answerer, attack, eps))
        if robust is None:
            return 1.0
        return short((robust[self.few] if attack == "autoattack" else robust).float().mean().item())

    def run(self, answerer: str, attack: str, eps: float) -> None:
        """Attack an answerer and keep who stays right.

        adaptive goes on with what the other attacks of this radius have left, so it is the worst of all.
        """
        robust = self.right[answerer].clone()
        if eps > 0 and attack == "transfer":
            if eps not in self._transferred:
                self._transferred[eps] = self._right(self._craft(ORIGINAL, "transfer", eps, self._all), self._all)
            robust &= self._transferred[eps][answerer]
        elif eps > 0:
            if attack == "adaptive":
                for name in ATTACKS:
                    robust &= self.robust.get((answerer, name, eps), robust)
            rows = (robust & self.few if attack == "autoattack" else robust).nonzero()[:, 0]
            if len(rows):
                found = self._craft(answerer, attack, eps, rows)
                robust[rows] = self._right(found, rows)[answerer]
        self.robust[answerer, attack, eps] = robust

    @property
    def _all(self) -> Tensor:
        return torch.arange(len(self.x))

    def _craft(self, answerer: str, attack: str, eps: float, rows: Tensor) -> Tensor:
        """Pictures `rows` changed by an attack on the answerer."""
        generator = torch.Generator().manual_seed(self.seed)
        system, norm, steps = self.system, self.norm, STEPS[attack]
        logits = system.logits(answerer)
        found = []
        together = max(BATCH, PIXELS // self.x[0, 0].numel()) if attack == "autoattack" else BATCH
        for part in rows.split(together):
            x, labels = self.x[part], self.labels[part]
            if attack == "transfer":
                out = apgd(logits, x, labels, norm, eps, steps, generator=generator)
            elif attack == "pgd":
                out = pgd(logits, x, labels, norm, eps, eps / 4, steps, generator=generator, stop_early=True)
            elif attack == "apgd":
                out = apgd(logits, x, labels, norm, eps, steps, generator=generator, stop_early=True)
            elif attack == "autoattack":
                out = autoattack(logits, x, labels, norm, eps, self.seed, together)
            else:
                out = adaptive(system, answerer, x, labels, norm, eps, steps, generator)
            found.append(out)
        return torch.cat(found)

    def _right(self, x: Tensor, rows: Tensor) -> dict[str, Tensor]:
        """Answerer -> bool [N] on the CPU: who is right about pictures that stand for `rows`."""
        right: dict[str, list[Tensor]] = {name: [] for name in self.system.answerers}
        for part, own in zip(x.split(BATCH), rows.split(BATCH), strict=True):
            for name, found in self.system.class_ids(part).items():
                right[name].append(found == self.labels[own].cpu())
        return {name: torch.cat(parts) for name, parts in right.items()}
