"""Attention of a few new queries over a cache of keys and values: softmax(q k^T * scale + ...) v, in one launch.

The queries that share keys, the heads of a group times the new positions, are the rows of one tile; the keys are split
among programs, and within a program among its warps, so that no warp waits for another while it reads.
"""

from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .decode_config import (
    CONSTANTS,
    MULTIPROCESSORS,
    NUMBERS,
    About,
    Config,
    about,
    check,
    check_addresses,
    config,
    splits,
)
from .decode_merge import finite, over_warps, share, store_parts, stretch
from .kv_load import cols, empty_sums, load_queries, parts_of, rows, scores, weigh, width_of
from .launch import Plan, launch, on_device
from .operands import device_of, interpreted, uses_ptx
from .tickets import take_tickets

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tanh(x):
    return 1 - 2 / (1 + tl.exp2(x * (2 * LOG2E)))


@triton.jit
def _logits(s, scale, softcap, slope, distance, SOFTCAP: tl.constexpr):
    """Products -> logits in units of log 2. distance: of keys from queries, not positive."""
    if SOFTCAP:
        s = _tanh(s * (scale / softcap)) * (softcap * LOG2E)
    else:
        s = s * (scale * LOG2E)
    if slope is not None:
        s += rows(slope * LOG2E) * distance.to(tl.float32)
    return s


@triton.jit
def _seen(mask, keys, valid, pos, window, SQ: tl.constexpr, WINDOW: tl.constexpr):
    """Which keys the rows may see [.., M or 1, keys]. mask: pointers to the rows' first entries, or None."""
    seen = cols(valid)
    if SQ > 1:
        seen &= cols(keys) <= rows(pos)
        if WINDOW:
            seen &= cols(keys) > rows(pos) - window
    if mask is not None:
        seen &= tl.load(rows(mask) + cols(keys), mask=seen, other=0) != 0
    return seen


