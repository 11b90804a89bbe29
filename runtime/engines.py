"""Which engine runs a bundle: ONNX Runtime, its TensorRT provider, or a TensorRT plan before ONNX Runtime."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

from .bundle import Bundle
from .engine import Backend, Engine
from .errors import EngineError, EngineMismatch
from .tensorrt import TensorRTEngine

EngineChoice = Literal["onnx", "auto", "tensorrt", "tensorrt-ep"]
_log = logging.getLogger(__name__)


def start_engine(
    bundle: Bundle,
    *,
    engine: EngineChoice = "onnx",
    kernels: Literal["auto", "on", "off"] = "auto",
    device: Literal["cpu", "cuda"] = "cpu",
    threads: int = 1,
    cache: Path | None = None,
) -> tuple[Backend, str]:
    """An engine that has passed its self-test, and why it is not the one that was asked for, in one word, or "".

    Args:
        engine: "onnx" is ONNX Runtime; "tensorrt" runs the bundle's plan and falls back to ONNX Runtime with a warning;
            "auto" does so without one where the bundle has no plan; "tensorrt-ep" is ONNX Runtime's TensorRT provider.
        kernels, device, threads: as of Engine.
        cache: directory where the TensorRT provider keeps what it compiles.

    Raises: EngineError, MissingExtra where ONNX Runtime cannot start either.
    """
    fallback = ""
    if device == "cuda" and (engine == "tensorrt" or (engine == "auto" and bundle.manifest.plans)):
        try:
            return _compiled(bundle), ""
        except EngineError as error:
            fallback = error.reason if isinstance(error, EngineMismatch) else "failed"
            # as text, for the error itself holds on to the engine and its memory
            _log.warning("%s: ONNX Runtime in TensorRT's place: %s", bundle.manifest.name, str(error))
    provider: Literal["plain", "tensorrt"] = "tensorrt" if engine == "tensorrt-ep" else "plain"
    started = Engine(bundle, kernels=kernels, device=device, threads=threads, provider=provider, cache=cache)
    started.self_test()
    return started, fallback


def _compiled(bundle: Bundle) -> Backend:
    engine = TensorRTEngine(bundle)
    engine.self_test()
    return engine
