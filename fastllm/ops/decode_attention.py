"""The op `fastllm::decode_attention`: attention of a few new queries over a cache of keys and values.

Its definition is `definition`: gather the pages, dequantise, attend in float32.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..kernels.decode_config import Problem, about, check
from ..kv_formats import KV_FORMATS
from .library import LIBRARY, is_traced


def gather(x: Tensor, block_table: Tensor) -> Tensor:
    """Pages [pages, Hkv, page_size, ...] -> rows [B, Hkv, max_pages * page_size, ...]; entries that name no page give
    the first or the last one."""
    pages = x[block_table.long().clamp(0, len(x) - 1)]  # [B, max_pages, Hkv, page_size, ...]
    return pages.transpose(1, 2).flatten(2, 3)


def visible(kv_end: Tensor, kv_start: Tensor | None, Sq: int, L: int, window: int | None) -> tuple[Tensor, Tensor]:
    """Which keys each query sees [B, 1, Sq, L], and the distance of keys from it, j - p."""
    keys = torch.arange(L, device=kv_end.device)
    p = kv_end[:, None] - Sq + torch.arange(Sq, device=kv_end.device)  # [B, Sq]
    distance = (keys - p[..., None])[:, None]
    seen = distance <= 0
    if kv_start is not None:
        seen &= (keys >= kv_start[:, None])[:, None, None]
    if window is not None:
        seen &= distance > -window
    return seen, distance


def definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_end: Tensor,
    kv_start: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    format: str | None = None,
    block_table: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    mask: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """What `decode_attention` computes, with its arguments, in `dtype` throughout: [B, Hq, Sq, Dv] of `dtype`."""
    k, v = dense(k, k_scale, format, block_table, dtype), dense(v, v_scale, format, block_table, dtype)
    group, Sq, L = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    seen, distance = visible(kv_end, kv_start, Sq, L, window)
    if mask is not None:
        seen = seen & mask[..., :L]
    used = seen.flatten(1, 2).any(1)[:, None, :, None]  # what no query sees may hold anything
    k, v = (torch.where(used, x, 0).repeat_interleave(group, 1) for x in (k, v))
    s = (q.to(dtype) @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if alibi_slopes is not None:
        s = s + alibi_slopes.to(dtype)[:, None, None] * distance
    s = s.masked_fill(~seen, -math.inf)
    top = s.amax(-1, keepdim=True) if sinks is None else torch.maximum(s.amax(-1, keepdim=True), sinks[:, None, None])
    top = top.to(dtype).nan_to_num(neginf=0.0, nan=math.nan, posinf=math.inf)
    weights = torch.exp(s - top)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks.to(dtype)[:, None, None] - top)
    return (weights / torch.where(total == 0, 1, total)) @ v


def dense(
    x: Tensor, scale: Tensor | None, format: str | None, block_table: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """A cache's contents [B, Hkv, L, D] in `dtype`."""
    if block_table is not None:
        x, scale = gather(x, block_table), None if scale is None else gather(scale, block_table)
    return x.to(dtype) if format is None or scale is None else KV_FORMATS[format].dequantize(x, scale, dtype)


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_end: Tensor,
    *,
    kv_start: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    format: str | None = None,
    block_table: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """softmax(scale * q k^T + ...) v over the keys that each query may see: [B, Hq, Sq, Dv] in q's dtype.

    q:        [B, Hq, Sq, D], float16, bfloat16 or float32, any strides; Sq from 1 to 16, D and Dv up to 256
    k, v:     [B, Hkv, L, D] and [B, Hkv, L, Dv], of q's dtype or as `format` stores them, unit inner stride; Hkv
              divides Hq. With block_table [pages, Hkv, page_size, ...], page_size a power of two from 16
    kv_end:   int32 [B]: keys of a row, those of q included. Query i is at position p = kv_end - Sq + i and sees keys j
              with kv_start <= j <= p. Other slots, and pages that no entry in use names, may hold anything
    kv_start: int32 [B], 0 by default
    format:   None, "int8" or "int4", with k_scale and v_scale, as `fastllm.kv_formats` has them
    block_table: int32 [B, max_pages]: key j of row b is key j % page_size of page block_table[b, j // page_size]
    scale:    D ** -0.5 by default
    window:   a query sees j > p - window only: so many keys, its own included
    softcap:  scores s, scaled, become softcap * tanh(s / softcap)
    sinks:    [Hq], a logit more in the denominator
    alibi_slopes: [Hq]; slope * (j - p) is added to scores, after the cap
    mask:     bool [B or 1, Hq or 1, Sq or 1, L at least], True where a query may see a key that it sees by position

    A query that sees nothing gives 0. The result lies in memory as [B, Sq, Hq, Dv]. The same call gives the same bits
    every time. Not differentiable. ValueError for operands that do not fit. Sources: Dao, "FlashAttention-2", 2023;
    "Flash-Decoding for long-context inference", 2023, for the split over keys; Kwon et al., "PagedAttention", 2023.
    """
    plain = softcap is None and sinks is None and alibi_slopes is None and mask is None and block_table is None
    if is_traced(q) and plain and format is None:
        return _traced(q, k, v, kv_end, kv_start, scale, window)
    rest = (kv_start, k_scale, v_scale, format, block_table, scale, window, softcap, sinks, alibi_slopes, mask)
    if torch.compiler.is_compiling() or type(q) is not Tensor or torch._C._len_torch_dispatch_stack():
        return torch.ops.fastllm.decode_attention(q, k, v, kv_end, *rest)
    return (_on_cuda if q.is_cuda else _on_cpu)(q, k, v, kv_end, *rest)


