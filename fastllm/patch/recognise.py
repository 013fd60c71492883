"""Whether a module is one that can be fused: what it was given and answered, beside what its fused form does."""

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import QuantLinear
from ..nn.attend import HARMLESS
from ..nn.fused import ROTATIONS, FusedAttention, FusedMLP, FusedNorm, Shape
from ..nn.fused_layer import FusedLayer
from ..nn.merge import Merged, why_not
from ..ops.gated_activation import ACTIVATIONS
from .attention import RECORD

EPSILONS = ("variance_epsilon", "eps", "epsilon")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # of the root mean square
KNOWN = {"hidden_states", "position_embeddings", "attention_mask", "past_key_values"} | HARMLESS
INSIDE = "something inside it has hooks"
Norms = dict[int, tuple[FusedNorm, Tensor]]  # by the module's id: its twin, and what it read


class Unlike(Exception):
    """Why a module cannot be fused."""


class Other(Exception):
    """It only has the looks of something that could be fused."""


def _close(got: Tensor, want: Any) -> float | None:
    """The error of `got` over the root mean square of `want`; None if that is more than rounding."""
    if not isinstance(want, Tensor) or got.shape != want.shape or got.dtype != want.dtype:
        return None
    a, b = got.float(), want.float()
    error = float((a - b).square().mean().sqrt() / b.square().mean().sqrt().clamp(min=1e-30))
    return error if error <= TOLERANCE.get(want.dtype, 0.0) else None


# Norms.


def _epsilon(module: Any) -> float | None:
    return next((value for name in EPSILONS if isinstance(value := getattr(module, name, None), float)), None)


def _is_norm(module: nn.Module) -> bool:
    own = dict(module.named_parameters(recurse=False))
    alone = not module._modules and not module._buffers
    return alone and set(own) == {"weight"} and own["weight"].ndim == 1 and _epsilon(module) is not None


def _look_norm(norms: Norms, module: Any, args: tuple, kwargs: dict, output: Any) -> FusedNorm:
    """Beside its input, rows far from 0 tell it from a layer norm, and rows of the size of epsilon show where that is;
    of float32 the order of rounding would not show, nor of weights that are all 1, so that it is tried on others."""
    if len(args) != 1 or kwargs:
        raise Unlike("it takes more than one tensor")
    x, epsilon = args[0], _epsilon(module)
    assert epsilon is not None
    size = x.float().square().mean().sqrt().clamp(min=1e-30)
    low = torch.bfloat16 if x.dtype == torch.float32 else x.dtype
    other, rough = (_with_other_weight(module, dtype) for dtype in (x.dtype, low))
    inputs = [(other, x + size.to(x.dtype)), (other, x * (epsilon**0.5 / size).to(x.dtype)), (rough, x.to(low))]
    trials = [(module, x, output), *((like, given, type(module).forward(like, given)) for like, given in inputs)]
    best: tuple[float, FusedNorm] | None = None
    for offset in (0.0, 1.0):
        for cast_first in (True, False):
            twins = [FusedNorm(like, epsilon, offset, cast_first) for like, _, _ in trials]
            errors = [_close(twin.forward(x), y) for twin, (_, x, y) in zip(twins, trials, strict=True)]
            if None not in errors and (best is None or errors[-1] < best[0]):  # type: ignore[operator]
                best = errors[-1], twins[0]  # type: ignore[assignment]
    if best is None:
        raise Unlike("it is not a root-mean-square norm, with or without 1 added to its weight")
    norms[id(module)] = best[1], x
    return best[1]


def _with_other_weight(module: Any, dtype: torch.dtype) -> Any:
    """The norm with another weight, of `dtype`."""
    like, own = copy.copy(module), module._parameters["weight"]
    weight = torch.linspace(0.5, 1.5, own.numel(), dtype=dtype, device=own.device)
    like.__dict__["_parameters"] = {"weight": nn.Parameter(weight, requires_grad=False)}
    return like


# Feed-forward blocks.


def _linears(module: nn.Module) -> dict[str, Any]:
    return {n: m for n, m in module._modules.items() if type(m) in (nn.Linear, QuantLinear)}


def _is_mlp(module: nn.Module) -> bool:
    layers = list(_linears(module).values())
    widths = sorted((layer.in_features, layer.out_features) for layer in layers)
    return len(layers) == 3 and not module._parameters and any(widths[i] == widths[i + 1] for i in (0, 1))


