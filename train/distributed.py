"""Several processes that train one model: who they are, what they agree on, and how the model is spread over them."""

from __future__ import annotations

import copy
import os
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from trivium.runtime.errors import ConfigError, ServerError, TriviumError

Parallel = Literal["auto", "ddp", "fsdp"]
TIMEOUT = timedelta(minutes=30)
"""For a process that hangs; one that ended is noticed at once."""
GRACE_S = 30.0
"""What one process finds wrong, all find; the others give the first this long to say it for all of them."""
SAID = "trivium/said"
"""Key of the store under which the first process leaves what it said."""
BYTES = 16
"""Of a parameter in training: weight, gradient, two moments, float32."""


class ProcessLost(ServerError):
    """Another process of the run ended or could not be reached."""


@contextmanager
def joined(timeout: timedelta = TIMEOUT) -> Iterator[None]:
    """Be one of the processes that torchrun started; without torchrun, the only one.

    An error that all of them meet is raised in the first alone: torchrun ends the others.
    Raises: ProcessLost where another one ended.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    store, number, count = next(dist.rendezvous("env://", timeout=timeout))
    try:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=timeout)
        signal.signal(signal.SIGTERM, _stopped)
        yield
    except TriviumError as error:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        lost = isinstance(error, ProcessLost)
        if number == 0:
            if not lost:
                store.set(SAID, str(error))
            raise
        if _said(store, 0.1 if lost else GRACE_S):
            raise SystemExit(error.exit_code) from None
        if lost:
            raise
        raise type(error)(f"process {number}: {error}") from None
    except RuntimeError as error:  # what torch, gloo and NCCL raise has no type of its own
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "closed by peer")):
            if number > 0 and _said(store, 0.1):
                raise SystemExit(ProcessLost.exit_code) from None
            raise ProcessLost(_lost("cannot be reached any more")) from None
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def first() -> bool:
    """Whether this is the one that writes files and speaks."""
    return rank() == 0


def barrier() -> None:
    """Wait until every process is here."""
    if processes() > 1:
        summed([0.0])


def once(work: Callable[[], object]) -> None:
    """Let the first process do it while the others wait."""
    if first():
        work()
    barrier()


def summed(values: Sequence[float]) -> list[float]:
    """Numbers, each added up over the processes."""
    if processes() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return [float(value) for value in total.tolist()]


def agreed(value: int) -> int:
    """What every process found on disk, after every process has looked.

    Raises: ConfigError where they found different things.
    """
    if summed([value, value * value]) != [processes() * value, processes() * value * value]:
        raise ConfigError("the processes do not see the same files: --out must lie where all of them read and write it")
    return value


def chosen(parallel: Parallel, model: nn.Module, device: torch.device) -> Literal["none", "ddp", "fsdp"]:
    """How a model is spread: auto takes fsdp where training it would fill half of a card's memory, else ddp."""
    if processes() == 1:
        return "none"
    if parallel != "auto":
        return parallel
    if device.type != "cuda":
        return "ddp"
    needed = BYTES * sum(parameter.numel() for parameter in model.parameters())
    return "fsdp" if needed > torch.cuda.get_device_properties(device).total_memory / 2 else "ddp"


class Step(nn.Module):
    """A loss as a module around the model that it trains, for wrappers to hook into: the loss calls parts of the model,
    not the model."""

    def __init__(self, model: nn.Module, loss: Any) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self, *arguments: Any) -> Any:
        return self._loss(*arguments)


class Spread:
    """A step of training on one process or, as made by `spread`, on several."""

    def __init__(self, step: Step, wrapped: nn.Module) -> None:
        self._step, self._wrapped = step, wrapped

    def __call__(self, *arguments: Any) -> Any:
        """What the loss returns."""
        return self._wrapped(*arguments)

    @contextmanager
    def slice(self, last: bool) -> Iterator[None]:
        """Forward and backward of one slice; gradients are added up over the processes after the last."""
        if isinstance(self._wrapped, DistributedDataParallel):
            with nullcontext() if last else self._wrapped.no_sync():
                yield
        elif isinstance(self._wrapped, FSDPModule):
            self._wrapped.set_requires_gradient_sync(last)
            yield
            self._wrapped.reshard()
        else:
            yield

    @contextmanager
    def whole(self) -> Iterator[None]:
        """The model with all its weights in every process, to be called as it is."""
        sharded = [module for module in self._step.modules() if isinstance(module, FSDPModule)]
        for module in sharded:
            module.unshard()
        yield
        for module in sharded:
            module.reshard()


