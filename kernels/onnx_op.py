"""ai.trivium::MCHeads for ONNX Runtime: the library to register and its settings."""

from __future__ import annotations

from pathlib import Path

from .heads import backend
from .native import library_path

WEIGHTS_ENTRY = "trivium.mcheads.weights"
"""Session configuration entry: float32, bfloat16, or auto (the default): bfloat16 where every weight is one already.

On a CUDA card bfloat16 rounds the features too, for its tensor cores, and auto is float32.
All entries must be set before the library is registered.
"""
MODE_ENTRY = "trivium.mcheads.mode"
"""Session configuration entry: exact (the default) or hybrid."""
THREADS_ENTRY = "trivium.mcheads.threads"
"""Session configuration entry: how many of the session's threads share a call; 1 by default."""


def custom_ops_library() -> Path:
    """The library for SessionOptions.register_custom_ops_library; without it the model-local function runs.

    Raises: FileNotFoundError where it was never built.
    """
    return library_path()


def pays() -> bool:
    """Whether the fused operator beats the model-local function on this machine.

    Measured by tests/bench behind EfficientNet-Lite0, three heads, T = 32, B = 1, as body time over fused time: with
    AVX2 or AVX-512 1.6 or more at every number of classes from 2 to 1000, one pass included. One float at a time it is
    1.6 at 10 classes, but 0.9 from 100 classes on, and 0.7 at 10 classes and B = 8: there ONNX Runtime's own matrix
    product is better.

    Raises: as backend().
    """
    return backend() != "scalar"
