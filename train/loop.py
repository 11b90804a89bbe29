"""One training loop for every stage: schedules, autocast, a checkpoint each epoch, and exact resume after a kill.

Every random draw of a step comes from (seed, stage, epoch, step, slice) alone and every epoch ends with all state on
disk, so a run that was killed and resumed ends with the same bits as one that was not (on a CPU, with as many threads).
A batch is cut into schedule.accumulate slices, which are all that a loss sees at a time. Their draws, dropout and batch
statistics are their own, so it makes no difference (but for rounding) how many processes share them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from trivium.runtime.errors import ClientError, ConfigError

from .checkpoint import Cost, replace_directory, save_tensors, write_json
from .distributed import (
    Parallel,
    Spread,
    Statistics,
    agreed,
    barrier,
    chosen,
    first,
    processes,
    rank,
    share,
    spread,
    summed,
    whole,
)
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
    precision: Literal["float32", "bfloat16", "float16"]
    parallel: Parallel = "auto"
    compile: bool = False

    def autocast(self) -> AbstractContextManager[Any]:
        """Autocast to 16 bits, or nothing."""
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.precision))

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

    `loss` is a mean over the pictures it is given; it and `check` reach the model's parts through `model` in every call
    (see distributed.spread). `kept` says which keys of the model's state dict change and are kept; `lr_scale` gives a
    parameter's share of the learning rate by its name. `check` is asked for figures after each epoch.
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


def machine(
    device: Literal["auto", "cpu", "cuda"],
    precision: Literal["auto", "float32", "bfloat16", "float16"],
    parallel: Parallel = "auto",
    compile: bool = False,
) -> Machine:
    """The device and precision of a recipe; of several processes on a machine each takes a card of its own.

    Raises: ClientError where cuda is asked for and absent; ConfigError where two settings exclude each other.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ClientError("device: cuda, but torch finds no CUDA device here")
    if precision == "float16" and parallel == "fsdp":
        raise ConfigError("precision: float16 does not go with parallel: fsdp; take bfloat16")
    place = torch.device("cpu")
    if device != "cpu" and torch.cuda.is_available():
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) if processes() > 1 else 0)
        if place.index >= torch.cuda.device_count():
            raise ClientError(f"{torch.cuda.device_count()} CUDA devices for {place.index + 1} processes or more")
        torch.cuda.set_device(place)
    if precision == "auto":
        native = torch.cuda.is_bf16_supported() if place.type == "cuda" else _cpu_has_bfloat16()
        precision = "bfloat16" if native else "float32"
    if precision == "float16":
        parallel = "ddp"  # the loss's scale would differ between shares
    return Machine(place, precision, parallel, compile)


def derive(*parts: object) -> int:
    """A 63-bit seed from its parts, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def fingerprint(*parts: Any) -> str:
    """A digest of JSON-able settings; a stage on disk counts only where it is unchanged."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def fit(stage: Stage, machine: Machine, watch: Watch) -> tuple[Cost, dict[str, float]]:
    """Train stage.model in place to the end of its schedule, from the last epoch on disk where there is one.

    Returns what it cost, all processes together, and the last figures of `check`.
    Raises: TrainingDiverged; the last good epoch stays on disk. ConfigError where a batch is too small for its slices.
    """
    schedule, model = stage.schedule, stage.model
    count = min(schedule.pictures or stage.pictures, stage.pictures)
    steps = max(1, count // schedule.batch)
    slices = _slices(stage, min(count, schedule.batch), watch)
    saved = _Saved(stage)
    cost, figures, begin = saved.cost, saved.figures, saved.epochs
    cost.parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    how = chosen(machine.parallel, model, machine.device)
    with spread(model, stage.loss, how, machine.device) as run, _compiled(model, machine, watch):
        optimizer = make_optimizer(model, schedule, stage.lr_scale)
        base = [group["lr"] for group in optimizer.param_groups]
        scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.precision == "float16")
        average = Average(model, schedule.ema, stage.kept)
        saved.restore(optimizer, scaler, average)
        tuned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        statistics = Statistics([b for key, b in model.named_buffers() if stage.kept(key)], slices)
        with watch.stage(stage.name, schedule.epochs, steps, begin) as show:
            for epoch in range(begin, schedule.epochs):
                cpu, wall = time.process_time(), time.monotonic()
                model.train()
                order = torch.randperm(stage.pictures, generator=_generator(stage.seed, stage.name, epoch)).numpy()
                batches = [order[i * schedule.batch : (i + 1) * schedule.batch] for i in range(steps)]
                batches[-1] = batches[-1][: max(count - (steps - 1) * schedule.batch, 1)]
                total = 0.0
                mine = [_own(batch, slices) for batch in batches]
                ahead = _ahead(stage, epoch, mine)
                for step in range(steps):
                    at = (epoch * steps + step) / (schedule.epochs * steps)
                    for group, lr in zip(optimizer.param_groups, base, strict=True):
                        group["lr"] = lr * rate(at, schedule.warmup, schedule.decay)
                    value, parts = _gradient(stage, machine, run, scaler, statistics, mine[step], ahead, (epoch, step))
                    if not math.isfinite(value):
                        raise TrainingDiverged(
                            f"{stage.name}: the loss is {value} in epoch {epoch + 1}, step {step + 1}; lower "
                            f"{stage.name}.schedule.lr ({schedule.lr}); {_kept(stage, epoch)}"
                        )
                    if schedule.clip_grad is not None:
                        scaler.unscale_(optimizer)
                        nn.utils.clip_grad_norm_(tuned, schedule.clip_grad)
                    scaler.step(optimizer)
                    scaler.update()
                    optimizer.zero_grad(set_to_none=True)
                    average.update(epoch * steps + step)
                    total += value
                    show.step(value, parts)
                model.eval()
                with average.shown(), run.whole():
                    figures = {"loss": total / steps, **stage.check()}
                used, pictures_seen = time.process_time() - cpu, sum(len(batch) for batch in batches)
                cost.cpu_seconds += summed([used])[0]
                elapsed = time.monotonic() - wall
                cost.wall_seconds += elapsed
                cost.gpu_seconds += elapsed * processes() if machine.device.type == "cuda" else 0.0
                cost.pictures += pictures_seen
                cost.epochs = epoch + 1
                _save(stage, optimizer, scaler, average, epoch, cost, figures)
                show.epoch(epoch, figures)
        average.take_over()
    model.eval()
    return cost, figures


