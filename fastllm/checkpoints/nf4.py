"""bitsandbytes checkpoints (`quant_method: "bitsandbytes"`) of type nf4, read without their library.

A weight [N, K] is cut into blocks of 64 along its rows; w = NF4_LEVELS[q] * absmax of its block:

    weight                                uint8 [N * K / 2, 1]   two q a byte, the first in the high bits
    weight.absmax                         float32 [N * K / 64]
    weight.quant_map                      float32 [16]           the levels
    weight.quant_state.bitsandbytes__nf4  uint8 [n]              a table in JSON

Quantized twice, absmax is uint8 and stands for nested_quant_map[absmax] * nested_absmax[i // 256] + nested_offset,
with `weight.nested_quant_map` float32 [256] and `weight.nested_absmax` float32.

Source: Dettmers et al., "QLoRA", 2023, and https://github.com/bitsandbytes-foundation/bitsandbytes.
"""

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import WeightRenaming

from ..formats import Format, Nf4Format, QuantizedWeight
from ..nf4_format import NF4_LEVELS
from .coding import CheckpointError, Coding, Part, Source, scales

METHOD = "bitsandbytes"
BLOCK, NESTED_BLOCK = 64, 256
STATE = "weight_quant_state"
PARTS = {  # names that parameters can have: {on disk: in memory}
    "weight.absmax": "weight_absmax",
    "weight.quant_map": "weight_quant_map",
    "weight.nested_absmax": "weight_nested_absmax",
    "weight.nested_quant_map": "weight_nested_quant_map",
    "weight.quant_state.bitsandbytes__nf4": STATE,
    "weight.quant_state.bitsandbytes__fp4": STATE,  # to say what is wrong with it
}


class PartRenaming(WeightRenaming):
    """Nothing that a saved checkpoint would have to undo."""

    __slots__ = ()


@dataclass(frozen=True)
class Nf4Layer(Coding):
    """How one layer is stored. nested: the scales are quantized, too."""

    seen = (STATE, "weight_quant_map")
    nested: bool
    bits: int = 4

    def parts(self, N: int, K: int) -> dict[str, Part]:
        blocks = N * K // BLOCK
        parts = {
            "weight": Part((N * K // 2, 1), ("U8",)),
            "weight_absmax": Part((blocks,), ("U8" if self.nested else "F32",)),
            "weight_quant_map": Part((16,), ("F32",)),
            STATE: Part(None, ("U8",)),
        }
        if self.nested:
            parts["weight_nested_absmax"] = Part((-(-blocks // NESTED_BLOCK),), ("F32",))
            parts["weight_nested_quant_map"] = Part((256,), ("F32",))
        return parts

    def fits(self, name: str, N: int, K: int) -> None:
        if K % BLOCK:
            raise CheckpointError(
                f"{name} has {K} inputs, no multiple of {BLOCK}, so that blocks of nf4 go on from row to row: it "
                "is not read packed; load it with transformers, or quantize the dense checkpoint"
            )

    def look(self, name: str, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> None:
        self._offset(name, parts[STATE], shape)
        levels = torch.tensor(NF4_LEVELS, dtype=torch.float32)  # transformers loads with another default
        away = (parts["weight_quant_map"] - levels).abs()
        if not bool((away <= 1e-6).all()):
            raise CheckpointError(f"{name}.weight.quant_map has other levels than nf4: only nf4 is read")

    def _offset(self, name: str, state: Tensor, shape: tuple[int, int]) -> float:
        """The number that `nested_offset` gives, 0 without. Raises CheckpointError for a state of something else."""
        where = f"{name}.{STATE.replace('_', '.', 1)}"
        try:
            table = json.loads(bytes(state.tolist()).decode())
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{where} is not JSON ({error}): the file is damaged") from error
        if not isinstance(table, dict):
            raise CheckpointError(f"{where} is {table!r:.60}, not a table: the file is damaged")
        wanted: dict[str, Any] = {"quant_type": "nf4", "blocksize": BLOCK, "shape": list(shape)}
        wanted |= {"nested_blocksize": NESTED_BLOCK} if self.nested else {}
        for key, value in wanted.items():
            if table.get(key) != value:
                raise CheckpointError(
                    f"{where} has {key} {table.get(key)!r:.60}, not {value!r}: nf4 in blocks of {BLOCK} is read; load "
                    "it with transformers, or the file or config.json is damaged"
                )
        offset: Any = table.get("nested_offset", None if self.nested else 0.0)
        if type(offset) not in (int, float) or not math.isfinite(offset):
            raise CheckpointError(f"{where} has nested_offset {offset!r:.60}, not a number: the file is damaged")
        return float(offset)

    def read(
        self, name: str, parts: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> QuantizedWeight:
        N, K = shape
        pairs = parts["weight"].reshape(N, K // 2)
        packed = (pairs >> 4 | pairs << 4).view(torch.int32)
        absmax, offset = parts["weight_absmax"], self._offset(name, parts[STATE], shape)
        if self.nested:
            outer = parts["weight_nested_absmax"].repeat_interleave(NESTED_BLOCK)[: absmax.numel()]
            absmax = parts["weight_nested_quant_map"][absmax.int()] * outer + offset
        return QuantizedWeight(packed, scales(f"{name}.weight.absmax", absmax.view(N, K // BLOCK), dtype))

    def layer(self, weight: QuantizedWeight, K: int, name: str) -> tuple[QuantizedWeight, Format]:
        return weight, Nf4Format()

    def __str__(self) -> str:
        return f"bitsandbytes nf4, blocks of {BLOCK}{', absmax quantized' if self.nested else ''}"


class Nf4(Source):
    """A bitsandbytes checkpoint. The files tell which layers are packed, and whether their scales are."""

    key, names = "weight.absmax", tuple(dict.fromkeys(PARTS.values()))

    def __init__(self, config: Mapping[str, Any]):
        """Raises CheckpointError naming what is not supported, and what to do."""
        four, eight = (config.get(f"load_in_{n}bit", config.get(f"_load_in_{n}bit")) for n in (4, 8))
        kind, storage = config.get("bnb_4bit_quant_type", "fp4"), config.get("bnb_4bit_quant_storage") or "uint8"
        found = [
            what
            for bad, what in (
                (four is not True, f"load_in_4bit {four!r}"),
                (bool(eight), f"load_in_8bit {eight!r}"),
                (kind != "nf4", f"bnb_4bit_quant_type {kind!r}"),
                (storage != "uint8", f"bnb_4bit_quant_storage {storage!r}"),
            )
            if bad
        ]
        if found:
            raise CheckpointError(
                f"bitsandbytes checkpoint with {' and '.join(found)}: 4 bits of type nf4, stored as uint8, are read; "
                "load it with transformers, which needs bitsandbytes, or quantize the dense checkpoint"
            )
        self.nested = config.get("bnb_4bit_use_double_quant") is True

    def coding(self, name: str, parts: Collection[str]) -> Nf4Layer | None:
        nested = self.nested or any("nested" in part for part in parts)
        return Nf4Layer(nested) if parts else None

    def experts(self) -> Nf4Layer:
        return Nf4Layer(self.nested)

    def renamings(self) -> list[Any]:
        return [PartRenaming(rf"\.{disk.replace('.', '[.]')}$", f".{memory}") for disk, memory in PARTS.items()]
