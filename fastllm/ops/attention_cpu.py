"""Attention on a CPU: torch's scaled_dot_product_attention on the keys that queries can see, or three products."""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .attention_reference import reference

BLOCK = 128  # queries at a time: the fastest at windows of 256 and 512, and for products
SCORES = 1 << 21  # scores that are held at a time, in float32
# Products are faster than torch's attention from so many queries and so large heads on, up to so many keys of a query.
MANY, LARGE, REACH = 384, 128, 1024


class Features(NamedTuple):
    """Of one problem on a CPU, in which all queries have the same keys; slopes and mask are [B or 1, Hq, ...]."""

    causal: bool
    scale: float | None
    window: int | None
    softcap: float | None
    sinks: Tensor | None
    slopes: Tensor | None
    mask: Tensor | None


def on_cpu(q: Tensor, k: Tensor, v: Tensor, f: Features, out: Tensor) -> None:
    """Attention to all of k, query i at position i + Sk - Sq, into `out`."""
    Sq, Sk = q.shape[2], k.shape[2]
    shift = Sk - Sq
    # queries before the first that sees a key
    blind = -shift if f.causal else 1 - f.window - shift if f.window is not None else 0
    blind = Sq if not Sk else min(max(blind, 0), Sq)
    out[:, :, :blind] = 0
    if _by_products(q, k, f) and blind < Sq:
        return _products(q[:, :, blind:], k, v, f, out[:, :, blind:])
    square = f.causal and Sq - blind == Sk or not f.causal
    if square and f.window is None and f.softcap is None and f.slopes is None and f.mask is None:
        if blind < Sq:
            out[:, :, blind:] = _product(q[:, :, blind:], k, v, f, None, f.causal)
        return
    for first in range(blind, Sq, BLOCK):
        rows = slice(first, min(first + BLOCK, Sq))
        low, high = 0, rows.stop + shift if f.causal else Sk
        if f.window is not None:
            low = max(0, first + shift - f.window + 1)
            high = min(high, rows.stop - 1 + shift + f.window)
        keys = slice(low, high)
        bias = _bias(f, torch.arange(rows.start, rows.stop) + shift, torch.arange(low, high), rows, keys, q.dtype)
        out[:, :, rows] = _product(q[:, :, rows], k[:, :, keys], v[:, :, keys], f, bias, False)


