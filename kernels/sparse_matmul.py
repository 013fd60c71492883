"""y = x @ w.T + bias for weights of which equally many in each 32 columns are kept, for the few rows of decoding.

Weights lie in lanes (see sparse_parts.py): all threads of a warp need values of the same 32 columns of x, which they
have in registers, one each. What a kept value is multiplied by comes from another thread's register; no gather ever
goes to memory.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import Plan, launch, on_device
from .operands import device_of, interpreted, uses_ptx
from .quant_matmul import INVARIANT_ROWS, _arrive, _sum_parts
from .sparse_parts import BITS, Kept, check_lanes, half_word, highest, nothing, shifted, value_of
from .tickets import take_tickets

WARPS = 8  # of a program: each takes every eighth block of its 32 rows
MOST_ROWS = 16  # of x in a program: each has a sum and a stretch of x in every thread's registers
MULTIPROCESSORS = 132  # of an H100 or H200
PROGRAMS = 4  # on a multiprocessor: 32 warps, each with a block or two on its way
MOST_SPLITS = 16


class Config(NamedTuple):
    """A program computes 32 columns x BLOCK_M rows of y; its warps read UNROLL blocks each at a step.

    SPLIT_K programs share the K of one tile. Of these only the first two depend on M, and they do not change the order
    in which a sum is added up: a row of y has the same bits whatever the other rows of x are, and however many.
    """

    BLOCK_M: int
    UNROLL: int
    SPLIT_K: int


def turn(words: int) -> int:
    """Blocks that the share of a warp is a multiple of: weights of 64 to 128 bytes a row."""
    return 2 if words <= 8 else 1


@cache
def config(M: int, N: int, K: int, words: int, multiprocessors: int = MULTIPROCESSORS) -> Config:
    """The tile for x [M, K], w [N, K] with `words` words a block: by arithmetic, programs enough to fill a device."""
    turns = -(-K // (32 * WARPS * turn(words)))
    enough = -(-PROGRAMS * multiprocessors // -(-N // 32))
    shares = [s for s in range(1, min(MOST_SPLITS, turns) + 1) if -(-turns // -(-turns // s)) == s]
    # equal shares, if some more programs than enough bring them
    even = [s for s in shares if enough <= s <= 2 * enough and turns % s == 0]
    split = next((s for s in (*even, *shares) if s >= enough), max(shares, default=1))
    BLOCK_M = min(triton.next_power_of_2(M), MOST_ROWS)
    return Config(BLOCK_M, turn(words) if BLOCK_M < 8 else 1, split)


@triton.jit
def _load(ptrs, mask, policy: tl.constexpr):
    if mask is None:
        return tl.load(ptrs, eviction_policy=policy)
    else:
        return tl.load(ptrs, mask=mask, other=0, eviction_policy=policy)


@triton.jit
def _load_words(ptrs, mask, COUNT: tl.constexpr):
    words = nothing()
    for i in tl.static_range(COUNT):
        words = words + (_load(ptrs + i * 32, mask, "evict_first"),)
    return words


@triton.jit
def _load_rows(x_ptrs, rows, mask, BLOCK_M: tl.constexpr, PAIRS: tl.constexpr):
    """A block of x, [WARPS, 32] a row: float32, or with PAIRS two rows of 16 bits in each word."""
    found = nothing()
    for m in tl.static_range(0, BLOCK_M, 2 if PAIRS else 1):
        low = _load(x_ptrs + rows[m], mask, "")
        if PAIRS:
            high = _load(x_ptrs + rows[m + 1], mask, "").to(tl.int16, bitcast=True).to(tl.int32)
            found = found + ((low.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) | (high << 16),)
        else:
            found = found + (low.to(tl.float32),)
    return found


@triton.jit
def _add(acc, xs, column, value, BLOCK_M: tl.constexpr, PAIRS: tl.constexpr, X_BF16: tl.constexpr):
    """acc + x[:, column] * value, row by row. The threads of a warp have its 32 columns of x, and pass them on.

    Rounded once by name: whether the compiler joins a product and a sum must not depend on how many rows there are.
    """
    sums = nothing()
    for m in tl.static_range(0, BLOCK_M, 2 if PAIRS else 1):
        if PAIRS:
            pair = tl.gather(xs[m // 2], column, 1)
            low, high = half_word(pair, False, X_BF16), half_word(pair, True, X_BF16)
            sums = sums + (tl.fma(low, value, acc[m]), tl.fma(high, value, acc[m + 1]))
        else:
            sums = sums + (tl.fma(tl.gather(xs[m], column, 1), value, acc[m]),)
    return sums


@triton.jit
def _halve(parts, half: tl.constexpr):
    pairs = nothing()
    for i in tl.static_range(half):
        pairs = pairs + (tl.join(parts[i], parts[i + half]),)
    return pairs


@triton.jit
def _sum_warps(acc, WARPS: tl.constexpr, BLOCK_M: tl.constexpr):
    """BLOCK_M tensors [WARPS, 32] -> their sums over the warps, [32, BLOCK_M]."""
    parts = acc
    if BLOCK_M >= 16:
        parts = _halve(parts, BLOCK_M // 2)  # [WARPS, 32, 2]
    if BLOCK_M >= 8:
        parts = _halve(parts, 4)
    if BLOCK_M >= 4:
        parts = _halve(parts, 2)
    if BLOCK_M >= 2:
        parts = _halve(parts, 1)
    return tl.sum(parts[0].reshape(WARPS, 32, BLOCK_M), 0)


# Not specialised on the number of rows or of steps: a binary serves any of them.
@triton.jit(do_not_specialize=["M", "steps"])
def _sparse_matmul(
    x, w, index, scale, bias, y, partial, tickets,
    M, N, blocks, steps,
    stride_xm,
    KEPT: tl.constexpr, QUADS: tl.constexpr, BITS: tl.constexpr, BF16: tl.constexpr, WORDS: tl.constexpr,
    WARPS: tl.constexpr, BLOCK_M: tl.constexpr, UNROLL: tl.constexpr, SPLIT_K: tl.constexpr,
    EVEN: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """One tile of y [BLOCK_M, 32]; with SPLIT_K > 1, the part of it that a stretch of K gives, and the last to finish
    adds them up.

    A thread has one row of w, and takes its kept values one after the other: bits of the index from the highest down,
    or positions, two bits each, in fours. EVEN: programs and warps share the blocks without rest.
    """
    tile, pid_k = tl.program_id(0), tl.program_id(1)
    tiles_m = tl.cdiv(M, BLOCK_M)  # neighbours share weights
    pid_n, pid_m = tile // tiles_m, tile % tiles_m
    lanes, warps = tl.arange(0, 32)[None, :], tl.arange(0, WARPS)[:, None]
    start = pid_k * steps * (UNROLL * WARPS) + warps  # [WARPS, 1]
    place = (pid_n.to(tl.int64) * blocks + start) * 32
    index_ptrs, w_ptrs, x_ptrs = index + place + lanes, w + place * WORDS + lanes, x + start * 32 + lanes
    PAIRS: tl.constexpr = BLOCK_M > 2 and x.dtype.element_ty != tl.float32
    X_BF16: tl.constexpr = x.dtype.element_ty == tl.bfloat16
    rows, acc = nothing(), nothing()
    for m in tl.static_range(BLOCK_M):  # rows past M repeat the last one, cheaper than a mask
        rows = rows + (tl.minimum(pid_m * BLOCK_M + m, M - 1).to(tl.int64) * stride_xm,)
        acc = acc + (tl.zeros((WARPS, 32), tl.float32),)
    magic = 0x4B000000 | (N >> 31)  # N is positive, which the compiler does not know
    for step in range(0, steps):
        masks, words, xs = nothing(), nothing(), nothing()
        for u in tl.static_range(UNROLL):  # all loads first
            # what is beyond reads as 0, which adds nothing
            inside = None if EVEN else start + (step * UNROLL + u) * WARPS < blocks
            masks = masks + (_load(index_ptrs + u * WARPS * 32, inside, "evict_first"),)  # [WARPS, 32]
            words = words + (_load_words(w_ptrs + u * WARPS * WORDS * 32, inside, WORDS),)
            xs = xs + (_load_rows(x_ptrs + u * WARPS * 32, rows, inside, BLOCK_M, PAIRS),)
        index_ptrs += UNROLL * WARPS * 32
        w_ptrs += UNROLL * WARPS * WORDS * 32
        x_ptrs += UNROLL * WARPS * 32
        for u in tl.static_range(UNROLL):
            left = masks[u]
            for i in tl.static_range(KEPT):
                if QUADS:
                    column = (shifted(left, 2 * i, PTX) & 3) | (i // 2 * 4)
                    value = value_of(words[u], magic, i, BITS, BF16, PTX)
                else:
                    column = highest(left, PTX)
                    left ^= 1 << column
                    value = value_of(words[u], magic, KEPT - 1 - i, BITS, BF16, PTX)
                acc = _add(acc, xs[u], column, value, BLOCK_M, PAIRS, X_BF16)

    total = _sum_warps(acc, WARPS, BLOCK_M)  # [32, BLOCK_M]
    offs_n = pid_n * 32 + tl.arange(0, 32)
    offs_m = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    mask_n, rows_n = offs_n < N, tl.minimum(offs_n, N - 1)
    mask = mask_n[:, None] & (offs_m < M)[None, :]
    if SPLIT_K > 1:
        part_ptrs, size = partial + offs_m[None, :] * N + offs_n[:, None], M.to(tl.int64) * N
        if _arrive(part_ptrs + pid_k * size, total, mask, tickets + tile) < SPLIT_K - 1:
            return
        total = _sum_parts(part_ptrs, size, mask, SPLIT_K, 32, BLOCK_M)
        tl.store(tickets + tile, 0)
    if scale is not None:
        total *= tl.load(scale + rows_n).to(tl.float32)[:, None]
    if bias is not None:
        total += tl.load(bias + rows_n).to(tl.float32)[:, None]
    tl.store(y + offs_m[None, :] * N + offs_n[:, None], total.to(y.dtype.element_ty), mask=mask)


def sparse_matmul(
    x: torch.Tensor,
    w: torch.Tensor,
    index: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    N: int,
    kept: Kept,
    tile: Config | None = None,
) -> torch.Tensor:
    """y[m, n] = scale[n] * sum over the kept k of x[m, k] * w[n, k] + bias[n], in float32; y [M, N] of x's dtype.

    x:     [M, K] float16, bfloat16 or float32, any strides
    w:     int32 [ceil(N / 32), K / 32, words, 32], and index int32 [ceil(N / 32), K / 32, 32]: see sparse_parts.py
    scale: [N] or [N, 1], any floating-point type, of integer values; not read for floats
    bias:  [N] contiguous or None
    tile:  in place of `config`'s; for measurements

    A row of y has the same bits every time, whatever the other rows of x are. An infinity or a NaN in x goes to those
    rows of w only that keep its column. Raises ValueError for operands that do not fit.
    """
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"x must be a floating-point [M, K], got {x.dtype} {list(x.shape)}")
    K, y = x.shape[1], x.new_empty(len(x), N)
    check_lanes(w, index, scale, N, K, kept)
    if bias is not None and (bias.shape != (N,) or not bias.is_contiguous()):
        raise ValueError(f"bias must be a contiguous [{N}], got {list(bias.shape)}")
    if y.numel() == 0:
        return y
    if x.dtype == torch.bfloat16 and interpreted(_sparse_matmul):  # which truncates when it converts to bfloat16
        return sparse_matmul(x.float(), w, index, scale, bias, N, kept, tile).to(x.dtype)
    x = x if x.stride(1) == 1 else x.contiguous()
    about = device_of(x.device.index)[1:] if x.is_cuda else ()
    scale = scale if kept.values == torch.int8 else None
    for rows, out in zip(x.split(INVARIANT_ROWS), y.split(INVARIANT_ROWS), strict=True):  # bounds the partial sums
        _launch(rows, w, index, scale, bias, out, kept, tile or config(len(rows), N, K, kept.words, *about))
    return y


def _launch(
    x: torch.Tensor,
    w: torch.Tensor,
    index: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    kept: Kept,
    tile: Config,
) -> None:
    (M, N), K = y.shape, x.shape[1]
    plan = _plan(M, N, K, kept, tile, uses_ptx(x))
    partial = tickets = None
    if tile.SPLIT_K > 1:
        partial = x.new_empty(tile.SPLIT_K, M, N, dtype=torch.float32)
        tickets = take_tickets(plan.tiles, x.device)
    dtypes = tuple(None if t is None else t.dtype for t in (x, scale, bias))
    with on_device(x.device):
        pointers = (x, w, index, scale, bias, y, partial, tickets)
        numbers = (M, N, K // 32, plan.steps, x.stride(0))
        launch(_sparse_matmul, (plan.tiles, tile.SPLIT_K, 1), pointers, numbers, plan, (dtypes, x.stride(0), x.device))


@cache
def _plan(M: int, N: int, K: int, kept: Kept, tile: Config, PTX: bool) -> Plan:
    """Cached: to work it out anew would double the cost of a launch."""
    each = turn(kept.words)
    steps = -(-K // (32 * WARPS * each * tile.SPLIT_K)) * (each // tile.UNROLL)
    constants = {
        "KEPT": kept.number,
        "QUADS": kept.quads,
        "BITS": BITS[kept.values],
        "BF16": kept.values == torch.bfloat16,
        "WORDS": kept.words,
        "WARPS": WARPS,
        "BLOCK_M": tile.BLOCK_M,
        "UNROLL": tile.UNROLL,
        "SPLIT_K": tile.SPLIT_K,
        "EVEN": K == 32 * WARPS * tile.UNROLL * steps * tile.SPLIT_K,
        "PTX": PTX,
    }
    tiles = -(-N // 32) * -(-M // tile.BLOCK_M)
    if interpreted(_sparse_matmul):
        steps = tl.constexpr(steps)  # NumPy 2.4 refuses a tensor as a loop's bound
    return Plan(tiles, steps, constants, {"num_warps": WARPS}, {})
