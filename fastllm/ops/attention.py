"""The ops `fastllm::attention` and `fastllm::attention_varlen`; `attention_reference.reference` defines them.

On CUDA the Triton kernel runs, on a CPU what `attention_cpu` has.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..kernels.attention_config import check_features, check_mask, check_ranges, check_shapes
from .attention_cpu import Features, on_cpu
from .attention_reference import reference, reference_varlen
from .library import LIBRARY, is_watched


def attention(
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

    q [B, Hq, Sq, D], k [B, Hkv, Sk, D], v [B, Hkv, Sk, Dv], alike in dtype, any strides. y is a view of a contiguous
    [B, Sq, Hq, Dv], which its transpose(1, 2) gives back, unless a gradient is wanted.
    Query i stands at position p = i + kv_end[b] - Sq, the last one at the last key. score = q @ k.T * scale, then

    softcap: score = softcap * tanh(score / softcap)
    alibi_slopes: score += slope * (j - p); [Hq] or [B, Hq]
    mask: bool, True where a query sees a key, or float, added; broadcastable to [B, Hq, Sq, Sk]. -inf, and the most
        negative number of the mask's dtype, hide a key. What it hides must be finite.
    kv_start, kv_end: int32 [B]; only keys from kv_start[b] to below kv_end[b] are seen; default 0 and Sk. Outside,
        keys and values may be anything, NaN included.
    causal: only j <= p is seen. window: only j > p - window and, without causal, j < p + window.
    sinks: [Hq]; exp(sinks[h]) joins the denominator (gpt-oss)

    scale is D**-0.5 by default. A query that sees no key gives 0. On CUDA: float16, bfloat16 and float32, D and Dv up
    to 256. Where a gradient is wanted torch computes it: through scaled_dot_product_attention if nothing but scale and
    a causal square is asked for, else through the definition, whose scores are a tensor [B, Hq, Sq, Sk].
    ValueError for operands that do not fit. Sources: arXiv 2307.08691; transformers' attention interface.
    """
    tensors = (q, k, v, sinks, alibi_slopes, mask)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        features = {"softcap": softcap, "sinks": sinks, "alibi_slopes": alibi_slopes, "mask": mask, "window": window}
        features |= {"kv_start": kv_start, "kv_end": kv_end}
        return _differentiable(q, k, v, causal, scale, features)
    run = torch.ops.fastllm.attention if is_watched(q, None) else _attention
    return run(q, k, v, causal, scale, window, softcap, sinks, alibi_slopes, mask, kv_start, kv_end)


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """`attention` within each of n sequences that lie one after another -> [Tq, Hq, Dv] in q's dtype, contiguous.

    q [Tq, Hq, D], k [Tk, Hkv, D], v [Tk, Hkv, Dv]; cu_seqlens_q, cu_seqlens_k int32 [n + 1]: sequence i has queries
    cu_seqlens_q[i] to below cu_seqlens_q[i + 1], and keys likewise, from 0 to Tq and Tk. max_seqlen_q: of the longest
    sequence, or more. alibi_slopes: [Hq] or [n, Hq]. Gradients come through the definition. ValueError likewise.
    """
    tensors = (q, k, v, sinks, alibi_slopes)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return reference_varlen(
            q, k, v, cu_seqlens_q, cu_seqlens_k,
            causal=causal, scale=scale, window=window, softcap=softcap, sinks=sinks, alibi_slopes=alibi_slopes,
        )  # fmt: skip
    run = torch.ops.fastllm.attention_varlen if is_watched(q, None) else _attention_varlen
    return run(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, causal, scale, window, softcap, sinks, alibi_slopes
    )  # fmt: skip