def _bias(f: Features, p: Tensor, j: Tensor, rows: slice, keys: slice, dtype: torch.dtype) -> Tensor | None:
    """What torch is to be told of queries at positions p and keys j: a bool mask, or what to add to their scores."""
    distance = j - p[:, None]
    seen = distance <= 0 if f.causal else None
    if f.window is not None:
        near = (distance > -f.window) & (distance < f.window)
        seen = near if seen is None else seen & near
    if f.mask is not None:
        part = f.mask[:, :, rows, keys]
        visible = part if part.dtype == torch.bool else part > torch.finfo(part.dtype).min
        seen = visible if seen is None else seen & visible
    if f.slopes is None and (f.mask is None or f.mask.dtype == torch.bool):
        return seen
    bias = torch.zeros((), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    if f.slopes is not None:
        bias = bias + f.slopes.to(bias.dtype)[:, :, None, None] * distance
    if f.mask is not None and f.mask.dtype != torch.bool:
        bias = bias + f.mask[:, :, rows, keys]
    return bias if seen is None else bias.masked_fill(~seen, -torch.inf)


def _product(q: Tensor, k: Tensor, v: Tensor, f: Features, bias: Tensor | None, causal: bool) -> Tensor:
    """Softmax and sums; causal only where q and k are equally many."""
    plain = f.softcap is None and (f.sinks is None or q.shape[-1] == v.shape[-1])
    if not plain:
        return reference(q, k, v, causal=causal, scale=f.scale, softcap=f.softcap, sinks=f.sinks, mask=bias)
    if f.sinks is None:
        return scaled_dot_product_attention(q, k, v, bias, is_causal=causal, scale=f.scale, enable_gqa=True)
    if bias is not None and bias.dtype == torch.bool:
        bias = torch.zeros(bias.shape, dtype=q.dtype).masked_fill(~bias, -torch.inf)
    run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    y, lse = run(q, k, v, 0.0, causal, attn_mask=bias, scale=f.scale)
    # another term in the denominator: y * exp(lse) / (exp(lse) + exp(sink))
    share = torch.sigmoid(lse - f.sinks.to(lse.dtype)[:, None])[..., None]
    return torch.where(share > 0, y * share, 0.0)


def _by_products(q: Tensor, k: Tensor, f: Features) -> bool:
    """Whether products of matrices are faster than torch's attention, which has no softcap."""
    simple = f.sinks is None and f.slopes is None and f.mask is None and (f.causal or f.window is None)
    reach = k.shape[2] if f.window is None else f.window
    fast = q.shape[2] >= MANY and (f.softcap is not None or q.shape[3] >= LARGE and reach <= REACH)
    return simple and fast and q.dtype == torch.bfloat16 and _multiplies_bfloat16()


@lru_cache(maxsize=1)
def _multiplies_bfloat16() -> bool:
    """Whether the CPU does so, but not tile by tile, which torch's attention then does as well."""
    return torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()


def _products(q: Tensor, k: Tensor, v: Tensor, f: Features, out: Tensor) -> None:
    """softmax(q k.T) v into `out`, as products of matrices, for some queries and heads at a time.

    Each query sees a key. Memory for the scores is taken once: fresh pages cost more than a product does.
    """
    (B, Hq, Sq, D), (_, Hkv, Sk, Dv) = q.shape, v.shape
    G, shift, R = Hq // Hkv, Sk - Sq, min(BLOCK, Sq)
    reach = Sk if f.window is None else min(Sk, R + f.window - 1)  # keys of a block of queries
    heads = max(1, min(B * Hkv, SCORES // (G * R * reach)))
    scratch = Scratch(heads * G * R * reach, q.dtype)
    bias = None
    if f.causal:  # adding is several times as fast as filling
        seen = _bias(f, torch.arange(R) + reach - R, torch.arange(reach), slice(0), slice(0), q.dtype)
        assert seen is not None
        bias = torch.zeros(R, reach).masked_fill_(~seen, -torch.inf)
        bias = bias if f.window is not None else bias[:, -R:]  # what is further back is seen
    scale = D**-0.5 if f.scale is None else f.scale
    for b, h in [(b, h) for b in range(B) for h in range(0, Hkv, heads)]:
        ks, vs = k[b, h : h + heads], v[b, h : h + heads]
        qs, y = (t[b].unflatten(0, (Hkv, G))[h : h + heads] for t in (q, out))  # [H, G, Sq, D]
        for first in range(0, Sq, R):
            rows = slice(first, min(first + R, Sq))
            high = rows.stop + shift if f.causal else Sk
            keys = slice(max(0, first + shift - f.window + 1) if f.window is not None else 0, high)
            own = None if bias is None else bias[first - rows.stop :, keys.start - keys.stop :]
            # queries of a group are rows of one product
            part = _softmax(qs[:, :, rows].flatten(1, 2), ks[:, keys], scale, f.softcap, own, scratch)
            y[:, :, rows] = torch.bmm(part, vs[:, keys]).view(*qs.shape[:2], -1, Dv)


class Scratch:
    """Memory for so many scores: as they come, what rounding has lost of them, and both together."""

    def __init__(self, size: int, dtype: torch.dtype):
        self.coarse, self.rest = (torch.empty(size, dtype=dtype) for _ in range(2))
        self.scores, self.shares = (torch.empty(size, dtype=torch.float32) for _ in range(2))


def _softmax(
    q: Tensor, k: Tensor, scale: float, softcap: float | None, bias: Tensor | None, scratch: Scratch
) -> Tensor:
    """q [H, G * R, D], k [H, L, D], bias [R, L or less], of the last keys -> [H, G * R, L], in q's dtype."""
    shape = *q.shape[:2], k.shape[1]
    size = math.prod(shape)
    coarse, rest, scores, shares = (t[:size].view(shape) for t in vars(scratch).values())
    torch.bmm(q, k.transpose(1, 2), out=coarse)
    torch.baddbmm(coarse, q, k.transpose(1, 2), beta=-1, out=rest)
    scores.copy_(coarse).add_(rest).mul_(scale)
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    if bias is not None:
        scores.view(len(q), -1, len(bias), k.shape[1])[..., -bias.shape[1] :].add_(bias)
    return coarse.copy_(torch.softmax(scores, -1, out=shares))
