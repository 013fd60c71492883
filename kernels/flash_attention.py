"""softmax(q @ k.T) @ v in one pass over the keys, for many queries at a time: FlashAttention-2, in Triton.

Keys go from right to left, so that the tiles that need a mask, at the diagonal, come first. On sm_90 the products of a
tile's weights and values run while the softmax of the next tile is computed (FlashAttention-3's overlap within a group
of warps). Source of the algorithm: Dao, arXiv 2307.08691; Shah et al., arXiv 2407.08608.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .attention_config import Config, check_features, check_mask, check_operands, check_ranges, columns
from .attention_config import config as tile_for
from .attention_parts import (
    add_values,
    attend,
    finish,
    key_ranges,
    load_columns,
    masked_steps,
    own_tile,
    rescale,
    store_columns,
)
from .launch import Plan, launch, on_device
from .operands import device_of, interpreted

LOG2E = 1.4426950408889634
NEAR = 24 << 20  # bytes of keys and values that programs which run at the same time share: they stay in the cache


# Not specialised on lengths: a binary serves every prompt.
@triton.jit(do_not_specialize=["window", "Hq", "Sq", "Sk", "tiles", "pairs", "section"])
def _flash_attention(
    q, k, v, out, lse, sinks, slopes, bias, kv_start, kv_end, cu_q, cu_k,
    scale, softcap, window, Hq, Sq, Sk, tiles, pairs, section,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ab, stride_bb, stride_bh, stride_bm, stride_bn,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, LOWEST: tl.constexpr,
    OVERLAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head.

    cu_q, cu_k: where sequences begin that lie one after another, Sq queries in all; else None. A tile beyond the end
    of its sequence has nothing to do. LOWEST: see `change_scores`. Offsets are 64 bits wide, but for those in a tile.
    """
    head, pid_m = own_tile(tiles, pairs, section, GROUP)
    b, h = (head // Hq).to(tl.int64), head % Hq
    h_q, h_k = h.to(tl.int64), (h // GROUP).to(tl.int64)
    if cu_q is None:
        row, q_len, end = b * Sq, Sq, Sk
        q_row, k_row, v_row = b * stride_qb, b * stride_kb, b * stride_vb
    else:
        row, first_k = tl.load(cu_q + b).to(tl.int64), tl.load(cu_k + b).to(tl.int64)
        q_len, end = (tl.load(cu_q + b + 1) - row).to(tl.int32), (tl.load(cu_k + b + 1) - first_k).to(tl.int32)
        q_row, k_row, v_row = row * stride_qm, first_k * stride_kn, first_k * stride_vn
    if pid_m * BLOCK_M >= q_len:
        return
    start = 0
    if kv_start is not None:
        start = tl.maximum(tl.load(kv_start + b), 0)
    if kv_end is not None:
        end = tl.minimum(tl.load(kv_end + b), end)

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    shift = end - q_len  # query i stands at position i + shift
    last_row = tl.minimum(pid_m * BLOCK_M + BLOCK_M, q_len) - 1 + shift
    wide, cap = window if WINDOW else None, softcap if SOFTCAP else None
    low, high, all_low, all_high = key_ranges(start, end, pid_m * BLOCK_M + shift, last_row, wide, CAUSAL)
    steps, right, left = masked_steps(low, high, all_low, all_high, BLOCK_N)
    k_head, v_head = k + k_row + h_k * stride_kh, v + v_row + h_k * stride_vh
    q_head, in_tile = q + q_row + h_q * stride_qh, tl.arange(0, BLOCK_M)
    q0 = load_columns(q_head, pid_m * BLOCK_M, in_tile, q_len - 1, stride_qm, D, 0, D0)
    q1 = load_columns(q_head, pid_m * BLOCK_M, in_tile, q_len - 1, stride_qm, D, D0, D1) if D1 else None
    slope, bias_rows = None, None
    if slopes is not None:
        slope = tl.load(slopes + b * stride_ab + h).to(tl.float32) * 1.4426950408889634
    if bias is not None:
        at = b * stride_bb + h_q * stride_bh + tl.minimum(offs_m, q_len - 1).to(tl.int64) * stride_bm
        bias_rows = bias + at[:, None]

    acc0, acc1 = tl.zeros((BLOCK_M, V0), tl.float32), tl.zeros((BLOCK_M, V1 if V1 else 1), tl.float32)
    m, total = tl.full((BLOCK_M,), float("-inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    p, alpha = tl.zeros((BLOCK_M, BLOCK_N), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    # one loop where a branch is cheaper than to fill the pipeline again, else one for each kind of tile
    for part in tl.static_range(1 if OVERLAP else 3 if WINDOW else 2):
        begin = 0 if part == 0 else right if part == 1 else left
        until = steps if OVERLAP or part == 2 or not WINDOW and part == 1 else right if part == 0 else left
        acc0, acc1, m, total, p, alpha = attend(
            acc0, acc1, m, total, p, alpha, q0, q1, k_head, v_head, bias_rows, slope,
            begin, until, low, steps, end, all_low, all_high, offs_m + shift,
            scale, cap, wide, stride_kn, stride_vn, stride_bn, D, D0, D1, DV, V0, V1,
            CAUSAL, LOWEST, OVERLAP, "some" if OVERLAP else "none" if part == 1 else "all", BLOCK_N,
        )  # fmt: skip
    if OVERLAP:
        if steps > 0:
            acc0, acc1 = rescale(acc0, acc1, alpha, V1)
            offs_n = tl.arange(0, BLOCK_N)
            acc0, acc1 = add_values(acc0, acc1, p, v_head, low, offs_n, end - 1, stride_vn, DV, V0, V1)

    sink = None if sinks is None else tl.load(sinks + h).to(tl.float32) * 1.4426950408889634
    factor, logarithm = finish(m, total, sink)
    acc0, acc1 = rescale(acc0, acc1, factor, V1)
    y_rows, mask_m = out + ((row + offs_m) * Hq + h)[:, None] * DV, (offs_m < q_len)
    store_columns(y_rows, acc0, mask_m, DV, 0, V0)
    if V1:
        store_columns(y_rows, acc1, mask_m, DV, V0, V1)
    if lse is not None:
        line = lse + ((b * Hq + h) * Sq if cu_q is None else h_q * Sq + row)
        tl.store(line + offs_m, logarithm, mask=mask_m)


class _Extras(NamedTuple):
    """What a launch takes beside q, k and v; see `flash_attention`. mask: [B, Hq, Sq, Sk], bool as uint8."""

    causal: bool
    scale: float
    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None
    slopes: torch.Tensor | None
    mask: torch.Tensor | None = None
    kv_start: torch.Tensor | None = None
    kv_end: torch.Tensor | None = None
    cu_q: torch.Tensor | None = None
    cu_k: torch.Tensor | None = None


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    kv_start: torch.Tensor | None = None,
    kv_end: torch.Tensor | None = None,
    return_lse: bool = False,
    config: Config | None = None,
) -> Any:
    """Attention as `fastllm.ops.attention` defines it: [B, Hq, Sq, Dv] in q's dtype, a view of [B, Sq, Hq, Dv].

    q: [B, Hq, Sq, D], k: [B, Hkv, Sk, D], v: [B, Hkv, Sk, Dv], Hkv divides Hq, D and Dv up to 256; float16, bfloat16
       or float32. Any strides; a copy is made where the innermost is not 1.
    sinks: [Hq]. alibi_slopes: [Hq] or [B, Hq]. mask: bool or float, broadcastable to [B, Hq, Sq, Sk]; where it hides a
       key, that may be NaN, but not its value. kv_start, kv_end: int32 [B]; outside anything may be.
    return_lse: also the logarithm of each softmax's denominator, sinks included, float32 [B, Hq, Sq].
    config: in place of the tile that `attention_config.config` gives; for measurements.

    Sums are float32; the same call gives the same bits every time. ValueError for operands that do not fit.
    """
    check_operands(q, k, v)
    (B, Hq, Sq, D), Sk = q.shape, k.shape[2]
    check_ranges(B, q.device, kv_start=kv_start, kv_end=kv_end)
    slopes, mask = check_features(B, Hq, window, softcap, sinks, alibi_slopes), check_mask(mask, (B, Hq, Sq, Sk))
    scale = D**-0.5 if scale is None else scale
    extras = _Extras(causal, scale, window, softcap, sinks, slopes, mask, kv_start, kv_end)
    out = q.new_empty(B, Sq, Hq, v.shape[-1])
    lse = q.new_empty(B, Hq, Sq, dtype=torch.float32) if return_lse else None
    _run(q, k, v, out, lse, B, Sq, extras, config)
    return out.transpose(1, 2) if lse is None else (out.transpose(1, 2), lse)


def flash_attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    return_lse: bool = False,
    config: Config | None = None,
) -> Any:
    """Attention within each of several sequences that lie one after another: [Tq, Hq, Dv] in q's dtype.

    q: [Tq, Hq, D], k: [Tk, Hkv, D], v: [Tk, Hkv, Dv]
    cu_seqlens_q, cu_seqlens_k: int32 [n + 1]; sequence i has queries cu_seqlens_q[i] to below cu_seqlens_q[i + 1], and
       keys likewise; they end at Tq and Tk, and are not checked, for that would wait for the device
    max_seqlen_q: queries of the longest sequence, or more: each sequence gets programs for so many, and those beyond
       its end return at once
    The others as in `flash_attention`; alibi_slopes may be [n, Hq]. return_lse: [Hq, Tq]. ValueError likewise.
    """
    q, k, v = (t[None].transpose(1, 2) for t in (q, k, v))
    check_operands(q, k, v)
    (_, Hq, Tq, D), count = q.shape, len(cu_seqlens_q) - 1
    check_ranges(count + 1, q.device, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    slopes = check_features(count, Hq, window, softcap, sinks, alibi_slopes)
    extras = _Extras(causal, D**-0.5 if scale is None else scale, window, softcap, sinks, slopes)
    out = q.new_empty(Tq, Hq, v.shape[-1])
    lse = q.new_empty(Hq, Tq, dtype=torch.float32) if return_lse else None
    extras = extras._replace(cu_q=cu_seqlens_q, cu_k=cu_seqlens_k)
    _run(q, k, v, out, lse, count, max_seqlen_q, extras, config)
    return out if lse is None else (out, lse)


def _run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    batch: int,
    longest: int,
    extras: _Extras,
    tile: Config | None,
) -> None:
    """Launch for `batch` sequences of at most `longest` queries."""
    if not out.numel() or not batch:
        return
    if q.dtype == torch.bfloat16 and interpreted(_flash_attention):
        # the interpreter multiplies the bits of bfloat16 as integers
        high = out.float()
        _run(q.float(), k.float(), v.float(), high, lse, batch, longest, extras, tile)
        out.copy_(high)
        return
    if extras.scale <= 0:  # maxima are taken before the scale is applied, which must keep the order
        q, extras = -q, extras._replace(scale=max(-extras.scale, 1e-30))
    q, k, v = _readable(q), _readable(k), _readable(v)
    (_, Hq, Sq, D), (Hkv, Sk), Dv = q.shape, k.shape[1:3], v.shape[-1]
    plain = extras.softcap is None and extras.slopes is None and extras.mask is None
    if extras.window is not None and extras.window >= max(Sq, Sk):  # nothing is beyond it
        extras = extras._replace(window=None)
    if tile is None:
        capability = device_of(q.device.index)[0] if q.is_cuda else 90
        tile = tile_for(D, Dv, extras.causal, longest, q.dtype == torch.float32, capability, plain)
    lowest = None if extras.mask is None or extras.mask.dtype == torch.uint8 else torch.finfo(extras.mask.dtype).min
    features = (extras.causal, extras.window is not None, extras.softcap is not None, lowest)
    plan = _plan(D, Dv, Hq // Hkv, features, tile)
    tiles, pairs = -(-longest // tile.BLOCK_M), batch * Hkv
    section = max(1, min(pairs, NEAR // (max(1, Sk) * (D + Dv) * q.itemsize)))
    scale, cap = extras.scale * LOG2E, (extras.softcap or 0.0) * LOG2E
    scale = scale if extras.softcap is None else extras.scale * 2 * LOG2E / extras.softcap
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    strides += (0,) if extras.slopes is None else extras.slopes.stride()[:1]
    strides += (0, 0, 0, 0) if extras.mask is None else extras.mask.stride()
    numbers: Any = (scale, cap, extras.window or 0, Hq, Sq, Sk, tiles, pairs, section, *strides)
    optional = (lse, extras.sinks, extras.slopes, extras.mask, *extras[-4:])
    kind = (q.dtype, strides, q.device, *(None if t is None else t.dtype for t in optional))
    with on_device(q.device):
        launch(_flash_attention, (tiles * batch * Hq, 1, 1), (q, k, v, out, *optional), numbers, plan, kind)


def _readable(t: torch.Tensor) -> torch.Tensor:
    """t, or a copy of it with rows that lie close and whose numbers are neighbours."""
    if t.stride(-1) != 1 or t.stride(-2) * 256 >= 1 << 31:
        return t.clone(memory_format=torch.contiguous_format)
    return t


@cache
def _plan(D: int, Dv: int, group: int, features: tuple[bool, bool, bool, float | None], tile: Config) -> Plan:
    """Cached: to work it out anew would cost as much as the launch."""
    (D0, D1), (V0, V1) = columns(D), columns(Dv, tile.VALUES)
    constants: dict[str, Any] = {"D": D, "D0": D0, "D1": D1, "DV": Dv, "V0": V0, "V1": V1, "GROUP": group}
    constants |= dict(zip(("CAUSAL", "WINDOW", "SOFTCAP", "LOWEST"), features, strict=True))
    constants |= {"OVERLAP": tile.OVERLAP, "BLOCK_M": tile.BLOCK_M, "BLOCK_N": tile.BLOCK_N}
    return Plan(0, None, constants, {"num_warps": tile.num_warps, "num_stages": tile.num_stages}, {})
