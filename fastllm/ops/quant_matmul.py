"""The op `fastllm::quant_matmul`: y = x @ dequantize(w).T + bias.

Its definition is `Rest`: dequantise, multiply. Each layout that packs the same numbers another way must agree with it.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..formats import IntFormat
from .gpu import Planar
from .int4pack import Int4Pack
from .int8 import Int8Blocks, Int8Rows
from .layout import Layout, Prepared, Rest, choose

LAYOUTS: dict[str, Layout] = {
    layout.name: layout for layout in (Planar(), Int4Pack(), Int8Blocks(), Int8Rows(), Rest())
}

LIBRARY = torch.library.Library("fastllm", "DEF")
LIBRARY.define(
    "quant_matmul(Tensor x, Tensor w, Tensor scale, Tensor? zero, Tensor? bias, "
    "int N, int bits, int group, str layout, bool batch_invariant=False) -> Tensor"
)
LIBRARY.define(
    "quant_matmul_grad_x(Tensor grad, Tensor w, Tensor scale, Tensor? zero, int K, int bits, int group, str layout)"
    " -> Tensor"
)


def choose_layout(
    format: IntFormat, N: int, K: int, dtype: torch.dtype, device: torch.device, among: Iterable[str] = LAYOUTS
) -> tuple[Layout, dict[str, list[str]]]:
    """The first layout that can hold the weight, and why those before it cannot: {name: reasons}."""
    return choose({name: LAYOUTS[name] for name in among}, format, N, K, dtype, device)


def quant_matmul(
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    N: int,
    bits: int,
    group: int,
    layout: str,
    batch_invariant: bool = False,
) -> Tensor:
    """x [..., K] @ dequantize(w) [N, K].T + bias [N] -> [..., N], in x's dtype, with sums in float32 or wider.

    w, scale, zero: the operands that `fastllm.ops.LAYOUTS[layout].pack` returned; that they fit is not checked here.
    bits: 4 or 8. group: weights per scale along K. On the CPU, 4-bit weights and the plain rows of 8-bit ones are
    multiplied in bfloat16 whatever the dtype of x: a relative error of about 3e-3.
    batch_invariant: a row of y has the same bits whatever the other rows of x are, and however many. Slower for many
    rows; on a CPU they are taken one by one.
    Differentiable with respect to x and bias. Source of the format: compressed-tensors, `pack-quantized`.
    """
    if torch.compiler.is_compiling() or type(x) is not Tensor or torch._C._len_torch_dispatch_stack():
        return torch.ops.fastllm.quant_matmul(x, w, scale, zero, bias, N, bits, group, layout, batch_invariant)
    if torch.is_grad_enabled() and (x.requires_grad or bias is not None and bias.requires_grad):
        return torch.ops.fastllm.quant_matmul(x, w, scale, zero, bias, N, bits, group, layout, batch_invariant)
    # Nobody is watching: spare the dispatcher, 8 of the 20 us that a small layer costs.
    return _forward(x, w, scale, zero, bias, N, bits, group, layout, batch_invariant)


def _forward(
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    N: int,
    bits: int,
    group: int,
    layout: str,
    batch_invariant: bool = False,
) -> Tensor:
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    if not len(rows):
        return x.new_empty(*x.shape[:-1], N)
    y = LAYOUTS[layout].linear(rows, Prepared(w, scale, zero), bias, N, bits, group, batch_invariant)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], N)


def _grad_x(
    grad: Tensor, w: Tensor, scale: Tensor, zero: Tensor | None, K: int, bits: int, group: int, layout: str
) -> Tensor:
    """grad [..., N] @ dequantize(w) [N, K], in grad's dtype, a few MB of the weight at a time."""
    return LAYOUTS[layout].grad_x(grad, Prepared(w, scale, zero), K, bits, group)


def _save_for_backward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, w, scale, zero, bias, _, bits, group, layout, _ = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(w, scale, zero)
    ctx.rest = x.shape[-1], bits, group, layout


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    w, scale, zero = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.fastllm.quant_matmul_grad_x(grad, w, scale, zero, *ctx.rest)
    if ctx.needs_input_grad[4]:
        grad_bias = grad.flatten(0, -2).sum(0).to(ctx.bias_dtype)
    return grad_x, None, None, None, grad_bias, None, None, None, None, None


for name, implementation in (("quant_matmul", _forward), ("quant_matmul_grad_x", _grad_x)):
    for key in ("CPU", "CUDA", "MkldnnCPU"):  # the last: oneDNN's blocks are opaque tensors with a key of their own
        LIBRARY.impl(name, implementation, key)

torch.library.register_autograd("fastllm::quant_matmul", _backward, setup_context=_save_for_backward, lib=LIBRARY)


@torch.library.register_fake("fastllm::quant_matmul", lib=LIBRARY)
def _(x: Tensor, w: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, N: int, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], N)


@torch.library.register_fake("fastllm::quant_matmul_grad_x", lib=LIBRARY)
def _(grad: Tensor, w: Tensor, scale: Tensor, zero: Tensor | None, K: int, *_: Any) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], K)
