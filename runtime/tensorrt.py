"""The TensorRT engine: a bundle's compiled plan on a CUDA card, with CUDA graphs and a pool of execution contexts.

Written against TensorRT 10.13 and 11.4 and type-checked against both; no TensorRT library has ever run it.
"""

from __future__ import annotations

import logging
import math
import queue
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trivium.kernels import HeadStatistics

from . import device
from .bundle import Bundle, Plan
from .engine import INPUT, OUTPUTS, Backend
from .errors import EngineError, EngineMismatch

if TYPE_CHECKING:
    import tensorrt as trt

LANES = 2
"""Batches on the card at once: one is copied while another is computed."""
_log = logging.getLogger(__name__)


@cache
def logger() -> trt.ILogger:
    """TensorRT's messages in this process's log; it wants one logger for all its objects."""
    import tensorrt as trt

    levels = {
        trt.ILogger.Severity.INTERNAL_ERROR: logging.ERROR,
        trt.ILogger.Severity.ERROR: logging.ERROR,
        trt.ILogger.Severity.WARNING: logging.WARNING,
        trt.ILogger.Severity.INFO: logging.DEBUG,
        trt.ILogger.Severity.VERBOSE: logging.NOTSET,
    }

    class Log(trt.ILogger):  # type: ignore[misc]  # typed only where stubs are
        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            if levels[severity]:
                _log.log(levels[severity], "TensorRT: %s", msg)

    return Log()


def library_version() -> str:
    """Of the TensorRT library, as "11.4.0.106".

    Raises: EngineMismatch where there is none.
    """
    try:
        import tensorrt as trt

        return str(trt.__version__)
    except (ImportError, AttributeError) as error:
        reason = "run: pip install 'trivium[tensorrt]'"
        raise EngineMismatch("no-tensorrt", f"TensorRT cannot be imported ({error}); {reason}") from None


def fitting_plan(bundle: Bundle) -> Plan:
    """The bundle's plan for this very card and TensorRT.

    Raises: EngineMismatch that says what there is and what is needed.
    """
    plans = bundle.manifest.plans
    if not plans:
        raise EngineMismatch("no-plan", f"{bundle.manifest.name}: the bundle has no TensorRT plan")
    version, card = library_version(), device.card()
    same_card = [p for p in plans if (p.card, p.compute_capability) == (card.name, card.compute_capability)]
    if not same_card:
        built = ", ".join(sorted({f"{p.card} ({p.compute_capability})" for p in plans}))
        raise EngineMismatch(
            "other-card", f"the bundle's plans are for {built}, this card is {card.name} ({card.compute_capability})"
        )
    fitting = [p for p in same_card if p.tensorrt == version]
    if not fitting:
        built = ", ".join(sorted({p.tensorrt for p in same_card}))
        raise EngineMismatch("other-version", f"the bundle's plans are of TensorRT {built}, installed is {version}")
    return fitting[0]


class TensorRTEngine(Backend):
    """A plan of the bundle, ready to run. A batch is filled up to the next power of two, for which a graph is kept.

    A plan holds code for the card, so its maker must be trusted; it runs only where the settings ask for it.

    Args:
        bundle: opened and verified.
        lanes: execution contexts, each with buffers and a stream of its own.

    Raises: EngineMismatch where the bundle has no plan for this machine; EngineError where it has and fails.
    """

    device = "cuda"
    kernels = "tensorrt"

    def __init__(self, bundle: Bundle, *, lanes: int = LANES) -> None:
        self.bundle = bundle
        plan = fitting_plan(bundle)
        self.max_batch = plan.max_batch
        self.kernels_reason = f"{plan.path}: TensorRT {plan.tensorrt}, {plan.precision}, {plan.card}"
        import tensorrt as trt

        self._runtime = trt.Runtime(logger())
        self._engine = self._runtime.deserialize_cuda_engine((bundle.path / plan.path).read_bytes())
        if self._engine is None:
            raise EngineMismatch("unreadable", f"{plan.path}: TensorRT cannot read this plan")
        shapes = _signature(self._engine, bundle, plan)
        self._lanes: queue.LifoQueue[_Lane] = queue.LifoQueue()
        for _ in range(lanes):
            self._lanes.put(_Lane(self._engine, shapes, plan.max_batch))

    def run(self, images: NDArray[np.uint8]) -> HeadStatistics:
        self._check(images)
        chunks = [self._chunk(images[i : i + self.max_batch]) for i in range(0, len(images), self.max_batch)]
        if len(chunks) == 1:
            return chunks[0]
        return HeadStatistics(*(np.concatenate(column) for column in zip(*chunks, strict=True)))

    def run_batch(self, images: NDArray[np.uint8], batch: int = 64) -> HeadStatistics:
        return self.run(images)

    def _chunk(self, images: NDArray[np.uint8]) -> HeadStatistics:
        lane = self._lanes.get()
        try:
            return lane.run(images)
        finally:
            self._lanes.put(lane)


class _Ready(NamedTuple):
    """A context fixed to one batch size."""

    context: trt.IExecutionContext
    graph: device.Graph | None
    """None where TensorRT cannot be captured, and is enqueued each time."""


