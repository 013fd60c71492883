"""The op `fastllm::dynamic_matmul`: weights and activations of 8 bits.

y[m, n] = (sum_k q[m, k] w[n, k]) * x_scale[m] * w_scale[n] + bias[n], with q and x_scale from rounding: each row of x
gets its own scale when it comes ("per token, dynamic"), so that nothing has to be calibrated.

Its definitions are `Int8Rest` and `Fp8Rest`. Sums of integers are exact in every implementation, which then differ in
the last bits of a float32.
"""

import torch
from torch import Tensor

from .fp8_matmul import FP8_LAYOUTS
from .int8_matmul import INT8_LAYOUTS
from .layout import DynamicLayout, Prepared
from .library import define, is_watched

DYNAMIC_LAYOUTS: dict[str, DynamicLayout] = {**INT8_LAYOUTS, **FP8_LAYOUTS}


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
    if is_watched(x, bias):
        return torch.ops.fastllm.dynamic_matmul(x, w, scale, zero, bias, N, layout, batch_invariant)
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


define("dynamic_matmul", _forward, _grad_x, "str layout")
