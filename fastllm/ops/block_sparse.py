"""The op `fastllm::block_sparse_matmul`: weights of which only some blocks are stored, read and multiplied."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, linear

from ..bsr_format import BlockSparseWeight, row_of_blocks, to_dense
from .library import LIBRARY, is_watched

# On a CPU (`bench/bench_block_sparse.py --paths`): rows of x up to which blocks are multiplied one by one in one call;
# up to which they are if that gives no more than PARTS sums, and rows of blocks are where they have equally many;
# bytes of x to gather at a time, and rows of x.
FEW, MEDIUM, PARTS = 32, 64, 1 << 20
GATHERED, CHUNK = 1 << 24, 512
# Share of blocks from which on a CPU was as fast with dense weights in bfloat16: for one row of x, for 512.
DENSE_FROM = {32: (0.4, 0.35), 64: (0.55, 0.6), 128: (0.5, 0.65)}


def block_sparse_matmul(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    rows: Tensor,
    order: Tensor,
    bias: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """x [..., K] @ W.T + bias [N] -> [..., N] in x's dtype: float16, bfloat16 or float32.

    values, columns, rows: a `bsr_format.BlockSparseWeight` of W [N, K], which `bsr_format.check` accepts; what is in
    columns and rows is not looked at here. Values of another dtype than x's are converted in every call.
    order: int32 [N / B], the rows of blocks in the order in which a GPU starts them, as `bsr_format.order_of` has it
    batch_invariant: a row of y has the same bits whatever the other rows of x are; slower

    x is not read where a row of blocks has no block: a NaN there is a NaN of the dense product, and none of this one.
    Differentiable with respect to x and bias, by way of the dense weight. Raises ValueError for operands that do not
    fit. Few rows of bfloat16 are summed on a CPU from one product for each block, each of which was rounded.
    """
    if is_watched(x, bias):
        return torch.ops.fastllm.block_sparse_matmul(x, values, columns, rows, order, bias, batch_invariant)
    return _forward(x, values, columns, rows, order, bias, batch_invariant)


def definition(x: Tensor, weight: BlockSparseWeight, bias: Tensor | None = None) -> Tensor:
    """What the op computes, in plain torch: in float32, rounded once."""
    B, nb = weight.values.shape[1], len(weight.rows) - 1
    dense = to_dense(weight, (nb * B, x.shape[-1]), torch.float32)
    return linear(x.float(), dense, None if bias is None else bias.float()).to(x.dtype)


def runs_on(N: int, K: int, B: int, count: int, dtype: torch.dtype, device: torch.device) -> str:
    """What multiplies by a weight [N, K] of `count` blocks of B x B, for reports; with a warning where dense wins."""
    if device.type == "cuda":
        return "triton block-sparse matmul"
    share = count * B * B / (N * K)
    how = "products of blocks" if dtype != torch.float16 else "products of blocks, in float32"
    slow = [name for name, limit in zip(("one row", "a prompt"), DENSE_FROM[B], strict=True) if share >= limit]
    if not slow:
        return how
    return f"{how}; dense would be as fast for {' and for '.join(slow)} ({share:.0%} of blocks of {B} x {B} are kept)"


def _check(x: Tensor, values: Tensor, columns: Tensor, rows: Tensor, order: Tensor, bias: Tensor | None) -> None:
    B, nb = values.shape[-1], len(rows) - 1
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"x must be float16, bfloat16 or float32, got {x.dtype}")
    if values.ndim != 3 or values.shape[1] != B or x.shape[-1] % B:
        raise ValueError(f"values must be [nnz, B, B] with a B that divides K={x.shape[-1]}; got {list(values.shape)}")
    for name, t, length in (("columns", columns, len(values)), ("rows", rows, nb + 1), ("order", order, nb)):
        if t.dtype != torch.int32 or t.shape != (length,):
            raise ValueError(f"{name} must be int32 [{length}]; got {t.dtype} {list(t.shape)}")
    if bias is not None and bias.shape != (nb * B,):
        raise ValueError(f"bias must be [{nb * B}] for {nb} rows of blocks of {B} x {B}; got {list(bias.shape)}")


def _forward(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    rows: Tensor,
    order: Tensor,
    bias: Tensor | None,
    batch_invariant: bool = False,
) -> Tensor:
    _check(x, values, columns, rows, order, bias)
    N = values.shape[1] * (len(rows) - 1)
    flat = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    values = values if values.dtype == x.dtype else values.to(x.dtype)
    if x.is_cuda:
        from ..kernels.block_sparse_matmul import block_sparse_matmul  # Triton is imported on first use

        y = block_sparse_matmul(flat, values, columns, rows, order, bias, batch_invariant)
    else:
        weight = BlockSparseWeight(values, columns, rows)
        step = 1 if batch_invariant else CHUNK
        if len(flat) <= step:
            y = native(flat, weight)
        else:
            y = torch.cat([native(part, weight) for part in flat.split(step)])
        if bias is not None:
            y += bias.to(y.dtype)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], N)


def native(x: Tensor, weight: BlockSparseWeight) -> Tensor:
    """x [M, K] @ W.T -> [M, N] in x's dtype, by whichever of torch's products is the fastest on a CPU."""
    M, (nnz, B, _), nb = len(x), weight.values.shape, len(weight.rows) - 1
    if not nnz or not M:
        return x.new_zeros(M, nb * B)
    if x.dtype == torch.float16 or nnz * M * B * x.element_size() > GATHERED:  # float16 products are slow on a CPU
        return by_rows(x, weight)
    if x.dtype == torch.bfloat16 and M <= MEDIUM:
        if nnz % nb == 0 and _equal(weight.rows, nnz // nb):
            return by_equal_rows(x, weight)
        if M <= FEW or nnz * M * B <= PARTS:
            return by_blocks(x, weight)
    return by_groups(x, weight)


def _equal(rows: Tensor, each: int) -> bool:
    return torch.equal(rows, torch.arange(0, len(rows) * each, each, dtype=torch.int32))


def _gathered(x: Tensor, columns: Tensor, B: int) -> Tensor:
    """The columns of x that each block takes, side by side: [M, nnz, B]."""
    return x.reshape(len(x), -1, B).index_select(1, columns)


def by_rows(x: Tensor, weight: BlockSparseWeight) -> Tensor:
    """One product for each row of blocks: for many rows of x, of which no more is gathered than a cache holds."""
    values, columns, rows = weight
    M, B, dtype = len(x), values.shape[1], x.dtype
    x, bounds, found = x.float() if dtype == torch.float16 else x, rows.tolist(), []
    for first, last in zip(bounds, bounds[1:], strict=False):
        xs = _gathered(x, columns[first:last], B).view(M, (last - first) * B)
        found.append(torch.mm(xs, values[first:last].view(-1, B).to(x.dtype)).to(dtype))
    return torch.cat(found, 1)


def by_groups(x: Tensor, weight: BlockSparseWeight) -> Tensor:
    """The same in one call."""
    values, columns, rows = weight
    M, B = len(x), values.shape[1]
    y = grouped_mm(_gathered(x, columns, B).view(M, -1), values.view(-1, B), offs=rows[1:] * B)  # [N / B, M, B]
    return y.transpose(0, 1).reshape(M, -1)


def by_equal_rows(x: Tensor, weight: BlockSparseWeight) -> Tensor:
    """The same as a batch, where all rows of blocks have equally many."""
    values, columns, rows = weight
    M, B, nb = len(x), values.shape[1], len(rows) - 1
    xs = _gathered(x, columns, B).view(M, nb, -1).transpose(0, 1)
    return torch.bmm(xs, values.view(nb, -1, B)).transpose(0, 1).reshape(M, -1)


def by_blocks(x: Tensor, weight: BlockSparseWeight) -> Tensor:
    """One product for each block, and sums of them in float32: for few rows of x."""
    values, columns, rows = weight
    M, B, nb = len(x), values.shape[1], len(rows) - 1
    parts = torch.bmm(_gathered(x, columns, B).transpose(0, 1), values)  # [nnz, M, B]
    y = torch.zeros(nb, M * B).index_add_(0, row_of_blocks(columns, rows), parts.view(-1, M * B).float())
    return y.view(nb, M, B).transpose(0, 1).reshape(M, -1).to(x.dtype)


def _grad_x(grad: Tensor, values: Tensor, columns: Tensor, rows: Tensor, K: int) -> Tensor:
    """grad [..., N] @ W -> [..., K]. The dense weight is there for as long as this takes."""
    dense = to_dense(BlockSparseWeight(values, columns, rows), (grad.shape[-1], K), grad.dtype)
    return grad @ dense


LIBRARY.define(
    "block_sparse_matmul(Tensor x, Tensor values, Tensor columns, Tensor rows, Tensor order, Tensor? bias, "
    "bool batch_invariant=False) -> Tensor"
)
LIBRARY.define(
    "block_sparse_matmul_grad_x(Tensor grad, Tensor values, Tensor columns, Tensor rows, SymInt K) -> Tensor"
)
for _key in ("CPU", "CUDA"):
    LIBRARY.impl("block_sparse_matmul", _forward, _key)
    LIBRARY.impl("block_sparse_matmul_grad_x", _grad_x, _key)


@torch.library.register_fake("fastllm::block_sparse_matmul", lib=LIBRARY)
def _like_y(x: Tensor, values: Tensor, columns: Tensor, rows: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], values.shape[1] * (rows.shape[0] - 1))


@torch.library.register_fake("fastllm::block_sparse_matmul_grad_x", lib=LIBRARY)
def _like_x(grad: Tensor, values: Tensor, columns: Tensor, rows: Tensor, K: int) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], K)


def _save_for_backward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, values, columns, rows, _, bias, _ = inputs
    ctx.K, ctx.bias_dtype = x.shape[-1], None if bias is None else bias.dtype
    ctx.save_for_backward(values, columns, rows)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    values, columns, rows = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.fastllm.block_sparse_matmul_grad_x(grad, values, columns, rows, ctx.K)
    if ctx.needs_input_grad[5]:
        grad_bias = grad.flatten(0, -2).sum(0).to(ctx.bias_dtype)
    return grad_x, None, None, None, None, grad_bias, None


torch.library.register_autograd(
    "fastllm::block_sparse_matmul", _backward, setup_context=_save_for_backward, lib=LIBRARY
)
