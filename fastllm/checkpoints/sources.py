"""The kinds of packed checkpoints that can be read, by the `quant_method` of their `quantization_config`."""

from collections.abc import Callable, Mapping
from typing import Any

from . import awq, gptq, nf4, scheme
from .awq import Awq
from .coding import Source
from .compressed_tensors import Stored
from .gptq import Gptq
from .nf4 import Nf4

SOURCES: dict[str, Callable[[Mapping[str, Any]], Source]] = {
    scheme.METHOD: Stored,
    gptq.METHOD: Gptq,
    awq.METHOD: Awq,
    nf4.METHOD: Nf4,
}


def source_of(config: Mapping[str, Any]) -> Source:
    """The reader for a checkpoint with this `quantization_config`. Raises CheckpointError for what cannot be read."""
    return SOURCES[config.get("quant_method", scheme.METHOD)](config)
