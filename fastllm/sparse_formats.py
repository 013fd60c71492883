"""How a sparse weight is stored: which columns of a row are kept, and their values, floats or integers.

Every 32 columns of a row keep equally many, so a row of a weight has one length and nothing has to say where a stretch
begins. `bitmap32` marks them with one bit each, `sparse24` names the two that each four keep: both cost one bit for a
column. At equal bytes 16 of 32 leaves far more freedom than 2 of 4; the second is what sparse tensor cores know.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .formats import IntFormat, QuantizedWeight, pack_bits, parse_format, unpack_bits

BLOCK = 32  # columns that one word of the index speaks of
SCRATCH = 1 << 22  # weights at a time in between: temporaries have up to 8 bytes for each


@dataclass(frozen=True)
class SparseFormat:
    """`kept` of each 32 columns of a row, or two of each four; all others are 0.

    quads:  two of each four: `kept` is 16
    values: None: floats, as the model has them; else integers, symmetric, whose scales are those of a dense weight

    A weight [N, K] at rest, K a multiple of 32, is a `QuantizedWeight` with V = K // 32 * kept values in a row:
    packed: [N, V] of the model's dtype; or int32 [N, ceil(V * bits / 32)], q + 2**(bits - 1), lowest bits first
    scale:  of integers as for a dense weight [N, K]; of floats an empty tensor [N, 0] of their dtype
    index:  int32 [N, K / 32]. Bit b of word j: column 32 j + b is kept. With quads, bits 4 q to 4 q + 3 of word j hold
            p0 | p1 << 2, p0 < p1: columns 32 j + 4 q + p0 and + p1 are kept
    """

    kept: int = 16
    quads: bool = False
    values: IntFormat | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.kept <= BLOCK or (self.quads and self.kept != 16):
            raise ValueError(f"{self.kept} of {BLOCK}: from 1 to {BLOCK} can be kept")
        if self.values is not None and (not self.values.symmetric or self.values.activations):
            raise ValueError(f"sparse values cannot be {self.values.name}: a 0 is kept exactly by symmetric formats")

    @property
    def pattern(self) -> str:
        """ "2:4", or such as "16:32"."""
        return "2:4" if self.quads else f"{self.kept}:{BLOCK}"

    @property
    def name(self) -> str:
        """Such as "16:32", "2:4-int8", "16:32-int4-g128". `parse_sparse` reads it."""
        return self.pattern + (f"-{self.values.name}" if self.values else "")

    @property
    def stored(self) -> str:
        """What the layout is called."""
        return "sparse24" if self.quads else "bitmap32"

    # what an IntFormat has too

    activations = None
    symmetric = True

    @property
    def bits(self) -> int:
        """Of a value; of floats 16, although they may have 32."""
        return self.values.bits if self.values else 16

    @property
    def group(self) -> int | None:
        return self.values.group if self.values else None

    @property
    def weight_only(self) -> "SparseFormat":
        return self

    def group_of(self, K: int) -> int:
        """The number of columns that share a scale."""
        return K if self.group is None else self.group

    def groups(self, K: int) -> int:
        """The number of scales in a row."""
        return self.values.groups(K) if self.values else 0

    def kept_of(self, K: int) -> int:
        """The number of values in a row."""
        return K // BLOCK * self.kept

    def largest(self, scores: Tensor) -> Tensor:
        """The mask, bool [N, K], that keeps the largest of scores [N, K]; of equal ones those that come first."""
        return largest(scores, 2, 4) if self.quads else largest(scores, self.kept, BLOCK)

    def bytes(self, N: int, K: int, scale_bytes: int = 2) -> int:
        """The size at rest of a weight [N, K] whose floats, scales or values, have `scale_bytes` bytes each."""
        V = self.kept_of(K)
        values = 4 * N * -(-V * self.bits // 32) if self.values else scale_bytes * N * V
        return values + scale_bytes * N * self.groups(K) + 4 * N * (K // BLOCK)


def parse_sparse(pattern: str | SparseFormat, values: str | IntFormat | None = None) -> SparseFormat:
    """The format of `pattern`, "2:4" or k:32 such as "16:32"; values: "int8" or "int4-g128", None: floats.

    The pattern may name the values itself, as `SparseFormat.name` does. Raises ValueError for what is none.
    """
    if isinstance(pattern, SparseFormat):
        return pattern
    match = re.fullmatch(r"(2:4|(\d+):32)(?:-(int.+))?", pattern)
    if match is None:
        raise ValueError(f"unknown pattern {pattern!r}; known: 2:4, 16:32 or any other k:32")
    if match[3] and values:
        raise ValueError(f"pattern {pattern!r} names the values already; leave values={values!r} out")
    given = match[3] or values
    found = parse_format(given) if given else None
    if found is not None and not isinstance(found, IntFormat):
        raise ValueError(f"sparse values cannot be {found.name}; use int8 or int4")
    return SparseFormat(int(match[2] or 16), match[2] is None, found)


def largest(scores: Tensor, n: int, m: int) -> Tensor:
    """Exactly n of each m neighbours in a row of scores [N, K], the largest, bool [N, K]; m divides K.

    Of equal ones those that come first. Raises ValueError for scores that are NaN.
    """
    N, K = scores.shape
    if K % m:
        raise ValueError(f"rows of {K} cannot be cut into stretches of {m}")
    if bool(scores.isnan().any()):
        raise ValueError("some scores are NaN: the weights or the inputs seen are not finite")
    mask = torch.zeros(N, K, dtype=torch.bool, device=scores.device)
    for rows in _steps(N, K):
        order = scores[rows].reshape(-1, m).argsort(dim=1, descending=True, stable=True)[:, :n]
        kept = torch.zeros(len(order), m, dtype=torch.bool, device=mask.device)
        mask[rows] = kept.scatter_(1, order, True).view(-1, K)
    return mask


def compress(dense: Tensor, mask: Tensor, scale: Tensor, format: SparseFormat) -> QuantizedWeight:
    """At rest: the values that `mask` bool [N, K] keeps of `dense` [N, K], floats or, for integers, uint8 codes.

    scale: [N, G], or [N, 0]. Raises ValueError unless the mask is of the format's pattern.
    """
    N, K = dense.shape
    refuse_shape(K)
    packed, index = [], []
    for rows in _steps(N, K):
        m = mask[rows].contiguous()
        _check_mask(m, format)
        values = dense[rows][m].view(len(m), format.kept_of(K))
        packed.append(pack_bits(values, format.bits) if format.values else values)
        index.append(_positions(m) if format.quads else _bitmap(m))
    return QuantizedWeight(torch.cat(packed), scale, None, torch.cat(index))


def expand(weight: QuantizedWeight, format: SparseFormat, shape: tuple[int, int], fill: float = 0) -> Tensor:
    """[N, K]: floats, or uint8 codes; `fill` where nothing is kept."""
    (N, K), mask = shape, mask_of(weight, format, shape)
    V = format.kept_of(K)
    stored = unpack_bits(weight.packed, format.bits, V) if format.values else weight.packed
    return stored.new_full((N, K), fill).masked_scatter_(mask, stored)


def mask_of(weight: QuantizedWeight, format: SparseFormat, shape: tuple[int, int]) -> Tensor:
    """Which are kept, bool [N, K]."""
    N, K = shape
    assert weight.index is not None
    mask = torch.empty(N, K, dtype=torch.bool, device=weight.packed.device)
    for rows in _steps(N, K):
        mask[rows] = _from_positions(weight.index[rows]) if format.quads else _from_bitmap(weight.index[rows])
    return mask


def dense_codes(weight: QuantizedWeight, format: SparseFormat, shape: tuple[int, int]) -> QuantizedWeight:
    """A weight with integer values as a dense one of `format.values`: what is not kept has the code of 0."""
    assert format.values is not None
    return QuantizedWeight(pack_bits(expand(weight, format, shape, format.values.middle), format.bits), weight.scale)


def dequantize_sparse(
    weight: QuantizedWeight, format: SparseFormat, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """The weight [N, K] that is meant, in `dtype`."""
    from .formats import dequantize

    if format.values is None:
        return expand(weight, format, shape).to(dtype)
    return dequantize(dense_codes(weight, format, shape), format.values, shape, dtype)


def check_sparse(weight: QuantizedWeight, format: SparseFormat, shape: tuple[int, int], name: str = "weight") -> None:
    """Raise ValueError, naming the tensor and the numbers, unless `weight` can be a [N, K] in `format`."""
    N, K = shape
    refuse_shape(K)
    V, index = format.kept_of(K), weight.index
    words = -(-V * format.bits // 32) if format.values else V
    kinds = {"packed": torch.int32 if format.values else None, "scale": None, "index": torch.int32}
    shapes = {"packed": (N, words), "scale": (N, format.groups(K)), "index": (N, K // BLOCK)}
    for part, tensor in (("packed", weight.packed), ("scale", weight.scale), ("index", index)):
        if tensor is None or tuple(tensor.shape) != shapes[part]:
            have = "nothing" if tensor is None else list(tensor.shape)
            raise ValueError(f"{name}_{part}: {format.name} of [{N}, {K}] needs {list(shapes[part])}, got {have}")
        if not (tensor.is_floating_point() if kinds[part] is None else tensor.dtype == kinds[part]):
            raise ValueError(f"{name}_{part} is {tensor.dtype}, not {kinds[part] or 'a floating-point type'}")
    if index is not None and not index.is_meta:
        for rows in _steps(N, K):
            _check_index(index[rows], format, name)


def refuse_shape(K: int) -> None:
    if K % BLOCK:
        raise ValueError(f"K={K} is not a multiple of {BLOCK}: sparse weights are stored {BLOCK} columns at a time")


def _steps(N: int, K: int) -> Iterator[slice]:
    step = max(1, SCRATCH // K)
    return (slice(start, min(start + step, N)) for start in range(0, N, step))


def _check_mask(mask: Tensor, format: SparseFormat) -> None:
    size, kept = (4, 2) if format.quads else (BLOCK, format.kept)
    counts = mask.view(len(mask), -1, size).sum(-1)
    if bad := int((counts != kept).sum()):
        raise ValueError(f"{bad} of {counts.numel()} stretches of {size} columns do not keep exactly {kept}")


def _check_index(index: Tensor, format: SparseFormat, name: str) -> None:
    if format.quads:
        low, high = _quads(index)
        good = (low < high).all(-1)
    else:
        good = _from_bitmap(index).view(*index.shape, BLOCK).sum(-1) == format.kept
    if not bool(good.all()):
        bad = int((~good).sum())
        raise ValueError(f"{name}_index: {bad} of {good.numel()} words are none of {format.pattern}: it is damaged")


def _bitmap(mask: Tensor) -> Tensor:
    """bool [N, K] -> int32 [N, K / 32]."""
    bits = mask.view(len(mask), -1, 8).to(torch.uint8) << torch.arange(8, dtype=torch.uint8, device=mask.device)
    return bits.sum(-1, dtype=torch.uint8).view(torch.int32)


def _from_bitmap(index: Tensor) -> Tensor:
    """The inverse of `_bitmap`."""
    bytes = index.contiguous().view(torch.uint8)[..., None]
    return (bytes >> torch.arange(8, dtype=torch.uint8, device=index.device) & 1).view(len(index), -1).bool()


def _positions(mask: Tensor) -> Tensor:
    """bool [N, K] that keeps two of each four -> int32 [N, K / 32]."""
    first, second = mask.view(-1, 4).nonzero()[:, 1].view(-1, 2).to(torch.uint8).unbind(1)
    quads = (first | second << 2).view(len(mask), -1)
    return (quads[:, 0::2] | quads[:, 1::2] << 4).contiguous().view(torch.int32)


def _quads(index: Tensor) -> tuple[Tensor, Tensor]:
    """The positions of the first and second kept, uint8 [N, J, 8] each."""
    bytes = index.contiguous().view(torch.uint8)
    quads = torch.stack((bytes & 15, bytes >> 4), -1).view(*index.shape, 8)
    return quads & 3, quads >> 2


def _from_positions(index: Tensor) -> Tensor:
    """The inverse of `_positions`."""
    columns = torch.arange(4, dtype=torch.uint8, device=index.device)
    low, high = (position[..., None] == columns for position in _quads(index))
    return (low | high).view(len(index), -1)
