"""Packed layers among the tensors of a checkpoint: their entries, as a `Scheme` has them."""

from typing import Any

import torch
from torch import Tensor

from ..formats import QuantizedWeight, dequantize
from ..nn import QuantExperts, QuantLinear
from ..nn.experts import up_name
from .names import Names
from .scheme import Scheme


def _take(state: dict[str, Tensor], name: str) -> QuantizedWeight:
    """Take the weight of the layer `name`, at rest, out of `state`."""
    packed, scale = state.pop(f"{name}.weight_packed"), state.pop(f"{name}.weight_scale")
    return QuantizedWeight(packed, scale, state.pop(f"{name}.weight_zero_point", None))


def _put(state: dict[str, Tensor], name: str, parts: dict[str, Tensor]) -> None:
    state.update({f"{name}.{part}": tensor for part, tensor in parts.items()})


def store(state: dict[str, Tensor], name: str, layer: QuantLinear, scheme: Scheme | None) -> None:
    """Rewrite the entries of a layer in `state` as `scheme` has them; dense if it is None."""
    weight = _take(state, name)
    if scheme is not None:
        _put(state, name, scheme.tensors(scheme.regroup(weight, layer.format, layer.in_features), *layer.shape))
        return
    dense = dequantize(weight, layer.format, layer.shape, weight.scale.dtype)
    state[f"{name}.weight"] = dense.t().contiguous() if layer.transposed else dense


def store_experts(
    state: dict[str, Tensor], name: str, module: QuantExperts, scheme: Scheme | None, names: Names
) -> None:
    """Rewrite the entries of `module` in `state`: one layer for each expert and projection, or dense 3-D weights."""
    for inner in [key for key in state if key.startswith(f"{name}.shell.")]:
        state[f"{name}.{inner.removeprefix(f'{name}.shell.')}"] = state.pop(inner)
    for which, target in (("up", up_name(module.shell)), ("down", "down_proj")):
        layers: Any = getattr(module, which)
        patterns = names.experts(name, target) or []
        dense = []
        for i, layer in enumerate(layers):
            weight, (N, K) = _take(state, f"{name}.{which}.{i}"), layer.shape
            if scheme is None:
                w = dequantize(weight, layer.format, layer.shape, weight.scale.dtype)
                dense.append(w.t() if module.shell.is_transposed else w)
                continue
            weight = scheme.regroup(weight, layer.format, K)
            rows = N // len(patterns)
            for part, pattern in enumerate(patterns):
                here = slice(part * rows, (part + 1) * rows)
                half = QuantizedWeight(weight.packed[here].clone(), weight.scale[here].clone())
                _put(state, pattern.replace("*", str(i)), scheme.tensors(half, rows, K))
        if dense:
            state[f"{name}.{target}"] = torch.stack(dense)
        if module.shell.has_bias:
            state[f"{name}.{target}_bias"] = torch.stack(
                [state.pop(f"{name}.{which}.{i}.bias") for i in range(len(layers))]
            )
