"""Checkpoints: public formats, written and read."""

from importlib import import_module
from typing import Any

_HOME = {"FastllmConfig": "quantizer", "SaveHook": "save", "load": "loading", "write_gptq": "gptq_save"}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import a public name on first use: all of them import transformers."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
