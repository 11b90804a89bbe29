"""The CUDA kernels of MCHeads through their C ABI (csrc/mcheads_cuda.h): addresses in, no arrays and no logic."""

from __future__ import annotations

import ctypes
import os
from typing import Final, NamedTuple

FLOAT32: Final = 0
FLOAT16: Final = 1
BFLOAT16: Final = 2

EXPAND: Final = 1
PRODUCT: Final = 2
STATISTICS: Final = 4
ALL_STAGES: Final = 7

_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


class CudaError(RuntimeError):
    """A call of the C ABI failed; the text is its line."""


class Shape(NamedTuple):
    """Extents of a model: K heads, feature heads (1, or K where each head owns its features), C, D and T."""

    heads: int
    feature_heads: int
    classes: int
    units: int
    passes: int


class CudaLibrary:
    """libtrivium, where it was built with nvcc. Raises: OSError or AttributeError where it was not."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.functions = ctypes.CDLL(os.fspath(path))
        f = self.functions
        f.mcheads_cuda_create.argtypes = [
            _POINTER, *[_LONG] * 5, ctypes.c_float, _INT, *[_POINTER] * 5,
        ]  # fmt: skip
        f.mcheads_cuda_destroy.argtypes = [_POINTER]
        f.mcheads_cuda_workspace.argtypes = [_POINTER, _LONG, _POINTER]
        f.mcheads_cuda_run_stages.argtypes = [_POINTER, _INT, _POINTER, _INT, _LONG, *[_POINTER] * 6, _LONG, _POINTER]
        f.mcheads_cuda_error.restype = ctypes.c_char_p

    def devices(self) -> int:
        """Number of usable cards; 0 where there is no driver."""
        return int(self.functions.mcheads_cuda_devices())

    def check(self, status: int) -> None:
        if status != 0:
            raise CudaError(self.functions.mcheads_cuda_error().decode())


class CudaModel:
    """A model packed onto the current device; close() frees it once no run is on its way.

    weights, bias, temperature, masks: addresses of host or device memory, laid out as in mc_heads_ref.
    arithmetic: BFLOAT16 for the tensor cores, FLOAT32 for parity. stream: address of a cudaStream_t, 0 the default.
    """

    def __init__(
        self,
        library: CudaLibrary,
        shape: Shape,
        keep: float,
        arithmetic: int,
        weights: int,
        bias: int,
        temperature: int,
        masks: int,
        stream: int = 0,
    ) -> None:
        self.library, self.shape = library, shape
        self._model = ctypes.c_void_p()
        address = ctypes.byref(self._model)
        create = library.functions.mcheads_cuda_create
        library.check(create(address, *shape, keep, arithmetic, weights, bias, temperature, masks, stream))

    def workspace_bytes(self, batch: int) -> int:
        """Bytes of device memory, aligned to 256, that a run over batch pictures needs."""
        needed = ctypes.c_int64()
        self.library.check(self.library.functions.mcheads_cuda_workspace(self._model, batch, ctypes.byref(needed)))
        return needed.value

    def run(
        self,
        features: int,
        feature_type: int,
        batch: int,
        outputs: tuple[int, int, int, int, int],
        workspace: int,
        workspace_bytes: int,
        stream: int = 0,
        stages: int = ALL_STAGES,
    ) -> None:
        """Enqueue the statistics of batch pictures; outputs are addresses of float32 in the order of HeadStatistics."""
        run = self.library.functions.mcheads_cuda_run_stages
        self.library.check(
            run(
                self._model,
                stages,
                features,
                feature_type,
                batch,
                *outputs,
                workspace,
                workspace_bytes,
                stream,
            )
        )

    def close(self) -> None:
        """Free the model's device memory."""
        model, self._model = self._model, ctypes.c_void_p()
        self.library.check(self.library.functions.mcheads_cuda_destroy(model))
