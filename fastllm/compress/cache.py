"""Scale the channels of keys, so that a cache of few bits loses less of them.

Keys have a few channels that are far larger than the others, which share a scale with them in the cache. Channel d of
the keys is divided by lambda_d and that of the queries multiplied by it, so q.k stays as it is. After Lin, Tang, Yang,
Zhang, Xiao, Gan, Han, "QServe: W4A8KV4 Quantization and System Co-design for Efficient LLM Serving", 2024, section 4.2
(SmoothAttention), where lambda = max|k|**0.5; here it is searched for.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..kv_formats import Int8KV, KVFormat
from .blocks import Blocks
from .fold import CLOSE, Change, Fold, take_back

TOKENS, BATCHES = 1024, 16  # whose keys are looked at, from so many batches
PROBED = 64  # tokens on whose scores a pair is tried
STEPS, RATE = 150, 0.05  # of the descent on log lambda
KEYS, QUERIES = 0.75, 0.25  # where it starts: max|k|**0.75 / rms(q)**0.25


class Seen(NamedTuple):
    """What an attention is given: q [B, Hq, T, D], k [B, Hkv, T, D], v [B, Hkv, T, Dv], rotated, as a cache has it."""

    q: Tensor
    k: Tensor
    v: Tensor


class _Stop(Exception):
    """The attention has been reached."""


def smooth_keys(blocks: Blocks, index: int, format: KVFormat) -> list[Change]:
    """Let a block make keys that lose less when a cache stores them in `format`: the parameters that were exchanged.

    Its answer stays as it is, up to roundings of its own precision. Nothing is changed, and the list is empty, where
    queries and keys are not the output of a norm or a linear layer of their own, where the attention is not one of
    transformers' interface, and where no scale helps, what rounding its weights costs included.
    """
    seen = record(blocks, index, 0)
    if seen is None or format.reasons(seen.k.shape[-1]):
        return []
    if (smoothing := find_smoothing(blocks, index, seen)) is None:
        return []
    changes, helps = smoothing.apply(search(*_rows(blocks, index), format, smoothing)), False
    try:
        smoothed = record(blocks, index, 0)
        assert smoothed is not None
        want = _scores(seen)
        rounded = (s._replace(k=format.dequantize(*format.quantize(s.k), s.k.dtype)) for s in (seen, smoothed))
        before, after = (_lost(_scores(s) - want) for s in rounded)
        helps = after < before
    finally:
        if not helps:
            take_back(changes)
    return changes if helps else []


# What goes into the attention.


def record(blocks: Blocks, index: int, batch: int) -> Seen | None:
    """What a block's first attention is given with one batch; None if it is not one of transformers' interface."""
    calls: list[Seen] = []

    def note(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
        calls.append(Seen(query, key, value))
        raise _Stop

    configs = (getattr(module, "config", None) for module in blocks.layers[index].modules())
    names = {getattr(config, "_attn_implementation", None) for config in configs} - {None}
    before = {name: ALL_ATTENTION_FUNCTIONS.get(name) for name in names}
    try:
        for name in names:
            ALL_ATTENTION_FUNCTIONS[name] = note
        with torch.no_grad(), suppress(_Stop):
            blocks.answer(index, batch)
    finally:
        for name, old in before.items():
            del ALL_ATTENTION_FUNCTIONS[name]  # what all share is seen again, but not what somebody had put here
            if old is not None and ALL_ATTENTION_FUNCTIONS.get(name) is not old:
                ALL_ATTENTION_FUNCTIONS[name] = old
    return calls[0] if calls else None


def _rows(blocks: Blocks, index: int) -> tuple[Tensor, Tensor]:
    """(keys [n, Hkv, D] of some tokens, for each head of theirs the mean of its queries' squares [Hkv, D])."""
    chosen = range(0, len(blocks.batches), max(1, len(blocks.batches) // BATCHES))
    keys, sizes = [], []
    for i in chosen:
        seen, mask = record(blocks, index, i), blocks.batches[i].seen
        assert seen is not None
        q, k = (x.transpose(1, 2).flatten(0, 1) for x in seen[:2])  # [B T, H, D]
        if mask is not None:
            q, k = (x[mask.flatten().to(x.device)] for x in (q, k))
        step = max(1, len(k) * len(chosen) // TOKENS)
        keys.append(k[::step].float())
        sizes.append(q[::step].float().square().unflatten(1, (k.shape[1], -1)).mean(2))
    return torch.cat(keys), torch.cat(sizes).mean(0)


# What makes it.


@dataclass
class Smoothing:
    """What makes the queries and the keys of a block, and which of their channels must have one scale.

    q, k: norms or linear layers, with as many channels as a head, or as all heads of theirs. partner: of each channel
    of a head, the first of those that a rotation mixes it with, int64 [D]. heads: of queries and of keys.
    """

    q: Fold
    k: Fold
    partner: Tensor
    heads: tuple[int, int]

    @property
    def scales(self) -> int:
        """How many heads of keys have scales of their own: all, or one for all."""
        D = len(self.partner)
        wide = all(f.producer.weight.shape[0] == H * D for f, H in zip((self.q, self.k), self.heads, strict=True))
        return self.heads[1] if wide else 1

    def apply(self, scale: Tensor) -> list[Change]:
        """Divide keys by `scale` [scales, D], and multiply queries by it, or by what weights can say of it.

        Of channels that are mixed, that with the larger weight tells: what weights say of small ones is rough.
        """
        weight, D = self.k.producer.weight.detach().float() + self.k.offset, len(self.partner)
        size = (weight.square().sum(1) if self.k.rows else weight.square()).view(-1, D)
        reached, changes = self.k.apply(_wide(scale, self.k, self.heads[1]))
        to = self.partner.expand_as(size)
        whole = torch.zeros_like(size).scatter_add(1, to, size)
        told = torch.zeros_like(size).scatter_add(1, to, size * reached.view(-1, D)) / whole
        told = torch.where(whole > 0, told, 1.0).gather(1, to)
        return changes + self.q.apply(1 / self.of_queries(told))[1]

    def of_queries(self, scale: Tensor) -> Tensor:
        """The scale of keys [Hkv or 1, D] for each channel of what makes queries."""
        Hq, Hkv = self.heads
        scale = scale.repeat_interleave(Hq // Hkv, 0) if len(scale) == Hkv else scale
        return _wide(scale, self.q, Hq)


def _wide(scale: Tensor, fold: Fold, heads: int) -> Tensor:
    """`scale` [heads or 1, D] for each channel of what makes them."""
    D, size = scale.shape[-1], fold.producer.weight.shape[0]
    return scale[0] if size == D else scale.expand(heads, D).reshape(-1)


def find_smoothing(blocks: Blocks, index: int, seen: Seen) -> Smoothing | None:
    """How scales can move from the keys of a block to its queries, if that changes neither scores nor answers."""
    q, k = (_maker(blocks, index, which, seen) for which in (0, 1))
    if q is None or k is None:
        return None
    for partner in _pairings(seen.k.shape[-1]):
        smoothing = Smoothing(q, k, partner.to(blocks.device), (seen.q.shape[1], seen.k.shape[1]))
        if _keeps(blocks, index, smoothing, seen):
            return smoothing
    return None


def _maker(blocks: Blocks, index: int, which: int, want: Seen) -> Fold | None:
    """The module of a block whose weight scales the queries (0) or keys (1), and nothing else that attention is given.

    It belongs to no other block.
    """
    (_, H, _, D), factors = want[which].shape, [2.0 if i == which else 1.0 for i in range(3)]
    others = {id(m) for i, layer in enumerate(blocks.layers) if i != index for m in layer.modules()}
    for module in blocks.layers[index].modules():
        weight, rows = module._parameters.get("weight"), isinstance(module, nn.Linear)
        if weight is None or weight.ndim != 1 + rows or weight.shape[0] not in (D, H * D) or id(module) in others:
            continue
        for offset in (0.0,) if rows else (0.0, 1.0):
            fold = Fold(module, [], rows, offset)
            changes = fold.apply(torch.full((weight.shape[0],), 0.5, device=weight.device))[1]
            try:
                got = record(blocks, index, 0)
            finally:
                take_back(changes)
            if got and all(_close(a, b * factor) for a, b, factor in zip(got, want, factors, strict=True)):
                return fold
    return None


def _pairings(D: int) -> Iterator[Tensor]:
    """For each channel of a head, the first of those that a rotation may mix it with: none, halves, or neighbours.

    Of a head, all channels, half of them or a quarter may be rotated.
    """
    channels = torch.arange(D)
    yield channels
    for R in (r for r in (D, D // 2, D // 4) if r % 2 == 0):
        yield torch.cat((channels[: R // 2], channels[: R // 2], channels[R:]))
        yield torch.cat((channels[:R] // 2 * 2, channels[R:]))


def _keeps(blocks: Blocks, index: int, smoothing: Smoothing, want: Seen) -> bool:
    """Whether scores and the block's answer stay when powers of two, which round nothing, move."""
    powers = torch.tensor([0.5, 1.0, 2.0, 4.0], device=blocks.device)
    picked = torch.randint(4, (smoothing.scales, len(smoothing.partner)), generator=torch.Generator().manual_seed(0))
    scale = powers[picked.to(blocks.device)][:, smoothing.partner]
    factors = (smoothing.of_queries(scale), 1 / _wide(scale, smoothing.k, smoothing.heads[1]))
    before = _answer(blocks, index)
    handles = [
        fold.producer.register_forward_hook(lambda module, args, out, factor=factor: out * factor.to(out.dtype))
        for fold, factor in zip((smoothing.q, smoothing.k), factors, strict=True)
    ]
    try:
        got = record(blocks, index, 0)
        return got is not None and _close(_scores(got), _scores(want)) and _close(_answer(blocks, index), before)
    finally:
        for handle in handles:
            handle.remove()


def _answer(blocks: Blocks, index: int) -> Tensor:
    """What a block adds to the first hidden states."""
    with torch.no_grad():
        return blocks.answer(index, 0).float() - blocks.hidden[0].to(blocks.device).float()


def _scores(seen: Seen) -> Tensor:
    """q.k of the last tokens of the first sample with all its tokens."""
    q, k = seen.q[0, :, -PROBED:].float(), seen.k[0].float()  # [H, T, D]
    return q.unflatten(0, (k.shape[0], -1)) @ k[:, None].transpose(2, 3)


def _lost(error: Tensor) -> float:
    """The size of an error of scores, but for what is the same for all keys, which no attention sees."""
    return float((error - error.mean(-1, keepdim=True)).norm())


def _close(got: Tensor, want: Tensor) -> bool:
    return got.shape == want.shape and bool((got - want).float().norm() <= CLOSE * want.float().norm())


# What the scales are.


def search(keys: Tensor, sizes: Tensor, format: KVFormat, smoothing: Smoothing) -> Tensor:
    """The scale [scales, D] with which rounding keys [n, H, D] loses least of their products with queries.

    sizes: the mean of the queries' squares, [H, D]. An error of rounding is as large, in all channels that share a
    step, as that: minimised is the mean, over the keys, of the sum of (step * scale)**2 * sizes, by gradient descent.
    """
    partner, scales = smoothing.partner, smoothing.scales

    def tied(x: Tensor) -> Tensor:
        """The largest of [H, D] among those that have one scale, [scales, D]."""
        x = x if scales > 1 else x.amax(0, keepdim=True)
        to = partner.expand_as(x)
        return x.scatter_reduce(1, to, x, "amax").gather(1, to).clamp(min=1e-3 * float(x.mean()) + 1e-30)

    start = tied(keys.abs().amax(0)) ** KEYS / tied(sizes.sqrt()) ** QUERIES
    with torch.enable_grad():
        logs = start.log().requires_grad_()
        descent = torch.optim.Adam([logs], lr=RATE)
        for _ in range(STEPS):
            scale = logs[:, partner].exp()
            step = _steps(keys / scale, format)  # [n, H, G]
            weight = (scale.square() * sizes).unflatten(-1, (step.shape[-1], -1)).sum(-1)  # [H, G]
            loss = (step.square().mean(0) * weight).sum().clamp(min=1e-30).log()
            descent.zero_grad()
            loss.backward()
            descent.step()
    logs = logs.detach()[:, partner]
    return (logs - logs.mean(-1, keepdim=True)).exp()


def _steps(x: Tensor, format: KVFormat) -> Tensor:
    """Between one code and the next, of rows [..., D] -> [..., D / channels with one scale]."""
    if isinstance(format, Int8KV):
        return x.abs().amax(-1, keepdim=True) / 127
    groups = x.unflatten(-1, (format.scale_shape(x.shape[-1])[-1], -1))
    return (groups.amax(-1) - groups.amin(-1)) / (2**format.bits - 1)
