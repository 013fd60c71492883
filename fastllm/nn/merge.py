"""Several linear layers that read the same input, as one product."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .linear import QuantLinear
from .stack import Stack, can_stack, stack


class Merged:
    """x -> the outputs of the layers beside each other: [..., N1 + N2 + ...], while `is_current`.

    The layers stay where they are, with weights that are now views of one tensor, so that saving, moving and adapting
    them one by one goes on as before. Whatever gives one of them another weight is noticed, and merged anew.
    """

    def __init__(self, owner: nn.Module, names: tuple[str, ...], beside: Iterable[str] = ()):
        """names: of children of `owner`, each an `nn.Linear` or a `QuantLinear`. Raises ValueError: `why_not` says.

        beside: children which are not called either where the product stands in for the layers.
        """
        self.owner, self.names = owner, names
        self.layers: list[Any] = [owner.get_submodule(name) for name in names]
        self.beside: dict[str, Any] = {name: owner.get_submodule(name) for name in beside}
        if why := why_not(self.layers):
            raise ValueError(f"{', '.join(names)} cannot be merged: {why}")
        self.kind = type(self.layers[0])
        self.widths = [layer.out_features for layer in self.layers]
        self.whole: Stack | None = None
        self._merge()

    def __call__(self, x: Tensor) -> Tensor:
        """Right after `is_current` was asked, which is what notices new weights."""
        whole, first = self.whole, self.layers[0]
        assert whole is not None
        if type(first) is QuantLinear:
            return first.product(x, whole.w, whole.scale, whole.zero, whole.bias, sum(self.widths))
        return linear(x, whole.w, whole.bias)

    def is_current(self) -> bool:
        """Whether the layers are still the owner's, unadapted, unwatched, not learning, and can be merged."""
        children: dict[str, Any] = self.owner._modules
        for name, layer in zip(self.names, self.layers, strict=True):
            if children.get(name) is not layer or type(layer) is not self.kind or is_watched(layer):
                return False
        for name, layer in self.beside.items():
            if children.get(name) is not layer or has_hooks(layer):
                return False
        if torch.is_grad_enabled():
            modules = (*self.layers, *self.beside.values())
            if any(p.requires_grad for module in modules for p in module.parameters()):
                return False
        if self.whole is not None and self.whole.holds(self.layers):
            return True
        if torch.compiler.is_compiling() or why_not(self.layers):
            return False
        self._merge()
        return True

    def _merge(self) -> None:
        with torch.inference_mode(False), torch.no_grad():  # what is made here stays
            self.whole = stack(self.layers)

    def undo(self) -> None:
        """Give the layers memory of their own again, with the same values."""
        self.whole = None
        for layer in self.layers:
            for p in layer.parameters():
                p.data = p.data.clone()
            if type(layer) is QuantLinear:
                layer.to_rest()
                layer.prepare()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "whole": None}  # copies merge their own


def has_hooks(module: Any) -> bool:
    """Whether something is called, forward or backward, when the module is."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def is_watched(module: Any) -> bool:
    """Whether a call of the module does more than its class says."""
    return has_hooks(module) or "forward" in module.__dict__


def why_not(layers: list[Any]) -> str:
    """Why layers cannot be merged; empty if they can."""
    first = layers[0]
    if len({type(layer) for layer in layers}) > 1 or type(first) not in (nn.Linear, QuantLinear):
        return "they are of different kinds"
    if len({layer.in_features for layer in layers}) > 1:
        return "they read inputs of different widths"
    if len({layer.bias is None for layer in layers}) > 1:
        return "some have a bias and some have none"
    if any(is_watched(layer) for layer in layers):
        return "one has hooks, or another library has replaced its forward"
    if type(first) is QuantLinear:
        return "" if can_stack(layers) else "their formats or layouts differ, or cannot lie in one tensor"
    weights = [p for layer in layers for p in layer._parameters.values() if p is not None]
    if len({(w.dtype, w.device) for w in weights}) > 1 or any(type(w) is not nn.Parameter for w in weights):
        return "their weights are of different types, or on different devices"
    if len({id(w) for w in weights}) < len(weights):
        return "they share a weight"
    return ""
