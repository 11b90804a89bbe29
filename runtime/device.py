"""A CUDA card: which one it is, and its buffers, streams and graphs, by cuda-bindings with every call checked.

Written against the interface of cuda-bindings 12.6 to 13; a card has never run it.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .errors import EngineError, EngineMismatch


class Card(NamedTuple):
    """What an engine is compiled for."""

    name: str
    compute_capability: str
    """As "9.0"."""
    driver: str
    """Newest CUDA version that the driver runs, as "13.0"."""


def card() -> Card:
    """The card that CUDA counts first.

    Raises: EngineMismatch without cuda-bindings, a driver or a card.
    """
    cuda = runtime_api()
    try:
        if not done(cuda.cudaGetDeviceCount(), "count the cards"):
            raise EngineMismatch("no-card", "no CUDA card is visible to this process")
        properties = done(cuda.cudaGetDeviceProperties(0), "ask the card for its properties")
        driver = done(cuda.cudaDriverGetVersion(), "ask for the driver's version")
    except EngineMismatch:
        raise
    except EngineError as error:
        raise EngineMismatch("no-card", str(error)) from None
    name = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
    return Card(name, f"{properties.major}.{properties.minor}", f"{driver // 1000}.{driver % 1000 // 10}")


def runtime_api() -> Any:
    """The module cuda.bindings.runtime.

    Raises: EngineMismatch where it is not installed.
    """
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        reason = "run: pip install 'trivium[tensorrt]'"
        raise EngineMismatch("no-cuda", f"cuda-bindings cannot be imported ({error}); {reason}") from None
    return runtime


def done(answer: tuple[Any, ...], what: str) -> Any:
    """The result of a CUDA call, which answers (status, results...); None where it has none.

    Raises: EngineError where the status is not success.
    """
    status, *results = answer
    if int(status) != 0:
        raise EngineError(f"CUDA could not {what}: {getattr(status, 'name', status)}")
    return results[0] if results else None


class Buffer:
    """Memory on the card and as much of the host's, page-locked; both live as long as this."""

    def __init__(self, shape: tuple[int, ...], dtype: type[np.generic]) -> None:
        cuda = runtime_api()
        self.row_bytes = int(np.prod(shape[1:], dtype=np.int64)) * np.dtype(dtype).itemsize
        nbytes = shape[0] * self.row_bytes
        self.device = int(done(cuda.cudaMalloc(nbytes), f"allocate {nbytes} bytes on the card"))
        weakref.finalize(self, cuda.cudaFree, self.device)
        self._host = int(done(cuda.cudaHostAlloc(nbytes, cuda.cudaHostAllocDefault), f"lock {nbytes} bytes"))
        weakref.finalize(self, cuda.cudaFreeHost, self._host)
        raw = (ctypes.c_uint8 * nbytes).from_address(self._host)
        self.host: NDArray[Any] = np.ndarray(shape, dtype, buffer=memoryview(raw))
        self.host[:] = 0

    def send(self, rows: int, stream: Stream) -> None:
        """Enqueue the copy of the first rows to the card."""
        cuda = runtime_api()
        kind = cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        size = rows * self.row_bytes
        done(cuda.cudaMemcpyAsync(self.device, self._host, size, kind, stream.handle), "copy to the card")

    def fetch(self, rows: int, stream: Stream) -> None:
        """Enqueue the copy of the first rows from the card."""
        cuda = runtime_api()
        kind = cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        size = rows * self.row_bytes
        done(cuda.cudaMemcpyAsync(self._host, self.device, size, kind, stream.handle), "copy from the card")


class Scratch:
    """Memory on the card alone."""

    def __init__(self, nbytes: int) -> None:
        cuda = runtime_api()
        self.nbytes = nbytes
        self.device = int(done(cuda.cudaMalloc(nbytes), f"allocate {nbytes} bytes on the card")) if nbytes else 0
        weakref.finalize(self, cuda.cudaFree, self.device)


class Stream:
    """An order of work on the card."""

    def __init__(self) -> None:
        cuda = runtime_api()
        self.handle = int(done(cuda.cudaStreamCreateWithFlags(cuda.cudaStreamNonBlocking), "create a stream"))
        weakref.finalize(self, cuda.cudaStreamDestroy, self.handle)

    def wait(self) -> None:
        """Until everything enqueued is done.

        Raises: EngineError where any of it failed.
        """
        done(runtime_api().cudaStreamSynchronize(self.handle), "finish the work")

    @contextmanager
    def capture(self) -> Iterator[list[Graph]]:
        """Record what the block enqueues instead of running it; the list holds the graph afterwards."""
        cuda = runtime_api()
        mode = cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        done(cuda.cudaStreamBeginCapture(self.handle, mode), "begin a capture")
        captured: list[Graph] = []
        try:
            yield captured
        except BaseException:
            # a stream stays unusable until its capture has ended, whatever comes of that
            _, unfinished = cuda.cudaStreamEndCapture(self.handle)
            if unfinished:
                cuda.cudaGraphDestroy(unfinished)
            raise
        graph = done(cuda.cudaStreamEndCapture(self.handle), "end a capture")
        captured.append(Graph(graph))


class Graph:
    """Work recorded once, to be launched as one."""

    def __init__(self, captured: Any) -> None:
        cuda = runtime_api()
        try:
            self._executable = done(cuda.cudaGraphInstantiate(captured, 0), "instantiate a graph")
        finally:
            cuda.cudaGraphDestroy(captured)
        weakref.finalize(self, cuda.cudaGraphExecDestroy, self._executable)

    def launch(self, stream: Stream) -> None:
        """Enqueue all of it."""
        done(runtime_api().cudaGraphLaunch(self._executable, stream.handle), "launch a graph")