@triton.jit
def _page(block_table, n, offs_n, low, high, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The pages of the keys from n, or the one that has them all. Asked for a block ahead, for loads follow loads."""
    if PAGE >= BLOCK_N:
        page = tl.load(block_table + n // PAGE, mask=n < high, other=0)
    else:
        keys = n + offs_n
        page = tl.load(block_table + keys // PAGE, mask=(keys >= low) & (keys < high), other=0)
    return page


# A binary serves every length, batch and layout of the cache: all it may assume of strides is that UNIT divides them.
@triton.jit(do_not_specialize=NUMBERS)
def _decode_attention(
    q, k, v, k_scale, v_scale, kv_end, kv_start, block_table, sinks, slopes, mask, out, partial, tickets,
    HQ, HKV, L, scale, softcap, window,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl,
    stride_ksb, stride_ksh, stride_ksl, stride_vsb, stride_vsh, stride_vsl,
    stride_tb, stride_mb, stride_mh, stride_ms,
    SQ: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, FORMAT: tl.constexpr, PAGE: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, UNIT_Q: tl.constexpr, UNIT: tl.constexpr, UNIT_S: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WARPS: tl.constexpr, PTX: tl.constexpr,
    STEPS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One tile of rows over one split of its keys; the last split to finish puts the splits together.

    Rows are query heads of a group, then new positions. WARPS: stretches a block of keys is cut into, each with sums
    of its own, for a warp each; 1 if the warps share one. PAGE: keys of a page, 0 for a cache without pages.
    """
    tile, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    dtype: tl.constexpr = tl.float16 if FORMAT == 4 and q.dtype.element_ty != tl.float32 else q.dtype.element_ty
    TOTAL: tl.constexpr = HEADS * SQ
    TILES_M: tl.constexpr = (TOTAL + BLOCK_M - 1) // BLOCK_M
    LAST: tl.constexpr = 1 if WARPS == 1 else 2  # the axis of keys
    BLOCK: tl.constexpr = width_of(FORMAT, D)
    BLOCK_V: tl.constexpr = width_of(FORMAT, DV)
    PARTS: tl.constexpr = parts_of(FORMAT, DV)
    pair, row = tile // TILES_M, tile % TILES_M * BLOCK_M
    batch, head = (pair // HKV).to(tl.int64), pair % HKV

    offs_m, offs_n = row + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    if WARPS > 1:
        offs_m = tl.zeros((WARPS, 1), tl.int32) + offs_m[None, :]  # [WARPS, BLOCK_M]
        offs_n = offs_n.reshape(WARPS, BLOCK_N // WARPS)
    mask_m, own, pos = offs_m < TOTAL, head * HEADS + offs_m % HEADS, tl.load(kv_end + batch) - SQ + offs_m // HEADS
    low, high, begin, active = stretch(kv_end, kv_start, batch, row, split, splits, L, window,
                                        SQ, HEADS, WINDOW, BLOCK_M, BLOCK_N)  # fmt: skip
    if split >= active:
        return

    query = (offs_m // HEADS).to(tl.int64)
    q_ptrs = q + (batch * stride_qb + own.to(tl.int64) * stride_qh + query * stride_qs) * UNIT_Q
    queries = load_queries(q_ptrs, mask_m, dtype, FORMAT, D, BLOCK)
    slope = None if slopes is None else tl.load(slopes + own, mask=mask_m, other=0.0).to(tl.float32)
    mask_ptrs = mask
    if mask is not None:
        mask_ptrs = mask + (batch * stride_mb + own.to(tl.int64) * stride_mh + query * stride_ms)
    if FORMAT:
        k, v = k.to(tl.pointer_type(tl.int16), bitcast=True), v.to(tl.pointer_type(tl.int16), bitcast=True)
        k_scale += head.to(tl.int64) * stride_ksh * UNIT_S
        v_scale += head.to(tl.int64) * stride_vsh * UNIT_S
    k += head.to(tl.int64) * stride_kh * UNIT
    v += head.to(tl.int64) * stride_vh * UNIT
    if PAGE:
        block_table += batch * stride_tb
        next_page = _page(block_table, begin, offs_n, low, high, PAGE, BLOCK_N)

    m, total = tl.full(offs_m.shape, float("-inf"), tl.float32), tl.zeros(offs_m.shape, tl.float32)
    sums = empty_sums(total, FORMAT, DV, BLOCK_V)
    for step in range(0, tl.cdiv(high - begin, BLOCK_N) if STEPS is None else STEPS):
        keys = begin + step * BLOCK_N + offs_n
        valid = (keys >= low) & (keys < high)
        page, slot = batch, keys
        if PAGE:
            page, slot = next_page.to(tl.int64), keys % PAGE
            next_page = _page(block_table, begin + (step + 1) * BLOCK_N, offs_n, low, high, PAGE, BLOCK_N)
        offs_k = (page * stride_kb + slot.to(tl.int64) * stride_kl) * UNIT
        offs_v = (page * stride_vb + slot.to(tl.int64) * stride_vl) * UNIT
        offs_ks, offs_vs = offs_k, offs_v
        if FORMAT:
            offs_ks = (page * stride_ksb + slot.to(tl.int64) * stride_ksl) * UNIT_S
            offs_vs = (page * stride_vsb + slot.to(tl.int64) * stride_vsl) * UNIT_S
        s = scores(queries, k, k_scale, offs_k, offs_ks, valid, FORMAT, D, BLOCK, PTX)
        s = _logits(s, scale, softcap, slope, cols(keys) - rows(pos), SOFTCAP)
        s = tl.where(_seen(mask_ptrs, keys, valid, pos, window, SQ, WINDOW), s, float("-inf"))
        top = tl.maximum(m, tl.max(s, LAST))
        p, alpha = tl.exp2(s - rows(finite(top))), tl.exp2(m - finite(top))
        total = total * alpha + tl.sum(p, LAST)
        m = top
        sums = weigh(sums, alpha, p, v, v_scale, offs_v, offs_vs, valid, dtype, FORMAT, DV, BLOCK_V, PTX)
    if WARPS > 1:
        sums, m, total = over_warps(sums, m, total, PARTS + (FORMAT == 4))

    out += batch * (SQ * HQ * DV)
    if partial is None:
        store_parts(out, sums, m, total, sinks, row, head, HQ, SQ, HEADS, DV, FORMAT, BLOCK_V)
    elif active == 1:
        store_parts(out, sums, m, total, sinks, row, head, HQ, SQ, HEADS, DV, FORMAT, BLOCK_V)
    else:
        ROWS: tl.constexpr = BLOCK_M if TOTAL > BLOCK_M else TOTAL
        share(partial, tickets, active, sums, m, total, out, sinks, row, head, HQ,
              SQ, HEADS, ROWS, DV, FORMAT, BLOCK_V, SPLITS)  # fmt: skip


def decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_end: torch.Tensor,
    *,
    kv_start: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    format: str | None = None,
    block_table: torch.Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    num_splits: int | None = None,
    tile: Config | None = None,
) -> torch.Tensor:
    """softmax(scale * q k^T + ...) v over the keys that each query may see: [B, Hq, Sq, Dv] in q's dtype.

    As `fastllm.ops.decode_attention`, which explains the arguments. num_splits, tile: in place of what `splits` and
    `config` choose; for tests and measurements. The same call gives the same bits every time. ValueError for operands
    that do not fit, before anything is launched.
    """
    if q.dtype == torch.bfloat16 and interpreted(_decode_attention):
        # the interpreter multiplies the bits of bfloat16 as integers, and truncates when it converts to it
        dense = (k, v) if format else (k.float(), v.float())
        return decode_attention(
            q.float(), *dense, kv_end, kv_start=kv_start, k_scale=k_scale, v_scale=v_scale, format=format,
            block_table=block_table, scale=scale, window=window, softcap=softcap, sinks=sinks,
            alibi_slopes=alibi_slopes, mask=mask, num_splits=num_splits, tile=tile,
        ).to(q.dtype)  # fmt: skip
    operands = (q, k, v, k_scale, v_scale, kv_end, kv_start, block_table, sinks, alibi_slopes, mask)
    ready = _ready(tuple(map(about, operands)), format, scale, window, softcap, num_splits, tile, uses_ptx(q))
    if format:
        check_addresses(k, v, k_scale, v_scale)
    if q.stride(3) != 1:
        q = q.contiguous()
    B, Hq, Sq, _ = q.shape
    out = q.new_empty(B, Sq, Hq, ready.Dv)
    if out.numel():
        partial = tickets = None
        if ready.sums:
            partial = q.new_empty(ready.sums, dtype=torch.float32)
            tickets = take_tickets(ready.grid[0], q.device)
        pointers = (q, *operands[1:], out, partial, tickets)
        with on_device(q.device):
            launch(_decode_attention, ready.grid, pointers, ready.numbers, ready.plan, ready.kind)
    return out.transpose(1, 2)


class Ready(NamedTuple):
    """A launch, but for its tensors. sums: float32 that splits keep, 0 without them. kind: see `launch`."""

    grid: tuple[int, int, int]
    numbers: tuple[Any, ...]
    plan: Plan
    kind: tuple
    sums: int
    Dv: int


@lru_cache(maxsize=4096)
def _ready(
    operands: tuple[About | None, ...],
    format: str | None,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    num_splits: int | None,
    tile: Config | None,
    ptx: bool,
) -> Ready:
    """Cached: operands look like those of the layer before, and in a static cache like those of the step before."""
    p = check(operands, format, window, softcap)
    q = operands[0]
    assert q is not None
    device = q.device
    processors = device_of(device.index)[1] if device.type == "cuda" else MULTIPROCESSORS
    rows = p.Hq // p.Hkv * p.Sq
    fp32 = q.dtype == torch.float32
    biased = operands[9] is not None or operands[10] is not None
    tile = tile or config(rows, max(p.D, p.Dv), min(p.bits, 16), fp32, biased)
    tiles = -(-rows // tile.BLOCK_M) * p.B * p.Hkv
    kept = min(rows, tile.BLOCK_M)
    count = num_splits or splits(tiles, p.L, tile, p.key_bytes, 4 * kept * p.Dv, processors)
    numbers, units = p.numbers(1.0 / p.D**0.5 if scale is None else scale, softcap or 0.0, window or 0)
    inside = interpreted(_decode_attention)
    each = triton.cdiv(triton.cdiv(p.L, tile.BLOCK_N), count)
    constants = (p.Sq, p.Hq // p.Hkv, p.D, p.Dv, p.bits if format else 0, p.page, window is not None, bool(softcap),
                 *units, tile.BLOCK_M, tile.BLOCK_N, tile.WARPS, ptx,
                 each if inside else None, count if inside else None)  # fmt: skip
    kind = (device, *(None if t is None else t.dtype for t in operands), count > 1)
    kind += tuple(n >= 1 << 31 for n in numbers)
    sums = tiles * count * kept * (p.Dv + 2) if count > 1 else 0
    return Ready((tiles, count, 1), numbers, _plan(constants, tile.num_warps, tile.num_stages), kind, sums, p.Dv)


@cache
def _plan(constants: tuple, num_warps: int, num_stages: int) -> Plan:
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return Plan(0, 0, dict(zip(CONSTANTS, constants, strict=True)), options, {})
