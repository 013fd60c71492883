"""How a quantized weight is stored: formats, and the one place that packs and unpacks them.

The layout at rest is `pack-quantized` of compressed-tensors
(https://github.com/vllm-project/compressed-tensors), so saving a layer is writing its parameters.
"""

import re
from dataclasses import dataclass, field, replace
from itertools import product, starmap
from typing import NamedTuple

import torch
from torch import Tensor

from .nf4_format import Nf4Format, level_pairs, nf4_dense


class QuantizedWeight(NamedTuple):
    """A weight [N, K] at rest.

    packed:     int32 [N, ceil(K * bits / 32)], lowest bits first along K, holding q + 2**(bits - 1), never negative,
                or the bits of floats
    scale:      float [N, G], one for each group of weights in a row
    zero_point: int32 [ceil(N * bits / 32), G], non-negative zero points packed along N; None when symmetric
    index:      which columns are stored, of a sparse weight (`sparse_formats`, which says what the others then are)
    """

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    index: Tensor | None = None  # type: ignore[assignment]


# "int4" alone means groups of 128, the field's habit; "int8" alone means one scale per output channel.
DEFAULT_GROUP = {4: 128, 8: None}


@dataclass(frozen=True)
class IntFormat:
    """Integers of `bits` bits: w[n, k] = (q[n, k] - z[n, k // group]) * scale[n, k // group].

    bits:      4 or 8
    group:     weights that share a scale, along K; None: one scale for a whole row ("per channel")
    symmetric: z is 2**(bits - 1), the middle of the range, and not stored
    activations: "int8": each row of the input is rounded to 8 bits as well, when it comes; None: it stays as it is
    """

    bits: int
    group: int | None = None
    symmetric: bool = True
    activations: str | None = None

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"bits={self.bits}: 4 and 8 are supported")
        if self.group is not None and (self.group < 32 or self.group % 32):
            raise ValueError(
                f"group_size={self.group} is not a multiple of 32; use 32, 64, 128, 256, or -1 (per channel)"
            )
        if self.activations not in (None, "int8"):
            raise ValueError(f"activations={self.activations!r}: only 'int8' is supported, or None to leave them")
        if self.activations and (self.bits, self.group, self.symmetric) != (8, None, True):
            raise ValueError(
                f"activations='int8' with {self.weight_only.name} weights: integer products need integer sums, so "
                "weights of 8 bits, symmetric, with one scale per channel; use weights='int8' without a group size"
            )

    @property
    def name(self) -> str:
        """Such as "int4-g128", "int4-channel", "int8" (per channel), "int4-g64-asym", "int8-a8" (activations too).

        `parse_format` reads it.
        """
        group = f"-g{self.group}" if self.group else "" if DEFAULT_GROUP[self.bits] is None else "-channel"
        return f"int{self.bits}{group}{'' if self.symmetric else '-asym'}{'-a8' if self.activations else ''}"

    @property
    def weight_only(self) -> "IntFormat":
        """The same weights, for activations that stay as they are."""
        return replace(self, activations=None)

    @property
    def middle(self) -> int:
        """The zero point of a symmetric weight: 8 or 128."""
        return 2 ** (self.bits - 1)

    def group_of(self, K: int) -> int:
        """The number of weights that share a scale in a row of K."""
        return K if self.group is None else self.group

    def groups(self, K: int) -> int:
        """The number of scales in a row of K; the last group may be short."""
        return -(-K // self.group_of(K))

    def words(self, K: int) -> int:
        """The number of int32 words in a row of K."""
        return -(-K * self.bits // 32)

    def bytes(self, N: int, K: int, scale_bytes: int = 2) -> int:
        """The size at rest of a weight [N, K] whose scales have `scale_bytes` bytes each."""
        zeros = 0 if self.symmetric else 4 * -(-N * self.bits // 32) * self.groups(K)
        return 4 * N * self.words(K) + scale_bytes * N * self.groups(K) + zeros


@dataclass(frozen=True)
class Fp8Format:
    """Floats of 8 bits (e4m3): w[n, k] = q[n, k] * scale[n], and each row of the input rounded so when it comes.

    It has the attributes and methods of an `IntFormat`, most of them with the only value there is.
    """

    bits: int = field(default=8, init=False)
    group: int | None = field(default=None, init=False)
    symmetric: bool = field(default=True, init=False)
    activations: str = field(default="fp8", init=False)
    name: str = field(default="fp8-a8", init=False)

    @property
    def weight_only(self) -> None:
        """There is no such format: a float8 that is not multiplied as it is has no advantage over an int8."""

    def group_of(self, K: int) -> int:
        """The number of weights that share a scale in a row of K: all."""
        return K

    def groups(self, K: int) -> int:
        """The number of scales in a row of K: one."""
        return 1

    def words(self, K: int) -> int:
        """The number of int32 words in a row of K."""
        return -(-K // 4)

    def bytes(self, N: int, K: int, scale_bytes: int = 2) -> int:
        """The size at rest of a weight [N, K] whose scales have `scale_bytes` bytes each."""
        return 4 * N * self.words(K) + scale_bytes * N


Format = IntFormat | Fp8Format | Nf4Format

_GROUPS = product((4, 8), (None, 32, 64, 128, 256), (True, False))
# those that a weight can be quantized to: nf4 is only read
_FORMATS: tuple[Format, ...] = (*starmap(IntFormat, _GROUPS), IntFormat(8, activations="int8"), Fp8Format())
FORMATS = {f.name: f for f in _FORMATS}


def parse_format(
    name: str | Format,
    group_size: int | None = None,
    symmetric: bool | None = None,
    activations: str | None = None,
) -> Format:
    """The format called `name` ("int4", "int8", "int4-g64", "int4-g32-asym", "int4-channel", "int8-a8", "fp8-a8").

    group_size replaces the group that the name gives; -1: one scale per output channel. activations: "int8" is as if
    the name ended in -a8; "fp8" weights always have "fp8" activations.

    Raises ValueError for an unknown name, naming the known ones.
    """
    if isinstance(name, Nf4Format) or name == "nf4":
        raise ValueError(
            "unknown weight format nf4 to quantize to: it is read from bitsandbytes checkpoints; use int4"
        )
    if isinstance(name, Fp8Format) or name in ("fp8", "fp8-a8"):
        if group_size not in (None, -1) or symmetric is False or activations not in (None, "fp8"):
            raise ValueError(
                f"fp8 weights with group_size={group_size}, symmetric={symmetric}, activations={activations!r}: they "
                "have one scale per channel, no zero points, and activations='fp8'"
            )
        return Fp8Format()
    if activations == "fp8":
        raise ValueError(f"activations='fp8' with {name} weights: use weights='fp8'")
    if isinstance(name, IntFormat):
        format = name
    else:
        match = re.fullmatch(r"int([48])(?:-g(\d+)|(-channel))?(-asym)?(-a8)?", name)
        if match is None:
            raise ValueError(f"unknown weight format {name!r}; known: int4, fp8, {', '.join(sorted(FORMATS))}")
        bits = int(match[1])
        group = int(match[2]) if match[2] else None if match[3] else DEFAULT_GROUP[bits]
        format = IntFormat(bits, group, match[4] is None, "int8" if match[5] else None)
    if group_size is not None:
        format = replace(format, group=None if group_size == -1 else group_size)
    if symmetric is not None:
        format = replace(format, symmetric=symmetric)
    return format if activations is None else replace(format, activations=activations)


def pack_bits(q: Tensor, bits: int) -> Tensor:
    """uint8 [R, C] with values below 2**bits -> int32 [R, ceil(C * bits / 32)], lowest bits first."""
    per_word = 32 // bits
    if q.shape[1] % per_word:
        q = torch.nn.functional.pad(q, (0, -q.shape[1] % per_word))
    if bits == 4:
        q = q[:, 0::2] | q[:, 1::2] << 4
    # flat, because torch refuses to view a dimension of size 1 whose stride is odd
    return q.flatten().view(torch.int32).view(len(q), -1)


def unpack_bits(packed: Tensor, bits: int, C: int) -> Tensor:
    """int32 [R, W] -> uint8 [R, C]; the inverse of `pack_bits`."""
    q = packed.flatten().view(torch.uint8).view(len(packed), -1)
    if bits == 4:
        q = torch.stack((q & 15, q >> 4), -1).flatten(1)
    return q[:, :C]


def to_int8(packed: Tensor, K: int) -> Tensor:
    """int32 [N, ceil(K / 4)], symmetric 8-bit weights at rest -> int8 [N, K], as `int-quantized` stores them."""
    return (unpack_bits(packed, 8, K) ^ 128).view(torch.int8)


def from_int8(q: Tensor) -> Tensor:
    """int8 [N, K] -> int32 [N, ceil(K / 4)], in new memory; the inverse of `to_int8`."""
    return pack_bits(q.contiguous().view(torch.uint8) ^ 128, 8)


def to_fp8(packed: Tensor, K: int) -> Tensor:
    """int32 [N, ceil(K / 4)], float8 weights at rest -> float8_e4m3fn [N, K], a view of them."""
    return unpack_bits(packed, 8, K).view(torch.float8_e4m3fn)


def from_fp8(q: Tensor) -> Tensor:
    """float8_e4m3fn [N, K] -> int32 [N, ceil(K / 4)], in new memory; the inverse of `to_fp8`."""
    return pack_bits(q.view(torch.uint8).clone(memory_format=torch.contiguous_format), 8)


def pack_zero_point(zero_point: Tensor, bits: int) -> Tensor:
    """uint8 [N, G] -> int32 [ceil(N * bits / 32), G]: packed along N, as compressed-tensors does."""
    return pack_bits(zero_point.t(), bits).t().contiguous()


def unpack_zero_point(packed: Tensor, bits: int, N: int) -> Tensor:
    """int32 [ceil(N * bits / 32), G] -> uint8 [N, G]."""
    return unpack_bits(packed.t(), bits, N).t().contiguous()


def scale_groups(q: Tensor, scale: Tensor, zero_point: Tensor | int, group: int, dtype: torch.dtype) -> Tensor:
    """(q - z) * scale: q uint8 [N, K], scale [N, G], zero_point uint8 [N, G] or one number -> [N, K] of `dtype`.

    The difference is an exact integer; the product is computed and rounded once in `dtype`.
    """
    N, K = q.shape
    G = scale.shape[1]
    padded = torch.nn.functional.pad(q, (0, G * group - K)).view(N, G, group).to(torch.int16)
    padded = padded - (zero_point if isinstance(zero_point, int) else zero_point[..., None].to(torch.int16))
    return (padded.to(dtype) * scale.to(dtype)[..., None]).view(N, G * group)[:, :K]


def dequantize(weight: QuantizedWeight, format: Format, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The weight [N, K] that `weight` stands for, in `dtype`."""
    N, K = shape
    if isinstance(format, Fp8Format):
        return to_fp8(weight.packed, K).to(dtype) * weight.scale.to(dtype)
    if isinstance(format, Nf4Format):
        return nf4_dense(weight.packed, weight.scale, level_pairs(weight.scale.device), K, dtype)
    q = unpack_bits(weight.packed, format.bits, K)
    zero = format.middle if weight.zero_point is None else unpack_zero_point(weight.zero_point, format.bits, N)
    return scale_groups(q, weight.scale, zero, format.group_of(K), dtype)


def check(weight: QuantizedWeight, format: Format, shape: tuple[int, int], name: str = "weight") -> None:
    """Raise ValueError, naming the tensor and the numbers, unless `weight` can be a [N, K] in `format`."""
    N, K = shape
    G = format.groups(K)
    expected = {
        "packed": (weight.packed, (N, format.words(K)), torch.int32),
        "scale": (weight.scale, (N, G), None),
        "zero_point": (weight.zero_point, (-(-N * format.bits // 32), G), torch.int32),
    }
    if format.symmetric != (weight.zero_point is None):
        have = "no zero points" if weight.zero_point is None else "zero points"
        raise ValueError(f"{name}: {have}, but the format is {format.name}")
    for part, (tensor, want_shape, want_dtype) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != want_shape:
            raise ValueError(
                f"{name}_{part} has shape {list(tensor.shape)}, but {format.name} of [{N}, {K}] needs "
                f"{list(want_shape)}: "
                "the checkpoint is damaged or its quantization_config names another format"
            )
        if not (tensor.is_floating_point() if want_dtype is None else tensor.dtype == want_dtype):
            raise ValueError(
                f"{name}_{part} has dtype {tensor.dtype}, expected {want_dtype or 'a floating-point type'}"
            )