def _look_mlp(norms: Norms, module: Any, args: tuple, kwargs: dict, output: Any) -> FusedMLP:
    if len(args) != 1 or kwargs or not isinstance(output, Tensor):
        raise Other
    x, layers = args[0], _linears(module)
    why = "it is not down(act(gate(x)) * up(x)) with any known activation"
    for gate, up, down in permutations(layers):
        shape = (layers[gate].in_features, layers[gate].out_features)
        if shape != (layers[up].in_features, layers[up].out_features) or layers[down].in_features != shape[1]:
            continue
        if shape[0] != x.shape[-1] or layers[down].out_features != output.shape[-1]:
            continue
        gated, plain = layers[gate](x), layers[up](x)
        tried = {kind: _close(layers[down](act(gated) * plain), output) for kind, act in ACTIVATIONS.items()}
        errors = {kind: error for kind, error in tried.items() if error is not None}
        if not errors:
            continue
        if why := why_not([layers[gate], layers[up]]):
            raise Unlike(why)
        # two that differ by less than rounding may both be close
        kind = _kind(module, errors) or min(errors, key=errors.__getitem__)
        with ExitStack() as failed:
            merged = Merged(module, (gate, up), _others(module, gate, up, down))
            failed.callback(merged.undo)
            twin = FusedMLP(module, merged, down, kind)
            if not twin.stands_in():
                raise Unlike(INSIDE)
            if _close(twin.forward(x), output) is not None:
                failed.pop_all()
                return twin
        why = "merged, it gives another answer"
    raise Unlike(why)


def _kind(module: nn.Module, among: Iterable[str]) -> str | None:
    """Which of some activations the module has, as far as it can be called by itself, in float32."""
    grid = torch.linspace(-6, 6, 97)
    for act in (*module._modules.values(), *vars(module).values()):
        if not callable(act) or isinstance(act, (nn.Linear, QuantLinear)):
            continue
        with suppress(TypeError, RuntimeError, ValueError):
            y = act(grid)
            for kind in among:
                if isinstance(y, Tensor) and torch.allclose(y, ACTIVATIONS[kind](grid), rtol=0, atol=1e-6):
                    return kind
    return None


def _others(module: nn.Module, *names: str) -> list[str]:
    return [name for name, child in module._modules.items() if name not in names and child is not None]


# Attention.


def _is_attention(module: nn.Module) -> bool:
    return len(_linears(module)) >= 4 and hasattr(module, "layer_idx")


def _look_attention(norms: Norms, module: Any, args: tuple, kwargs: dict, output: Any) -> FusedAttention:
    calls = module.__dict__[RECORD]
    given = dict(zip(("hidden_states",), args, strict=False)) | kwargs
    unknown = [n for n, value in given.items() if n not in KNOWN and value is not None]
    if len(calls) != 1 or len(args) > 1 or unknown or not isinstance(output, tuple) or len(output) != 2:
        raise Unlike("it does not call fastllm's attention just once" if len(calls) != 1 else f"it takes {unknown}")
    q, k, v, options, bias, more = calls[0]
    if bias is not None or not options["causal"]:
        raise Unlike("it has a position bias" if bias is not None else "it is not causal")
    x, embeddings = given["hidden_states"], given.get("position_embeddings")
    shape = Shape(q.shape[1], k.shape[1], q.shape[3], v.shape[3])
    layers = {n: m for n, m in _linears(module).items() if m.in_features == x.shape[-1]}
    heads = [norms[id(m)] for m in module._modules.values() if id(m) in norms]
    for names in permutations(layers, 3):
        if [layers[n].out_features for n in names] != [shape.Hq * shape.D, shape.Hkv * shape.D, shape.Hkv * shape.Dv]:
            continue
        parts = _apart(x, [layers[n] for n in names], shape)
        if _close(parts[2], v) is None:
            continue
        a, b = (next((norm for norm, read in heads if _reads(read, part)), None) for part in parts[:2])
        pair = None if a is None or b is None else (a, b)
        for turn in (None,) if embeddings is None else (*ROTATIONS, None):
            twin = FusedAttention(module, None, shape, "", pair, turn, _named(module, options))  # type: ignore[arg-type]
            turned = _turned(twin, parts, embeddings)
            if turned and all(_close(got, want) is not None for got, want in zip(turned, (q, k), strict=True)):
                return _complete(twin, names, given, output)
    raise Unlike("its queries and keys are not projections with head norms and a rotation that are known")


