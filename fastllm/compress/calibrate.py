"""The one driver of calibration: block by block, on what the blocks before, as they are by then, have made."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from ..formats import Format, IntFormat, QuantizedWeight
from ..nn.experts import is_experts
from ..progress import track
from .blocks import Blocks
from .mixtures import Make, expert_rounding
from .statistics import SAMPLE, Statistics

if TYPE_CHECKING:
    from .cache_scales import CacheScales
    from .fold import Change
    from .work import Work

# The name of a layer and the weight that it gets, or of a mixture and how each of its experts gets its weights.
Put = Callable[[str, QuantizedWeight | Make], None]


class Layer(NamedTuple):
    """A linear layer to be quantized: its module, and the format."""

    module: Any
    format: Format

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored as [K, N]."""
        return not isinstance(self.module, nn.Linear)

    @property
    def weight(self) -> Tensor:
        """[N, K], float32."""
        weight = self.module.weight.detach()
        return (weight.t() if self.transposed else weight).float()

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        a, b = self.module.weight.shape
        return (b, a) if self.transposed else (a, b)


class Group(NamedTuple):
    """Layers of a block with one input, in the order in which they run."""

    names: tuple[str, ...]
    once: bool  # whether each of them runs once in a block


class Solver(ABC):
    """A way to choose the numbers of quantized weights, given what goes into the layers."""

    changes: list["Change"]  # all parameters that were exchanged, as they were
    sequential = True  # whether a layer's input is to come from layers that are quantized already
    products = True  # whether it wants the mean of x x.T

    def __init__(self) -> None:
        self.changes = []

    def fold(
        self, blocks: Blocks, index: int, layers: Mapping[str, Layer], found: list[tuple[Group, Statistics]]
    ) -> None:
        """Change a block and what is known of its inputs, but not what it computes. Here: nothing."""
        return

    @abstractmethod
    def solve(self, weights: Sequence[Tensor], formats: Sequence[Format], seen: Statistics) -> list[QuantizedWeight]:
        """The weights [N, K] of layers with one input, quantized; scales in float32 are rounded by the caller."""

    def stored(self, weight: Any, layer: Layer) -> Any:
        """What `put` gets of what `solve` gave for a layer."""
        return weight._replace(scale=weight.scale.to(layer.module.weight.dtype))

    @property
    def label(self) -> str:
        """For the progress."""
        return type(self).__name__.lower()

    def expert(self, w: Tensor, format: Format, seen: Statistics) -> QuantizedWeight:
        """As `solve`, for one projection of an expert, to whose input nothing can be moved."""
        return self.solve([w], [format], seen)[0]


def calibrate(
    blocks: Blocks,
    layers: dict[str, Layer],
    solver: Solver,
    put: Put,
    quiet: bool = False,
    work: "Work | None" = None,
    cache: "CacheScales | None" = None,
) -> None:
    """Quantize those of `layers` that lie in `blocks`, and hand each to `put`, which puts it into the model at once.

    They are taken out of `layers`: what is left there ran in no block, or on no data. work: where blocks go when they
    are done, and come from if they were done before. cache: what is to be done for a cache of keys and values.
    """
    sizes = [sum(p.numel() * p.element_size() for p in block.parameters()) for block in blocks.layers]
    for index in track(range(len(blocks)), f"calibrating {solver.label}", sizes, quiet):
        prefix, block = f"{blocks.name(index)}.", blocks.layers[index]
        mine = {name: layer for name, layer in layers.items() if name.startswith(prefix)}
        if work is not None and work.has(index):
            done = work.give(index, block, mine, prefix, put)
        else:
            solver.changes += [] if cache is None else cache.prepare(blocks, index)
            done = _quantize_block(blocks, index, mine, solver, put)
        for name in done:
            del layers[name]
        if cache is not None:
            cache.finish(blocks, index)
        if index + 1 < len(blocks) or work is not None:
            blocks.advance(index)
        if work is not None:
            work.keep(index, block)


def _quantize_block(blocks: Blocks, index: int, layers: Mapping[str, Layer], solver: Solver, put: Put) -> list[str]:
    """The names of the layers that were quantized, all of them in one block."""
    mixtures = {name: layer for name, layer in layers.items() if is_experts(layer.module)}
    linears = {name: layer for name, layer in layers.items() if name not in mixtures}
    groups = find_groups(blocks, index, linears) if linears else []
    if solver.sequential:
        for group in groups:
            _solve(solver, group, observe(blocks, index, linears, [group], solver.products)[0], linears, put)
    elif groups:
        found = observe(blocks, index, linears, groups, solver.products)
        solver.fold(blocks, index, linears, list(zip(groups, found, strict=True)))
        for group, seen in zip(groups, found, strict=True):
            _solve(solver, group, seen, linears, put)
    for name, (experts, format) in mixtures.items():
        assert isinstance(format, IntFormat)
        put(name, expert_rounding(blocks, index, name, experts, format, solver.products, solver.expert))
    return [*mixtures, *(name for group in groups for name in group.names)]


def _solve(solver: Solver, group: Group, seen: Statistics, layers: Mapping[str, Layer], put: Put) -> None:
    own = [layers[name] for name in group.names]
    weights = solver.solve([layer.weight for layer in own], [layer.format for layer in own], seen)
    for name, layer, weight in zip(group.names, own, weights, strict=True):
        put(name, solver.stored(weight, layer))


def find_groups(blocks: Blocks, index: int, layers: Mapping[str, Layer]) -> list[Group]:
    """The layers of a block by what they are given, in the order in which they run."""
    inputs: list[Tensor] = []  # kept, so that their addresses are not used again
    of: dict[str, int] = {}
    calls = dict.fromkeys(layers, 0)

    def seen(name: str, x: Tensor, rows: Tensor | None) -> bool:
        calls[name] += 1
        for i, other in enumerate(inputs):
            if other.data_ptr() == x.data_ptr() and other.shape == x.shape and other.stride() == x.stride():
                of.setdefault(name, i)
                return False
        inputs.append(x)
        of.setdefault(name, len(inputs) - 1)
        return False

    blocks.watch(index, {name: layer.module for name, layer in layers.items()}, seen, batches=1)
    groups: dict[int, list[str]] = {}
    for name, i in of.items():
        groups.setdefault(i, []).append(name)
    return [Group(tuple(names), all(calls[n] == 1 for n in names)) for _, names in sorted(groups.items())]


def observe(
    blocks: Blocks, index: int, layers: Mapping[str, Layer], groups: Sequence[Group], products: bool
) -> list[Statistics]:
    """What each of `groups` is given, over all batches."""
    sample = 0 if products else SAMPLE  # one or the other tells what rounding costs
    first = {
        group.names[0]: Statistics(layers[group.names[0]].shape[1], blocks.device, products, sample)
        for group in groups
    }
    last = groups[-1].names[0] if groups[-1].once else None

    def seen(name: str, x: Tensor, rows: Tensor | None) -> bool:
        first[name].add(x if rows is None else x[rows])
        return name == last

    blocks.watch(index, {name: layers[name].module for name in first}, seen)
    return list(first.values())
