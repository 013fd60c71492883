"""Sparse weights in lanes: what kernels and launchers need to know of them.

Lanes are 32 rows side by side, so that a warp reads one word of each as one line of memory.

    w:     int32 [ceil(N / 32), K / 32, words, 32 rows], the kept values of a block of 32 columns, lowest bits first
    index: int32 [ceil(N / 32), K / 32, 32 rows], which columns are kept: a bit for each, or two bits of position for
           each of two in four (see fastllm/sparse_formats.py)
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

LANES = 32  # rows that lie side by side, and columns of a block
BITS = {torch.int8: 8, torch.float16: 16, torch.bfloat16: 16, torch.float32: 32}


class Kept(NamedTuple):
    """What is kept: `number` of each 32 columns; two of each four if `quads`. values: int8 stands for q + 128."""

    number: int
    quads: bool
    values: torch.dtype

    @property
    def words(self) -> int:
        """Of the values of a row in a block."""
        return -(-self.number * BITS[self.values] // 32)


def check_lanes(w: torch.Tensor, index: torch.Tensor, scale: torch.Tensor | None, N: int, K: int, kept: Kept) -> None:
    """Raise ValueError unless these are a weight [N, K]: kernels would read beyond them."""
    if kept.values not in BITS or not 1 <= kept.number <= 32 or (kept.quads and kept.number != 16):
        raise ValueError(f"{kept}: values are int8 or floats, 1 to 32 of 32, 16 in quads")
    if K % 32 or K < 1 or N < 0:
        raise ValueError(f"K={K} is not a multiple of 32: sparse weights are stored 32 columns at a time")
    tiles, blocks = -(-N // LANES), K // 32
    for name, t, shape in (("w", w, (tiles, blocks, kept.words, LANES)), ("index", index, (tiles, blocks, LANES))):
        if t.shape != shape or t.dtype != torch.int32 or not t.is_contiguous():
            have = f"{t.dtype} {list(t.shape)}"
            raise ValueError(f"{name} must be a contiguous int32 {list(shape)} for [{N}, {K}] of {kept}; got {have}")
    if kept.values == torch.int8 and (scale is None or scale.shape not in ((N,), (N, 1)) or not scale.is_contiguous()):
        got = None if scale is None else list(scale.shape)
        raise ValueError(f"scale of int8 values must be a contiguous [{N}, 1]: one for each row; got {got}")


@triton.jit
def nothing():
    """A tuple for others to be added to."""
    return ()


@triton.jit
def highest(m, PTX: tl.constexpr):
    """The place of the highest bit set of int32 m; any place if it is 0."""
    if PTX:
        return tl.inline_asm_elementwise("bfind.u32 $0, $1;", "=r,r", [m], tl.int32, True, 1)
    else:  # the exponent of a float that holds all 32 bits
        wide = m.to(tl.uint32, bitcast=True).to(tl.float64).to(tl.int64, bitcast=True)
        return ((wide >> 52) - 1023).to(tl.int32) & 31


@triton.jit
def shifted(m, by: tl.constexpr, PTX: tl.constexpr):
    """m >> by. As PTX, or the compiler makes three instructions of (m >> by) & 3 | c, which are two."""
    if PTX:
        return tl.inline_asm_elementwise(f"shr.u32 $0, $1, {by};", "=r,r", [m], tl.int32, True, 1)
    else:
        return m >> by


@triton.jit
def half_word(word, high: tl.constexpr, BF16: tl.constexpr):
    """One of the two floats of 16 bits in a word, in float32."""
    if BF16:
        return (word & -65536 if high else word << 16).to(tl.float32, bitcast=True)
    else:
        return (word >> 16 if high else word).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def value_of(words, magic, j: tl.constexpr, BITS: tl.constexpr, BF16: tl.constexpr, PTX: tl.constexpr):
    """Kept value j of a block, in float32; integers without their scale."""
    if BITS == 32:
        return words[j].to(tl.float32, bitcast=True)
    elif BITS == 16:
        return half_word(words[j // 2], j % 2 == 1, BF16)
    else:  # or-ed into the mantissa of 2^23, an integer is what exceeds it: no conversion, of which there are few
        # `magic` is that constant, in a register: from the code it would be made anew for every value
        if PTX:
            q = tl.inline_asm_elementwise(
                f"prmt.b32 $0, $1, $2, 0x744{j % 4};", "=r,r,r", [words[j // 4], magic], tl.int32, True, 1
            )
        else:
            q = ((words[j // 4] >> (j % 4 * 8)) & 255) | magic
        return q.to(tl.float32, bitcast=True) - 8388736.0


@triton.jit
def count_bits(m, PTX: tl.constexpr):
    """The number of bits set of int32 m."""
    if PTX:
        return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [m], tl.int32, True, 1)
    else:
        m = m - ((m >> 1) & 0x55555555)
        m = (m & 0x33333333) + ((m >> 2) & 0x33333333)
        m = (m + (m >> 4)) & 0x0F0F0F0F
        m += m >> 8
        return (m + (m >> 16)) & 63