def _reads(read: Tensor, heads: Tensor) -> bool:
    """Whether `read` is the projection [B, H, T, D], as [B, T, H, D] maybe."""
    return any(read.shape == t.shape and _close(t, read) is not None for t in (heads, heads.transpose(1, 2)))


def _turned(twin: FusedAttention, parts: list[Tensor], embeddings: Any) -> tuple[Tensor, ...]:
    """Queries and keys with norm and rotation; nothing if the rotation is not for embeddings like these."""
    try:
        return twin.rotate(parts[0], parts[1], embeddings)
    except (ValueError, TypeError, RuntimeError):
        return ()


def _apart(x: Tensor, layers: list[Any], shape: Shape) -> list[Tensor]:
    heads = (shape.Hq, shape.Hkv, shape.Hkv)
    return [layer(x).unflatten(-1, (H, -1)).transpose(1, 2) for layer, H in zip(layers, heads, strict=True)]


def _named(module: nn.Module, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a call, with parameters of the module by their names."""
    names = {id(p): name for name, p in module.named_parameters(recurse=False)}
    if any(isinstance(value, Tensor) and id(value) not in names for value in options.values()):
        raise Unlike("it makes tensors for its attention as it goes")
    return {n: names[id(value)] if isinstance(value, Tensor) else value for n, value in options.items()}


def _complete(twin: FusedAttention, names: tuple[str, ...], given: Mapping[str, Any], output: Any) -> FusedAttention:
    """The output projection, and the merged one of the rest, once all of it gives the module's answer."""
    module: Any = twin.module
    if why := why_not([module._modules[n] for n in names]):
        raise Unlike(why)
    if twin.norms is not None and twin.norms[0].eps != twin.norms[1].eps:
        raise Unlike("the norms of its queries and keys differ")
    call = {k: value for k, value in given.items() if k != "past_key_values"}
    for name, layer in _linears(module).items():
        if name not in names and layer.in_features == twin.shape.Hq * twin.shape.Dv:
            twin.output = name
            with ExitStack() as failed:
                twin.qkv = Merged(module, names, _others(module, *names, name))
                failed.callback(twin.qkv.undo)
                if not twin.stands_in():
                    raise Unlike(INSIDE)
                if _close(twin.forward(**call)[0], output[0]) is not None:
                    failed.pop_all()
                    return twin
    raise Unlike("what it does after its attention is not one projection")


# Decoder layers.


def _is_layer(module: nn.Module) -> bool:
    kinds = [(_is_norm(child), _is_attention(child)) for child in module._modules.values() if child is not None]
    return sum(n for n, _ in kinds) in (2, 4) and sum(a for _, a in kinds) == 1


def _look_layer(norms: Norms, module: Any, args: tuple, kwargs: dict, output: Any) -> FusedLayer:
    calls, children = module.__dict__[RECORD], module._modules
    found = [norms.get(id(children[name])) for name in calls]
    places = [i for i, norm in enumerate(found) if norm is not None]
    known = places in ([0, 2], [0, 2, 3, 5]) and len(calls) in (4, 6) and places[-1] >= len(calls) - 2
    if not known or len(args) != 1 or not isinstance(output, Tensor):
        raise Unlike("it is not attention and a feed-forward block with norms before, or before and after them")
    fused = tuple(norm[0] for norm in found if norm is not None)
    if len({norm.cast_first for norm in fused[1:]}) > 1:
        raise Unlike("its norms round in different places")
    mlp = calls[3] if len(calls) == 4 else calls[4]
    after = dict(zip((calls[i] for i in places[1:]), fused[1:], strict=True))
    twin = FusedLayer(module, calls[1], mlp, calls[0], after)
    if not twin.stands_in():
        raise Unlike(INSIDE)
    if _close(twin.forward(*args, **kwargs), output) is None:
        raise Unlike("with its sums and norms in one it gives another answer")
    return twin


CANDIDATES: dict[str, Callable[[nn.Module], bool]] = {
    "norm": _is_norm,
    "mlp": _is_mlp,
    "attention": _is_attention,
    "layer": _is_layer,
}
LOOKS: dict[str, Callable] = {
    "norm": _look_norm,
    "mlp": _look_mlp,
    "attention": _look_attention,
    "layer": _look_layer,
}
