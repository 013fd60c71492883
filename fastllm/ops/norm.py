"""The ops `fastllm::rms_norm`, `layer_norm` and those that add a residual first: norms of rows, in float32.

Their definitions are `rms`, `layer` and the sums around them. On a GPU each is one launch (kernels/norm.py). On the
CPU a layer norm is torch's own; of an RMS norm it makes ten operators there, `cpu_rms` about five.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from .library import define_fused, is_traced, is_watched

FAST = (torch.float32, torch.bfloat16, torch.float16)
FEW = 8192  # numbers for which one call less is worth a division each


def rms(x: Tensor, weight: Tensor | None, eps: float, cast_first: bool) -> Tensor:
    """The definition of `rms_norm` without a residual; float64 stays float64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    h = x.to(wide)
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    if cast_first:
        h = h.to(x.dtype).to(wide)
    return (h if weight is None else h * weight.to(wide)).to(x.dtype)


def layer(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The definition of `layer_norm` without a residual."""
    wide = torch.promote_types(x.dtype, torch.float32)
    h = x.to(wide)
    h = h - h.mean(-1, keepdim=True)
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    h = h if weight is None else h * weight.to(wide)
    return (h if bias is None else h + bias.to(wide)).to(x.dtype)


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, *, residual: Tensor | None = None, cast_first: bool = False
) -> Any:
    """y = x * rsqrt(mean(x^2) + eps) * weight over the last dimension; with a residual, (y, total) of the total.

    x: [..., D] floating point; weight: [D] or None; eps: positive; residual: like x, or None
    residual: total = x + residual, rounded to x's dtype, is normalized, and returned as well
    cast_first: as Llama does, x * rsqrt(...) is rounded to x's dtype before it meets the weight; otherwise as Gemma
        does, where the weight (1 + that of the checkpoint) is float32 and all of it is rounded once

    float32 arithmetic. Differentiable. ValueError for operands that do not fit. Source: Zhang and Sennrich, Root Mean
    Square Layer Normalization (2019).
    """
    if is_traced(x):
        return rms(x, weight, eps, cast_first) if residual is None else _add_rms(x, residual, weight, eps, cast_first)
    if residual is not None:
        if is_watched(x, weight, residual):
            return torch.ops.fastllm.add_rms_norm(x, residual, weight, eps, cast_first)
        return _add_rms_norm(x, residual, weight, eps, cast_first)
    if is_watched(x, weight):
        return torch.ops.fastllm.rms_norm(x, weight, eps, cast_first)
    return _rms_norm(x, weight, eps, cast_first)


def norm_add_norm(
    x: Tensor,
    residual: Tensor,
    weight_a: Tensor | None,
    weight_b: Tensor | None,
    eps_a: float,
    eps_b: float,
    cast_first: bool = False,
) -> tuple[Tensor, Tensor]:
    """(y, total): total = residual + rms_norm(x, weight_a), y = rms_norm(total, weight_b).

    What Gemma 2 and 3 do between two sublayers. The first norm, the total and y are each rounded to x's dtype.
    """
    if is_traced(x):
        return _rms_add_rms(x, residual, weight_a, weight_b, eps_a, eps_b, cast_first)
    if is_watched(x, residual, weight_a, weight_b):
        return torch.ops.fastllm.norm_add_norm(x, residual, weight_a, weight_b, eps_a, eps_b, cast_first)
    return _norm_add_norm(x, residual, weight_a, weight_b, eps_a, eps_b, cast_first)


def norm_add(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, cast_first: bool = False) -> Tensor:
    """residual + rms_norm(x, weight), of x's dtype: `norm_add_norm` without the second norm."""
    if is_traced(x):
        return _rms_add(x, residual, weight, eps, cast_first)
    if is_watched(x, residual, weight):
        return torch.ops.fastllm.norm_add(x, residual, weight, eps, cast_first)
    return _norm_add(x, residual, weight, eps, cast_first)


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, residual: Tensor | None = None
) -> Any:
    """y = (x - mean(x)) * rsqrt(var(x) + eps) * weight + bias over the last dimension; with a residual, (y, total).

    As `rms_norm`: float32 arithmetic, the total and y each rounded to x's dtype.
    """
    if residual is not None:
        if is_watched(x, weight, bias, residual):
            return torch.ops.fastllm.add_layer_norm(x, residual, weight, bias, eps)
        return _add_layer_norm(x, residual, weight, bias, eps)
    if is_watched(x, weight, bias):
        return torch.ops.fastllm.layer_norm(x, weight, bias, eps)
    return _layer_norm(x, weight, bias, eps)


def check_norm(x: Tensor, eps: float, residual: Tensor | None, *parameters: Tensor | None) -> None:
    """Raise ValueError where torch would broadcast, or divide by zero."""
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}: a row of zeros would be divided by zero")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        want = f"{x.dtype} {list(x.shape)}"
        raise ValueError(f"residual must be {want}, as x is; got {residual.dtype} {list(residual.shape)}")
    for t in parameters:
        if t is not None and t.shape != x.shape[-1:]:
            raise ValueError(
                f"weights and bias must be {list(x.shape[-1:])} for x {list(x.shape)}; got {list(t.shape)}"
            )