class Average:
    """The exponential moving average of a model's weights and statistics, where a decay is given: what is evaluated and
    what a stage ends with. The decay rises with the steps t, as min(decay, (1 + t) / (10 + t)), so that the weights at
    the start are forgotten (as TensorFlow's ExponentialMovingAverage)."""

    def __init__(self, model: nn.Module, decay: float | None, kept: Callable[[str], bool]) -> None:
        self._model, self._decay = model, decay
        self.values: dict[str, Tensor] = {}
        if decay is not None:
            own = {key: value for key, value in model.state_dict().items() if kept(key) and value.is_floating_point()}
            self.values = {key: value.detach().clone() for key, value in own.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After the step of this number."""
        if self._decay is not None:
            weight = 1 - min(self._decay, (1 + step) / (10 + step))
            for value, live in self._pairs():
                value.lerp_(live, weight)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The model has the average's weights."""
        live = [(each, each.detach().clone()) for _, each in self._pairs()]
        self.take_over()
        yield
        with torch.no_grad():
            for each, before in live:
                each.copy_(before)

    @torch.no_grad()
    def take_over(self) -> None:
        """Give the model the average's weights for good."""
        for value, live in self._pairs():
            live.copy_(value)

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        live = self._model.state_dict() if self.values else {}
        return [(value, live[key]) for key, value in self.values.items()]


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


def rate(at: float, warmup: float, decay: Literal["cosine"] | Sequence[float] = "cosine") -> float:
    """Share of the learning rate at the share `at` of all steps: linear warm-up, then half a cosine to 0, or a tenth
    after each share in `decay`."""
    if at < warmup:
        return (at + 1e-3) / (warmup + 1e-3)
    if decay != "cosine":
        return math.prod(0.1 for share in decay if at >= share)
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


def _slices(stage: Stage, batch: int, watch: Watch) -> int:
    """Into how many slices each batch of so many pictures is cut: as many as asked for, or more, so that every process
    has as many as the others."""
    wanted = stage.schedule.accumulate
    slices = -(-wanted // processes()) * processes()
    if slices > 1 and batch < 2 * slices:
        raise ConfigError(f"{stage.name}.schedule: a batch of {batch} cannot be cut into {slices} slices of 2 or more")
    if slices != wanted:
        watch.say(
            f"{stage.name}: {processes()} processes cut each batch into {slices} slices (as accumulate: {slices})"
        )
    return slices


@dataclass(frozen=True)
class _Slice:
    """A part of a batch that is learned from at once: its number, its pictures, its share of the batch's."""

    number: int
    indices: NDArray[np.int64]
    share: float

    def key(self, *parts: object) -> tuple[object, ...]:
        """What its random draws come from; the only slice of a batch draws as the batch would."""
        return (*parts, self.number) if self.number else parts


def _own(batch: NDArray[np.int64], slices: int) -> list[_Slice]:
    """The slices of a batch that are this process's."""
    parts = np.array_split(batch, slices)
    numbers = range(rank() * slices // processes(), (rank() + 1) * slices // processes())
    return [_Slice(number, parts[number], len(parts[number]) / len(batch)) for number in numbers]


def _gradient(
    stage: Stage,
    machine: Machine,
    run: Spread,
    scaler: torch.amp.GradScaler,
    statistics: Statistics,
    slices: Sequence[_Slice],
    ahead: Iterator[Tensor],
    at: tuple[int, int],
) -> tuple[float, dict[str, float]]:
    """Leave the gradient of a batch, from the slices of all processes, in the parameters; its loss and figures.

    slices: this process's, whose pictures come next in `ahead`. at: epoch and step.
    """
    value, parts = 0.0, dict[str, float]()
    statistics.begin()
    for each in slices:
        pictures = next(ahead)
        seed = derive(*each.key(stage.seed, stage.name, *at))
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        statistics.rewind()
        with run.slice(last=each is slices[-1]):
            loss, shown = run(machine.channels_last(pictures), each.indices, generator)
            # Gradients are averaged over the processes, each of which has only its part of the batch.
            scaler.scale(loss * (each.share * processes())).backward()
        statistics.add(each.share)
        value += loss.item() * each.share
        for key, figure in shown.items():
            parts[key] = parts.get(key, 0.0) + figure * each.share
    statistics.end()
    value, *rest = summed([value, *parts.values()])
    return value, dict(zip(parts, rest, strict=True))


def _ahead(stage: Stage, epoch: int, batches: Sequence[Sequence[_Slice]]) -> Iterator[Tensor]:
    # The next slice is decoded while this one is learned from; its generator is its own, so order does not matter.
    def fetch(step: int, each: _Slice) -> Tensor:
        return stage.fetch(each.indices, _generator(*each.key(stage.seed, stage.name, epoch, step, "fetch")))

    order = [(step, each) for step, slices in enumerate(batches) for each in slices]
    with ThreadPoolExecutor(1, thread_name_prefix="fetch") as pool:
        coming = pool.submit(fetch, *order[0])
        for after in [*order[1:], None]:
            pictures = coming.result()
            if after:
                coming = pool.submit(fetch, *after)
            yield pictures


@contextmanager
def _compiled(model: nn.Module, machine: Machine, watch: Watch) -> Iterator[None]:
    """The model compiled by torch.compile, where the recipe asks for it and the machine can."""
    if not machine.compile:
        yield
        return
    if reason := _no_compiler(machine.device):
        watch.say(f"compile: not possible here, going on without ({reason})")
        yield
        return
    model.compile()
    yield
    for module in model.modules():
        module._compiled_call_impl = None


@lru_cache
def _no_compiler(device: torch.device) -> str | None:
    """Why torch.compile does not work here; None where it does."""
    try:
        torch.compile(torch.sin)(torch.zeros(8, device=device))
    except Exception as error:  # whatever a C++ compiler or Triton raises
        return " ".join(str(error).split())[:200] or type(error).__name__
    return None


def _save(
    stage: Stage,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    average: Average,
    epoch: int,
    cost: Cost,
    figures: Mapping[str, float],
) -> None:
    tensors = {f"model.{key}": whole(value) for key, value in stage.model.state_dict().items() if stage.kept(key)}
    tensors |= {f"ema.{key}": whole(value) for key, value in average.values.items()}
    for index, entry in optimizer.state_dict()["state"].items():
        for key, value in entry.items():
            tensors[f"optimizer.{index}.{key}"] = whole(value) if isinstance(value, Tensor) else torch.tensor(value)
    tensors["rng"] = torch.get_rng_state()
    if first():
        scratch = stage.directory / ".epoch.part"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        save_tensors(scratch / TENSORS, tensors)
        state = {"epoch": epoch, "fingerprint": stage.fingerprint, "cost": cost.model_dump(), "figures": dict(figures)}
        write_json(scratch / STATE, state | {"scaler": scaler.state_dict()})
        target = stage.directory / f"epoch-{epoch + 1:04d}"
        replace_directory(scratch, target)
        for older in stage.directory.glob("epoch-*"):
            if older != target:
                shutil.rmtree(older, ignore_errors=True)
    barrier()


class _Saved:
    """The last epoch on disk, its weights given to the stage's model; none where there is none of this stage."""

    def __init__(self, stage: Stage) -> None:
        self.cost, self.figures, self.epochs = Cost(), dict[str, float](), 0
        self._tensors: dict[str, Tensor] = {}
        self._scaler: dict[str, Any] = {}
        for directory in sorted(stage.directory.glob("epoch-*"), reverse=True):
            try:
                state = json.loads((directory / STATE).read_text(encoding="utf-8"))
                tensors = load_file(directory / TENSORS)
            except (OSError, ValueError, SafetensorError):
                continue  # cut short by a power failure; the epoch is trained again
            if state["fingerprint"] != stage.fingerprint:
                continue
            self._tensors, self._scaler = tensors, state["scaler"]
            self.cost, self.figures = Cost.model_validate(state["cost"]), state["figures"]
            self.epochs = state["epoch"] + 1
            stage.model.load_state_dict({**stage.model.state_dict(), **self._part("model.")})
            if self.epochs < stage.schedule.epochs:
                self.cost.resumed += 1
            break
        agreed(self.epochs)

    def restore(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, average: Average) -> None:
        """Give the rest of it to what trains the model."""
        if not self._tensors:
            return
        tuned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        entries: dict[int, dict[str, Tensor]] = {}
        for key, value in self._part("optimizer.").items():
            index, name = key.split(".")
            entries.setdefault(int(index), {})[name] = share(value, tuned[int(index)])
        optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})
        for key, value in self._part("ema.").items():
            average.values[key].copy_(share(value, average.values[key]))
        if self._scaler:
            scaler.load_state_dict(self._scaler)
        torch.set_rng_state(self._tensors["rng"])

    def _part(self, prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in self._tensors.items() if key.startswith(prefix)}


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
