"""Move a scale of each input channel of some layers into what makes that input, exactly.

What makes it is found by trying: a module with one weight a channel, such as a norm, whose output is the very tensor
that the layers are given, or a linear layer whose rows scale that tensor. A pair is taken only if the block's answer
stays as it is when a scale moves from one to the other.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import Blocks
from .calibrate import Group, Layer

TRIED = 2  # batches on which a pair is tried
CLOSE = 1e-2  # of the answer's size, by which it may change: roundings of the model's own precision


Change = tuple[nn.Module, str, nn.Parameter]  # a module, the name of a parameter, and what it was


@dataclass
class Fold:
    """A producer and the layers that it feeds.

    offset: what the producer adds to its weight before it multiplies (Gemma's norms: 1). rows: whether it is a linear
    layer, whose rows are scaled.
    """

    producer: Any
    layers: list[Any]
    rows: bool
    offset: float = 0.0

    def apply(self, scale: Tensor) -> tuple[Tensor, list[Change]]:
        """Divide the input by `scale` [K] and multiply the layers' columns by it: (what it came to, changes).

        A norm's weights are stored in its dtype: the scale is what they can say, so nothing is lost.
        """
        producer, changes = self.producer, []
        weight = producer.weight.detach()
        if self.rows:
            changes.append(_exchange(producer, "weight", weight.float() / scale[:, None]))
        else:
            changes.append(_exchange(producer, "weight", (weight.float() + self.offset) / scale - self.offset))
            old, new = weight.float() + self.offset, producer.weight.detach().float() + self.offset
            scale = torch.where((old != 0) & (new != 0), old / new, 1.0)
        if getattr(producer, "bias", None) is not None:
            changes.append(_exchange(producer, "bias", producer.bias.detach().float() / scale))
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
    found: dict[tuple[str, ...], Fold] = {}
    for group in groups:
        own = [layers[name].module for name in group.names]
        if not all(isinstance(layer, nn.Linear) for layer in own):
            continue
        K = own[0].in_features
        candidates: list[Fold] = []
        norm = outputs.get(group.names[0])
        if norm is not None and getattr(norm, "weight", None) is not None and norm.weight.shape == (K,):
            candidates += [Fold(norm, own, False, offset) for offset in (0.0, 1.0)]
        candidates += [
            Fold(m, own, True)
            for m in block.modules()
            if isinstance(m, nn.Linear) and m.out_features == K and m not in own
        ]
        for fold in candidates:
            if _keeps(blocks, index, fold, K):
                found[group.names] = fold
                break
    return found


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


def _keeps(blocks: Blocks, index: int, fold: Fold, K: int) -> bool:
    """Whether the block's answer stays when powers of two move, which roundings do not notice."""
    powers = torch.tensor([0.5, 1.0, 2.0, 4.0], device=blocks.device)
    scale = powers[torch.randint(4, (K,), generator=torch.Generator().manual_seed(0)).to(blocks.device)]
    want = list(_answers(blocks, index))
    changes = fold.apply(scale)[1]
    try:
        return all(
            bool((got - right).norm() <= CLOSE * right.norm())
            for got, right in zip(_answers(blocks, index), want, strict=True)
        )
    finally:
        take_back(changes)


def _answers(blocks: Blocks, index: int) -> Iterator[Tensor]:
    """What a block adds to the first hidden states."""
    for i in range(min(TRIED, len(blocks.batches))):
        with torch.no_grad():
            answer = blocks.answer(index, i)
        yield answer.float() - blocks.hidden[i].to(blocks.device).float()