@contextmanager
def spread(model: nn.Module, loss: Any, how: Literal["none", "ddp", "fsdp"], device: torch.device) -> Iterator[Spread]:
    """Spread a model over the processes; at the end it is whole again in each, the same modules as before.

    ddp: each holds all of it, gradients are averaged (DistributedDataParallel). fsdp: each holds a share of every
    weight, gradient and optimizer state, gathered block by block (FSDP2, fully_shard); the loss must then reach the
    parts of the model through the model in every call, for they are others meanwhile.
    """
    if how == "fsdp":
        plain = dict(model.__dict__)
        model.__dict__.update(copy.deepcopy(model).__dict__)
        try:
            model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # all that FSDP2 takes
            step = Step(model, loss)
            mesh = init_device_mesh(device.type, (processes(),))
            for unit in [*_units(model), step]:
                fully_shard(unit, mesh=mesh)
            # An attack inside the loss goes backward too, and the model's own weights are needed after it.
            step.set_reshard_after_backward(False, recurse=False)  # type: ignore[operator]
            yield Spread(step, step)
            state = {key: whole(value) for key, value in model.state_dict().items()}
        finally:
            model.__dict__.clear()
            model.__dict__.update(plain)
        model.load_state_dict(state)
        return
    step = Step(model, loss)
    if how == "none":
        yield Spread(step, step)
        return
    with warnings.catch_warnings():
        # The newer name of broadcast_buffers is not in all releases of torch that will do.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", "Grad strides do not match")  # of 1 x 1 convolutions, channels last
        # Buffers are the loop's matter (Statistics); a network may hold parameters that its loss does not reach.
        yield Spread(step, DistributedDataParallel(step, broadcast_buffers=False, find_unused_parameters=True))


def whole(value: Tensor) -> Tensor:
    """A tensor of a spread model with what the other processes hold; every process must ask."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def share(value: Tensor, like: Tensor) -> Tensor:
    """Of a whole tensor what this process holds of a tensor of the same shape."""
    if isinstance(like, DTensor) and value.shape == like.shape:
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value


class Statistics:
    """Buffers that a step moves, which are batch norm's running statistics, kept the same however a batch is cut: each
    slice starts from those before the step, and what the slices make of them is averaged by their pictures."""

    def __init__(self, buffers: Sequence[Tensor], slices: int) -> None:
        self._buffers = list(buffers) if slices > 1 else []
        self._moving = [buffer for buffer in self._buffers if buffer.is_floating_point()]

    def begin(self) -> None:
        """Before a step."""
        self._before = [buffer.clone() for buffer in self._buffers]
        self._moves = [torch.zeros_like(buffer) for buffer in self._moving]

    def rewind(self) -> None:
        """Before a slice."""
        for buffer, before in zip(self._buffers, self._before, strict=True):
            buffer.copy_(before)

    def add(self, share: float) -> None:
        """After a slice with this share of the batch's pictures."""
        before = [each for each in self._before if each.is_floating_point()]
        for move, buffer, start in zip(self._moves, self._moving, before, strict=True):
            move.add_(buffer - start, alpha=share)

    def end(self) -> None:
        """After the step."""
        if not self._moving:
            return
        moves = torch.cat([move.flatten() for move in self._moves])
        if processes() > 1:
            dist.all_reduce(moves)
        before = [each for each in self._before if each.is_floating_point()]
        pieces = moves.split([buffer.numel() for buffer in self._moving])
        for buffer, start, move in zip(self._moving, before, pieces, strict=True):
            buffer.copy_(start + move.view_as(start))


def _units(model: nn.Module) -> list[nn.Module]:
    """What FSDP gathers at a time: outermost elements of the model's lists (blocks, stages, branches) that share no
    parameter with the rest."""
    found: list[nn.Module] = []

    def walk(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(module, (nn.Sequential, nn.ModuleList)) and not isinstance(child, nn.ModuleList):
                found.append(child)
            else:
                walk(child)

    def uses(module: nn.Module) -> dict[int, int]:
        counts: dict[int, int] = {}
        for _, parameter in module.named_parameters(remove_duplicate=False):
            counts[id(parameter)] = counts.get(id(parameter), 0) + 1
        return counts

    walk(model)
    everywhere = uses(model)
    inside = [(unit, uses(unit)) for unit in found]
    return [unit for unit, own in inside if own and all(everywhere[each] == count for each, count in own.items())]


def _said(store: dist.Store, seconds: float) -> bool:
    """Whether the first process has said what is wrong, or does so in this time."""
    try:
        store.wait([SAID], timedelta(seconds=seconds))
    except RuntimeError:  # the time is up, or the store went with the first process
        return False
    return True


def _stopped(signum: int, frame: Any) -> NoReturn:
    raise ProcessLost(_lost("ended, or the run was told to stop"))


def _lost(what: str) -> str:
    return (
        f"process {rank()}: another process of this run {what}; what was finished is on disk, and the same command "
        "goes on from it"
    )
