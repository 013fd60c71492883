"""The kinds of packed checkpoints that can be read, by what their `quantization_config` names."""

from collections.abc import Callable, Mapping
from typing import Any

from . import awq, gptq, nf4, scheme, sparse
from .awq import Awq
from .coding import Source
from .compressed_tensors import Stored
from .gptq import Gptq
from .nf4 import Nf4
from .sparse import SparseStored

SOURCES: dict[str, Callable[[Mapping[str, Any]], Source]] = {
    scheme.METHOD: Stored,
    gptq.METHOD: Gptq,
    awq.METHOD: Awq,
    nf4.METHOD: Nf4,
    sparse.METHOD: SparseStored,
}


def method_of(config: Mapping[str, Any]) -> Any:
    """What SOURCES may have a reader for. Sparse checkpoints tell by their format alone."""
    return sparse.METHOD if config.get("format") == sparse.METHOD else config.get("quant_method")


def source_of(config: Mapping[str, Any]) -> Source:
    """The reader for a checkpoint with this `quantization_config`. Raises CheckpointError for what cannot be read."""
    return SOURCES[method_of(config) or scheme.METHOD](config)
