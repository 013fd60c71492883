"""What calibration does for a cache of keys and values of few bits."""

import logging

import torch
from torch import Tensor

from ..kv_formats import KV_FORMATS
from .blocks import Blocks
from .cache import record, smooth_keys
from .fold import Change

logger = logging.getLogger("fastllm")

FP8_MAX = 448.0  # of float8_e4m3fn
KV_CACHES = (*KV_FORMATS, "fp8")


class CacheScales:
    """For "int8" and "int4", caches with scales of their own for each token, keys are made that lose less by it.

    For "fp8", servers' caches with one scale for all keys of a layer and one for all values, these are found: `scales`
    has them by the name of the attention, (k_scale, v_scale), float32 [1] each.
    """

    def __init__(self, kv_cache: str | None):
        """Raises ValueError for an unknown kind."""
        if kv_cache not in (None, *KV_CACHES):
            raise ValueError(f"kv_cache={kv_cache!r} is not one of {', '.join(map(repr, KV_CACHES))} or None")
        self.format = None if kv_cache in (None, "fp8") else KV_FORMATS[str(kv_cache)]
        self.measures = kv_cache == "fp8"
        self.scales: dict[str, tuple[Tensor, Tensor]] = {}
        self._without: list[str] = []

    def prepare(self, blocks: Blocks, index: int) -> list[Change]:
        """What was exchanged in a block that is still dense."""
        if self.format is None:
            return []
        changes = smooth_keys(blocks, index, self.format)
        self._without += [] if changes else [blocks.name(index)]
        return changes

    def finish(self, blocks: Blocks, index: int) -> None:
        """Look at the keys and values of a block that is done."""
        if self.measures:
            found, name = fp8_scales(blocks, index), _attention(blocks, index)
            if found is None or name is None:
                self._without.append(blocks.name(index))
            else:
                self.scales[name] = found

    def complete(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The scales, if those of all blocks were found: whoever reads some expects all. Warns of what was not."""
        without = ", ".join(self._without)
        if without and self.format is not None:
            logger.warning("keys stay as they are for a cache of %s in %s", self.format.name, without)
        elif without:
            logger.warning("no scales for an fp8 cache: keys or values not found in %s", without)
        return {} if self._without else self.scales


def _attention(blocks: Blocks, index: int) -> str | None:
    """The name of a block's attention, by the rule of compressed-tensors."""
    for name, module in blocks.layers[index].named_modules():
        if "attention" in type(module).__name__.lower() and hasattr(module, "k_proj"):
            return f"{blocks.name(index)}.{name}"
    return None


def fp8_scales(blocks: Blocks, index: int) -> tuple[Tensor, Tensor] | None:
    """(k_scale, v_scale), float32 [1], with which a block's keys and values fit float8_e4m3fn: max|x| / 448.

    None if they cannot be seen, or are 0 or not finite: with such a scale a cache would hold nothing.
    """
    largest = torch.zeros(2, 1)
    for i, batch in enumerate(blocks.batches):
        if (seen := record(blocks, index, i)) is None:
            return None
        for j, x in enumerate((seen.k, seen.v)):
            rows = x.transpose(1, 2) if batch.seen is None else x.transpose(1, 2)[batch.seen.to(x.device)]
            largest[j] = torch.maximum(largest[j], rows.abs().max().float().cpu())
    if not bool(((largest > 0) & largest.isfinite()).all()):
        return None
    return largest[0] / FP8_MAX, largest[1] / FP8_MAX
