"""A stand-in for cuda.bindings.runtime on host memory: allocations, copies, streams and graphs, each misuse an error.

Only what our code calls. test_interface.py holds names and parameters against the real module.
"""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

Work = Callable[[], None]


class cudaError_t(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorStreamCaptureUnsupported = 900


class cudaMemcpyKind(enum.IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class cudaStreamCaptureMode(enum.IntEnum):
    cudaStreamCaptureModeThreadLocal = 1


cudaStreamNonBlocking = 1
cudaHostAllocDefault = 0
OK = cudaError_t.cudaSuccess


@dataclass
class Machine:
    """A card's state."""

    name: str = "NVIDIA Fake 100"
    capability: tuple[int, int] = (9, 0)
    cards: int = 1
    memory: int = 1 << 30
    driver: bool = True
    device: dict[int, Any] = field(default_factory=dict)
    host: dict[int, Any] = field(default_factory=dict)
    pending: dict[int, list[Work]] = field(default_factory=dict)
    """By stream; done when the stream is waited for, so that a missing wait is a wrong answer."""
    captures: dict[int, list[Work]] = field(default_factory=dict)
    graphs: dict[int, list[Work]] = field(default_factory=dict)
    launches: int = 0
    handles: int = 1000

    def handle(self) -> int:
        self.handles += 1
        return self.handles

    def enqueue(self, stream: int, work: Work) -> None:
        (self.captures if stream in self.captures else self.pending)[stream].append(work)

    def holds(self, kind: str, address: int, size: int) -> bool:
        """Whether size bytes from address lie in one allocation."""
        allocations: dict[int, Any] = getattr(self, kind)
        return any(start <= address and address + size <= start + len(b) for start, b in allocations.items())

    def module(self) -> ModuleType:
        """It as the module cuda.bindings.runtime."""
        result = ModuleType("cuda.bindings.runtime")
        for name, value in globals().items():
            if name.startswith("cuda"):
                setattr(result, name, value)
        for name in dir(self):
            if name.startswith("cuda"):
                setattr(result, name, getattr(self, name))
        return result

    def cudaGetDeviceCount(self) -> tuple[Any, ...]:
        if not self.driver:
            return cudaError_t.cudaErrorInsufficientDriver, None
        return OK, self.cards

    def cudaGetDeviceProperties(self, device: int) -> tuple[Any, ...]:
        major, minor = self.capability
        return OK, SimpleNamespace(name=self.name.encode(), major=major, minor=minor)

    def cudaDriverGetVersion(self) -> tuple[Any, ...]:
        return OK, 13020

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        if sum(map(len, self.device.values())) + size > self.memory:
            return cudaError_t.cudaErrorMemoryAllocation, None
        return OK, self._allocate(self.device, size)

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[Any, ...]:
        return OK, self._allocate(self.host, size)

    def _allocate(self, where: dict[int, Any], size: int) -> int:
        block = ctypes.create_string_buffer(b"\xcd" * size, size)
        where[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def cudaFree(self, devPtr: int) -> tuple[Any, ...]:
        if devPtr:
            del self.device[devPtr]
        return (OK,)

    def cudaFreeHost(self, ptr: int) -> tuple[Any, ...]:
        del self.host[ptr]
        return (OK,)

    def cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: cudaMemcpyKind, stream: int) -> tuple[Any, ...]:
        ends = ("device", "host") if kind == cudaMemcpyKind.cudaMemcpyHostToDevice else ("host", "device")
        if not (self.holds(ends[0], dst, count) and self.holds(ends[1], src, count)):
            return (cudaError_t.cudaErrorInvalidValue,)

        def copy() -> None:
            ctypes.memmove(dst, src, count)

        self.enqueue(stream, copy)
        return (OK,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        stream = self.handle()
        self.pending[stream] = []
        return OK, stream

    def cudaStreamDestroy(self, stream: int) -> tuple[Any, ...]:
        del self.pending[stream]
        return (OK,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Any, ...]:
        if stream in self.captures:
            return (cudaError_t.cudaErrorStreamCaptureUnsupported,)
        work, self.pending[stream] = self.pending[stream], []
        for step in work:
            step()
        return (OK,)

    def cudaStreamBeginCapture(self, stream: int, mode: cudaStreamCaptureMode) -> tuple[Any, ...]:
        self.captures[stream] = []
        return (OK,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Any, ...]:
        graph = self.handle()
        self.graphs[graph] = self.captures.pop(stream)
        return OK, graph

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[Any, ...]:
        executable = self.handle()
        self.graphs[executable] = self.graphs[graph]
        return OK, executable

    def cudaGraphDestroy(self, graph: int) -> tuple[Any, ...]:
        del self.graphs[graph]
        return (OK,)

    def cudaGraphExecDestroy(self, graphExec: int) -> tuple[Any, ...]:
        del self.graphs[graphExec]
        return (OK,)

    def cudaGraphLaunch(self, graphExec: int, stream: int) -> tuple[Any, ...]:
        self.launches += 1
        self.pending[stream].extend(self.graphs[graphExec])
        return (OK,)