def _differentiable(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None, features: dict[str, Any]
) -> Tensor:
    if any(value is not None for value in features.values()) or causal and q.shape[-2] != k.shape[-2]:
        return reference(q, k, v, causal=causal, scale=scale, **features)
    return scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
    if q.is_cuda:
        from ..kernels.flash_attention import flash_attention  # Triton is imported on first use

        return flash_attention(
            q, k, v, causal=causal, scale=scale, window=window, softcap=softcap, sinks=sinks,
            alibi_slopes=alibi_slopes, mask=mask, kv_start=kv_start, kv_end=kv_end,
        )  # fmt: skip
    check_shapes(q, k, v)
    (B, Hq, Sq, _), (_, Hkv, Sk, _) = q.shape, k.shape
    everything = kv_start is None and kv_end is None and mask is None and (window is None or window >= Sk)
    if Sq == 1 and everything and Sk and softcap is None and sinks is None and alibi_slopes is None:
        # heads of a group as rows of one product: torch is seven times as fast so, and this is what decoding does
        grouped = q.reshape(B, Hkv, Hq // Hkv, q.shape[-1])
        return scaled_dot_product_attention(grouped, k, v, scale=scale).reshape(B, Hq, 1, v.shape[-1])
    check_ranges(B, q.device, kv_start=kv_start, kv_end=kv_end)
    check_mask(mask, (B, Hq, Sq, Sk))
    slopes = check_features(B, Hq, window, softcap, sinks, alibi_slopes)
    window = None if window is not None and window >= max(Sq, Sk) else window  # which nothing is beyond
    if mask is not None:
        mask = mask.expand(B, *mask.shape[-3:]) if mask.ndim == 4 else mask.expand(B, 1, *mask.shape[-2:])
        mask = mask.expand(-1, -1, Sq, Sk)
    out = q.new_empty(B, Sq, Hq, v.shape[-1]).transpose(1, 2)
    starts = [0] * B if kv_start is None else kv_start.clamp(min=0).tolist()
    ends = [Sk] * B if kv_end is None else kv_end.clamp(max=Sk).tolist()
    alike = len({*starts}) == 1 and len({*ends}) == 1
    for rows in [slice(B)] if alike else [slice(b, b + 1) for b in range(B)]:
        keys = slice(starts[rows.start or 0], ends[rows.start or 0])
        own = None if slopes is None else slopes[rows]
        part = None if mask is None else mask[rows, :, :, keys]
        features = Features(causal, scale, window, softcap, sinks, own, part)
        on_cpu(q[rows], k[rows, :, keys], v[rows, :, keys], features, out[rows])
    return out


def _attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    if q.is_cuda:
        from ..kernels.flash_attention import flash_attention_varlen

        return flash_attention_varlen(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
            causal=causal, scale=scale, window=window, softcap=softcap, sinks=sinks, alibi_slopes=alibi_slopes,
        )  # fmt: skip
    q, k, v = (t[None].transpose(1, 2) for t in (q, k, v))
    check_shapes(q, k, v)
    count = len(cu_seqlens_q) - 1
    check_ranges(count + 1, q.device, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    slopes = check_features(count, q.shape[1], window, softcap, sinks, alibi_slopes)
    out = q.new_empty(1, q.shape[2], q.shape[1], v.shape[-1]).transpose(1, 2)
    bounds = list(zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), strict=True))
    for n, ((q0, k0), (q1, k1)) in enumerate(zip(bounds, bounds[1:], strict=False)):
        own = None if slopes is None else slopes[n : n + 1]
        features = Features(causal, scale, window, softcap, sinks, own, None)
        on_cpu(q[:, :, q0:q1], k[:, :, k0:k1], v[:, :, k0:k1], features, out[:, :, q0:q1])
    return out[0].transpose(0, 1)


def _like(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]).transpose(1, 2)


def _like_varlen(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
    return q.new_empty(*q.shape[:-1], v.shape[-1])


OPERANDS = "Tensor q, Tensor k, Tensor v"
FEATURES = "bool causal=False, float? scale=None, int? window=None, float? softcap=None, Tensor? sinks=None"
FEATURES += ", Tensor? alibi_slopes=None"
RANGES = "Tensor? mask=None, Tensor? kv_start=None, Tensor? kv_end=None"
SEQUENCES = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, int max_seqlen_q"
LIBRARY.define(f"attention({OPERANDS}, {FEATURES}, {RANGES}) -> Tensor")
LIBRARY.define(f"attention_varlen({OPERANDS}, {SEQUENCES}, {FEATURES}) -> Tensor")
for key in ("CPU", "CUDA"):
    LIBRARY.impl("attention", _attention, key)
    LIBRARY.impl("attention_varlen", _attention_varlen, key)
torch.library.register_fake("fastllm::attention", _like, lib=LIBRARY)
torch.library.register_fake("fastllm::attention_varlen", _like_varlen, lib=LIBRARY)
