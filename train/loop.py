"""One training loop for every stage: schedules, autocast, a checkpoint each epoch, and exact resume after a kill.

Every random draw of a step comes from (seed, stage, epoch, step) alone and every epoch ends with all state on disk, so
a run that was killed and resumed ends with the same bits as one that was not (on a CPU, with as many threads).
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from trivium.runtime.errors import ClientError

from .checkpoint import Cost, replace_directory, save_tensors, write_json
from .progress import Watch
from .sections import Schedule

STATE = "state.json"
TENSORS = "tensors.safetensors"

Fetch = Callable[[NDArray[np.int64], torch.Generator], Tensor]
"""Indices of pictures, generator -> a batch of pictures, uint8 [B, 3, H, W]; may run ahead in another thread."""
Loss = Callable[[Tensor, NDArray[np.int64], torch.Generator], tuple[Tensor, dict[str, float]]]
"""A batch of pictures on the device, their indices, generator -> loss to minimise, figures to show."""


class TrainingDiverged(ClientError):
    """The loss is no longer a number."""


@dataclass(frozen=True)
class Machine:
    """What training runs on."""

    device: torch.device
    bfloat16: bool

    def autocast(self) -> AbstractContextManager[Any]:
        """bfloat16 autocast, or nothing."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.bfloat16 else nullcontext()

    def place(self, model: nn.Module) -> None:
        """Move a model to the device, in the memory format its convolutions are fastest in."""
        model.to(device=self.device)
        model.to(memory_format=torch.channels_last)

    def channels_last(self, x: Tensor) -> Tensor:
        """The pictures on the device, in the memory format its convolutions are fastest in."""
        return x.to(self.device).contiguous(memory_format=torch.channels_last)


@dataclass
class Stage:
    """What the loop trains, how, and where it keeps its state.

    `kept` says which keys of the model's state dict change and are kept; `lr_scale` gives a parameter's share of the
    learning rate by its name. `check` is asked for figures after each epoch.
    """

    name: str
    model: nn.Module
    loss: Loss
    fetch: Fetch
    pictures: int
    schedule: Schedule
    directory: Path
    fingerprint: str
    seed: int
    kept: Callable[[str], bool] = field(default=lambda key: True)
    lr_scale: Callable[[str], float] = field(default=lambda key: 1.0)
    check: Callable[[], dict[str, float]] = field(default=dict)


def machine(device: Literal["auto", "cpu", "cuda"], precision: Literal["auto", "float32", "bfloat16"]) -> Machine:
    """The device and precision of a recipe.

    Raises: ClientError where cuda is asked for and absent.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ClientError("device: cuda, but torch finds no CUDA device here")
    chosen = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    if precision == "auto":
        native = torch.cuda.is_bf16_supported() if chosen.type == "cuda" else _cpu_has_bfloat16()
        return Machine(chosen, native)
    return Machine(chosen, precision == "bfloat16")


def derive(*parts: object) -> int:
    """A 63-bit seed from its parts, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def fingerprint(*parts: Any) -> str:
    """A digest of JSON-able settings; a stage on disk counts only where it is unchanged."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def fit(stage: Stage, machine: Machine, watch: Watch) -> tuple[Cost, dict[str, float]]:
    """Train stage.model in place to the end of its schedule, from the last epoch on disk where there is one.

    Returns what it cost and the last figures of `check`.
    Raises: TrainingDiverged; the last good epoch stays on disk.
    """
    schedule = stage.schedule
    optimizer = make_optimizer(stage.model, schedule, stage.lr_scale)
    base = [group["lr"] for group in optimizer.param_groups]
    count = min(schedule.pictures or stage.pictures, stage.pictures)
    steps = max(1, count // schedule.batch)
    cost, figures, first = _resume(stage, optimizer)
    cost.parameters = sum(p.numel() for p in stage.model.parameters() if p.requires_grad)
    with watch.stage(stage.name, schedule.epochs, steps, first) as show:
        for epoch in range(first, schedule.epochs):
            cpu, wall = time.process_time(), time.monotonic()
            stage.model.train()
            order = torch.randperm(stage.pictures, generator=_generator(stage.seed, stage.name, epoch)).numpy()
            total = 0.0
            batches = [order[i * schedule.batch : (i + 1) * schedule.batch] for i in range(steps)]
            batches[-1] = batches[-1][: max(count - (steps - 1) * schedule.batch, 1)]
            for step, (indices, pictures) in enumerate(_ahead(stage, epoch, batches)):
                at = (epoch * steps + step) / (schedule.epochs * steps)
                for group, lr in zip(optimizer.param_groups, base, strict=True):
                    group["lr"] = lr * rate(at, schedule.warmup)
                seed = derive(stage.seed, stage.name, epoch, step)
                torch.manual_seed(seed)
                generator = torch.Generator().manual_seed(seed)
                loss, parts = stage.loss(machine.channels_last(pictures), indices, generator)
                value = loss.item()
                if not math.isfinite(value):
                    raise TrainingDiverged(
                        f"{stage.name}: the loss is {value} in epoch {epoch + 1}, step {step + 1}; lower "
                        f"{stage.name}.schedule.lr ({schedule.lr}); {_kept(stage, epoch)}"
                    )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                total += value
                show.step(value, parts)
            stage.model.eval()
            figures = {"loss": total / steps, **stage.check()}
            cost.cpu_seconds += time.process_time() - cpu
            cost.wall_seconds += time.monotonic() - wall
            cost.pictures += sum(len(batch) for batch in batches)
            cost.epochs = epoch + 1
            _save(stage, optimizer, epoch, cost, figures)
            show.epoch(epoch, figures)
    stage.model.eval()
    return cost, figures


def make_optimizer(
    model: nn.Module, schedule: Schedule, lr_scale: Callable[[str], float]
) -> torch.optim.AdamW | torch.optim.SGD:
    """An optimizer over the parameters that ask for a gradient, grouped by learning rate and by decay."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = schedule.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((schedule.lr * lr_scale(name), decay), []).append(parameter)
    rows = [{"params": each, "lr": lr, "weight_decay": decay} for (lr, decay), each in groups.items()]
    if schedule.optimizer == "sgd":
        return torch.optim.SGD(rows, lr=schedule.lr, momentum=schedule.momentum, nesterov=schedule.momentum > 0)
    return torch.optim.AdamW(rows, lr=schedule.lr)


