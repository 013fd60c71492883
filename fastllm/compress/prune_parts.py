"""What can be made narrower in a block: linear layers whose outputs belong to neurons, or heads, that one linear layer
takes in.

They are found by trying. A layer feeds another if, when its rows of some units get other weights, the other's input
changes in the channels of these units and nowhere else. A layer that feeds it and mixes the channels of a unit makes
attention's queries or keys; where none does, units are single neurons. It stays only what computes, with units cut
out, what the whole computes when these units are silent.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..nn.experts import is_experts
from ..patch.plan import is_conv1d
from .blocks import Blocks
from .prune_config import FAILURES, Values
from .prune_edits import Edits, channels, cut, sizes

SHAKEN = 8.0  # the size of weights that rows get for a trial, in theirs
CLOSE = {torch.float32: 1e-4, torch.float64: 1e-4}  # of an output's size, by which cutting may change it
ROUGH = 3e-2  # of other types


class Producer(NamedTuple):
    """A linear layer, whose rows are `parts` runs of all units."""

    name: str
    parts: int


class Part(NamedTuple):
    """Some units of a block: where their channels are taken in, and what makes them; names within the block."""

    consumer: str
    producers: tuple[Producer, ...]
    units: int
    vectors: tuple[str, ...] = ()  # parameters of one number, or of as many, a unit

    def shapes(self, block: nn.Module, kept: int) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters that change when so many units are kept."""
        found: dict[str, tuple[int, ...]] = {}
        for name, dim in [(self.consumer, 1), *((producer.name, 0) for producer in self.producers)]:
            layer: Any = block.get_submodule(name)
            shape = list(layer.weight.shape)
            dim = dim if isinstance(layer, nn.Linear) else 1 - dim
            shape[dim] = shape[dim] // self.units * kept
            found[f"{name}.weight"] = tuple(shape)
            if layer.bias is not None and name != self.consumer:
                found[f"{name}.bias"] = (shape[dim],)
        for name in self.vectors:
            found[name] = (block.get_parameter(name).numel() // self.units * kept,)
        return found

    def columns(self, block: nn.Module, units: Sequence[int]) -> Tensor:
        """The channels of some units in the input of the consumer."""
        return channels(units, self.units, sizes(block.get_submodule(self.consumer))[1])

    def cut(self, edits: Edits, block: nn.Module, kept: Sequence[int]) -> None:
        """Leave only these units."""
        cut(edits, block.get_submodule(self.consumer), "in", self.columns(block, kept))
        for name, parts in self.producers:
            layer = block.get_submodule(name)
            cut(edits, layer, "out", channels(kept, self.units, sizes(layer)[0], parts))
        for name in self.vectors:
            owner, _, own = name.rpartition(".")
            value = block.get_parameter(name).detach()
            index = channels(kept, self.units, value.numel()).to(value.device)
            edits.parameter(block.get_submodule(owner), own, value[index])


def linears(block: nn.Module) -> dict[str, Any]:
    """The linear layers of a block, without those of a mixture's experts."""
    return {name: m for name, m in block.named_modules() if type(m) is nn.Linear or is_conv1d(m)}


def is_mixture(block: nn.Module) -> bool:
    """Whether a block has experts."""
    lists = [m for m in block.modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    return any(is_experts(m) for m in block.modules()) or any("expert" in type(m[0]).__name__.lower() for m in lists)


class Trials:
    """What goes into the linear layers of one block, when some of their rows have other weights."""

    def __init__(self, blocks: Blocks, index: int):
        self.blocks, self.index = blocks, index
        self.block = blocks.layers[index]
        self.layers = linears(self.block)
        self.before = self._inputs()

    def _inputs(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}

        def seen(name: str, x: Tensor, rows: Tensor | None) -> bool:
            found.setdefault(name, x.detach().reshape(-1, x.shape[-1]).clone())
            return False

        self.blocks.watch(self.index, self.layers, seen, batches=1)
        return found

    def changed(self, name: str, rows: Tensor) -> dict[str, Tensor]:
        """By the name of each layer: which channels of its input, bool [K], change with other weights in some rows."""
        layer, edits = self.layers[name], Edits()
        weight = layer.weight.detach()
        rough = weight.float().square().mean().sqrt().clamp(min=1e-2) * SHAKEN
        shape = (len(rows), sizes(layer)[1])
        drawn = (torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(weight.device) * rough).to(weight)
        linear = isinstance(layer, nn.Linear)
        other = weight.index_copy(1 - linear, rows.to(weight.device), drawn if linear else drawn.t())
        edits.parameter(layer, "weight", other)
        try:
            after = self._inputs()
        finally:
            edits.undo()
        found = {}
        for own, x in self.before.items():
            slack = 1e-3 * float(x.float().square().mean().sqrt())
            same = (after[own].float() - x.float()).abs() <= slack if own in after else x.new_zeros(x.shape).bool()
            found[own] = ~same.all(0)  # NaN is a change
        return found


def _subset(count: int) -> list[int]:
    """Some of so many, not all of them, in no order that a model might have."""
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return sorted(drawn[: max(1, count // 2)].tolist())


def _within(changed: Tensor, units: Sequence[int], of: int) -> bool:
    """Whether what changed is something, and belongs to these units."""
    own = torch.zeros(len(changed), dtype=torch.bool)
    own[channels(units, of, len(changed))] = True
    changed = changed.cpu()
    return bool(changed.any()) and not bool((changed & ~own).any())


def find_feed_forward(blocks: Blocks, index: int) -> Iterator[Part]:
    """Candidates: a layer in whose input every channel is a neuron, and the one or two that make these."""
    trials = Trials(blocks, index)
    wide = {name: x.shape[1] for name, x in trials.before.items()}
    fed: dict[str, list[Producer]] = {}
    for name, layer in trials.layers.items():
        for parts in (1, 2):
            units, rest = divmod(sizes(layer)[0], parts)
            if rest or units < 2 or units not in [K for other, K in wide.items() if other != name]:
                continue
            some = _subset(units)
            changed = trials.changed(name, channels(some, units, units * parts, parts))
            for other, found in changed.items():
                if other != name and len(found) == units and _within(found, some, units):
                    fed.setdefault(other, []).append(Producer(name, parts))
    for consumer, producers in sorted(fed.items(), key=lambda item: -wide[item[0]]):
        yield Part(consumer, tuple(producers), wide[consumer], _vectors(trials, consumer, producers, wide[consumer]))


def find_attention(blocks: Blocks, index: int, units: int, heads: int) -> Iterator[Part]:
    """Candidates: a layer that takes in all heads, and those that make one or more heads from a run of rows each.

    units: into how many equal runs the heads are to fall; heads: how many there are.
    """
    trials, some = Trials(blocks, index), _subset(units)
    fed: dict[str, list[Producer]] = {}
    mixes: set[str] = set()
    for name, layer in trials.layers.items():
        N = sizes(layer)[0]
        if N % units:
            continue
        changed, one = trials.changed(name, channels(some, units, N)), None
        for other, found in changed.items():
            if other == name or len(found) % heads or not _within(found, some, units):
                continue
            fed.setdefault(other, []).append(Producer(name, 1))
            one = one or trials.changed(name, channels(some[:1], units, N)[:1])
            # a row of values is in as many channels as there are heads that share it
            if int(one[other].sum()) > heads // units:
                mixes.add(other)
    for consumer in fed:
        if consumer in mixes:
            yield Part(consumer, tuple(fed[consumer]), units, _vectors(trials, consumer, fed[consumer], heads))


def _vectors(trials: Trials, consumer: str, producers: Sequence[Producer], count: int) -> tuple[str, ...]:
    """Parameters of `count` numbers, of the modules in which the layers of a part lie."""
    owners = {name.rpartition(".")[0] for name in (consumer, *(producer.name for producer in producers))}
    return tuple(
        f"{owner}.{name}" if owner else name
        for owner in sorted(owners)
        for name, p in trials.block.get_submodule(owner).named_parameters(recurse=False)
        if p.shape == (count,)
    )


def rehearse(blocks: Blocks, index: int, part: Part, kept: Sequence[int], values: Values) -> str:
    """Why a block with only these units is not the block with the others silent; "" if it is. Nothing stays changed.

    values: by module within the block, what its attributes become.
    """
    block = blocks.layers[index]
    consumer, edits = block.get_submodule(part.consumer), Edits()
    silent = torch.ones(sizes(consumer)[1], device=blocks.device).index_fill_(
        0, part.columns(block, [u for u in range(part.units) if u not in set(kept)]).to(blocks.device), 0.0
    )
    try:
        want = _answer(blocks, index, consumer, lambda module, args: (args[0] * silent.to(args[0].dtype), *args[1:]))
        part.cut(edits, block, kept)
        adopt(edits, block, values)
        got = _answer(blocks, index, consumer, None)
    except FAILURES as error:
        return f"without some of them it does not run: {error}"
    finally:
        edits.undo()
    if not bool(want.isfinite().all()):
        return "what it answers is not finite: the model has NaN or infinity"
    if got.shape != want.shape:
        return f"without some of them it answers {list(got.shape)}, not {list(want.shape)}"
    off = float((got - want).norm() / want.norm().clamp(min=1e-30))
    slack = CLOSE.get(next(block.parameters()).dtype, ROUGH)
    return "" if off <= slack else f"without some of them its answer is off by {off:.2g} of its size"


def adopt(edits: Edits, root: nn.Module, values: Values) -> None:
    """Give attributes of modules other values."""
    for name, own in values.items():
        for attribute, value in own.items():
            edits.set(root.get_submodule(name), attribute, value)


def _answer(blocks: Blocks, index: int, layer: nn.Module, before: Callable[..., Any] | None) -> Tensor:
    """What a layer answers to the first batch, float32, with its input changed."""
    found: list[Tensor] = []
    handles = [layer.register_forward_hook(lambda module, args, out: found.append(out.float()))]
    if before is not None:
        handles.append(layer.register_forward_pre_hook(before))
    try:
        with torch.no_grad():
            blocks.answer(index, 0)
    finally:
        for handle in handles:
            handle.remove()
    return found[0]
