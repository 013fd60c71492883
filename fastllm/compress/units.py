"""What can be given a format of its own, and what it becomes in each."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..checkpoints.mapped import Mapped
from ..formats import IntFormat, QuantizedWeight, dequantize
from ..nn import QuantExperts, QuantLinear
from ..nn.experts import expert_weight, is_experts, up_name
from ..progress import track
from ..quantizers import quantize
from .blocks import Blocks
from .calibrate import Layer, Solver, find_groups, observe
from .mixtures import expert_rounding
from .statistics import Statistics, output_error
from .work import PARTS

Key = tuple[str, int] | None  # of an expert's projection: "up" or "down", and the number


class Slot(NamedTuple):
    """A matrix [N, K] of a module: a linear layer's weight, or one of an expert."""

    name: str
    module: Any
    key: Key

    @property
    def parameter(self) -> nn.Parameter:
        """What holds it, perhaps among others."""
        if self.key is None:
            found = self.module.weight
        else:
            found = getattr(self.module, up_name(self.module) if self.key[0] == "up" else "down_proj")
        assert isinstance(found, nn.Parameter)
        return found

    def of(self, whole: Tensor) -> Tensor:
        """The matrix, out of a tensor like the parameter."""
        turned = not isinstance(self.module, nn.Linear) if self.key is None else self.module.is_transposed
        own = whole if self.key is None else whole[self.key[1]]
        return own.t() if turned else own

    @property
    def weight(self) -> Tensor:
        """[N, K]."""
        return self.of(self.parameter.detach())


@dataclass
class Unit:
    """Layers with one input, which get one format: a kernel then can read them together.

    bytes, loss: by format, what a token reads of them, and the loss in nats a token that is foreseen; None: as it is.
    error: by format, the squared error of their outputs. changes: by how much the matrices change in `worst`, the
    format with the largest error, bfloat16 [N, K] each.
    """

    names: tuple[str, ...]
    slots: list[Slot]
    share: float = 1.0  # of the bytes that one token reads, of a mixture
    weights: dict[IntFormat, list[QuantizedWeight]] = field(default_factory=dict)
    bytes: dict[IntFormat | None, int] = field(default_factory=dict)
    loss: dict[IntFormat | None, float] = field(default_factory=dict)
    error: dict[IntFormat, float] = field(default_factory=dict)
    changes: list[Tensor] = field(default_factory=list)

    def add(self, format: IntFormat, weights: list[QuantizedWeight]) -> None:
        """What the unit's matrices become in a format."""
        self.weights[format] = weights
        self.bytes[format] = self._bytes(lambda w: format.bytes(len(w), w.shape[1], w.element_size()))
        self.bytes[None] = self._bytes(lambda w: w.numel() * w.element_size())
        self.loss[None] = 0.0

    def weigh(self, format: IntFormat, seen: Statistics | None = None) -> None:
        """Note the error in a format. seen: of the input; None: all inputs are taken as alike."""
        weights = self.weights[format]
        changes = [self._change(i, format) for i in range(len(weights))]
        self.error[format] = sum(
            float(change.square().sum() if seen is None else output_error(change, seen.hessian).sum())
            for change in changes
        )
        if self.worst is format:
            self.changes = [change.bfloat16() for change in changes]

    def _bytes(self, size: Any) -> int:
        return int(self.share * sum(size(slot.weight) for slot in self.slots))

    @property
    def worst(self) -> IntFormat:
        """The format with the largest error."""
        return max(self.error, key=lambda format: self.error[format])

    def foresee(self, loss: float) -> None:
        """Fill in the losses: that of the worst format is `loss`, and those of others as their errors are."""
        if not math.isfinite(loss):
            raise ValueError(f"{self.names[0]}: the gradient is not finite; load the model in bfloat16 or float32")
        most = self.error[self.worst]
        self.loss |= {format: loss * error / most if most else 0.0 for format, error in self.error.items()}

    def _change(self, index: int, format: IntFormat) -> Tensor:
        w = self.slots[index].weight.float()
        return dequantize(self.weights[format][index], format, (w.shape[0], w.shape[1]), torch.float32) - w

    def build(self, name: str, format: IntFormat) -> nn.Module:
        """The quantized module in the place of that called `name`, with tensors of its own."""
        mine = [i for i, slot in enumerate(self.slots) if slot.name == name]
        first = self.slots[mine[0]]
        device = first.parameter.device
        fresh = {self.slots[i].key: _fresh(self.weights[format][i], device) for i in mine}
        if first.key is not None:
            return QuantExperts.from_weights(first.module, format, lambda which, number, w: fresh[which, number])
        layer = QuantLinear(fresh[None], (first.weight.shape[0], first.weight.shape[1]), format, first.module.bias)
        layer.transposed = not isinstance(first.module, nn.Linear)
        return layer


