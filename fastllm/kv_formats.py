"""How keys and values are stored in a quantized cache: formats as frozen dataclasses, with their definitions in plain
torch. A token's key (or value) of one head is a row of D numbers; a row is quantized when it is appended, once."""

from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 32  # numbers per scale at 4 bits
HALF_MAX = 65504.0


@dataclass(frozen=True)
class Int8KV:
    """Codes int8 [..., D] and one float32 scale a row: value = code * scale, scale = absmax / 127."""

    name = "int8"
    bits = 8
    dtype = torch.int8
    scale_dtype = torch.float32

    def width(self, D: int) -> int:
        """Elements of the stored row."""
        return D

    def scale_shape(self, D: int) -> tuple[int, ...]:
        """The shape of one row's scales."""
        return ()

    def reasons(self, D: int) -> list[str]:
        """Why rows of D numbers cannot be stored; empty if they can."""
        return []

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., D], floating point -> codes int8 [..., D], scale float32 [...]."""
        x = x.float()
        scale = x.abs().amax(-1) / 127
        codes = torch.where(scale[..., None] > 0, x / scale[..., None], 0.0).round().clamp(-127, 127)
        return codes.to(torch.int8), scale

    def dequantize(self, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Codes and scales -> values [..., D] of `dtype`, rounded once."""
        return (codes * scale[..., None]).to(dtype)


@dataclass(frozen=True)
class Int4KV:
    """Nibbles, two a byte, with a scale and a zero for each group of 32: value = code * scale + zero.

    Byte d holds code[d] in its low nibble and code[d + D/2] in its high one; scale float16 [..., 2, D/32]: the scales,
    then the zeros, which are the groups' least values.
    """

    name = "int4"
    bits = 4
    dtype = torch.uint8
    scale_dtype = torch.float16

    def width(self, D: int) -> int:
        return D // 2

    def scale_shape(self, D: int) -> tuple[int, ...]:
        return 2, D // GROUP

    def reasons(self, D: int) -> list[str]:
        return [] if D % (2 * GROUP) == 0 else [f"heads of {D} are not a multiple of {2 * GROUP}, as int4 needs"]

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., D], floating point -> packed uint8 [..., D/2], scale float16 [..., 2, D/32]."""
        groups = x.float().unflatten(-1, (-1, GROUP))
        low, high = groups.amin(-1), groups.amax(-1)
        zero = low.clamp(-HALF_MAX, HALF_MAX).half()
        step = ((high - low) / 15).clamp(max=HALF_MAX).half()
        s, z = step.float()[..., None], zero.float()[..., None]
        codes = torch.where(s > 0, (groups - z) / s, 0.0).round().clamp(0, 15).to(torch.uint8).flatten(-2)
        first, second = codes.chunk(2, -1)
        return first | second << 4, torch.stack((step, zero), -2)

    def dequantize(self, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        values = torch.cat((codes & 15, codes >> 4), -1).unflatten(-1, (-1, GROUP))
        step, zero = scale.float().unbind(-2)
        return (values * step[..., None] + zero[..., None]).flatten(-2).to(dtype)


KVFormat = Int8KV | Int4KV
KV_FORMATS: dict[str, KVFormat] = {format.name: format for format in (Int8KV(), Int4KV())}


def kv_format(name: str | None) -> KVFormat | None:
    """The format called `name`; None stands for dense rows. Raises ValueError for an unknown one."""
    if name not in (None, *KV_FORMATS):
        raise ValueError(f"kv_cache={name!r} is not one of {', '.join(map(repr, KV_FORMATS))} or None")
    return None if name is None else KV_FORMATS[name]
