"""Between the projections and attention, in one launch: norms of the heads of q and k, rotary embedding, and the new
keys and values on their way into a cache, quantized if the cache is."""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import Plan, launch, on_device
from .norm import rounded, weighted
from .rotary import HALF, PAIRS, check, heads_of, pairs, row_strides, turned, warps_of

GROUP = 32  # numbers per scale at 4 bits
DENSE = 16  # or 32 bits: numbers are stored as they are


class Store(NamedTuple):
    """Where keys and values go. k, v: [B, Hkv, L, width], or with a table pages [pages, Hkv, page_size, width].

    bits: 16 for numbers of q's dtype, or 8 or 4: codes int8 or uint8 with scales float32 [B, Hkv, L] or float16
    [B, Hkv, L, 2, D / 32]. slots: int32 or int64 [S] or [B, S], or None: from `first` on.
    """

    k: torch.Tensor
    v: torch.Tensor
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None
    slots: torch.Tensor | None
    first: int
    table: torch.Tensor | None
    bits: int


@triton.jit
def _ordered(x):
    """float32 as int32 in the same order, and the other way about; NaN comes above infinity, or below minus it."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _nearest(x, least, most):
    """x within bounds, to the nearest integer, half to even."""
    x = tl.minimum(tl.maximum(x, least), most)
    return ((x + 12582912.0) - 12582912.0).to(tl.int32)  # 1.5 * 2**23 leaves no room for a fraction


@triton.jit
def _half_step(x):
    """float32 -> float16, with no number out of reach, and NaN kept."""
    return tl.where(x > 65504.0, 65504.0, tl.where(x < -65504.0, -65504.0, x)).to(tl.float16)


@triton.jit
def _store_rows(
    x, rows, scale_rows, mask_h, d, mask_d,
    D: tl.constexpr, BITS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x float32 [HEADS, 2, BLOCK], zeros beyond D, into rows of a cache; rows, scale_rows, mask_h: [HEADS, 1, 1]."""
    if BITS == 8:
        # the bits of a positive float are in its order, with NaN above all, which a maximum of floats would lose
        bits = tl.max(tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 2), 1)[:, None, None]
        scale = tl.div_rn(bits.to(tl.float32, bitcast=True), 127.0)
        good = (scale > 0) & (scale < float("inf"))
        codes = _nearest(tl.div_rn(x, tl.where(good, scale, 1.0) + tl.zeros_like(x)), -127.0, 127.0)
        tl.store(rows + d, tl.where(good, codes, 0).to(tl.int8), mask=mask_h & mask_d)
        tl.store(scale_rows, scale, mask=mask_h)
    elif BITS == 4:
        groups = tl.reshape(x, (HEADS, 2, BLOCK // 32, 32))
        order = _ordered(groups)
        low, high = tl.min(order, 3), tl.max(order, 3)  # [HEADS, 2, BLOCK / 32]
        low, high = (low ^ ((low >> 31) & 0x7FFFFFFF)), (high ^ ((high >> 31) & 0x7FFFFFFF))
        low, high = low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True)
        zero, step = _half_step(low), _half_step(tl.div_rn(high - low, 15.0))
        s, z = step.to(tl.float32)[:, :, :, None], zero.to(tl.float32)[:, :, :, None]
        good = s > 0
        codes = _nearest(tl.div_rn(groups - z, tl.where(good, s, 1.0) + tl.zeros_like(groups)), 0.0, 15.0)
        codes = tl.reshape(tl.where(good, codes, 0), (HEADS, 2, BLOCK))
        half = tl.arange(0, 2)[None, :, None]
        packed = tl.sum(codes << 4 * half, 1)[:, None, :]  # [HEADS, 1, BLOCK]: the second half of D in high nibbles
        j = tl.arange(0, BLOCK)[None, None, :]
        tl.store(rows + j, packed.to(tl.uint8), mask=mask_h & (j < D // 2))
        group = tl.arange(0, BLOCK // 32)[None, None, :]
        at, mask = scale_rows + half * (D // 64) + group, mask_h & (group < D // 64)
        tl.store(at, step, mask=mask)
        tl.store(at + D // 32, zero, mask=mask)
    else:
        tl.store(rows + d, x.to(rows.dtype.element_ty), mask=mask_h & mask_d)


@triton.jit
def _ready_heads(
    rows, mask_h, weight, cos, sin,
    D: tl.constexpr, R: tl.constexpr, PAIRED: tl.constexpr, EPS: tl.constexpr, CAST_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Heads of q or k at rows [HEADS, 1, 1], normalized and turned: float32 [HEADS, 2, BLOCK], zeros beyond D."""
    DTYPE: tl.constexpr = rows.dtype.element_ty
    d, partner, minus, mask_d = pairs(D, R, PAIRED, BLOCK)
    mask = mask_h & mask_d
    x = tl.load(rows + d, mask=mask, other=0.0).to(tl.float32)  # [HEADS, 2, BLOCK]
    if R:
        others = tl.load(rows + partner, mask=mask, other=0.0).to(tl.float32)  # a second time, from the cache
    if weight is not None:
        scale = tl.rsqrt(tl.sum(tl.sum(x * x, 2), 1) / D + EPS)[:, None, None]
        x = rounded(weighted(x * scale, weight, d, mask_d, CAST_FIRST, DTYPE), DTYPE).to(tl.float32)
        if R:
            others = weighted(others * scale, weight, partner, mask_d, CAST_FIRST, DTYPE)
            others = rounded(others, DTYPE).to(tl.float32)
    if R:
        x = rounded(turned(x, others, cos, sin, d, minus, mask_d, D, R), DTYPE).to(tl.float32)
    return x


# Not specialised on numbers of tokens: a binary serves every prompt length.
@triton.jit(do_not_specialize=["S", "first", "L", "pages"])
def _append_kv(
    q, k, v, cos, sin, q_weight, k_weight, out, k_cache, v_cache, k_scale, v_scale, slots, table,
    S, Hq, Hk, first, L, pages,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_cb, stride_cs, stride_nb, stride_ns, stride_ib, stride_is, stride_tb,
    stride_kcb, stride_kch, stride_kcl, stride_vcb, stride_vch, stride_vcl,
    stride_ksb, stride_ksh, stride_ksl, stride_vsb, stride_vsh, stride_vsl,
    D: tl.constexpr, DV: tl.constexpr, R: tl.constexpr, PAIRED: tl.constexpr, PAGE: tl.constexpr, BITS: tl.constexpr,
    EPS: tl.constexpr, CAST_FIRST: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """HEADS heads of one token, of q, of k or of v. L: slots of a sequence; PAGE: of a page, 0 without a table."""
    token = tl.program_id(0).to(tl.int64)
    b, s = token // S, token % S
    if R:
        cos += b * stride_cb + s * stride_cs
        sin += b * stride_nb + s * stride_ns
    block, blocks_q, blocks_k = tl.program_id(1), tl.cdiv(Hq, HEADS), tl.cdiv(Hk, HEADS)
    heads = tl.arange(0, HEADS)[:, None, None]
    if block < blocks_q:
        h = (block * HEADS + heads).to(tl.int64)
        rows = q + b * stride_qb + s * stride_qs + h * stride_qh  # [HEADS, 1, 1]
        x = _ready_heads(rows, h < Hq, q_weight, cos, sin, D, R, PAIRED, EPS, CAST_FIRST, BLOCK)
        d, _, _, mask_d = pairs(D, R, PAIRED, BLOCK)
        tl.store(out + ((b * Hq + h) * S + s) * D + d, x.to(out.dtype.element_ty), mask=(h < Hq) & mask_d)
        return
    slot = first + s
    if slots is not None:
        slot = tl.load(slots + b * stride_ib + s * stride_is).to(tl.int64)
    at, row = slot, b
    good = (slot >= 0) & (slot < L)
    if PAGE:
        row = tl.load(table + b * stride_tb + slot // PAGE, mask=good, other=-1).to(tl.int64)
        at = slot % PAGE
        good = good & (row >= 0) & (row < pages)
    if good:
        if block < blocks_q + blocks_k:
            h = ((block - blocks_q) * HEADS + heads).to(tl.int64)
            rows = k + b * stride_kb + s * stride_ks + h * stride_kh
            x = _ready_heads(rows, h < Hk, k_weight, cos, sin, D, R, PAIRED, EPS, CAST_FIRST, BLOCK)
            d, _, _, mask_d = pairs(D, 0, 0, BLOCK)
            to = k_cache + row * stride_kcb + at * stride_kcl + h * stride_kch
            scales = to if k_scale is None else k_scale + row * stride_ksb + at * stride_ksl + h * stride_ksh
            _store_rows(x, to, scales, h < Hk, d, mask_d, D, BITS, HEADS, BLOCK)
        else:
            h = ((block - blocks_q - blocks_k) * HEADS + heads).to(tl.int64)
            d, _, _, mask_d = pairs(DV, 0, 0, BLOCK_V)
            rows = v + b * stride_vb + s * stride_vs + h * stride_vh
            x = tl.load(rows + d, mask=(h < Hk) & mask_d, other=0.0).to(tl.float32)  # [HEADS, 2, BLOCK_V]
            to = v_cache + row * stride_vcb + at * stride_vcl + h * stride_vch
            scales = to if v_scale is None else v_scale + row * stride_vsb + at * stride_vsl + h * stride_vsh
            _store_rows(x, to, scales, h < Hk, d, mask_d, DV, BITS, HEADS, BLOCK_V)


def append_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    store: Store,
    eps: float = 1e-6,
    cast_first: bool = False,
    paired: bool = False,
) -> torch.Tensor:
    """Writes k, normalized and turned, and v into `store`; returns q, normalized and turned, contiguous.

    q, k, v:  [B, Hq, S, D], [B, Hkv, S, D] and [B, Hkv, S, Dv], of one dtype, any strides but an inner one of 1
    cos, sin: as `rotary` takes them, or None for heads that are not turned
    q_weight, k_weight: contiguous [D], or None for heads that are not normalized; eps, cast_first as in `norm`

    What has a negative slot, one at or beyond the end, or a page that is not there, is not written: the device does
    not tell. float32 inside; norms and turned heads are rounded to q's dtype, then quantized. ValueError for operands
    that do not fit.
    """
    (B, Hq, S, D), (Hk, DV) = q.shape, v.shape[1::2]
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    if cos is not None and sin is not None:
        check(q, cos, sin)
        cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (cos, sin))
    out = q.new_empty(B, Hq, S, D)
    if B * S == 0:
        return out
    R, page = 0 if cos is None else cos.shape[-1], 0 if store.table is None else store.k.shape[2]
    plan = _plan(D, DV, R, paired, page, store.bits, eps, cast_first, heads_of(B * S, max(D, DV)))
    HEADS = plan.constants["HEADS"]
    pointers = (q, k, v, cos, sin, q_weight, k_weight, out, *store[:5], store.table)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    strides += (0, 0, 0, 0) if cos is None or sin is None else (*row_strides(cos), *row_strides(sin))
    strides += (*slot_strides(store.slots), 0 if store.table is None else store.table.stride(0))
    strides += (*store.k.stride()[:3], *store.v.stride()[:3])
    for scale in (store.k_scale, store.v_scale):
        strides += (0, 0, 0) if scale is None else scale.stride()[:3]
    slots_of = store.k.shape[2] if store.table is None else store.table.shape[1] * page
    numbers = (S, Hq, Hk, store.first, slots_of, len(store.k), *strides)
    kind = (Hq, Hk, strides, q.device, *(None if t is None else t.dtype for t in pointers))
    grid = (B * S, -(-Hq // HEADS) + 2 * -(-Hk // HEADS), 1)
    with on_device(q.device):
        launch(_append_kv, grid, pointers, numbers, plan, kind)
    return out


def slot_strides(slots: torch.Tensor | None) -> tuple[int, int]:
    """Of batch and position; 0 where all sequences share them."""
    if slots is None:
        return 0, 0
    return (slots.stride(0), slots.stride(1)) if slots.ndim == 2 else (0, slots.stride(0))


@cache
def _plan(
    D: int, DV: int, R: int, paired: bool, page: int, bits: int, eps: float, cast_first: bool, HEADS: int
) -> Plan:
    BLOCK, BLOCK_V = triton.next_power_of_2(D // 2), triton.next_power_of_2(DV // 2)
    constants = {
        "D": D,
        "DV": DV,
        "R": R,
        "PAIRED": PAIRS if paired else HALF,
        "PAGE": page,
        "BITS": bits,
        "EPS": eps,
        "CAST_FIRST": cast_first,
        "HEADS": HEADS,
        "BLOCK": BLOCK,
        "BLOCK_V": BLOCK_V,
    }
    return Plan(0, 0, constants, {"num_warps": warps_of(HEADS, max(BLOCK, BLOCK_V))}, {})