class _Lane:
    """One batch at a time: buffers for the largest, a stream, and a context for each size met so far.

    A captured graph holds its context's shapes and addresses, so each size has a context of its own; as they take
    turns, they share one scratch memory.
    """

    def __init__(self, engine: trt.ICudaEngine, shapes: dict[str, tuple[int, ...]], max_batch: int) -> None:
        self._engine = engine
        self._max_batch = max_batch
        self._stream = device.Stream()
        self._scratch = device.Scratch(engine.device_memory_size_v2)
        self._input = device.Buffer(shapes[INPUT], np.uint8)
        self._outputs = {name: device.Buffer(shapes[name], np.float32) for name in OUTPUTS}
        self._unread = {name: device.Scratch(n) for name, n in _unread(engine, shapes, max_batch).items()}
        self._ready: dict[int, _Ready] = {}

    def run(self, images: NDArray[np.uint8]) -> HeadStatistics:
        count = len(images)
        size = padded(count, self._max_batch)
        self._input.host[:count] = images
        ready = self._ready.get(size)
        if ready is None:
            ready = self._ready[size] = self._prepare(size)
        if ready.graph is not None:
            ready.graph.launch(self._stream)
        else:
            self._enqueue(ready.context, size)
        self._stream.wait()
        return HeadStatistics(*(self._outputs[name].host[:count].copy() for name in OUTPUTS))

    def _prepare(self, size: int) -> _Ready:
        import tensorrt as trt

        context = self._engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise EngineError("TensorRT could not create an execution context")
        context.set_device_memory(self._scratch.device, self._scratch.nbytes)
        if not context.set_optimization_profile_async(_profile(self._engine, size), self._stream.handle):
            raise EngineError(f"TensorRT did not take the profile for {size} pictures")
        if not context.set_input_shape(INPUT, (size, *self._input.host.shape[1:])):
            raise EngineError(f"TensorRT did not take a batch of {size} pictures")
        memories: dict[str, device.Buffer | device.Scratch] = {INPUT: self._input, **self._outputs, **self._unread}
        for name, memory in memories.items():
            context.set_tensor_address(name, memory.device)
        # The first run does what cannot be captured.
        self._enqueue(context, size)
        self._stream.wait()
        try:
            with self._stream.capture() as captured:
                self._enqueue(context, size)
        except EngineError as error:
            _log.warning("batches of %d run without a CUDA graph: %s", size, str(error))
            return _Ready(context, None)
        return _Ready(context, captured[0])

    def _enqueue(self, context: trt.IExecutionContext, size: int) -> None:
        self._input.send(size, self._stream)
        if not context.execute_async_v3(self._stream.handle):
            raise EngineError("TensorRT could not enqueue the batch; the log says why")
        for buffer in self._outputs.values():
            buffer.fetch(size, self._stream)


def padded(count: int, max_batch: int) -> int:
    """The size that a batch is filled up to: the next power of two, max_batch at most."""
    return min(1 << (count - 1).bit_length(), max_batch)


def sizes_of(shape: trt.Dims) -> tuple[int, ...]:
    """TensorRT's shape as a tuple; -1 where it is free."""
    return tuple(shape[axis] for axis in range(len(shape)))


def _profile(engine: trt.ICudaEngine, size: int) -> int:
    """The profile with the narrowest range that holds a batch size."""
    widths: dict[int, int] = {}
    for index in range(engine.num_optimization_profiles):
        low, _, high = engine.get_tensor_profile_shape(INPUT, index)
        if low[0] <= size <= high[0]:
            widths[index] = high[0] - low[0]
    if not widths:
        raise EngineError(f"the TensorRT plan has no profile for {size} pictures")
    return min(widths, key=lambda index: widths[index])


def _signature(engine: trt.ICudaEngine, bundle: Bundle, plan: Plan) -> dict[str, tuple[int, ...]]:
    """Shapes of input and outputs at the largest batch, by name.

    Raises: EngineError where the plan is not of the manifest's model.
    """
    import tensorrt as trt

    manifest = bundle.manifest
    k, c, n = len(manifest.heads), len(manifest.classes), plan.max_batch
    size = manifest.preprocessing
    expected: dict[str, tuple[int, ...]] = {name: (n, k) for name in OUTPUTS}
    expected |= {INPUT: (n, size.height, size.width, 3), "probabilities": (n, k, c), "divergence": (n, k, k)}
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    if inputs != [INPUT]:
        raise EngineError(f"{plan.path}: its one input must be {INPUT!r}, it has {', '.join(inputs)}")
    for name, shape in expected.items():
        if name not in names:
            raise EngineError(f"{plan.path}: it has no output {name!r}")
        found = sizes_of(engine.get_tensor_shape(name))
        dtype = engine.get_tensor_dtype(name)
        if found[1:] != shape[1:] or dtype != (trt.DataType.UINT8 if name == INPUT else trt.DataType.FLOAT):
            wanted = ["N", *shape[1:]]
            raise EngineError(f"{plan.path}: {name} is {dtype} {list(found)}, the manifest says {wanted}")
    return expected


def _unread(engine: trt.ICudaEngine, known: Iterable[str], max_batch: int) -> dict[str, int]:
    """Bytes of the outputs that a bundle may have beside the five, say those of a folded router."""
    import tensorrt as trt

    names = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)} - set(known)
    sizes = {}
    for name in sorted(names):
        elements = max_batch * math.prod(sizes_of(engine.get_tensor_shape(name))[1:])
        sizes[name] = elements * np.dtype(trt.nptype(engine.get_tensor_dtype(name))).itemsize
    return sizes
