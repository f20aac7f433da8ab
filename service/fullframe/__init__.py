"""Image features and classes computed on the full frame, whatever its size."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fullframe.client import AsyncClient, Client
    from fullframe.engine.predictor import load

# ONNX Runtime reads it once, when it is loaded: else it keeps an identifier on disk and reports to its maker.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "__version__", "load"]

_HOMES = {
    "AsyncClient": "fullframe.client",
    "Client": "fullframe.client",
    "load": "fullframe.engine.predictor",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: a client needs no engine, an engine no gRPC."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
