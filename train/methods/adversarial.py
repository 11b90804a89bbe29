"""Adversarial training of one head: AT (Madry et al. 2018), TRADES (Zhang et al. 2019) and TWINS (Liu et al. 2023).

Pictures are attacked by PGD in evaluation mode, under TWINS through the adaptive wing (models/twins.py), and learned in
training mode. Dropout is left to the runtime: the papers train without.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..attacks.ball import Norm
from ..attacks.pgd import cross_entropy, pgd
from ..checkpoint import save_tensors
from ..data.pictures import DataSpec
from ..distributed import barrier, once, whole
from ..loop import accuracy, derive, fingerprint
from ..models.backbone import read_state
from ..models.stages import Classifier
from ..models.student import Student
from ..models.twins import TwinNorm, fold_wings, spread_wings, twin_norms
from ..sections import Count, NonNegative, Schedule, Section
from .losses import at_loss, trades_loss

if TYPE_CHECKING:
    from ..feed import Feed
    from ..pipeline import Run

SCORE = "score"
GLANCED = 10
"""PGD steps of the check after each epoch, without random start."""


def _fraction(value: Any) -> Any:
    try:
        return float(Fraction(value)) if isinstance(value, str) else value
    except (ValueError, ZeroDivisionError):
        return value


Length = Annotated[float, BeforeValidator(_fraction), Field(gt=0, allow_inf_nan=False)]
"""In pixels' units [0, 1]; 8/255 may be written so."""


class Attack(Section):
    """PGD on the pictures that are learned from."""

    norm: Norm = "linf"
    eps: Length = 8 / 255
    step: Length | None = None
    """None: a quarter of eps."""
    steps: Count = 10
    random_start: bool = True
    loss: Literal["ce", "kl"] = "ce"
    """What it maximises: cross-entropy, or (TRADES' own attack) the divergence from the clean answer, which needs the
    random start."""

    @property
    def stride(self) -> float:
        return self.eps / 4 if self.step is None else self.step


class Source(Section):
    """Robust pre-training: adversarial training (AT, one wing, the same attack) on other pictures, of whatever classes;
    where these differ, the final layer starts anew afterwards."""

    data: DataSpec
    schedule: Schedule


class Adversarial(Section):
    """How one head, with all stages that are tuned, is trained adversarially."""

    schedule: Schedule
    loss: Literal["at", "trades"] = "at"
    attack: Attack = Attack()
    beta: NonNegative = 6.0
    """Weight of TRADES' divergence."""
    wings: Literal["single", "twins", "adaptive"] = "single"
    """single: ordinary batch norms; twins: a frozen and an adaptive wing, each for half of a batch; adaptive: the
    control with two adaptive wings."""
    lambda_twins: NonNegative = 1.0
    """Weight of the first wing's loss; the second's is 1, so that a single wing at lr x (1 + lambda) is the control."""
    divergence_mean: Literal["batch", "wing"] = "batch"
    """Each wing's divergences are summed and divided by all pictures of the batch, as in the authors' code (which
    halves beta against its wing's cross-entropy), or by those of the wing."""
    shared_affine: bool = False
    """Both wings learn one scale and shift; the authors' each their own."""
    settle: Annotated[int, Field(ge=0)] = 0
    """Batches of attacked pictures that move the adaptive wing's statistics before anything is learned (the paper's
    warm-up, which is not in the authors' code; reconstructed)."""
    source: Source | None = None
    """Before all else, from the original; fine-tuning asks for a robust start. None: the original is one, or is taken
    as it is."""
    keep: Literal["final", "best"] = "final"
    """best: the epoch of the highest PGD accuracy on the held-out pictures."""
    held_out: Count = 500
    """Calibration pictures that are attacked after each epoch."""

    @model_validator(mode="after")
    def _consistent(self) -> Adversarial:
        if self.wings == "single" and (self.settle or self.shared_affine):
            raise ValueError(f"{'settle' if self.settle else 'shared_affine'} needs wings: twins or adaptive")
        return self


