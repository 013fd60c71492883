"""Compression with calibration data: quantization that keeps a model's answers."""

from importlib import import_module
from typing import Any

_HOME = {"prune": "prune_model", "quantize": "model", "sparsify": "sparse_model"}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import a public name on first use: it brings transformers along."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
