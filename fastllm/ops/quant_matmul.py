"""The op `fastllm::quant_matmul`: y = x @ dequantize(w).T + bias.

Its definition is `Rest`: dequantise, multiply. Each layout that packs the same numbers another way must agree with it.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from ..formats import IntFormat
from .gpu import Planar
from .int4pack import Int4Pack
from .int8 import Int8Blocks, Int8Rows
from .layout import Layout, Prepared, Rest, choose
from .library import define, is_traced, is_watched
from .nf4 import NF4_LAYOUTS

LAYOUTS: dict[str, Layout] = {
    layout.name: layout for layout in (Planar(), Int4Pack(), Int8Blocks(), Int8Rows(), Rest())
}

EVERY: dict[str, Layout] = LAYOUTS | NF4_LAYOUTS  # of integers, and of levels

TRACED, TRACED_ROWS = ("int4pack", "int8rows"), 8  # one operator of torch each, for so few rows in bfloat16


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

    w, scale, zero: the operands that `pack` of this layout, in LAYOUTS or NF4_LAYOUTS, returned; that they fit is not
    checked here.
    bits: 4 or 8. group: weights per scale along K. On the CPU, 4-bit weights and the plain rows of 8-bit ones are
    multiplied in bfloat16 whatever the dtype of x: a relative error of about 3e-3.
    batch_invariant: a row of y has the same bits whatever the other rows of x are, and however many. Slower for many
    rows; on a CPU they are taken one by one.
    Differentiable with respect to x and bias. Source of the format: compressed-tensors, `pack-quantized`.
    """
    if is_traced(x) and x.dtype == torch.bfloat16 and layout in TRACED and not batch_invariant:
        if x.shape[:-1].numel() <= TRACED_ROWS:
            return _forward(x, w, scale, zero, bias, N, bits, group, layout)
    if is_watched(x, bias):
        return torch.ops.fastllm.quant_matmul(x, w, scale, zero, bias, N, bits, group, layout, batch_invariant)
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
    if not rows.shape[0]:
        return x.new_empty(*x.shape[:-1], N)
    y = EVERY[layout].linear(rows, Prepared(w, scale, zero), bias, N, bits, group, batch_invariant)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], N)


def _grad_x(
    grad: Tensor, w: Tensor, scale: Tensor, zero: Tensor | None, K: int, bits: int, group: int, layout: str
) -> Tensor:
    """grad [..., N] @ dequantize(w) [N, K], in grad's dtype, a few MB of the weight at a time."""
    return EVERY[layout].grad_x(grad, Prepared(w, scale, zero), K, bits, group)


define("quant_matmul", _forward, _grad_x, "int bits, int group, str layout")
