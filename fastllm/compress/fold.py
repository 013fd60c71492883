"""Move a scale of each input channel of some layers into what makes that input, exactly.

What makes it is found by trying: a module with one weight a channel, such as a norm, whose output is the very tensor
that the layers are given, or a linear layer whose rows scale that tensor. A pair is taken only if the block's answer
stays as it is when a scale moves from one to the other.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import Blocks
from .calibrate import Group, Layer

TRIED = 2  # batches on which a pair is tried
CLOSE = 1e-2  # of the answer's size, by which it may change: roundings of the model's own precision
FAR = 1e-1  # by which it may not, even if roundings alone do almost as much


Change = tuple[nn.Module, str, nn.Parameter]  # a module, the name of a parameter, and what it was
Share = Callable[[Tensor], Tensor]  # makes a vector equal in channels that are to have the same scale


def same(v: Tensor) -> Tensor:
    """Every channel may have a scale of its own."""
    return v


@dataclass
class Fold:
    """A producer and the layers that it feeds.

    offset: what the producer adds to its weight before it multiplies (Gemma's norms: 1). rows: whether it is a linear
    layer, whose rows are scaled. repeats: how often its output comes, in heads of `head` channels, each head as often
    as that before the next one comes (values, where queries share them).
    """

    producer: Any
    layers: list[Any]
    rows: bool
    offset: float = 0.0
    repeats: int = 1
    head: int = 1

    def share(self, v: Tensor) -> Tensor:
        """v [K] with the mean of those channels that are made by the same row in each of them."""
        return self.spread(self._owned(v))

    def _owned(self, v: Tensor) -> Tensor:
        """Channels [K] -> the producer's rows [K / repeats]."""
        return v if self.repeats == 1 else v.view(-1, self.repeats, self.head).mean(1).flatten()

    def spread(self, v: Tensor) -> Tensor:
        """The producer's rows [K / repeats] -> channels [K]."""
        return v if self.repeats == 1 else v.view(-1, 1, self.head).expand(-1, self.repeats, -1).flatten()

    def apply(self, scale: Tensor) -> tuple[Tensor, list[Change]]:
        """Divide the input by `share(scale)` [K] and multiply the layers' columns by it: (what it came to, changes).

        A norm's weights are stored in its dtype: the scale is what they can say, so nothing is lost.
        """
        producer, changes = self.producer, []
        weight, shared = producer.weight.detach(), self._owned(scale)
        scale = self.spread(shared)
        if self.rows:
            changes.append(_exchange(producer, "weight", weight.float() / shared[:, None]))
        else:
            changes.append(_exchange(producer, "weight", (weight.float() + self.offset) / scale - self.offset))
            old, new = weight.float() + self.offset, producer.weight.detach().float() + self.offset
            scale = shared = torch.where((old != 0) & (new != 0), old / new, 1.0)
        if getattr(producer, "bias", None) is not None:
            changes.append(_exchange(producer, "bias", producer.bias.detach().float() / shared))
        changes += [_exchange(layer, "weight", layer.weight.detach().float() * scale) for layer in self.layers]
        return scale, changes


def _exchange(module: Any, name: str, value: Tensor) -> Change:
    """Give a module another parameter, in the dtype of that which it had."""
    old = module._parameters[name]
    module._parameters[name] = nn.Parameter(value.to(old.dtype), requires_grad=old.requires_grad)
    return module, name, old


def take_back(changes: list[Change]) -> None:
    """Give the modules the parameters that they had."""
    for module, name, old in reversed(changes):
        module._parameters[name] = old


def find_folds(
    blocks: Blocks, index: int, layers: Mapping[str, Layer], groups: list[Group]
) -> dict[tuple[str, ...], Fold]:
    """By the names of a group's layers: the fold that feeds it, for those groups that have one."""
    block = blocks.layers[index]
    outputs = _norms(blocks, index, layers)
    want = list(_answers(blocks, index))
    found: dict[tuple[str, ...], Fold] = {}
    for group in groups:
        own = [layers[name].module for name in group.names]
        if not all(isinstance(layer, nn.Linear) for layer in own):
            continue
        norm = outputs.get(group.names[0])
        for fold in chain(_scaled(blocks, index, own, norm, want), _candidates(block, own)):
            if _keeps(blocks, index, fold, want):
                found[group.names] = fold
                break
    return found


def _scaled(blocks: Blocks, index: int, layers: list[Any], norm: Any, want: list[Tensor]) -> list[Fold]:
    """The fold of a norm, whose output is what `layers` are given, with the offset that suits it best; or none."""
    weight = getattr(norm, "weight", None)
    if weight is None or weight.shape != (layers[0].in_features,):
        return []
    folds = [Fold(norm, layers, False, offset) for offset in (0.0, 1.0)]
    return [min(folds, key=lambda fold: _change(blocks, index, fold, want))]


def _candidates(block: nn.Module, layers: list[Any]) -> Iterator[Fold]:
    """Linear layers of a block that may feed `layers`."""
    K = layers[0].in_features
    others = [m for m in block.modules() if isinstance(m, nn.Linear) and m not in layers and K % m.out_features == 0]
    yield from (Fold(m, layers, True) for m in others if m.out_features == K)
    told = {getattr(m, "head_dim", None) for m in block.modules()}
    heads = sorted(head for head in told if isinstance(head, int) and head > 0)
    for m in others:
        repeats = K // m.out_features
        if repeats > 1:
            yield from (Fold(m, layers, True, 0.0, repeats, head) for head in heads if m.out_features % head == 0)


def _norms(blocks: Blocks, index: int, layers: Mapping[str, Layer]) -> dict[str, nn.Module]:
    """The module, of those in a block that hold no others, whose output is the input of each layer."""
    makers: list[tuple[Tensor, nn.Module]] = []
    found: dict[str, nn.Module] = {}

    def made(module: nn.Module, args: Any, out: Any) -> None:
        if isinstance(out, Tensor):
            makers.append((out, module))

    def seen(name: str, x: Tensor, rows: Tensor | None) -> bool:
        for out, module in makers:
            if out.data_ptr() == x.data_ptr() and out.shape == x.shape:
                found.setdefault(name, module)
        return False

    leaves = [m for m in blocks.layers[index].modules() if not any(True for _ in m.children())]
    handles = [m.register_forward_hook(made) for m in leaves]
    try:
        blocks.watch(index, {name: layer.module for name, layer in layers.items()}, seen, batches=1)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _keeps(blocks: Blocks, index: int, fold: Fold, want: list[Tensor]) -> bool:
    """Whether the block's answer is what we want when a scale moves, but for what roundings make of it."""
    change = _change(blocks, index, fold, want)
    return change <= CLOSE or (change <= FAR and change <= 2 * _noise(blocks, index, fold, want))


def _change(blocks: Blocks, index: int, fold: Fold, want: list[Tensor]) -> float:
    """Of the block's answer, relative to its size, when powers of two move.

    These are not rounded, except in a norm that adds to its weight, whose scale is then not quite a power of two.
    """
    powers = torch.tensor([0.5, 1.0, 2.0, 4.0])
    own = fold.layers[0].in_features // fold.repeats
    scale = powers[torch.randint(4, (own,), generator=torch.Generator().manual_seed(0))].to(blocks.device)
    return _difference(blocks, index, fold.apply(fold.spread(scale))[1], want)


def _noise(blocks: Blocks, index: int, fold: Fold, want: list[Tensor]) -> float:
    """As `_change`, when every weight of the layers moves to a number next to it: roundings of inputs add to that."""
    draw = torch.Generator().manual_seed(0)
    changes = []
    for layer in fold.layers:
        w = layer.weight.detach()
        half = torch.finfo(w.dtype).eps / 2
        up = torch.rand(w.shape, generator=draw).to(w.device) < 0.5
        changes.append(_exchange(layer, "weight", w.float() * (1 + torch.where(up, half, -half))))
    return _difference(blocks, index, changes, want)


def _difference(blocks: Blocks, index: int, changes: list[Change], want: list[Tensor]) -> float:
    """Of the block's answer from what we want, as a share of that; infinity if it is FAR. Changes are taken back."""
    worst = 0.0
    try:
        for got, right in zip(_answers(blocks, index), want, strict=True):
            worst = max(worst, float((got - right).norm() / right.norm().clamp(min=1e-30)))
            if not worst <= FAR:  # or NaN
                return float("inf")
        return worst
    finally:
        take_back(changes)


def _answers(blocks: Blocks, index: int) -> Iterator[Tensor]:
    """What a block adds to the first hidden states."""
    for i in range(min(TRIED, len(blocks.batches))):
        with torch.no_grad():
            answer = blocks.answer(index, i)
        yield answer.float() - blocks.hidden[i].to(blocks.device).float()
