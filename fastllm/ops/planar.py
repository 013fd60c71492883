"""The planar layout, in which kernels read packed weights, and the way from and to the layout at rest.

4 bits: a row is cut into blocks of 128 values, 16 int32 words or 32 int16 halves each. Bits 4p..4p+3 of half j hold
value 32p + j of the block, so that one shift and one mask of a word give two neighbours. At rest the 8 values of a
word are neighbours. K is padded to a multiple of 128. 8 bits: planar is the layout at rest.
"""

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 128
SCRATCH = 1 << 26  # bytes of temporaries that a change of layout may hold at once
PADDING = -0x77777778  # 0x88888888: eight values of 8, zero in a symmetric weight


def planar_words(K: int, bits: int) -> int:
    """The number of int32 words in a planar row of K values."""
    return -(-K // BLOCK) * (BLOCK // 8) if bits == 4 else -(-K // 4)


def to_planar(packed: Tensor, K: int, bits: int) -> Tensor:
    """int32 [N, ceil(K * bits / 32)] at rest -> int32 [N, planar_words(K, bits)].

    In place, returning `packed` itself, when both have the same size (K is a multiple of 128, or nearly); otherwise
    into a new tensor whose further words hold values of 8. All bits of the words at rest are kept, those past K too.
    """
    words = planar_words(K, bits)
    _expect(packed, -(-K * bits // 32), "packed")
    if bits == 8:
        return packed
    if words == packed.shape[1]:
        planar = packed
    else:
        planar = packed.new_full((len(packed), words), PADDING)
        planar[:, : packed.shape[1]] = packed
    _each_rows(planar, planar, _interleave)
    return planar


def from_planar(planar: Tensor, K: int, bits: int) -> Tensor:
    """The exact inverse of `to_planar`: int32 [N, planar_words(K, bits)] -> [N, ceil(K * bits / 32)] at rest.

    In place, returning `planar` itself, when both have the same size.
    """
    words = -(-K * bits // 32)
    _expect(planar, planar_words(K, bits), "planar")
    if bits == 8:
        return planar
    packed = planar if words == planar.shape[1] else planar.new_empty(len(planar), words)
    _each_rows(planar, packed, _deinterleave)
    return packed


def unpack_planar(planar: Tensor, K: int, bits: int) -> Tensor:
    """int32 [N, planar_words(K, bits)] -> uint8 [N, K], the values as stored: q + 2**(bits - 1)."""
    _expect(planar, planar_words(K, bits), "planar")
    rows = planar.flatten().view(torch.uint8).view(len(planar), -1)
    return (rows if bits == 8 else _values(rows))[:, :K]


def _expect(tensor: Tensor, words: int, name: str) -> None:
    if tensor.dtype != torch.int32 or tensor.dim() != 2 or tensor.shape[1] != words:
        have = f"{tensor.dtype} {list(tensor.shape)}"
        raise ValueError(f"{name} is {have}, expected torch.int32 [N, {words}]")


def _each_rows(source: Tensor, target: Tensor, change: Callable[[Tensor], Tensor]) -> None:
    """target[rows] = change(source[rows]) on bytes, a few rows at a time; both may be the same tensor."""
    step = max(1, SCRATCH // (16 * source.shape[1] + 1))  # `change` holds up to four times the bytes it is given
    for start in range(0, len(source), step):
        rows = source[start : start + step]
        changed = change(rows.flatten().view(torch.uint8).view(len(rows), -1))
        target[start : start + step] = changed.flatten().view(torch.int32).view(len(rows), -1)[:, : target.shape[1]]


def _interleave(rest: Tensor) -> Tensor:
    """uint8 [R, 64 * B] at rest -> planar."""
    plane = torch.stack((rest & 15, rest >> 4), -1).view(len(rest), -1, 4, 32)
    low, high = plane[:, :, 0] | plane[:, :, 1] << 4, plane[:, :, 2] | plane[:, :, 3] << 4
    return torch.stack((low, high), -1).view(len(rest), -1)


def _deinterleave(planar: Tensor) -> Tensor:
    """uint8 [R, 64 * B] planar -> at rest."""
    values = _values(planar)
    return values[:, 0::2] | values[:, 1::2] << 4


def _values(planar: Tensor) -> Tensor:
    """uint8 [R, 64 * B] planar -> one value a byte, [R, 128 * B]."""
    low, high = planar.view(len(planar), -1, 32, 2).unbind(-1)
    return torch.stack((low & 15, low >> 4, high & 15, high >> 4), 2).view(len(planar), -1)
