"""How compressed-tensors stores one layer.

Source: https://github.com/vllm-project/compressed-tensors. A layer `name` of weight [N, K] is stored as
`name.weight_packed`, `.weight_scale`, `.weight_zero_point` (see `fastllm.formats.QuantizedWeight`) and
`.weight_shape`, int64 [2] = (N, K), if only its weight is quantized (`pack-quantized`). With activations of 8 bits
it is `name.weight`, [N, K] of int8 (`int-quantized`) or float8_e4m3fn (`float-quantized`), and `.weight_scale` [N, 1].
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..formats import Format, Fp8Format, IntFormat, QuantizedWeight, to_fp8, to_int8

METHOD, FORMAT, MIXED = "compressed-tensors", "pack-quantized", "mixed-precision"
ROUNDING = {"int8": "int-quantized", "fp8": "float-quantized"}  # by the type of the activations
SMALLEST_GROUP = 8


class CheckpointError(ValueError):
    """A checkpoint is damaged, or of a kind that cannot be read; the message names the layer and the numbers."""


@dataclass(frozen=True)
class Scheme:
    """How one layer is stored: as a `Format` is, but with any group size, which divides K."""

    bits: int
    group: int | None
    symmetric: bool
    activations: str | None = None

    @classmethod
    def storing(cls, format: Format, *Ks: int) -> "Scheme | None":
        """The scheme that stores rows of every length in `Ks` without loss; None if there is none.

        Readers insist that the group divides K. A short last group is written as smaller groups with repeated scales.
        """
        group = None if format.group is None else math.gcd(format.group, *Ks)
        if group is not None and group < SMALLEST_GROUP:
            return None
        return cls(format.bits, group, format.symmetric, format.activations)

    @property
    def file_format(self) -> str:
        """What compressed-tensors calls it."""
        return ROUNDING[self.activations] if self.activations else FORMAT

    @property
    def type(self) -> str:
        return "float" if self.activations == "fp8" else "int"

    @property
    def dtype(self) -> torch.dtype:
        """Of weights that are stored one by one."""
        return torch.float8_e4m3fn if self.type == "float" else torch.int8

    @property
    def format(self) -> Format:
        """The same, for a group that kernels know."""
        if self.activations == "fp8":
            return Fp8Format()
        return IntFormat(self.bits, self.group, self.symmetric, self.activations)

    def entries(self) -> dict[str, Any]:
        """What a config group says of it."""
        strategy = {"strategy": "channel"} if self.group is None else {"strategy": "group", "group_size": self.group}
        weights = {"num_bits": self.bits, "type": self.type, "symmetric": self.symmetric, "dynamic": False, **strategy}
        return {"weights": weights, **({"input_activations": rounding(self.type)} if self.activations else {})}

    def regroup(self, weight: QuantizedWeight, format: Format, K: int) -> QuantizedWeight:
        """`weight`, a [N, K] in `format`, with scales and zero points repeated for the groups of this scheme."""
        if format.group is None or self.group is None or format.group == self.group:
            return weight
        times, G = format.group // self.group, K // self.group

        def repeat(t: Tensor) -> Tensor:
            return t.repeat_interleave(times, 1)[:, :G].contiguous()

        zero = None if weight.zero_point is None else repeat(weight.zero_point)
        return QuantizedWeight(weight.packed, repeat(weight.scale), zero)

    def shapes(self, N: int, K: int) -> dict[str, tuple[int, ...]]:
        """The shape of each stored tensor of a weight [N, K]."""
        G = 1 if self.group is None else K // self.group
        if self.activations:
            return {"weight": (N, K), "weight_scale": (N, 1)}
        shapes: dict[str, tuple[int, ...]] = {
            "weight_packed": (N, -(-K * self.bits // 32)),
            "weight_scale": (N, G),
            "weight_shape": (2,),
        }
        if not self.symmetric:
            shapes["weight_zero_point"] = (-(-N * self.bits // 32), G)
        return shapes

    def tensors(self, weight: QuantizedWeight, N: int, K: int) -> dict[str, Tensor]:
        """What is stored of `weight`, a [N, K] whose groups are those of this scheme."""
        if self.activations:
            q = to_fp8(weight.packed, K).contiguous() if self.type == "float" else to_int8(weight.packed, K)
            return {"weight": q, "weight_scale": weight.scale}
        parts = {"weight_packed": weight.packed, "weight_scale": weight.scale, "weight_shape": torch.tensor((N, K))}
        return parts if weight.zero_point is None else {**parts, "weight_zero_point": weight.zero_point}

    def __str__(self) -> str:
        group = "per channel" if self.group is None else f"groups of {self.group}"
        activations = f", {self.activations} activations" if self.activations else ""
        kind = "fp" if self.type == "float" else "int"
        return f"{kind}{self.bits}, {group}, {'symmetric' if self.symmetric else 'asymmetric'}{activations}"


def rounding(type: str) -> dict[str, Any]:
    """What a config group says of activations that are rounded."""
    return {"num_bits": 8, "type": type, "symmetric": True, "dynamic": True, "strategy": "token"}