def run(run: Run, student: Student, teacher: Classifier | None, upstream: str) -> None:
    """Train the student's only head in place.

    Raises: ConfigError where wings are asked for and there are no batch norms; TrainingDiverged.
    """
    settings = run.recipe.adversarial
    assert settings is not None, "the recipe's method"
    if settings.source is not None:
        upstream = _start(run, student, settings, upstream)
    if settings.wings != "single":
        spread_wings(student.branches, settings.shared_affine, freeze=settings.wings == "twins")
    parts = (settings.model_dump(exclude={"source"}), upstream)
    name = student.head_names[0]
    _train(run, "adversarial", student, lambda: student.classifier(name), settings, parts, run.feed)
    fold_wings(student.branches)


class AdversarialTraining:
    """Objective and figures of one stage.

    Args:
        model: what the loop trains; its mode is switched between attacking and learning.
        classifier: of the model, in every call (a model's parts are others while it is spread over processes):
            normalised pictures -> logits [B, C].
        directory, mark: where the best epoch so far is noted, and of what run it is.
        norms: of the gradients of the steps since the last check (gradient_norms).
    """

    def __init__(
        self,
        feed: Feed,
        model: nn.Module,
        classifier: Callable[[], nn.Module],
        settings: Adversarial,
        directory: Path,
        mark: str,
        norms: list[float],
    ) -> None:
        self.feed, self.model, self.classifier, self.settings = feed, model, classifier, settings
        self.norms = norms
        self._best = directory / f"best-{mark[:16]}.safetensors"
        wings = tuple(f"{name}.first." for name, module in model.named_modules() if isinstance(module, TwinNorm))
        self._start = {
            name: p.detach().clone()
            for name, p in model.named_parameters()
            if p.requires_grad and not name.startswith(wings)
        }
        for norm in twin_norms(model):
            norm.adaptive.num_batches_tracked.zero_()  # type: ignore[union-attr]

    def loss(
        self, pictures: Tensor, indices: NDArray[np.int64], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        """As the loop wants it."""
        settings, feed = self.settings, self.feed
        # The count of batches is kept with the weights, so a resumed run does not settle twice.
        if settings.settle and not next(twin_norms(self.model)).adaptive.num_batches_tracked:
            self._settle(len(indices), generator)
        labels, x = feed.labels(indices), feed.clean(pictures, generator)
        attacked = self._attack(x, labels, generator)
        answer = feed.answer(self.classifier())
        first = 0 if settings.wings == "single" else len(labels) // 2
        if settings.loss == "at":
            return at_loss(answer(attacked), labels, first, settings.lambda_twins), {}
        clean = answer(x)
        loss = trades_loss(
            clean, answer(attacked), labels, settings.beta, first, settings.lambda_twins, settings.divergence_mean
        )
        return loss, {"cross_entropy": F.cross_entropy(clean, labels).item()}

    def check(self) -> dict[str, float]:
        """Accuracy on held-out pictures, clean and under PGD; how far the weights went, how long gradients were."""
        attack, classifier = self.settings.attack, self.classifier()

        def logits(x: Tensor) -> Tensor:
            return classifier(self.feed.normalise(x)).float()  # type: ignore[no-any-return]

        def attacked() -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
            for x, labels in self.feed.held_out_batches(self.settings.held_out, shifted=False):
                y = torch.from_numpy(labels).to(x.device)
                yield (
                    pgd(logits, x, y, attack.norm, attack.eps, attack.eps / 4, GLANCED, False, keep_best=False),
                    labels,
                )

        clean = accuracy(logits, self.feed.held_out_batches(self.settings.held_out, shifted=False))
        robust = accuracy(logits, attacked())
        best = max(robust, self._keep(robust))
        now = dict(self.model.named_parameters())
        moved = [(whole(now[name].detach()) - start).float().square().sum() for name, start in self._start.items()]
        distance = torch.stack(moved).sum().sqrt().item()
        gradient = float(np.mean(self.norms)) if self.norms else 0.0
        self.norms.clear()
        return {
            "clean": clean,
            "pgd": robust,
            "best_gap": best - robust,
            "weight_distance": distance,
            "gradient_norm": gradient,
        }

    def finish(self) -> None:
        """Give the model what the recipe keeps, the final epoch or the best."""
        if self.settings.keep == "best":
            state = read_state(self._best)
            del state[SCORE]
            self.model.load_state_dict(state)

    def _keep(self, score: float) -> float:
        """Note a score, with the tensors where they may be asked for, if it is the best so far; the best before it."""
        # An epoch that is trained again after a kill comes to the same score and so changes nothing.
        before = float(read_state(self._best)[SCORE]) if self._best.is_file() else -1.0
        barrier()
        if score > before:
            state = self.model.state_dict() if self.settings.keep == "best" else {}
            tensors = {key: whole(value) for key, value in state.items()}
            self._best.parent.mkdir(parents=True, exist_ok=True)
            once(lambda: save_tensors(self._best, {**tensors, SCORE: torch.tensor(score, dtype=torch.float64)}))
        return before

    def _attack(self, x: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        attack = self.settings.attack
        self.model.eval()
        answer = self.feed.answer(self.classifier())
        found = pgd(
            answer, x, labels, attack.norm, attack.eps, attack.stride, attack.steps, attack.random_start, generator,
            _divergence_from(answer, x) if attack.loss == "kl" else cross_entropy, keep_best=False,
        )  # fmt: skip
        self.model.train()
        return found

    @torch.no_grad()
    def _settle(self, count: int, generator: torch.Generator) -> None:
        """Forward passes only, in training mode, of attacked pictures drawn from all."""
        for _ in range(self.settings.settle):
            indices = torch.randint(len(self.feed.pictures), (count,), generator=generator).numpy()
            pictures = self.feed.machine.channels_last(self.feed.fetch(indices, generator))
            x = self.feed.clean(pictures, generator)
            self.feed.answer(self.classifier())(self._attack(x, self.feed.labels(indices), generator))


@contextmanager
def gradient_norms() -> Iterator[list[float]]:
    """Collects the L2 norm of the whole gradient, as clipped, of each step that an optimizer takes meanwhile."""
    norms: list[float] = []

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        tuned = [p for group in optimizer.param_groups for p in group["params"]]
        norms.append(whole(nn.utils.get_total_norm([p.grad for p in tuned if p.grad is not None])).item())

    handle = register_optimizer_step_pre_hook(note)
    try:
        yield norms
    finally:
        handle.remove()


def _divergence_from(answer: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    with torch.no_grad():
        log_p = F.log_softmax(answer(x), -1)
    return lambda logits, labels: (log_p.exp() * (log_p - F.log_softmax(logits, -1))).sum(-1)


def _start(run: Run, student: Student, settings: Adversarial, upstream: str) -> str:
    """Fill the student's head and all stages before it by robust pre-training; the fingerprint of where they came from.

    Raises: ConfigError where the data cannot be used; TrainingDiverged.
    """
    recipe, source = run.recipe, settings.source
    assert source is not None
    own = student.classifier(student.head_names[0])
    feed = run.feed.over(source.data)
    classifier = copy.deepcopy(own)
    classifier.head = _fresh(own.head, len(feed.classes), derive(recipe.seed, "source"))
    plain = Adversarial(schedule=source.schedule, attack=settings.attack, held_out=settings.held_out)
    parts = (plain.model_dump(), feed.description["digest"], upstream)
    _train(run, "source", classifier, lambda: classifier, plain, parts, feed)
    if feed.classes != run.feed.classes:
        classifier.head = _fresh(own.head, len(run.feed.classes), derive(recipe.seed, "adversarial"))
    own.load_state_dict(classifier.state_dict())
    return fingerprint(*parts)


def _train(
    run: Run,
    name: str,
    model: nn.Module,
    classifier: Callable[[], nn.Module],
    settings: Adversarial,
    parts: Any,
    feed: Feed,
) -> None:
    directory, mark = run.out / name, fingerprint(run.common, parts)
    with gradient_norms() as norms:
        training = AdversarialTraining(feed, model, classifier, settings, directory, mark, norms)
        run.stage(
            name, model, settings.schedule, lambda: training.loss, parts,
            kept=Student.is_tuned if isinstance(model, Student) else lambda key: True,
            check=training.check, finish=training.finish, feed=feed,
        )  # fmt: skip

    def forget() -> None:
        for file in directory.glob("best-*"):
            file.unlink()

    once(forget)


def _fresh(head: nn.Linear, classes: int, seed: int) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(head.in_features, classes, bias=head.bias is not None).to(head.weight.device)
