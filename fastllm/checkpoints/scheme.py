"""How compressed-tensors stores one layer.

Source: https://github.com/vllm-project/compressed-tensors. A layer `name` of weight [N, K] is stored as
`name.weight_packed`, `.weight_scale`, `.weight_zero_point` (see `fastllm.formats.QuantizedWeight`) and
`.weight_shape`, int64 [2] = (N, K), if only its weight is quantized (`pack-quantized`). With activations of 8 bits
it is `name.weight`, [N, K] of int8 (`int-quantized`) or float8_e4m3fn (`float-quantized`), and `.weight_scale` [N, 1].
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..formats import Format, Fp8Format, IntFormat, Nf4Format, QuantizedWeight, from_fp8, from_int8, to_fp8, to_int8
from .coding import FLOATS, CheckpointError, Coding, Part, scales

METHOD, FORMAT, MIXED = "compressed-tensors", "pack-quantized", "mixed-precision"
ROUNDING = {"int8": "int-quantized", "fp8": "float-quantized"}  # by the type of the activations
SMALLEST_GROUP = 8


@dataclass(frozen=True)
class Scheme(Coding):
    """How one layer is stored: as a `Format` is, but with any group size, which divides K."""

    seen = ("weight_shape",)
    bits: int
    group: int | None
    symmetric: bool
    activations: str | None = None

    @classmethod
    def storing(cls, format: Format, *Ks: int) -> "Scheme | None":
        """The scheme that stores rows of every length in `Ks` without loss; None if there is none.

        Readers insist that the group divides K. A short last group is written as smaller groups with repeated scales.
        """
        if isinstance(format, Nf4Format):
            return None
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

    def parts(self, N: int, K: int) -> dict[str, Part]:
        """The stored tensors of a weight [N, K]."""
        G = 1 if self.group is None else K // self.group
        if self.activations:
            dtype = "F8_E4M3" if self.type == "float" else "I8"
            return {"weight": Part((N, K), (dtype,)), "weight_scale": Part((N, 1), FLOATS)}
        parts = {
            "weight_packed": Part((N, -(-K * self.bits // 32)), ("I32",)),
            "weight_scale": Part((N, G), FLOATS),
            "weight_shape": Part((2,), ("I64", "I32")),
        }
        if not self.symmetric:
            parts["weight_zero_point"] = Part((-(-N * self.bits // 32), G), ("I32",))
        return parts

    def fits(self, name: str, N: int, K: int) -> None:
        if self.group is not None and K % self.group:
            raise CheckpointError(f"{name} has {K} inputs, which {self} does not divide")

    def look(self, name: str, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> None:
        stated = parts["weight_shape"].tolist() if "weight_shape" in parts else list(shape)
        if stated != list(shape):
            raise CheckpointError(
                f"{name}.weight_shape says {stated}, but the weight is {list(shape)}: the file or config.json is wrong"
            )

    def read(
        self, name: str, parts: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> QuantizedWeight:
        scale = scales(f"{name}.weight_scale", parts["weight_scale"], dtype)
        if self.activations == "fp8":
            if bad := int(parts["weight"].isnan().sum()):
                raise CheckpointError(f"{name}.weight has {bad} values that are NaN: the file is damaged")
            return QuantizedWeight(from_fp8(parts["weight"]), scale)
        if self.activations:
            return QuantizedWeight(from_int8(parts["weight"]), scale)
        # it may be a view of the file, and layers permute their weight in place
        packed = parts["weight_packed"]
        return QuantizedWeight(
            packed.clone() if packed.device.type == "cpu" else packed, scale, parts.get("weight_zero_point")
        )

    def layer(self, weight: QuantizedWeight, K: int, name: str) -> tuple[QuantizedWeight, Format]:
        """With neighbouring groups whose scales are equal made one: `storing` writes them for a K that the group does
        not divide. Raises CheckpointError without any.
        """
        if self.group is None or self.group % 32 == 0:
            return weight, self.format
        tensors = [t for t in (weight.scale, weight.zero_point) if t is not None]
        for group in (g for g in range(256, 31, -32) if g % self.group == 0):
            first = torch.arange(K // self.group) // (group // self.group) * (group // self.group)
            if all(torch.equal(t, t[:, first.to(t.device)]) for t in tensors):
                picked = [t[:, :: group // self.group].contiguous() for t in tensors]
                zero = picked[1] if len(picked) > 1 else None
                return QuantizedWeight(weight.packed, picked[0], zero), IntFormat(self.bits, group, self.symmetric)
        raise CheckpointError(
            f"{name} is stored in groups of {self.group}: groups are multiples of 32 here; load it with transformers, "
            "or quantize the dense checkpoint"
        )

    def expert(self, name: str) -> "Scheme":
        if self.activations == "fp8":
            raise CheckpointError(
                f"{name}: experts in float8 are not read; load it with transformers, or quantize the dense checkpoint "
                "to int8"
            )
        return self

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
