"""Checkpoints with sparse layers: what they keep is stored, and where it belongs.

No public format holds such weights any more, so this one is fastllm's own, for `fastllm.load`; `fastllm.to_dense`
makes a checkpoint that everything reads. Its `quantization_config` names no `quant_method`, so that other readers
refuse it instead of filling the layers with random numbers:

    {"format": "fastllm-sparse", "version": 1, "prefix": ..., "sparse": {layer: {"format": "16:32"}}, "packed": ...}

Each layer has the tensors of `SparseFormat` (weight_packed, weight_index, and weight_scale of integers) or, with
{"format": "block64", "blocks": n}, of `BlockSparseWeight` (weight_values, weight_columns, weight_rows). packed: what
compressed-tensors says of the layers that are quantized and not sparse.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..bsr_format import BlockSparseWeight, check, check_block
from ..formats import QuantizedWeight
from ..nn import BlockSparseLinear, SparseLinear
from ..sparse_formats import SparseFormat, check_sparse, parse_sparse, refuse_shape
from .coding import FLOATS, CheckpointError, Coding, Part, Source, scales
from .compressed_tensors import Stored

METHOD, VERSION = "fastllm-sparse", 1
LARGEST = 1 << 24  # blocks of one layer
BLOCKS = re.compile(r"block(\d{1,4})")


SparseLayer = SparseLinear | BlockSparseLinear


def build_config(layers: Mapping[str, SparseLayer], prefix: str, packed: dict[str, Any] | None) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint. packed: that of compressed-tensors, if some layers are quantized."""
    entries = {
        name: {"format": layer.format.name, "blocks": layer.count}
        if isinstance(layer, BlockSparseLinear)
        else {"format": layer.format.name}
        for name, layer in layers.items()
    }
    config: dict[str, Any] = {"format": METHOD, "version": VERSION, "prefix": prefix, "sparse": entries}
    return config if packed is None else {**config, "packed": packed}


def store_sparse(state: dict[str, Tensor], name: str, layer: SparseLayer, dense: bool) -> None:
    """Rewrite the entries of a layer in `state`: without those that say nothing, or as a dense weight."""
    if dense:
        for key in [key for key in state if key.startswith(f"{name}.weight_")]:
            del state[key]
        weight = layer.dequantize()
        state[f"{name}.weight"] = weight.t().contiguous() if layer.transposed else weight
    elif isinstance(layer, SparseLinear) and layer.format.values is None:
        del state[f"{name}.weight_scale"]


@dataclass(frozen=True)
class SparseCoding(Coding):
    """How a layer with equally many weights in each 32 columns is stored."""

    format: SparseFormat

    @property
    def bits(self) -> int:  # type: ignore[override]
        return self.format.bits

    def parts(self, N: int, K: int) -> dict[str, Part]:
        V, index = self.format.kept_of(K), Part((N, K // 32), ("I32",))
        if self.format.values is None:
            return {"weight_packed": Part((N, V), FLOATS), "weight_index": index}
        words = Part((N, -(-V * self.format.bits // 32)), ("I32",))
        return {
            "weight_packed": words,
            "weight_index": index,
            "weight_scale": Part((N, self.format.groups(K)), FLOATS),
        }

    def fits(self, name: str, N: int, K: int) -> None:
        _named(name, refuse_shape, K)

    def read(
        self, name: str, parts: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> QuantizedWeight:
        packed, index = parts["weight_packed"], parts["weight_index"].clone()
        if self.format.values is None:
            packed = scales(f"{name}.weight_packed", packed, dtype)
            scale = packed.new_empty(shape[0], 0)
        else:
            packed, scale = packed.clone(), scales(f"{name}.weight_scale", parts["weight_scale"], dtype)
        weight = QuantizedWeight(packed, scale, None, index)
        _named(name, check_sparse, weight, self.format, shape)
        return weight

    def layer(self, weight: Any, K: int, name: str) -> tuple[Any, Any]:
        return weight, self.format

    def __str__(self) -> str:
        return self.format.name


@dataclass(frozen=True)
class BlockCoding(Coding):
    """How a layer of so many blocks is stored."""

    size: int
    blocks: int
    bits = 16

    def parts(self, N: int, K: int) -> dict[str, Part]:
        return {
            "weight_values": Part((self.blocks, self.size, self.size), FLOATS),
            "weight_columns": Part((self.blocks,), ("I32",)),
            "weight_rows": Part((N // self.size + 1,), ("I32",)),
        }

    def fits(self, name: str, N: int, K: int) -> None:
        _named(name, check_block, N, K, self.size)

    def read(
        self, name: str, parts: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> BlockSparseWeight:
        values = scales(f"{name}.weight_values", parts["weight_values"], dtype)
        weight = BlockSparseWeight(values, parts["weight_columns"].clone(), parts["weight_rows"].clone())
        _named(name, check, weight, shape)
        return weight

    def layer(self, weight: Any, K: int, name: str) -> tuple[Any, Any]:
        return weight, None

    def __str__(self) -> str:
        return f"{self.blocks} blocks of {self.size}"


class SparseStored(Source):
    """What the `quantization_config` of such a checkpoint says. Raises CheckpointError for what makes no sense."""

    key = Stored.key

    def __init__(self, config: Mapping[str, Any]):
        layers, self.prefix = config.get("sparse"), config.get("prefix") or ""
        if config.get("version") != VERSION:
            raise CheckpointError(
                f"the checkpoint's sparse layers are of version {config.get('version')!r}; this fastllm reads "
                f"{VERSION}: another one wrote it"
            )
        if not isinstance(layers, Mapping) or not layers or not isinstance(self.prefix, str):
            raise CheckpointError("quantization_config.sparse is no table of layers: config.json is damaged")
        self.layers = {name: _coding(name, entry) for name, entry in layers.items()}
        packed = config.get("packed")
        if not isinstance(packed, (Mapping, type(None))):
            raise CheckpointError(f"quantization_config.packed is {packed!r}, not a table: config.json is damaged")
        self.rest = None if packed is None else Stored(packed)

    def coding(self, name: str, parts: Collection[str]) -> Coding | None:
        found = self.layers.get(name) or self.layers.get(f"{self.prefix}.{name}")
        if found is None and self.prefix:
            found = self.layers.get(name.removeprefix(f"{self.prefix}."))
        return found if found is not None or self.rest is None else self.rest.coding(name, parts)

    def experts(self) -> Coding:
        if self.rest is None:
            raise CheckpointError("the files have packed experts, of which quantization_config says nothing")
        return self.rest.experts()

    def leave_out(self, model: PreTrainedModel) -> None:
        if self.rest is not None:
            self.rest.leave_out(model)


def _coding(name: str, entry: Any) -> Coding:
    given = entry.get("format") if isinstance(entry, Mapping) else None
    count = entry.get("blocks") if isinstance(entry, Mapping) else None
    blocks = BLOCKS.fullmatch(given) if isinstance(given, str) else None
    if blocks is not None and type(count) is int and 0 <= count <= LARGEST:
        return BlockCoding(int(blocks[1]), count)
    if blocks is None and isinstance(given, str):
        coding: Coding = SparseCoding(_named(name, parse_sparse, given))
        return coding
    raise CheckpointError(f"quantization_config.sparse.{name} is {entry!r}: config.json is damaged")


def _named(name: str, call: Any, *args: Any) -> Any:
    """call(*args), whose complaint becomes one about the layer."""
    try:
        return call(*args)
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}") from error
