"""The fused CPU kernel: a packed model, its one-call form beside mc_heads_ref, and what the process has computed."""

from __future__ import annotations

import ctypes
import threading
import weakref
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .native import MODES, WEIGHT_TYPES, Counts, last_error, library
from .reference import HeadStatistics, check_shapes

WeightType = Literal["float32", "bfloat16", "auto"]
Mode = Literal["exact", "hybrid"]

_ALIGNMENT = 64
_local = threading.local()


class KernelCounts(NamedTuple):
    """What this process has computed with the CPU kernels, over all models and callers."""

    runs: int
    """Calls, those from ONNX Runtime among them."""
    pictures: int
    poisoned: int
    """Pictures answered with NaN, because of a feature that was NaN or infinite or of logits beyond float32."""
    fallbacks: int
    """Pictures that hybrid mode computed exactly, because too much probability lay in the tail."""
    operators: int
    """Calls that came from ONNX Runtime."""


class MCHeads:
    """Heads packed once, run many times. Threads may share one; each keeps a scratch of its own.

    A picture's answer is the same bit for bit in every batch and with every number of threads.
    """

    def __init__(
        self,
        weights: ArrayLike,
        bias: ArrayLike,
        temperature: ArrayLike,
        masks: ArrayLike,
        keep: float,
        *,
        weight_type: WeightType = "float32",
        mode: Mode = "exact",
    ) -> None:
        """Args as of mc_heads. Raises: ValueError for shapes, masks or settings that do not fit; MemoryError."""
        w, b, tau = (np.ascontiguousarray(a, np.float32) for a in (weights, bias, temperature))
        m = np.ascontiguousarray(masks, np.uint8)
        check_shapes((1, *w.shape[2:]), w.shape, b.shape, tau.shape, m.shape, keep)
        self.heads, self.classes, self.units = w.shape
        self.passes = m.shape[0]
        handle = ctypes.c_void_p()
        _check(
            library().mcheads_create(
                ctypes.byref(handle),
                *w.shape,
                self.passes,
                keep,
                WEIGHT_TYPES[weight_type],
                MODES[mode],
                *(a.ctypes.data for a in (w, b, tau, m)),
            )
        )
        self._handle = handle
        weakref.finalize(self, library().mcheads_destroy, handle)

    @property
    def isa(self) -> str:
        """The instruction set it runs with: scalar, avx2 or avx512."""
        return str(library().mcheads_isa(self._handle).decode())

    @property
    def weight_type(self) -> WeightType:
        """How its weights are kept: float32 or bfloat16."""
        return "bfloat16" if library().mcheads_weight_type(self._handle) else "float32"

    def __call__(self, features: ArrayLike, *, threads: int = 1) -> HeadStatistics:
        """Statistics of features [B, D] or [B, K, D], float32.

        Raises: ValueError for features of another shape or threads outside 1 to 256.
        """
        h = np.ascontiguousarray(features, np.float32)
        if h.shape[1:] not in ((self.units,), (self.heads, self.units)):
            d, k = self.units, self.heads
            raise ValueError(f"features must be [B, {d}] or [B, {k}, {d}], got {list(h.shape)}")
        b, k = h.shape[0], self.heads
        out = HeadStatistics(
            np.empty((b, k, self.classes), np.float32),
            *(np.empty(shape, np.float32) for shape in ((b, k), (b, k), (b, k, k), (b, k))),
        )
        feature_heads = 1 if h.ndim == 2 else k
        lib = library()
        scratch, size = _scratch(lib.mcheads_scratch(self._handle, feature_heads, b, threads) if b else 0)
        _check(
            lib.mcheads_run(
                self._handle, h.ctypes.data, feature_heads, b, *(a.ctypes.data for a in out), scratch, size, threads
            )
        )
        return out


def mc_heads(
    features: ArrayLike,
    weights: ArrayLike,
    bias: ArrayLike,
    temperature: ArrayLike,
    masks: ArrayLike,
    keep: float,
    *,
    weight_type: WeightType = "float32",
    mode: Mode = "exact",
    threads: int = 1,
) -> HeadStatistics:
    """The fast twin of mc_heads_ref in float32: same arguments, shapes, equations and NaN rule.

    Packs the weights at every call; keep an MCHeads where they stay the same.

    Args:
        masks: 0 or 1; where the second half of the passes is the complement of the first, half of the work is saved.
        weight_type: how weights are kept; the arithmetic is float32. "bfloat16" rounds them and is half as much to
            read; "auto" takes it where every weight is a bfloat16 already, so that nothing is lost.
        mode: "hybrid" computes the likeliest 32 classes of each head exactly and the others by their moments. Its
            entropies were measured within 0.1 nats of the exact ones, which is less than other masks change them; it
            is faster from some 64 passes on.
        threads: how many threads work on this call.

    Raises: ValueError where shapes do not fit, a mask is neither 0 nor 1, or a temperature is not positive.
    """
    heads = MCHeads(weights, bias, temperature, masks, keep, weight_type=weight_type, mode=mode)
    return heads(features, threads=threads)


def backend() -> str:
    """The instruction set that the CPU kernel chooses on this machine: scalar, avx2 or avx512.

    Raises: ValueError where TRIVIUM_ISA asks for one that is not there; FileNotFoundError where nothing was built.
    """
    name: bytes | None = library().mcheads_default_isa()
    if name is None:
        raise ValueError(last_error())
    return name.decode()


def kernel_counts() -> KernelCounts:
    """What this process has computed so far."""
    counts = Counts()
    library().mcheads_get_counts(ctypes.byref(counts))
    return KernelCounts(counts.runs, counts.pictures, counts.poisoned, counts.fallbacks, counts.operators)


def _check(status: int) -> None:
    if status:
        raise (MemoryError if status == 2 else ValueError)(last_error())


def _scratch(size: int) -> tuple[int, int]:
    """Address and bytes of this thread's scratch, aligned, at least `size` bytes."""
    buffer: NDArray[np.uint8] | None = getattr(_local, "scratch", None)
    if buffer is None or buffer.size < size + _ALIGNMENT:
        buffer = _local.scratch = np.empty(size + _ALIGNMENT, np.uint8)
    address = -(-buffer.ctypes.data // _ALIGNMENT) * _ALIGNMENT
    return address, buffer.size - (address - buffer.ctypes.data)
