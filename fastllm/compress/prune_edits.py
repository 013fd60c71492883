"""Changes to a model that can be taken back."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Edits:
    """What was changed, as it was. `undo` is exact: it puts the very objects back."""

    def __init__(self) -> None:
        self._back: list[Callable[[], None]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """An attribute of a module or a configuration."""
        if hasattr(owner, name):
            old = getattr(owner, name)
            self._back.append(lambda: setattr(owner, name, old))
        else:
            self._back.append(lambda: delattr(owner, name))
        setattr(owner, name, value)

    def parameter(self, module: Any, name: str, value: Tensor) -> None:
        """A parameter of a module, in the dtype of that which it had."""
        old = module._parameters[name]
        module._parameters[name] = nn.Parameter(value.to(old.dtype), requires_grad=old.requires_grad)
        self._back.append(lambda: module._parameters.__setitem__(name, old))

    def keep(self, modules: nn.ModuleList, kept: Sequence[int]) -> None:
        """Leave only some of a list of modules, renumbered."""
        before = dict(modules._modules)

        def put(children: Mapping[str, Any]) -> None:
            modules._modules.clear()
            modules._modules.update(children)

        self._back.append(lambda: put(before))
        put({str(new): before[str(old)] for new, old in enumerate(kept)})

    def undo(self) -> None:
        """All of it, the last change first."""
        while self._back:
            self._back.pop()()


def cut(edits: Edits, layer: Any, axis: str, kept: Tensor) -> None:
    """Leave some rows (axis "out", with their biases) or columns ("in") of a linear layer: kept int64, sorted."""
    conv = not isinstance(layer, nn.Linear)
    dim = int(axis == ("out" if conv else "in"))
    kept = kept.to(layer.weight.device)
    edits.parameter(layer, "weight", layer.weight.detach().index_select(dim, kept))
    if axis == "out" and layer.bias is not None:
        edits.parameter(layer, "bias", layer.bias.detach()[kept])
    size = {"in": "nx", "out": "nf"}[axis] if conv else f"{axis}_features"
    edits.set(layer, size, len(kept))


def sizes(layer: Any) -> tuple[int, int]:
    """(N outputs, K inputs) of a linear layer."""
    a, b = layer.weight.shape
    return (a, b) if isinstance(layer, nn.Linear) else (b, a)


def matrix(layer: Any) -> Tensor:
    """The weight [N, K] of a linear layer, float32."""
    weight = layer.weight.detach()
    return (weight if isinstance(layer, nn.Linear) else weight.t()).float()


def put_matrix(edits: Edits, layer: Any, weight: Tensor, bias: Tensor | None) -> None:
    """Give a linear layer another weight [N, K], and bias [N] if it has one."""
    edits.parameter(layer, "weight", (weight if isinstance(layer, nn.Linear) else weight.t()).contiguous())
    if bias is not None:
        edits.parameter(layer, "bias", bias)


def channels(units: Sequence[int], of: int, size: int, parts: int = 1) -> Tensor:
    """Which of `size` channels, `parts` runs of `of` units each, belong to some units: int64, sorted by run."""
    width = size // (of * parts)
    own = torch.tensor(list(units), dtype=torch.int64)[:, None] * width + torch.arange(width)
    return torch.cat([own.flatten() + part * of * width for part in range(parts)])
