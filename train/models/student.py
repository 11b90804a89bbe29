"""The student: a frozen trunk, the last stages copied per head (or shared, or none), dropout, and K linear heads."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trivium.runtime.errors import ConfigError

from .stages import Classifier, bias_of

Tail = Literal["copied", "shared"]


class Student(nn.Module):
    """K heads on the original classifier, which stays in it, frozen and exact.

    Args:
        original: the classifier to start from; taken over, its parameters frozen.
        head_names: K distinct names.
        depth: number of last stages that are tuned; 0 leaves linear heads on the original's features, "all" leaves
            nothing in common.
        tail: each head tunes its own copy of those stages, or all share one.
        dropout_rate: Bernoulli dropout before each head.
        freeze_norm: batch norms of the tuned stages keep the original's statistics.

    Raises: ConfigError where the model cannot be cut `depth` stages before its end.
    """

    def __init__(
        self,
        original: Classifier,
        head_names: Sequence[str],
        depth: int | Literal["all"],
        tail: Tail = "copied",
        dropout_rate: float = 0.5,
        freeze_norm: bool = False,
    ) -> None:
        super().__init__()
        stages = list(original.stages)
        if depth == "all":
            depth = len(stages)
        elif depth > 0 and not original.splittable:
            raise ConfigError("no verified split of this model into stages: set heads.depth to 0 or all")
        if not 0 <= depth <= len(stages):
            raise ConfigError(f"heads.depth is {depth}, this model has {len(stages)} stages: 0 to {len(stages)}")
        self.head_names = tuple(head_names)
        self.fixed: tuple[str, ...] = ()
        """Heads taken over from elsewhere, which are not trained."""
        self.depth, self.tail, self.dropout_rate, self.freeze_norm = depth, tail, dropout_rate, freeze_norm
        last = [*stages[len(stages) - depth :], original.neck]
        self.trunk = nn.Sequential(*stages[: len(stages) - depth], *([] if depth else last))
        self.original_tail = nn.Sequential(*(last if depth else []))
        self.original_head = original.head
        for module in self._frozen():
            module.requires_grad_(False)
        copies = 0 if depth == 0 else 1 if tail == "shared" else len(self.head_names)
        self.branches = nn.ModuleList(copy.deepcopy(self.original_tail) for _ in range(copies))
        self.heads = nn.ModuleList(copy.deepcopy(self.original_head) for _ in self.head_names)
        self.branches.requires_grad_(True)
        self.heads.requires_grad_(True)

    def train(self, mode: bool = True) -> Student:
        """As nn.Module's; the frozen parts stay in eval mode, so that their batch statistics never move."""
        super().train(mode)
        for module in self._frozen():
            module.eval()
        for name in self.fixed:
            head = self.head_names.index(name)
            self.heads[head].eval()
            if self.branches:
                self.branches[head].eval()
        if self.freeze_norm:
            for norm in self.branches.modules():
                if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                    norm.eval()
        return self

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As nn.Module's, of the parts that training calls."""
        for part in (self.trunk, self.original_tail, *self.branches):
            part.compile(*args, **kwargs)

    def role(self, head: int) -> str:
        """What head number `head` is for: clean, robust or combined."""
        return self.head_names[head].partition("-")[0]

    def classifier(self, name: str) -> Classifier:
        """One head with the stages before it as a classifier of its own, sharing their parameters."""
        head = self.head_names.index(name)
        last: list[nn.Module] = []
        if self.branches:
            last = list(self.branches[0 if self.tail == "shared" else head].children())
        *stages, neck = [*self.trunk, *last]
        linear = self.heads[head]
        assert isinstance(linear, nn.Linear)
        return Classifier(stages, neck, linear, self.dropout_rate)

    def take_over(self, name: str, source: Classifier) -> None:
        """Give a head the weights of another classifier of this architecture, and leave it as it is from now on.

        Raises: ConfigError where the frozen stages before this head are not the source's.
        """
        head = self.head_names.index(name)
        own = self.classifier(name)
        theirs = source.state_dict()
        frozen = {f"stages.{i}." for i in range(len(own.stages) - self.depth)}
        try:
            for key, value in own.state_dict().items():
                if key.startswith(tuple(frozen)) and not torch.equal(value, theirs[key]):
                    raise ConfigError(
                        f"heads.sources.{name}: its first stages are not the original's, which all heads share: "
                        "set heads.depth to all"
                    )
            own.load_state_dict(theirs)
        except (KeyError, RuntimeError):
            raise ConfigError(
                f"heads.sources.{name}: not a classifier of this architecture and these classes"
            ) from None
        self.heads[head].requires_grad_(False)
        if self.branches:
            self.branches[head].requires_grad_(False)
        self.fixed = (*self.fixed, name)

    def branch(self, head: int, z: Tensor) -> Tensor:
        """Trunk features -> pooled features [B, D] that head number `head` sees."""
        if not self.branches:
            return z
        features: Tensor = self.branches[0 if self.tail == "shared" else head](z)
        return features

    def logits(self, head: int, features: Tensor) -> Tensor:
        """Pooled features [B, D] -> logits [B, C], float32, with dropout in training mode."""
        dropped = F.dropout(features, self.dropout_rate, self.training)
        logits: Tensor = self.heads[head](dropped)
        return logits.float()

    def features(self, x: Tensor) -> Tensor:
        """Normalised pictures [B, 3, H, W] -> [B, K, D], or [B, D] where the heads share their features."""
        z = self.trunk(x)
        if len(self.branches) <= 1:
            return self.branch(0, z)
        return torch.stack([branch(z) for branch in self.branches], 1)

    def head_weights(self) -> tuple[Tensor, Tensor]:
        """(weights [K, C, D], bias [K, C])."""
        heads = [head for head in self.heads if isinstance(head, nn.Linear)]
        return torch.stack([head.weight for head in heads]), torch.stack([bias_of(head) for head in heads])

    def original_from_trunk(self, z: Tensor) -> Tensor:
        """Trunk features -> the original classifier's logits [B, C]."""
        logits: Tensor = self.original_head(self.original_tail(z))
        return logits

    def original_logits(self, x: Tensor) -> Tensor:
        """Normalised pictures [B, 3, H, W] -> the original classifier's logits [B, C], exactly."""
        return self.original_from_trunk(self.trunk(x))

    def forward(self, x: Tensor) -> Tensor:
        """Normalised pictures [B, 3, H, W] -> logits of all heads [B, K, C], without dropout in eval mode."""
        z = self.trunk(x)
        return torch.stack([self.logits(i, self.branch(i, z)) for i in range(len(self.head_names))], 1)

    def _frozen(self) -> tuple[nn.Module, ...]:
        return self.trunk, self.original_tail, self.original_head

    @staticmethod
    def is_tuned(key: str) -> bool:
        """Whether a key of the state dict belongs to the parts that training changes."""
        return key.startswith(("branches.", "heads."))