def _traced(
    q: Tensor, k: Tensor, v: Tensor, kv_end: Tensor, kv_start: Tensor | None, scale: float | None, window: int | None
) -> Tensor:
    """Over all slots, of which those that nobody sees must be finite, without a step that looks at a length."""
    (B, Hq, Sq, D), (Hkv, L) = q.shape, k.shape[1:3]
    seen, _ = visible(kv_end, kv_start, Sq, L, window)
    seen = seen.expand(B, Hkv, Hq // Hkv * Sq, L) if Sq == 1 else seen.repeat(1, Hkv, Hq // Hkv, 1)
    y = scaled_dot_product_attention(q.reshape(B, Hkv, -1, D), k, v, attn_mask=seen, scale=scale)
    return y.reshape(B, Hq, Sq, v.shape[3])


def _on_cuda(q: Tensor, k: Tensor, v: Tensor, kv_end: Tensor, *rest: Any) -> Tensor:
    from ..kernels.decode_attention import decode_attention  # Triton is imported on first use

    names = ("kv_start", "k_scale", "v_scale", "format", "block_table", "scale", "window", "softcap", "sinks",
             "alibi_slopes", "mask")  # fmt: skip
    return decode_attention(q, k, v, kv_end, **dict(zip(names, rest, strict=True)))


def _on_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_end: Tensor,
    kv_start: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    format: str | None = None,
    block_table: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Row by row, or all rows at once where they have the same keys: what nobody sees is then never read."""
    operands = (q, k, v, k_scale, v_scale, kv_end, kv_start, block_table, sinks, alibi_slopes, mask)
    p = check(tuple(map(about, operands)), format, window, softcap)
    out = q.new_zeros(p.B, p.Sq, p.Hq, p.Dv).transpose(1, 2)
    ends, starts = kv_end.tolist(), [0] * p.B if kv_start is None else kv_start.tolist()
    same = block_table is None and len({*zip(starts, ends, strict=True)}) == 1
    for rows in [slice(0, p.B)] if same else [slice(b, b + 1) for b in range(p.B)]:
        end, low = ends[rows.start], max(starts[rows.start], 0)
        low = low if window is None else max(low, end - p.Sq - window + 1)
        keys = slice(low, min(end, p.L))
        if keys.start >= keys.stop:
            continue
        cache = ((k, k_scale), (v, v_scale))
        ks, vs = (_values(x, s, format, block_table, rows, keys, q.dtype) for x, s in cache)
        bias = _bias(p, end, keys, rows, window, alibi_slopes, mask)
        factor = p.D**-0.5 if scale is None else scale
        if softcap is None and sinks is None:
            mine = bias if bias is None or bias.dtype == torch.bool else bias.to(q.dtype)
            y = scaled_dot_product_attention(_packed(q[rows], p), ks, vs, attn_mask=mine, scale=factor)
        else:
            y = _plainly(_packed(q[rows], p), ks, vs, bias, factor, softcap, sinks, p)
        if bias is not None:
            blind = bias == 0 if bias.dtype == torch.bool else bias == -math.inf
            y = y.masked_fill(blind.all(-1, keepdim=True), 0)
        out[rows] = y.unflatten(2, (-1, p.Sq)).flatten(1, 2)
    return out


def _packed(q: Tensor, p: Problem) -> Tensor:
    """Heads of a group and positions in one axis, so that no key is read twice: [B, Hkv, Hq / Hkv * Sq, D]."""
    return q.unflatten(1, (p.Hkv, -1)).flatten(2, 3)


def _values(
    x: Tensor,
    scale: Tensor | None,
    format: str | None,
    table: Tensor | None,
    rows: slice,
    keys: slice,
    dtype: torch.dtype,
) -> Tensor:
    """Some keys of some rows [B, Hkv, keys, D] in `dtype`."""

    def part(t: Tensor) -> Tensor:
        if table is None:
            return t[rows, :, keys]
        size = t.shape[2]
        first = keys.start // size
        entries = table[rows, first : -(-keys.stop // size)]
        return gather(t, entries)[:, :, keys.start - first * size : keys.stop - first * size]

    if scale is None or format is None:
        return part(x)
    if format == "int8" and dtype == torch.bfloat16:  # three times as fast as by way of float32
        return part(x).to(dtype).mul_(part(scale).to(dtype)[..., None])
    return KV_FORMATS[format].dequantize(part(x), part(scale), dtype)


def _bias(
    p: Problem, end: int, keys: slice, rows: slice, window: int | None, slopes: Tensor | None, mask: Tensor | None
) -> Tensor | None:
    """What is added to scores [B or 1, Hkv or 1, heads * Sq, keys], or a mask of bool; None if all see everything."""
    seen = None
    position = torch.arange(end - p.Sq, end)
    distance = torch.arange(keys.start, keys.stop) - position[:, None]  # [Sq, keys]
    if p.Sq > 1:
        seen = distance <= 0
        if window is not None:
            seen = seen & (distance > -window)
    if mask is not None:
        own = mask[rows if mask.shape[0] > 1 else slice(None), :, :, keys]
        seen = own if seen is None else own & seen
    if slopes is None and seen is None:
        return None
    if slopes is None:
        bias = seen
    else:
        bias = slopes.float()[:, None, None] * distance
        if seen is not None:
            bias = torch.where(seen, bias, -math.inf)
    assert bias is not None
    bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
    bias = bias.expand(-1, p.Hq, p.Sq, -1)
    return bias.unflatten(1, (p.Hkv, -1)).flatten(2, 3)


def _plainly(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, softcap: float | None, sinks: Tensor | None,
    p: Problem,
) -> Tensor:  # fmt: skip
    s = (q @ k.mT).float() * scale
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None:
        s = s.masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else s + bias
    top = s.amax(-1, keepdim=True)
    if sinks is not None:
        extra = sinks.float().view(p.Hkv, -1, 1).expand(-1, -1, p.Sq).reshape(1, p.Hkv, -1, 1)
        top = torch.maximum(top, extra)
    top = torch.where(top == -math.inf, 0, top)
    weights = torch.exp(s - top)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(extra - top)
    return (weights / torch.where(total == 0, 1, total)).to(v.dtype) @ v


LIBRARY.define(
    "decode_attention(Tensor q, Tensor k, Tensor v, Tensor kv_end, Tensor? kv_start, Tensor? k_scale, "
    "Tensor? v_scale, str? format, Tensor? block_table, float? scale, int? window, float? softcap, Tensor? sinks, "
    "Tensor? alibi_slopes, Tensor? mask) -> Tensor"
)
LIBRARY.impl("decode_attention", _on_cpu, "CPU")
LIBRARY.impl("decode_attention", _on_cuda, "CUDA")


@torch.library.register_fake("fastllm::decode_attention", lib=LIBRARY)
def _(q: Tensor, k: Tensor, v: Tensor, kv_end: Tensor, *rest: Any) -> Tensor:
    Dv = v.shape[3] * (2 if rest[3] == "int4" else 1)
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], Dv).transpose(1, 2)
