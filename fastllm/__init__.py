"""fastllm: fast inference for the Hugging Face models people already have."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "FORMATS": "formats",
    "KVCache": "decode",
    "QuantExperts": "nn",
    "BlockSparseLinear": "nn",
    "QuantLinear": "nn",
    "SparseLinear": "nn",
    "load": "patch",
    "lora_config": "nn.lora",
    "optimize": "patch",
    "optimized": "patch",
    "prune": "compress",
    "quant_matmul": "ops",
    "quantize": "compress",
    "restore": "patch",
    "sparsify": "compress",
    "to_dense": "patch",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import a public name on first use: `import fastllm` loads neither triton nor transformers."""
    if name not in _HOME:
        raise AttributeError(f"module 'fastllm' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
