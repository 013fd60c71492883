"""The op `fastllm::dynamic_matmul`: weights and activations of 8 bits.

y[m, n] = (sum_k q[m, k] w[n, k]) * x_scale[m] * w_scale[n] + bias[n], with q and x_scale from rounding: each row of x
gets its own scale when it comes ("per token, dynamic"), so that nothing has to be calibrated.

Its definitions are `Int8Rest` and `Fp8Rest`. Sums of integers are exact in every implementation, which then differ in
the last bits of a float32.
"""

from typing import Any

import torch
from torch import Tensor

from .fp8_matmul import FP8_LAYOUTS
from .int8_matmul import INT8_LAYOUTS
from .layout import DynamicLayout, Prepared
from .quant_matmul import LIBRARY

DYNAMIC_LAYOUTS: dict[str, DynamicLayout] = {**INT8_LAYOUTS, **FP8_LAYOUTS}

LIBRARY.define(
    "dynamic_matmul(Tensor x, Tensor w, Tensor scale, Tensor? zero, Tensor? bias, int N, str layout, "
    "bool batch_invariant=False) -> Tensor"
)
LIBRARY.define("dynamic_matmul_grad_x(Tensor grad, Tensor w, Tensor scale, Tensor? zero, int K, str layout) -> Tensor")


def dynamic_matmul(
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    N: int,
    layout: str,
    batch_invariant: bool = False,
) -> Tensor:
    """x [..., K], rounded to 8 bits row by row, @ dequantize(w) [N, K].T + bias [N] -> [..., N] in x's dtype.

    w, scale, zero: the operands that `fastllm.ops.DYNAMIC_LAYOUTS[layout].pack` returned; that they fit is not checked
    here. A row of x with a NaN or an infinity gives a row of NaN.
    batch_invariant: a row of y has the same bits whatever the other rows of x are; sums of integers always have them,
    those of floats are slower then.
    Differentiable with respect to x and bias, straight through the rounding of x: dx = dy @ dequantize(w). Source of
    the formats: compressed-tensors, `int-quantized` and `float-quantized`.
    """
    if torch.compiler.is_compiling() or type(x) is not Tensor or torch._C._len_torch_dispatch_stack():
        return torch.ops.fastllm.dynamic_matmul(x, w, scale, zero, bias, N, layout, batch_invariant)
    if torch.is_grad_enabled() and (x.requires_grad or bias is not None and bias.requires_grad):
        return torch.ops.fastllm.dynamic_matmul(x, w, scale, zero, bias, N, layout, batch_invariant)
    # without the dispatcher, whose 8 us a small layer would feel
    return _forward(x, w, scale, zero, bias, N, layout, batch_invariant)


def _forward(
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    N: int,
    layout: str,
    batch_invariant: bool = False,
) -> Tensor:
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    if not len(rows):
        return x.new_empty(*x.shape[:-1], N)
    y = DYNAMIC_LAYOUTS[layout].multiply(rows, Prepared(w, scale, zero), bias, N, batch_invariant)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], N)


def _grad_x(grad: Tensor, w: Tensor, scale: Tensor, zero: Tensor | None, K: int, layout: str) -> Tensor:
    return DYNAMIC_LAYOUTS[layout].grad_x(grad, Prepared(w, scale, zero), K, 8, K)


def _save_for_backward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, w, scale, zero, bias, _, layout, _ = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(w, scale, zero)
    ctx.K, ctx.layout = x.shape[-1], layout


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    w, scale, zero = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.fastllm.dynamic_matmul_grad_x(grad, w, scale, zero, ctx.K, ctx.layout)
    if ctx.needs_input_grad[4]:
        grad_bias = grad.flatten(0, -2).sum(0).to(ctx.bias_dtype)
    return grad_x, None, None, None, grad_bias, None, None, None


for name, implementation in (("dynamic_matmul", _forward), ("dynamic_matmul_grad_x", _grad_x)):
    for key in ("CPU", "CUDA", "MkldnnCPU"):  # the last: oneDNN's blocks are opaque tensors with a key of their own
        LIBRARY.impl(name, implementation, key)

torch.library.register_autograd("fastllm::dynamic_matmul", _backward, setup_context=_save_for_backward, lib=LIBRARY)


@torch.library.register_fake("fastllm::dynamic_matmul", lib=LIBRARY)
def _(x: Tensor, w: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, N: int, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], N)


@torch.library.register_fake("fastllm::dynamic_matmul_grad_x", lib=LIBRARY)
def _(grad: Tensor, w: Tensor, scale: Tensor, zero: Tensor | None, K: int, *_: Any) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], K)
