"""The weights of several layers one below the other, so that one product reads them all; the layers keep views."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops import layouts_of
from .linear import QuantLinear


class Stack(NamedTuple):
    """Operands of all layers, along their rows: w [N1 + N2 + ..., KW], scale and zero, bias.

    Of dense layers there are w and bias alone. held: of each layer, what it reads now: views of these.
    """

    w: Tensor
    scale: Tensor | None
    zero: Tensor | None
    bias: Tensor | None
    held: list[tuple[Any, ...]]

    def holds(self, layers: Sequence[Any]) -> bool:
        """Whether the layers still have the views that they were given: moving or loading gives them others."""
        for (w, scale, bias), layer in zip(self.held, layers, strict=True):
            own = layer._parameters
            if own["bias"] is not bias:
                return False
            if type(layer) is QuantLinear:
                if own["weight_packed"] is not w or layer._buffers["_scale"] is not scale:
                    return False
            elif own["weight"] is not w or not torch.compiler.is_compiling() and not _unmoved(w, bias, scale):
                return False
        return True


def can_stack(layers: Sequence[QuantLinear]) -> bool:
    """Whether one product can read them all: of one format and width, in a layout whose rows lie one after another."""
    first = layers[0]
    tile = layouts_of(first.format)[first.layout].stacks if first.layout else 0
    return tile > 0 and all(
        (layer.layout, layer.format, layer.in_features, layer.weight_scale.dtype, layer.bias is None)
        == (first.layout, first.format, first.in_features, first.weight_scale.dtype, first.bias is None)
        and layer.out_features % tile == 0
        for layer in layers
    )


def stack(layers: Sequence[Any]) -> Stack:
    """One copy of the weights: what the layers had is given up for views of the whole, one tensor after the other."""
    if type(layers[0]) is nn.Linear:
        return _stack_dense(layers)
    layout = layouts_of(layers[0].format)[layers[0].layout]
    packed, held = _join([layer._parameters["weight_packed"] for layer in layers])
    scale_at_rest, scales = _join([layer._parameters["weight_scale"] for layer in layers])
    bias, biases = _join([layer._parameters["bias"] for layer in layers])
    at_rest = [layer._parameters["weight_zero_point"] for layer in layers]
    own_zeros = [layer._buffers["_zero"] for layer in layers]
    zero, zeros = _join(own_zeros)
    if all(_same(layer._buffers["_scale"], layer._parameters["weight_scale"]) for layer in layers):
        prepared, views = scale_at_rest, [view.detach() for view in scales]
    else:
        prepared, views = _join([layer._buffers["_scale"] for layer in layers], layout.scale_rows)
    if zero is not None and all(_same(*pair) for pair in zip(own_zeros, at_rest, strict=True)):
        for layer, view in zip(layers, zeros, strict=True):
            layer._parameters["weight_zero_point"] = nn.Parameter(view, requires_grad=False)
    for layer, *own in zip(layers, held, scales, biases, zeros, views, strict=True):
        layer._parameters.update(weight_packed=own[0], weight_scale=own[1], bias=own[2])
        layer._buffers.update(_zero=own[3], _scale=own[4])
    return Stack(packed, prepared, zero, bias, list(zip(held, views, biases, strict=True)))


def _stack_dense(layers: Sequence[Any]) -> Stack:
    """For plain linear layers: the same parameters, whose data are now views."""
    weight = torch.cat([layer.weight.detach() for layer in layers])
    bias = None if layers[0].bias is None else torch.cat([layer.bias.detach() for layer in layers])
    widths = [layer.out_features for layer in layers]
    for layer, view in zip(layers, weight.split(widths), strict=True):
        layer.weight.data = view
    if bias is not None:
        for layer, view in zip(layers, bias.split(widths), strict=True):
            layer.bias.data = view
    # moving a layer gives the same parameters other memory
    places = [tuple(p.data_ptr() for p in (layer.weight, layer.bias) if p is not None) for layer in layers]
    held = [(layer.weight, place, layer.bias) for layer, place in zip(layers, places, strict=True)]
    return Stack(weight, None, None, bias, held)


def _join(parts: list[Any], dim: int = 0) -> tuple[Any, list[Any]]:
    """One tensor of `parts` along `dim`, and views of it in their place; None stays None."""
    if parts[0] is None:
        return None, parts
    whole = torch.cat([part.detach() for part in parts], dim)
    views: list[Any] = list(whole.split([part.shape[dim] for part in parts], dim))
    if isinstance(parts[0], nn.Parameter):
        views = [nn.Parameter(view, requires_grad=False) for view in views]
    return whole, views


def _unmoved(w: Tensor, bias: Tensor | None, place: tuple[int, ...]) -> bool:
    return w.data_ptr() == place[0] and (bias is None or bias.data_ptr() == place[1])


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether both are the same memory."""
    return a.data_ptr() == b.data_ptr() and a.dtype == b.dtype and a.numel() == b.numel()
