"""AWQ checkpoints (`quant_method: "awq"`, version "gemm"), read without their library.

A weight [N, K] in groups of g, of 4 bits with zero points:

    qweight int32 [K, N / 8]   field i of word c, lowest first, is output 8c + [0, 2, 4, 6, 1, 3, 5, 7][i]
    qzeros  int32 [G, N / 8]   in the same order
    scales  float [G, N]       w = (q - z) * scale

Source: https://github.com/casper-hansen/AutoAWQ.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..formats import Format, IntFormat, QuantizedWeight, pack_bits
from .coding import FLOATS, CheckpointError, Coding, Part, Source, scales
from .gptq import expect, group_of, one_group

METHOD, VERSION = "awq", "gemm"
FIELD = (0, 4, 1, 5, 2, 6, 3, 7)  # the field of a word that holds each of its eight outputs
CHUNK = 1 << 24  # values that lie unpacked in memory at any one time


@dataclass(frozen=True)
class AwqLayer(Coding):
    """How one layer is stored."""

    group: int | None
    bits: int = 4

    @property
    def format(self) -> IntFormat:
        return IntFormat(4, self.group, symmetric=False)

    def parts(self, N: int, K: int) -> dict[str, Part]:
        G = self.format.groups(K)
        return {
            "qweight": Part((K, N // 8), ("I32",)),
            "qzeros": Part((G, N // 8), ("I32",)),
            "scales": Part((G, N), FLOATS),
        }

    def fits(self, name: str, N: int, K: int) -> None:
        if N % 8:
            raise CheckpointError(
                f"{name} has {N} outputs, and AWQ packs 8 to a word: it cannot be stored so, the file or config.json "
                "is wrong"
            )

    def read(
        self, name: str, parts: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> QuantizedWeight:
        N, K = shape
        packed = parts["qweight"].new_empty(N, self.format.words(K))
        step = max(1, CHUNK // (8 * K))
        for start in range(0, N // 8, step):
            q = outputs(parts["qweight"][:, start : start + step])
            packed[8 * start : 8 * (start + step)] = pack_bits(q.t().contiguous(), 4)
        zero = pack_bits(outputs(parts["qzeros"]), 4).t().contiguous()
        return QuantizedWeight(packed, scales(f"{name}.scales", parts["scales"].t(), dtype), zero)

    def layer(self, weight: QuantizedWeight, K: int, name: str) -> tuple[QuantizedWeight, Format]:
        return weight, one_group(self.format, K)

    def __str__(self) -> str:
        return f"awq {self.format.name}"


def outputs(words: Tensor) -> Tensor:
    """int32 [R, N / 8] -> uint8 [R, N], the values in the order of the outputs."""
    bytes = words.contiguous().view(torch.uint8).view(len(words), -1, 4)
    fields = torch.stack((bytes & 15, bytes >> 4), -1).flatten(2)
    return fields[:, :, torch.tensor(FIELD, device=words.device)].flatten(1)


class Awq(Source):
    """An AWQ checkpoint. The files tell which layers are packed, so `modules_to_not_convert` is not needed."""

    names = ("qweight", "qzeros", "scales", "bias")

    def __init__(self, config: Mapping[str, Any]):
        """Raises CheckpointError naming what is not supported, and what to do."""
        bits, size = (
            config.get(key, config.get(old)) for key, old in (("bits", "w_bit"), ("group_size", "q_group_size"))
        )
        expect(type(bits) is int, "bits", bits, "of type int")
        expect(type(size) is int, "group_size", size, "of type int")
        zero_point, skipped = config.get("zero_point", True), config.get("modules_to_not_convert")
        expect(type(zero_point) is bool, "zero_point", zero_point, "of type bool")
        expect(skipped is None or isinstance(skipped, list), "modules_to_not_convert", skipped, "a list of names")
        versions = {str(v).lower() for v in (config.get(k) for k in ("version", "format", "checkpoint_format")) if v}
        found = [
            what
            for bad, what in (
                (bits != 4, f"bits {bits}"),
                (not versions <= {VERSION}, f"version {' and '.join(map(repr, sorted(versions)))}"),
                (not zero_point, "zero_point false"),
            )
            if bad
        ]
        if found:
            raise CheckpointError(
                f"AWQ checkpoint with {' and '.join(found)}: 4 bits with zero points in version {VERSION!r} are read; "
                "load it with transformers, which needs gptqmodel, or quantize the dense checkpoint"
            )
        self.layer = AwqLayer(group_of("AWQ", size))

    def coding(self, name: str, parts: Collection[str]) -> AwqLayer | None:
        return self.layer if set(parts) - {"bias"} else None

    def experts(self) -> AwqLayer:
        return self.layer
