"""The dense form of weights in lanes (see sparse_parts.py), zeros and all, for products with many rows."""

import torch
import triton
import triton.language as tl

from .launch import on_device
from .operands import interpreted, uses_ptx
from .sparse_parts import BITS, LANES, Kept, check_lanes, count_bits

BLOCKS = 4  # of 32 columns, in a program: it writes 256 bytes of each of its 32 rows


@triton.jit
def _sparse_expand(
    w, index, scale, y,
    N, blocks,
    QUADS: tl.constexpr, BITS: tl.constexpr, BF16: tl.constexpr, WORDS: tl.constexpr,
    BLOCKS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """One tile of y, 32 rows x BLOCKS * 32 columns. An element finds out how many before it in its block are kept."""
    pid_n, pid_k = tl.program_id(0), tl.program_id(1)
    lanes = tl.arange(0, 32)[:, None]
    offs = tl.arange(0, BLOCKS * 32)[None, :]
    block, column = pid_k * BLOCKS + offs // 32, offs % 32  # [1, BLOCKS * 32]
    offs_n = pid_n * 32 + lanes
    inside = block < blocks
    mask = (offs_n < N) & inside
    first = pid_n.to(tl.int64) * blocks * 32
    m = tl.load(index + first + (block * 32 + lanes), mask=inside, other=0)  # [32, BLOCKS * 32]
    if QUADS:
        both = m >> (column // 4 * 4)
        low, high, at = both & 3, (both >> 2) & 3, column % 4
        kept = (at == low) | (at == high)
        rank = column // 4 * 2 + (at == high).to(tl.int32)
    else:
        kept = ((m >> column) & 1) != 0
        rank = count_bits(m & ((1 << column) - 1), PTX)
    place = (block * WORDS + rank * BITS // 32) * 32 + lanes
    word = tl.load(w + first * WORDS + place, mask=kept & inside, other=0)
    if BITS == 8:
        value = ((word >> (rank % 4 * 8)) & 255).to(tl.float32) - 128.0
        value *= tl.load(scale + tl.minimum(offs_n, N - 1)).to(tl.float32)
    elif BITS == 16 and BF16:
        value = tl.where(rank % 2 == 1, word & -65536, word << 16).to(tl.float32, bitcast=True)
    elif BITS == 16:
        value = (word >> (rank % 2 * 16)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        value = word.to(tl.float32, bitcast=True)
    y_ptrs = y + offs_n.to(tl.int64) * blocks * 32 + (block * 32 + column)
    tl.store(y_ptrs, tl.where(kept, value, 0.0).to(y.dtype.element_ty), mask=mask)


def sparse_expand(
    w: torch.Tensor,
    index: torch.Tensor,
    scale: torch.Tensor | None,
    N: int,
    kept: Kept,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The weight [N, K] of `dtype`, computed in float32 and rounded once; 0 where nothing is kept.

    Operands as for `sparse_matmul`; they may be a slice of whole tiles. Raises ValueError for what does not fit.
    """
    K = 32 * index.shape[1]
    check_lanes(w, index, scale, N, K, kept)
    y = torch.empty(N, K, dtype=dtype, device=w.device)
    if y.numel() == 0:
        return y
    if dtype == torch.bfloat16 and interpreted(_sparse_expand):  # which truncates when it converts to bfloat16
        return sparse_expand(w, index, scale, N, kept, torch.float32).to(dtype)
    with on_device(w.device):
        _sparse_expand[-(-N // LANES), -(-K // (32 * BLOCKS))](
            w, index, scale if kept.values == torch.int8 else None, y,
            N, K // 32,
            QUADS=kept.quads, BITS=BITS[kept.values], BF16=kept.values == torch.bfloat16, WORDS=kept.words,
            BLOCKS=BLOCKS, PTX=uses_ptx(w), num_warps=8,
        )  # fmt: skip
    return y
