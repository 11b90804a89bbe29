"""ai.trivium::MCHeads for ONNX Runtime: the library to register and its settings."""

from __future__ import annotations

from pathlib import Path

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