def _fresh(weight: QuantizedWeight, device: torch.device) -> QuantizedWeight:
    return QuantizedWeight(*(None if t is None else t.to(device, copy=True) for t in weight))  # type: ignore[arg-type]


def without_calibration(name: str, module: Any, formats: Sequence[IntFormat]) -> Unit:
    """A unit of a layer outside of blocks, such as the head; its errors are not weighed."""
    unit = Unit((name,), [Slot(name, module, None)])
    for format in formats:
        unit.add(format, [quantize(unit.slots[0].weight, format, "hqq" if format.bits == 4 else "rtn")])
    return unit


def candidates(
    blocks: Blocks,
    layers: Mapping[str, Any],
    share: Mapping[str, float],
    formats: Sequence[IntFormat],
    solver: Solver,
    folder: Path,
    quiet: bool,
) -> list[Unit]:
    """The units of `layers` {name: module} that lie in blocks, in every format; each block is seen as it is.

    Four bits are rounded by `solver`, eight to the nearest. share: see `Unit`. folder: where the weights lie.
    """
    units = []
    sizes = [sum(p.numel() * p.element_size() for p in block.parameters()) for block in blocks.layers]
    for index in track(range(len(blocks)), "quantizing in every format", sizes, quiet):
        prefix = f"{blocks.name(index)}."
        own = {name: Layer(module, formats[0]) for name, module in layers.items() if name.startswith(prefix)}
        linears = {name: layer for name, layer in own.items() if not is_experts(layer.module)}
        found = _linear_units(blocks, index, linears, formats, solver)
        for name in own.keys() - linears.keys():
            found.append(_experts_unit(blocks, index, name, own[name].module, share[name], formats, solver))
        _lay_down(found, folder / f"block-{index:05}.safetensors")
        units += found
        if index + 1 < len(blocks):
            blocks.advance(index)
    return units


def _linear_units(
    blocks: Blocks, index: int, layers: Mapping[str, Layer], formats: Sequence[IntFormat], solver: Solver
) -> list[Unit]:
    units: list[Unit] = []
    groups = find_groups(blocks, index, layers) if layers else []
    found = observe(blocks, index, layers, groups, solver.products) if groups else []
    for group, seen in zip(groups, found, strict=True):
        unit = Unit(group.names, [Slot(name, layers[name].module, None) for name in group.names])
        weights = [slot.weight.float() for slot in unit.slots]
        for format in formats:
            if format.bits == 8:
                made = [quantize(w, format, "rtn") for w in weights]
            else:
                made = solver.solve(weights, [format] * len(weights), seen)
            unit.add(format, [_rounded(m, slot.weight) for m, slot in zip(made, unit.slots, strict=True)])
            unit.weigh(format, seen)
        units.append(unit)
    return units


def _experts_unit(
    blocks: Blocks, index: int, name: str, experts: Any, share: float, formats: Sequence[IntFormat], solver: Solver
) -> Unit:
    slots = [Slot(name, experts, (which, n)) for which in ("up", "down") for n in range(len(experts.down_proj))]
    unit = Unit((name,), slots, share)
    for format in formats:
        if format.bits == 8:
            made = [quantize(slot.weight, format, "rtn") for slot in slots]
        else:
            make = expert_rounding(blocks, index, name, experts, format, solver.products, solver.expert)
            made = [make(*slot.key, expert_weight(experts, *slot.key)[0].detach()) for slot in slots if slot.key]
        unit.add(format, [_rounded(m, slot.weight) for m, slot in zip(made, slots, strict=True)])
        unit.weigh(format)
    return unit


def _rounded(weight: QuantizedWeight, like: Tensor) -> QuantizedWeight:
    return weight._replace(scale=weight.scale.to(like.dtype))


def _lay_down(units: list[Unit], file: Path) -> None:
    """Write the weights and changes of units to a file, and let them have them from there."""
    named = {f"{u}.change.{i}": change for u, unit in enumerate(units) for i, change in enumerate(unit.changes)}
    named |= {
        f"{u}.{format.name}.{i}.{part}": t.contiguous()
        for u, unit in enumerate(units)
        for format, weights in unit.weights.items()
        for i, weight in enumerate(weights)
        for part, t in zip(PARTS, weight[: len(PARTS)], strict=True)
        if t is not None
    }
    save_file(named, file)
    tensors = Mapped([file]).tensors
    for u, unit in enumerate(units):
        unit.changes = [tensors[f"{u}.change.{i}"] for i in range(len(unit.changes))]
        for format, weights in unit.weights.items():
            for i in range(len(weights)):
                parts = [tensors.get(f"{u}.{format.name}.{i}.{part}") for part in PARTS]
                assert parts[0] is not None and parts[1] is not None
                weights[i] = QuantizedWeight(parts[0], parts[1], parts[2])
