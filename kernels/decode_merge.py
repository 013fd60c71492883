"""What programs that share a row's keys do before and after they read them: which keys are whose, what each leaves to
the others, and how the last of them puts it together."""

import triton
import triton.language as tl

from .kv_load import columns, nothing, parts_of, value_of

LOG2E = tl.constexpr(1.4426950408889634)
MERGE = tl.constexpr(16384)  # numbers of partial sums that are read at a time


@triton.jit
def stretch(
    kv_end, kv_start, batch, row, split, splits, L, window,
    SQ: tl.constexpr, HEADS: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(low, high, begin, active): a split has the keys from `begin`, of those from low to high; `active` have any.

    Whole blocks are shared out, of those that some row sees, which only the device knows. The first split always
    counts as active: it writes the zeros of rows that see nothing.
    """
    after = tl.load(kv_end + batch) - SQ
    high = tl.minimum(after + tl.minimum(SQ, (row + BLOCK_M - 1) // HEADS + 1), L)
    low = row * 0
    if kv_start is not None:
        low = tl.maximum(low, tl.load(kv_start + batch))
    if WINDOW:
        low = tl.maximum(low, after + row // HEADS - window + 1)
    first = low // BLOCK_N
    blocks = tl.maximum(tl.cdiv(tl.maximum(high, 0), BLOCK_N) - first, 0)
    each = tl.cdiv(blocks, splits)
    begin = (first + split * each) * BLOCK_N
    active = tl.maximum(tl.cdiv(blocks, tl.maximum(each, 1)), 1)
    return low, tl.minimum(high, begin + each * BLOCK_N), begin, active


@triton.jit
def finite(m):
    """m, or 0 for rows that have seen nothing yet, whose differences would be NaN."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def over_warps(sums, m, total, COUNT: tl.constexpr):
    """What the warps of a program have found, each for keys of its own -> sums [M, BLOCK], m [M], total [M]."""
    top = tl.max(m, 0)
    w = tl.exp2(m - finite(top)[None, :])  # [WARPS, M]
    new = nothing()
    for i in tl.static_range(COUNT):
        new = new + (tl.sum(sums[i] * w[:, :, None], 0),)
    return new, top, tl.sum(total * w, 0)


@triton.jit
def write(out, acc, m, total, sinks, row, head, column, HQ, SQ: tl.constexpr, HEADS: tl.constexpr, DV: tl.constexpr):
    """out = acc / total for rows from `row`, or 0 where they saw nothing; a sink's logit joins the denominator."""
    offs_m = row + tl.arange(0, acc.shape[0])
    own, mask = head * HEADS + offs_m % HEADS, offs_m < HEADS * SQ
    if sinks is not None:
        sink = tl.load(sinks + own, mask=mask, other=0.0).to(tl.float32) * LOG2E
        top = tl.maximum(m, sink)
        total = total * tl.exp2(m - finite(top)) + tl.exp2(sink - finite(top))
        acc *= tl.exp2(m - finite(top))[:, None]
    empty = (total == 0)[:, None]
    y = tl.where(empty, 0.0, acc / tl.where(empty, 1.0, total[:, None]))
    out_ptrs = out + (offs_m // HEADS * HQ + own)[:, None] * DV + column[None, :]
    tl.store(out_ptrs, y.to(out.dtype.element_ty), mask=mask[:, None] & (column < DV)[None, :])


@triton.jit
def store_parts(
    out, sums, m, total, sinks, row, head, HQ,
    SQ: tl.constexpr, HEADS: tl.constexpr, DV: tl.constexpr, FORMAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    for part in tl.static_range(parts_of(FORMAT, DV)):
        column = columns(part, FORMAT, DV, BLOCK)
        write(out, value_of(sums, part, FORMAT, DV), m, total, sinks, row, head, column, HQ, SQ, HEADS, DV)


@triton.jit
def keep_parts(
    partial,
    maxima,
    sums,
    m,
    total,
    split,
    ROWS: tl.constexpr,
    DV: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A split's sums, to partial [splits, ROWS, DV], and m and total, to maxima [splits, 2, ROWS]."""
    offs_m = tl.arange(0, m.shape[0])
    mask = offs_m < ROWS
    for part in tl.static_range(parts_of(FORMAT, DV)):
        column = columns(part, FORMAT, DV, BLOCK)
        at = partial + (split * ROWS + offs_m)[:, None] * DV + column[None, :]
        tl.store(at, value_of(sums, part, FORMAT, DV), mask=mask[:, None] & (column < DV)[None, :])
    tl.store(maxima + split * (2 * ROWS) + offs_m, m, mask=mask)
    tl.store(maxima + split * (2 * ROWS) + ROWS + offs_m, total, mask=mask)


@triton.jit
def merge(
    partial, maxima, active, limit, out, sinks, row, head, HQ,
    SQ: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """Put together what `_keep_parts` left, many splits at a time, always in their order."""
    BLOCK_R: tl.constexpr = triton.next_power_of_2(ROWS)
    BLOCK: tl.constexpr = triton.next_power_of_2(DV)
    CHUNK: tl.constexpr = MERGE // (BLOCK_R * BLOCK) if BLOCK_R * BLOCK < MERGE else 1
    offs_r, offs_d = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK_R, BLOCK), tl.float32)
    m, total = tl.full((BLOCK_R,), float("-inf"), tl.float32), tl.zeros((BLOCK_R,), tl.float32)
    for first in range(0, limit, CHUNK):
        split = first + tl.arange(0, CHUNK)
        mask = (split < active)[:, None] & (offs_r < ROWS)[None, :]
        at = maxima + split[:, None] * (2 * ROWS) + offs_r[None, :]
        ms = tl.load(at, mask=mask, other=float("-inf"), cache_modifier=".cg")  # [CHUNK, BLOCK_R]
        ls = tl.load(at + ROWS, mask=mask, other=0.0, cache_modifier=".cg")
        at = partial + (split[:, None] * ROWS + offs_r[None, :])[:, :, None] * DV + offs_d
        parts = tl.load(at, mask=mask[:, :, None] & (offs_d < DV), other=0.0, cache_modifier=".cg")
        top = tl.maximum(m, tl.max(ms, 0))
        w, alpha = tl.exp2(ms - finite(top)[None, :]), tl.exp2(m - finite(top))
        acc = acc * alpha[:, None] + tl.sum(parts * w[:, :, None], 0)
        total = total * alpha + tl.sum(ls * w, 0)
        m = top
    write(out, acc, m, total, sinks, row, head, offs_d, HQ, SQ, HEADS, DV)


@triton.jit
def share(
    partial, tickets, active, sums, m, total, out, sinks, row, head, HQ,
    SQ: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, DV: tl.constexpr, FORMAT: tl.constexpr,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Leave a split's sums to the others, or, for the last to come, put them all together.

    partial: for all tiles sums [tiles, splits, ROWS, DV], then maxima and totals [tiles, splits, 2, ROWS].
    """
    tile, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    mine = tile.to(tl.int64) * splits
    maxima = partial + tl.num_programs(0).to(tl.int64) * splits * (ROWS * DV) + mine * (2 * ROWS)
    partial += mine * (ROWS * DV)
    keep_parts(partial, maxima, sums, m, total, split, ROWS, DV, FORMAT, BLOCK)
    tl.debug_barrier()  # all threads have written before one of them says so
    if tl.atomic_add(tickets + tile, 1, sem="acq_rel", scope="gpu") == active - 1:
        limit = active if SPLITS is None else SPLITS
        merge(partial, maxima, active, limit, out, sinks, row, head, HQ, SQ, HEADS, ROWS, DV)
        tl.store(tickets + tile, 0)
