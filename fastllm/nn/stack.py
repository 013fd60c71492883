"""The weights of several layers one below the other, so that one kernel reads them all; the layers keep views."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .linear import QuantLinear


class Stack(NamedTuple):
    """Operands of all layers: w [E * N, KW], scale and zero [E * N, G], bias [E * N].

    held: the layers' own views of w.
    """

    w: Tensor
    scale: Tensor
    zero: Tensor | None
    bias: Tensor | None
    held: list[Tensor]

    def holds(self, layers: list[QuantLinear]) -> bool:
        """Whether the layers still have the views that they were given: moving or loading gives them others."""
        return all(a is b._parameters["weight_packed"] for a, b in zip(self.held, layers, strict=True))


def can_stack(layers: list[QuantLinear]) -> bool:
    """Whether one kernel can read them all: planar, of one shape and format."""
    first = layers[0]
    return first.layout == "planar" and all(
        (layer.layout, layer.shape, layer.format, layer.weight_scale.dtype, layer.bias is None)
        == (first.layout, first.shape, first.format, first.weight_scale.dtype, first.bias is None)
        for layer in layers
    )


def stack(layers: list[QuantLinear]) -> Stack:
    """One copy of the weights: what the layers had is given up for views of the whole, one tensor after the other."""
    whole: dict[str, Any] = {}
    for place, name in (
        ("_parameters", "weight_packed"),
        ("_parameters", "weight_scale"),
        ("_parameters", "bias"),
        ("_buffers", "_zero"),
    ):
        parts = [getattr(layer, place)[name] for layer in layers]
        whole[name] = None
        if parts[0] is not None:
            every = torch.stack([part.detach() for part in parts])
            whole[name] = every.flatten(0, 1)
            for layer, view in zip(layers, every.unbind(), strict=True):
                own = nn.Parameter(view, requires_grad=False) if place == "_parameters" else view
                getattr(layer, place)[name] = own
    for layer in layers:
        layer._buffers["_scale"] = layer.weight_scale.detach()
    held = [layer.weight_packed for layer in layers]
    return Stack(whole["weight_packed"], whole["weight_scale"], whole["_zero"], whole["bias"], held)