def rate(at: float, warmup: float) -> float:
    """Share of the learning rate at the share `at` of all steps: linear warm-up, then half a cosine to 0."""
    if at < warmup:
        return (at + 1e-3) / (warmup + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (at - warmup) / (1 - warmup)))


def accuracy(predict: Callable[[Tensor], Tensor], batches: Iterator[tuple[Tensor, NDArray[np.int64]]]) -> float:
    """Share of pictures whose highest logit is the label's; batches of (pictures, labels [B])."""
    right = total = 0
    with torch.no_grad():
        for pictures, labels in batches:
            answer = predict(pictures).argmax(-1).cpu().numpy()
            right += int((answer == labels).sum())
            total += len(labels)
    return right / max(total, 1)


def _ahead(
    stage: Stage, epoch: int, batches: Sequence[NDArray[np.int64]]
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    # The next batch is decoded while this one is learned from; its generator is its own, so order does not matter.
    def fetch(step: int) -> Tensor:
        return stage.fetch(batches[step], _generator(stage.seed, stage.name, epoch, step, "fetch"))

    with ThreadPoolExecutor(1, thread_name_prefix="fetch") as pool:
        coming = pool.submit(fetch, 0)
        for step, indices in enumerate(batches):
            pictures = coming.result()
            if step + 1 < len(batches):
                coming = pool.submit(fetch, step + 1)
            yield indices, pictures


def _save(stage: Stage, optimizer: torch.optim.Optimizer, epoch: int, cost: Cost, figures: Mapping[str, float]) -> None:
    tensors = {f"model.{key}": value for key, value in stage.model.state_dict().items() if stage.kept(key)}
    for index, entry in optimizer.state_dict()["state"].items():
        for key, value in entry.items():
            tensors[f"optimizer.{index}.{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    tensors["rng"] = torch.get_rng_state()
    scratch = stage.directory / ".epoch.part"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    save_tensors(scratch / TENSORS, tensors)
    state = {"epoch": epoch, "fingerprint": stage.fingerprint, "cost": cost.model_dump(), "figures": dict(figures)}
    write_json(scratch / STATE, state)
    target = stage.directory / f"epoch-{epoch + 1:04d}"
    replace_directory(scratch, target)
    for older in stage.directory.glob("epoch-*"):
        if older != target:
            shutil.rmtree(older, ignore_errors=True)


def _resume(stage: Stage, optimizer: torch.optim.Optimizer) -> tuple[Cost, dict[str, float], int]:
    for directory in sorted(stage.directory.glob("epoch-*"), reverse=True):
        try:
            state = json.loads((directory / STATE).read_text(encoding="utf-8"))
            tensors = load_file(directory / TENSORS)
        except (OSError, ValueError, SafetensorError):
            continue  # cut short by a power failure; the epoch is trained again
        if state["fingerprint"] != stage.fingerprint:
            continue
        own = stage.model.state_dict()
        own.update({key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")})
        stage.model.load_state_dict(own)
        entries: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".")
                entries.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})
        torch.set_rng_state(tensors["rng"])
        cost = Cost.model_validate(state["cost"])
        if state["epoch"] + 1 < stage.schedule.epochs:
            cost.resumed += 1
        return cost, state["figures"], state["epoch"] + 1
    return Cost(), {}, 0


def _kept(stage: Stage, epoch: int) -> str:
    return f"epoch {epoch} is kept in {stage.directory}" if epoch else "no epoch was finished"


def _generator(*parts: object) -> torch.Generator:
    return torch.Generator().manual_seed(derive(*parts))


def _cpu_has_bfloat16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags
