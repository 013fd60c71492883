"""Attention as it is defined: plain torch, in higher precision, every feature. Tests trust it, training uses it."""

from typing import Any

import torch
from torch import Tensor


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    mask: Tensor | None = None,
    kv_start: Tensor | None = None,
    kv_end: Tensor | None = None,
) -> Tensor:
    """y[b, h, i] = sum_j softmax_j(score[b, h, i, j]) v[b, h // (Hq // Hkv), j]: [B, Hq, Sq, Dv] in q's dtype.

    q [B, Hq, Sq, D], k [B, Hkv, Sk, D], v [B, Hkv, Sk, Dv]. Query i stands at position p = i + kv_end[b] - Sq: the
    last query at the last key ("bottom right"). score = q @ k.T * scale, then in this order:

    softcap: score = softcap * tanh(score / softcap)
    alibi_slopes: score += slope * (j - p); [Hq] or [B, Hq]
    mask: bool, True where a query sees a key, or float, added; broadcastable to [B, Hq, Sq, Sk]. What is added as -inf
        or as the most negative number of the mask's dtype hides the key.
    kv_start, kv_end: int32 [B]; only keys from kv_start[b] to below kv_end[b] are seen; default 0 and Sk. What lies
        outside may be anything, NaN included.
    causal: only j <= p is seen. window: only j > p - window and, without causal, j < p + window.
    sinks: [Hq]; exp(sinks[h]) joins the denominator of the softmax, and nothing the numerator (gpt-oss)

    scale is D**-0.5 by default. Computed in float32, in float64 for float64. A row that sees no key is 0.
    """
    return reference_with_lse(
        q, k, v, causal=causal, scale=scale, window=window, softcap=softcap, sinks=sinks, alibi_slopes=alibi_slopes,
        mask=mask, kv_start=kv_start, kv_end=kv_end,
    )[0]  # fmt: skip


def reference_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    mask: Tensor | None = None,
    kv_start: Tensor | None = None,
    kv_end: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference`, and the logarithm of the softmax's denominator [B, Hq, Sq], sinks included, -inf where it is 0."""
    high = torch.float64 if q.dtype == torch.float64 else torch.float32
    (B, Hq, Sq, D), (Hkv, Sk) = q.shape, k.shape[1:3]
    inside, visible, distance = seen_keys(q, Sk, causal, window, kv_start, kv_end)
    groups = q.to(high).reshape(B, Hkv, Hq // Hkv, Sq, D)
    scores = (groups @ k.to(high).transpose(-1, -2)[:, :, None]).flatten(1, 2)  # [B, Hq, Sq, Sk]
    scores = scores * (D**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        scores = scores + alibi_slopes.to(high).reshape(-1, Hq, 1, 1) * distance
    if mask is not None:
        visible = visible & (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min)
        scores = scores if mask.dtype == torch.bool else scores + mask.to(high)
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        column = sinks.to(high).reshape(1, Hq, 1, 1).expand(B, Hq, Sq, 1)
        scores = torch.cat((scores, column), -1)
    largest = (
        scores.detach().amax(-1, keepdim=True) if scores.shape[-1] else scores.new_full((B, Hq, Sq, 1), -torch.inf)
    )
    weights = torch.exp(scores - largest.clamp(min=torch.finfo(high).min))
    total = weights.sum(-1, keepdim=True)
    weights = weights[..., :Sk] / total.masked_fill(total == 0, 1)
    values = v.to(high).masked_fill(~inside[:, None, :, None], 0)  # 0 times NaN would be NaN
    y = weights.reshape(B, Hkv, Hq // Hkv, Sq, Sk) @ values[:, :, None]
    return y.flatten(1, 2).to(q.dtype), (largest + total.log())[..., 0]


def seen_keys(
    q: Tensor, Sk: int, causal: bool, window: int | None, kv_start: Tensor | None, kv_end: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys of each row's range [B or 1, Sk]; those that a query sees [B or 1, 1, Sq, Sk]; j - p, of the same shape."""
    j = torch.arange(Sk, device=q.device)
    end = torch.full((1,), Sk, device=q.device) if kv_end is None else kv_end
    start = torch.zeros_like(end) if kv_start is None else kv_start
    inside = (j >= start[:, None]) & (j < end[:, None])
    p = torch.arange(q.shape[-2], device=q.device) + (end - q.shape[-2])[:, None]
    distance = (j - p[..., None])[:, None]
    visible = inside[:, None, None].expand(len(inside), 1, *distance.shape[-2:])
    if causal:
        visible = visible & (distance <= 0)
    if window is not None:
        visible = visible & (distance > -window) & (distance < window)
    return inside, visible, distance


def reference_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **features: Any
) -> Tensor:
    """`reference` of each sequence by itself: q [Tq, Hq, D], k [Tk, Hkv, D], v [Tk, Hkv, Dv] -> [Tq, Hq, Dv].

    Sequence n has queries cu_seqlens_q[n] to below cu_seqlens_q[n + 1], and keys likewise. features: causal, scale,
    window, softcap, sinks, alibi_slopes ([Hq], or [n, Hq] with a row for each sequence).
    """
    slopes = features.pop("alibi_slopes", None)
    bounds = list(zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), strict=True))
    parts = []
    for n, ((q0, k0), (q1, k1)) in enumerate(zip(bounds, bounds[1:], strict=False)):
        one = (t[None].transpose(1, 2) for t in (q[q0:q1], k[k0:k1], v[k0:k1]))
        own = slopes if slopes is None or slopes.ndim == 1 else slopes[n]
        parts.append(reference(*one, alibi_slopes=own, **features)[0].transpose(0, 1))
    return torch.cat(parts) if parts else q.new_empty(*q.shape[:-1], v.shape[-1])