def cpu_rms(x: Tensor, weight: Tensor | None, eps: float, cast_first: bool) -> Tensor:
    """`rms` in few operators, none of which wakes other threads for a few rows."""
    D, dtype = x.shape[-1], x.dtype
    if dtype not in FAST or not x.numel():
        return rms(x, weight, eps, cast_first)
    h = x.float()
    if x.numel() == D:  # a number of Python's will do: on a CPU nothing has to be waited for
        row = h.reshape(-1)
        scale = (row.dot(row).item() / D + eps) ** -0.5
        y = x * scale if cast_first or weight is None else torch.addcmul(_number(0.0), h, _float(weight), value=scale)
    else:
        length = torch.hypot(torch.linalg.vector_norm(h, 2, -1, True), _number((D * eps) ** 0.5))
        if x.numel() <= FEW:
            y = torch.addcdiv(_number(0.0), h, length, value=D**0.5)  # h * sqrt(D / (sum(h^2) + D eps))
        else:
            length = length.reciprocal_().mul_(D**0.5)
            y = h * length if h is x else h.mul_(length)
        if weight is not None and not cast_first:
            y.mul_(weight)
    if y.dtype != dtype:
        y = y.to(dtype)
    if weight is None or not cast_first:
        return y
    return y.mul_(weight) if weight.dtype == dtype else (y * _float(weight)).to(dtype)


def _float(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float32 else x.float()


@cache
def _number(value: float) -> Tensor:
    return torch.full((), value, device="cpu")


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float, cast_first: bool) -> Tensor:
    check_norm(x, eps, None, weight)
    if x.is_cuda and x.dtype in FAST:
        return _gpu(x, None, None, weight, None, None, eps, False, cast_first)[0]
    return cpu_rms(x, weight, eps, cast_first)


def _add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, cast_first: bool
) -> tuple[Tensor, Tensor]:
    check_norm(x, eps, residual, weight)
    if x.is_cuda and x.dtype in FAST:
        return _gpu(x, residual, None, weight, None, None, eps, False, cast_first)
    total = x + residual
    return cpu_rms(total, weight, eps, cast_first), total


def _norm_add_norm(
    x: Tensor,
    residual: Tensor,
    weight_a: Tensor | None,
    weight_b: Tensor | None,
    eps_a: float,
    eps_b: float,
    cast_first: bool,
) -> tuple[Tensor, Tensor]:
    check_norm(x, min(eps_a, eps_b), residual, weight_a, weight_b)
    if x.is_cuda and x.dtype in FAST:
        return _gpu(x, residual, weight_a, weight_b, None, eps_a, eps_b, False, cast_first)
    total = cpu_rms(x, weight_a, eps_a, cast_first) + residual
    return cpu_rms(total, weight_b, eps_b, cast_first), total


def _norm_add(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, cast_first: bool) -> Tensor:
    check_norm(x, eps, residual, weight)
    if x.is_cuda and x.dtype in FAST:
        return _gpu(x, residual, weight, None, None, eps, None, False, cast_first)[1]
    return cpu_rms(x, weight, eps, cast_first) + residual


def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    check_norm(x, eps, None, weight, bias)
    if x.is_cuda and x.dtype in FAST:
        return _gpu(x, None, None, weight, bias, None, eps, True, False)[0]
    return _cpu_layer(x, weight, bias, eps)


def _add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    check_norm(x, eps, residual, weight, bias)
    if x.is_cuda and x.dtype in FAST:
        return _gpu(x, residual, None, weight, bias, None, eps, True, False)
    total = x + residual
    return _cpu_layer(total, weight, bias, eps), total


def _cpu_layer(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """torch's, which takes parameters of x's dtype, or both of float32."""
    return torch.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _gpu(x: Tensor, *operands: Any) -> Any:
    from ..kernels.norm import norm  # Triton is imported on first use

    return norm(x, *operands)


def _like_x(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _like_both(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _like_x(x), _like_x(x)


def _add_rms(x: Tensor, residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms(total, *rest), total


def _rms_add_rms(x: Tensor, residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    weight_a, weight_b, eps_a, eps_b, cast_first = rest
    total = rms(x, weight_a, eps_a, cast_first) + residual
    return rms(total, weight_b, eps_b, cast_first), total


def _rms_add(x: Tensor, residual: Tensor, *rest: Any) -> Tensor:
    return rms(x, *rest) + residual


def _add_layer(x: Tensor, residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    total = x + residual
    return layer(total, *rest), total


_X, _RMS = "Tensor x, Tensor residual", "Tensor? weight, float eps, bool cast_first"
_LAYER = "Tensor? weight, Tensor? bias, float eps"
_TWO = "Tensor? weight_a, Tensor? weight_b, float eps_a, float eps_b, bool cast_first"
define_fused(f"rms_norm(Tensor x, {_RMS}) -> Tensor", _rms_norm, rms, _like_x)
define_fused(f"add_rms_norm({_X}, {_RMS}) -> (Tensor, Tensor)", _add_rms_norm, _add_rms, _like_both)
define_fused(f"norm_add_norm({_X}, {_TWO}) -> (Tensor, Tensor)", _norm_add_norm, _rms_add_rms, _like_both)
define_fused(f"norm_add({_X}, {_RMS}) -> Tensor", _norm_add, _rms_add, _like_x)
define_fused(f"layer_norm(Tensor x, {_LAYER}) -> Tensor", _layer_norm, layer, _like_x)
define_fused(f"add_layer_norm({_X}, {_LAYER}) -> (Tensor, Tensor)", _add_layer_norm, _add_layer, _like_both)
