"""The planar layout, in which kernels read packed weights, and the way from and to the layout at rest.

A row is cut into int16 halves. Each 32 of them, 16 int32 words, hold 16 / bits planes of 32 values: plane p of half j,
from its lowest bits up, is value 32p + j. One shift and one mask of a word thus give two neighbours. At rest the
values of a word are neighbours. K is padded to a multiple of 128.
"""

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 128
SCRATCH = 1 << 26  # bytes of temporaries that a change of layout may hold at once
PADDING = {4: -0x77777778, 8: -0x7F7F7F80}  # 0x88888888, 0x80808080: values that are zero in a symmetric weight


def planar_words(K: int, bits: int) -> int:
    """The number of int32 words in a planar row of K values."""
    return -(-K // BLOCK) * (BLOCK * bits // 32)


def to_planar(packed: Tensor, K: int, bits: int) -> Tensor:
    """int32 [N, ceil(K * bits / 32)] at rest -> int32 [N, planar_words(K, bits)].

    In place, returning `packed` itself, when both have the same size (K is a multiple of 128, or nearly); otherwise
    into a new tensor whose further words hold zeros of a symmetric weight. All bits of the words at rest are kept,
    those past K too.
    """
    words = planar_words(K, bits)
    _expect(packed, -(-K * bits // 32), "packed")
    if words == packed.shape[1]:
        planar = packed
    else:
        planar = packed.new_full((len(packed), words), PADDING[bits])
        planar[:, : packed.shape[1]] = packed
    _each_rows(planar, planar, _interleave4 if bits == 4 else _interleave8)
    return planar


def from_planar(planar: Tensor, K: int, bits: int) -> Tensor:
    """The exact inverse of `to_planar`: int32 [N, planar_words(K, bits)] -> [N, ceil(K * bits / 32)] at rest.

    In place, returning `planar` itself, when both have the same size.
    """
    words = -(-K * bits // 32)
    _expect(planar, planar_words(K, bits), "planar")
    packed = planar if words == planar.shape[1] else planar.new_empty(len(planar), words)
    _each_rows(planar, packed, _deinterleave4 if bits == 4 else _values8)
    return packed


def unpack_planar(planar: Tensor, K: int, bits: int) -> Tensor:
    """int32 [N, planar_words(K, bits)] -> uint8 [N, K], the values as stored: q + 2**(bits - 1)."""
    _expect(planar, planar_words(K, bits), "planar")
    rows = planar.flatten().view(torch.uint8).view(len(planar), -1)
    return (_values4 if bits == 4 else _values8)(rows)[:, :K]


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


def _interleave4(rest: Tensor) -> Tensor:
    """uint8 [R, 64 * B] at rest -> planar."""
    plane = torch.stack((rest & 15, rest >> 4), -1).view(len(rest), -1, 4, 32)
    low, high = plane[:, :, 0] | plane[:, :, 1] << 4, plane[:, :, 2] | plane[:, :, 3] << 4
    return torch.stack((low, high), -1).view(len(rest), -1)


def _interleave8(rest: Tensor) -> Tensor:
    """uint8 [R, 128 * B] at rest -> planar."""
    return rest.view(len(rest), -1, 2, 32).transpose(2, 3).reshape(len(rest), -1)


def _deinterleave4(planar: Tensor) -> Tensor:
    """uint8 [R, 64 * B] planar -> at rest."""
    values = _values4(planar)
    return values[:, 0::2] | values[:, 1::2] << 4


def _values4(planar: Tensor) -> Tensor:
    """uint8 [R, 64 * B] planar -> one value a byte, [R, 128 * B]."""
    low, high = planar.view(len(planar), -1, 32, 2).unbind(-1)
    return torch.stack((low & 15, low >> 4, high & 15, high >> 4), 2).view(len(planar), -1)


def _values8(planar: Tensor) -> Tensor:
    """uint8 [R, 128 * B] planar -> one value a byte, [R, 128 * B], which is at rest."""
    return planar.view(len(planar), -1, 32, 2).transpose(2, 3).reshape(len(planar), -1)
