"""MCHeads over CUDA tensors of torch, which is not imported here: a tensor is what has data_ptr and new_empty."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any, Literal

from .cuda import BFLOAT16, FLOAT16, FLOAT32, CudaLibrary, CudaModel, Shape

Tensor = Any
Arithmetic = Literal["float32", "bfloat16"]

_FEATURE_TYPES = {"torch.float32": FLOAT32, "torch.float16": FLOAT16, "torch.bfloat16": BFLOAT16}
_ARITHMETICS = {"float32": FLOAT32, "bfloat16": BFLOAT16}
_REMEMBERED = 4


class CudaHeads:
    """Runs the CUDA kernels on tensors; packs weights once and remembers the last few packed models."""

    def __init__(self, library: str | Path) -> None:
        """Raises: OSError or AttributeError where the library has no CUDA kernels."""
        self.library = CudaLibrary(library)
        # The tensors are kept beside their model: while they live no other tensor can lie at their addresses.
        self._models: OrderedDict[tuple[object, ...] | None, tuple[CudaModel, tuple[Tensor, ...]]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(
        self,
        features: Tensor,
        weights: Tensor,
        bias: Tensor,
        temperature: Tensor,
        masks: Tensor,
        keep: float,
        *,
        stream: int,
        arithmetic: Arithmetic = "float32",
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The statistics of HeadStatistics as new float32 tensors, enqueued on the stream.

        Args:
            features: [B, D] or [B, K, D], float32, float16 or bfloat16, contiguous, on the current device.
            weights, bias, temperature: float32, masks: uint8; contiguous; shapes as in mc_heads_ref, checked before.
            stream: torch.cuda.current_stream().cuda_stream; the tensors must be safe to use on it.
            arithmetic: "bfloat16" rounds weights and features for the tensor cores.

        Raises: CudaError; KeyError for features of another type.
        """
        feature_type = _FEATURE_TYPES[str(features.dtype)]
        batch, (heads, classes, _) = features.shape[0], weights.shape
        shapes = ((batch, heads, classes), (batch, heads), (batch, heads), (batch, heads, heads), (batch, heads))
        out = tuple(weights.new_empty(shape) for shape in shapes)
        p, h, mi, kl, e = (t.data_ptr() for t in out)
        tensors = (weights, bias, temperature, masks)
        # Tensors made in inference mode do not tell when they are written to: nothing can be remembered of them.
        key = (
            None
            if any(t.is_inference() for t in tensors)
            else (keep, arithmetic, features.ndim, *map(_identity, tensors))
        )
        with self._lock:
            model = self._model(key, tensors, features.ndim, keep, arithmetic, stream)
            try:
                size = model.workspace_bytes(batch)
                workspace = masks.new_empty(size + 256)
                aligned = -(-workspace.data_ptr() // 256) * 256
                model.run(features.data_ptr(), feature_type, batch, (p, h, mi, kl, e), aligned, size, stream)
            finally:
                if key is None:
                    model.close()
        return out

    def close(self) -> None:
        """Free all packed models; none may still be running."""
        with self._lock:
            while self._models:
                self._models.popitem()[1][0].close()

    def _model(
        self,
        key: tuple[object, ...] | None,
        tensors: tuple[Tensor, ...],
        feature_axes: int,
        keep: float,
        arithmetic: Arithmetic,
        stream: int,
    ) -> CudaModel:
        if key in self._models:
            self._models.move_to_end(key)
            return self._models[key][0]
        (heads, classes, units), passes = tensors[0].shape, tensors[3].shape[0]
        shape = Shape(heads, 1 if feature_axes == 2 else heads, classes, units, passes)
        w, b, tau, m = (t.data_ptr() for t in tensors)
        model = CudaModel(self.library, shape, keep, _ARITHMETICS[arithmetic], w, b, tau, m, stream)
        if key is not None:
            self._models[key] = (model, tensors)
            if len(self._models) > _REMEMBERED:
                # Freeing device memory waits for the card: no run still uses it then.
                self._models.popitem(last=False)[1][0].close()
        return model


def _identity(t: Tensor) -> tuple[object, ...]:
    return t.data_ptr(), t._version, tuple(t.shape), t.device
