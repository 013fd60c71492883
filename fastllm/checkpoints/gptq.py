"""GPTQ checkpoints (`quant_method: "gptq"`), versions 1 and 2, read without their library.

A weight [N, K] in groups of g has G = ceil(K / g) of them. With 4 or 8 bits, lowest first in every word:

    qweight int32 [K * bits / 32, N]   integers from 0, packed along K
    qzeros  int32 [G, N * bits / 32]   zero points, packed along N; version 1 stores them less one
    scales  float [G, N]               w = (q - z) * scale
    g_idx   int32 [K]                  the group of each input

Source: https://github.com/AutoGPTQ/AutoGPTQ and https://github.com/ModelCloud/GPTQModel.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..formats import Format, IntFormat, QuantizedWeight
from .coding import FLOATS, CheckpointError, Coding, Part, Source, scales

METHOD = "gptq"
V1, V2 = "gptq", "gptq_v2"  # what `checkpoint_format` says
ONES = {4: 0x11111111, 8: 0x01010101}  # one in every field of a word
# every field holds the middle of the range, as versions 1 and 2 store it
MIDDLES = {4: (0x77777777, -0x77777778), 8: (0x7F7F7F7F, -0x7F7F7F80)}
# what changes the meaning of a checkpoint, and the values that leave it alone
PLAIN: dict[str, tuple[Any, ...]] = {
    "pack_dtype": (None, "int32"),
    "is_marlin_format": (None, False),
    "rotation": (None, "", False),
    "adapter": (None, {}, []),
}


@dataclass(frozen=True)
class GptqLayer(Coding):
    """How one layer is stored. first: as version 1; reordered: the config says that `g_idx` permutes."""

    seen = ("g_idx",)
    bits: int
    group: int | None
    symmetric: bool
    first: bool = True
    reordered: bool = False

    @property
    def format(self) -> IntFormat:
        return IntFormat(self.bits, self.group, self.symmetric)

    def parts(self, N: int, K: int) -> dict[str, Part]:
        G, per_word = self.format.groups(K), 32 // self.bits
        return {
            "qweight": Part((K // per_word, N), ("I32",)),
            "qzeros": Part((G, N // per_word), ("I32",)),
            "scales": Part((G, N), FLOATS),
            "g_idx": Part((K,), ("I32",), optional=True),
        }

    def fits(self, name: str, N: int, K: int) -> None:
        if N % (32 // self.bits) or K % (32 // self.bits):
            raise CheckpointError(
                f"{name} is [{N}, {K}], and GPTQ packs {32 // self.bits} outputs and inputs to a word: it cannot be "
                "stored so, the file or config.json is wrong"
            )

    def look(self, name: str, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> None:
        K, G = shape[1], self.format.groups(shape[1])
        given, plain = parts.get("g_idx"), torch.arange(K) // self.format.group_of(K)
        if given is None:
            if self.reordered and self.group is not None:
                raise CheckpointError(f"{name}.g_idx is missing from the checkpoint, which has desc_act: true")
            return
        low, high = (int(given.min()), int(given.max())) if K else (0, 0)
        if low < 0 or high >= G:
            raise CheckpointError(
                f"{name}.g_idx has values from {low} to {high}, but {K} inputs in {self} have {G} groups: the file is "
                "damaged"
            )
        if moved := int((given.long() != plain).sum()):
            raise CheckpointError(
                f"{name}.g_idx puts {moved} of {K} inputs into another group than their neighbours: weights in "
                "activation order (desc_act: true) are not read; take a checkpoint with desc_act: false, or quantize "
                "the dense one"
            )

    def read(
        self, name: str, parts: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> QuantizedWeight:
        packed, scale = transposed(parts["qweight"]), scales(f"{name}.scales", parts["scales"].t(), dtype)
        return QuantizedWeight(packed, scale, self._zeros(name, parts["qzeros"]))

    def _zeros(self, name: str, qzeros: Tensor) -> Tensor | None:
        """At rest. The words of symmetric weights are known, whatever version the config claims."""
        if not self.symmetric:
            return transposed(plus_one(qzeros, self.bits) if self.first else qzeros)
        if not any(bool((qzeros == middle).all()) for middle in MIDDLES[self.bits]):
            odd = next(w for w in qzeros.flatten().tolist() if w != MIDDLES[self.bits][0]) & 0xFFFFFFFF
            raise CheckpointError(
                f"{name}.qzeros has the word {odd:#010x}, but symmetric weights have {MIDDLES[self.bits][0]:#010x} or "
                f"{MIDDLES[self.bits][1] & 0xFFFFFFFF:#010x} throughout: the file is damaged, or sym: true is wrong"
            )
        return None

    def layer(self, weight: QuantizedWeight, K: int, name: str) -> tuple[QuantizedWeight, Format]:
        return weight, one_group(self.format, K)

    def regroup(self, weight: QuantizedWeight, format: Format, K: int) -> QuantizedWeight:
        return weight

    def tensors(self, weight: QuantizedWeight, N: int, K: int) -> dict[str, Tensor]:
        """What is stored of `weight`, symmetric, a [N, K]: the inverse of `read`, in version 1."""
        G, scale, half = self.format.groups(K), weight.scale, weight.scale.half()
        groups = torch.arange(K, dtype=torch.int32) // self.format.group_of(K)
        return {
            "qweight": transposed(weight.packed),
            "qzeros": torch.full((G, N * self.bits // 32), MIDDLES[self.bits][0], dtype=torch.int32),
            # readers expect float16
            "scales": transposed(half if torch.equal(half.to(scale.dtype), scale) else scale),
            "g_idx": groups.to(torch.int32),
        }

    def __str__(self) -> str:
        return f"gptq {self.format.name}"


def transposed(t: Tensor) -> Tensor:
    """The transpose of a matrix, in memory of its own: what was loaded may be a view of the file."""
    return t.t().clone(memory_format=torch.contiguous_format)


def one_group(format: IntFormat, K: int) -> IntFormat:
    """`format`, by channel if its groups are as long as a row: they would be padded otherwise."""
    return format if format.group is None or format.group < K else replace(format, group=None)


def plus_one(words: Tensor, bits: int) -> Tensor:
    """int32 words with one added to every field. A full field carries on, which undoes the borrow of its writer."""
    total = (words.long() + ONES[bits]) & 0xFFFFFFFF
    return torch.where(total > 0x7FFFFFFF, total - (1 << 32), total).to(torch.int32)


class Gptq(Source):
    """A GPTQ checkpoint. The files tell which layers are packed; `dynamic` rules may give them other settings."""

    names = ("qweight", "qzeros", "scales", "g_idx", "bias")

    def __init__(self, config: Mapping[str, Any]):
        """Raises CheckpointError naming what is not supported, and what to do."""
        self.config = dict(config)
        self.rules: dict[str, Any] = config.get("dynamic") or {}
        expect(isinstance(self.rules, Mapping), "dynamic", self.rules, "a table")
        for pattern, change in self.rules.items():
            try:
                re.compile(pattern[2:] if pattern[:2] in ("+:", "-:") else pattern)
            except re.error as error:
                raise CheckpointError(
                    f"quantization_config.dynamic has {pattern!r}, not a regular expression: the file is damaged"
                ) from error
            expect(isinstance(change, Mapping), f"dynamic[{pattern!r}]", change, "a table")
            self._settings(change)
        self._settings({})

    def coding(self, name: str, parts: Collection[str]) -> GptqLayer | None:
        if not set(parts) - {"bias"}:
            return None
        for pattern, change in self.rules.items():
            if re.match(pattern.removeprefix("+:"), name) and not pattern.startswith("-:"):
                return self._settings(change)
        return self._settings({})

    def experts(self) -> GptqLayer:
        return self._settings({})

    def _settings(self, change: Mapping[str, Any]) -> GptqLayer:
        config = self.config | dict(change)
        for key, kind in (("bits", int), ("group_size", int), ("sym", bool), ("desc_act", bool)):
            value = config.get(key)
            optional = key in ("sym", "desc_act") and value is None
            expect(optional or type(value) is kind, key, value, f"of type {kind.__name__}")
        versions = {str(v) for v in (config.get(key) for key in ("checkpoint_format", "format")) if v is not None}
        found = [
            what
            for bad, what in (
                (config["bits"] not in (4, 8), f"bits {config['bits']}"),
                (not versions <= {V1, V2} or len(versions) > 1, f"the format {' and '.join(map(repr, versions))}"),
                *((config.get(key) not in plain, f"{key} {config.get(key)!r}") for key, plain in PLAIN.items()),
            )
            if bad
        ]
        if found:
            raise CheckpointError(
                f"GPTQ checkpoint with {' and '.join(found)}: 4 and 8 bits in the formats {V1!r} and {V2!r}, packed "
                "into int32, are read; load it with transformers, which needs gptqmodel, or quantize the dense "
                "checkpoint"
            )
        group = group_of("GPTQ", config["group_size"])
        symmetric, first = config.get("sym") is not False, V2 not in versions
        return GptqLayer(config["bits"], group, symmetric, first, bool(config.get("desc_act")))


def group_of(kind: str, size: int) -> int | None:
    """The group that `group_size` says, None for one a row. Raises CheckpointError for those that kernels lack."""
    if size != -1 and (size < 32 or size % 32):
        raise CheckpointError(
            f"{kind} checkpoint with group_size {size}: multiples of 32, and -1 (one a channel), are read; load it "
            "with transformers, or quantize the dense checkpoint"
        )
    return None if size == -1 else size


def expect(good: bool, where: str, value: Any, what: str) -> None:
    """Raise CheckpointError unless `good`."""
    if not good:
        raise CheckpointError(f"quantization_config.{where} is {value!r}, not {what}: the file is damaged")
