"""Serving: from picture bytes to a routed, uncertainty-aware answer."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .client import Client
    from .client_aio import AsyncClient
    from .client_codec import ModelMetadata, ServedPrediction
    from .predictor import Prediction, Predictor, Timings
    from .retries import ClientStatistics, RetryPolicy

__all__ = [
    "AsyncClient",
    "Client",
    "ClientStatistics",
    "ModelMetadata",
    "Prediction",
    "Predictor",
    "RetryPolicy",
    "ServedPrediction",
    "Timings",
]
_MODULES = {
    "AsyncClient": "client_aio",
    "Client": "client",
    "ClientStatistics": "retries",
    "ModelMetadata": "client_codec",
    "Prediction": "predictor",
    "Predictor": "predictor",
    "RetryPolicy": "retries",
    "ServedPrediction": "client_codec",
    "Timings": "predictor",
}


if not TYPE_CHECKING:  # a checker would take any name for one of ours

    def __getattr__(name: str) -> Any:
        # on first use: a command that only asks for its help must not load gRPC
        from importlib import import_module

        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
