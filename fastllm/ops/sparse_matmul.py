"""The op `fastllm::sparse_matmul`: y = x @ w.T + bias for a weight that keeps equally many of each 32 columns.

Its definition is `SparseRest`: expand, multiply. `Lanes`, which a GPU reads, must agree with it.
"""

from functools import cache

import torch
from torch import Tensor

from ..sparse_formats import parse_sparse
from .lanes import Lanes, SparseLayout, SparseRest
from .layout import Prepared
from .library import define, is_watched

SPARSE_LAYOUTS: dict[str, SparseLayout] = {layout.name: layout for layout in (Lanes(), SparseRest())}


def sparse_matmul(
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    index: Tensor,
    bias: Tensor | None,
    N: int,
    format: str,
    layout: str,
    batch_invariant: bool = False,
) -> Tensor:
    """x [..., K] @ expand(w) [N, K].T + bias [N] -> [..., N], in x's dtype, with sums in float32 or wider.

    w, scale, index: the operands that `SPARSE_LAYOUTS[layout].pack` returned; that they fit is not checked here.
    format: the name of a `SparseFormat`, such as "16:32" or "2:4-int8".
    batch_invariant: a row of y has the same bits whatever the other rows of x are, and however many.
    An infinity or a NaN in x may or may not reach rows of w that do not keep its column.
    Differentiable with respect to x and bias.
    """
    if is_watched(x, bias):
        return torch.ops.fastllm.sparse_matmul(x, w, scale, index, bias, N, format, layout, batch_invariant)
    return _forward(x, w, scale, index, bias, N, format, layout, batch_invariant)


@cache
def _of(layout: str, format: str) -> SparseLayout:
    return type(SPARSE_LAYOUTS[layout])(parse_sparse(format))


def _forward(
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    index: Tensor,
    bias: Tensor | None,
    N: int,
    format: str,
    layout: str,
    batch_invariant: bool = False,
) -> Tensor:
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    if not rows.shape[0]:
        return x.new_empty(*x.shape[:-1], N)
    y = _of(layout, format).linear(rows, Prepared(w, scale, index), bias, N, 0, 0, batch_invariant)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], N)


def _grad_x(grad: Tensor, w: Tensor, scale: Tensor, index: Tensor, K: int, format: str, layout: str) -> Tensor:
    """grad [..., N] @ expand(w) [N, K], in grad's dtype, a few MB of the weight at a time."""
    return _of(layout, format).grad_x(grad, Prepared(w, scale, index), K, 0, 0)


define("sparse_matmul", _forward, _grad_x, "str format, str layout", "Tensor w, Tensor scale, Tensor index")
