"""Block-sparse weights: of a matrix cut into blocks of B x B, those that are not zero.

The format is BSR (block sparse row) as in the sparse BLAS and `torch.sparse_bsr`, but for the blocks themselves: each
is stored with its columns first. The blocks of a row of blocks, one below the other, are then one contiguous matrix
[count * B, B], which a CPU multiplies as it lies, and tensor cores read either way.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

SIZES = (32, 64, 128)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class BlockFormat:
    """Blocks of `block` x `block`, by the name that users give it: "block64"."""

    block: int

    @property
    def name(self) -> str:
        return f"block{self.block}"

    def bytes(self, N: int, count: int, value_bytes: int = 2) -> int:
        """The size of a weight of N rows with `count` blocks, of values of `value_bytes` bytes each."""
        return count * (self.block**2 * value_bytes + 4) + 4 * (N // self.block + 1)


class BlockSparseWeight(NamedTuple):
    """W [N, K] with blocks of B x B, row of blocks by row of blocks, in the order of columns.

    values:  [nnz, B, B] float16, bfloat16 or float32; W[rB + n, cB + k] = values[j, k, n] for block j, at row r and
        column c of blocks
    columns: int32 [nnz], the c of each block, ascending within a row
    rows:    int32 [N / B + 1]; row r has the blocks rows[r] to rows[r + 1] - 1, which may be none
    """

    values: Tensor
    columns: Tensor
    rows: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes in memory and on disk."""
        return sum(t.numel() * t.element_size() for t in self)


def check_block(N: int, K: int, B: int) -> None:
    """Raise ValueError unless a weight [N, K] can be cut into blocks of B x B."""
    if B not in SIZES:
        raise ValueError(f"blocks may be of {', '.join(map(str, SIZES[:-1]))} or {SIZES[-1]}, not {B!r}")
    if N % B or K % B:
        raise ValueError(
            f"a weight [{N}, {K}] is not made of blocks of {B} x {B}: {N} leaves {N % B} and {K} leaves {K % B}; "
            f"use a size of {', '.join(map(str, SIZES))} that divides both, or leave the layer dense"
        )


def check(weight: BlockSparseWeight, shape: tuple[int, int]) -> None:
    """Raise ValueError unless the tensors are a weight of `shape`, [N, K]: kernels would read beyond them.

    What is on the meta device has no content to look at.
    """
    values, columns, rows = weight
    if values.ndim != 3 or values.shape[1] != values.shape[2] or values.dtype not in DTYPES:
        kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"values must be [nnz, B, B] of {kinds}; got {values.dtype} {list(values.shape)}")
    (nnz, B, _), (N, K) = values.shape, shape
    check_block(N, K, B)
    for name, t, length in (("columns", columns, nnz), ("rows", rows, N // B + 1)):
        if t.dtype != torch.int32 or t.shape != (length,):
            raise ValueError(f"{name} must be int32 [{length}]; got {t.dtype} {list(t.shape)}")
        if t.device != values.device:
            raise ValueError(f"{name} is on {t.device}, values are on {values.device}: move them together")
    if not rows.is_meta:
        _check_content(columns.cpu(), rows.cpu(), nnz, K // B)


def _check_content(columns: Tensor, rows: Tensor, nnz: int, width: int) -> None:
    if rows[0] != 0 or rows[-1] != nnz or (rows.diff() < 0).any():
        raise ValueError(
            f"rows must ascend from 0 to {nnz}, the number of blocks; they go from {int(rows[0])} to {int(rows[-1])}"
            + (", and descend on the way" if (rows.diff() < 0).any() else "")
        )
    if not nnz:
        return
    low, high = int(columns.min()), int(columns.max())
    if low < 0 or high >= width:
        raise ValueError(f"columns must be from 0 to {width - 1}; they are from {low} to {high}")
    falls = columns.diff() <= 0
    starts = rows[1:-1].long()  # where a new row starts, columns may fall
    falls[starts[(starts > 0) & (starts < nnz)] - 1] = False
    if falls.any():
        at = int(falls.nonzero()[0])
        raise ValueError(f"columns must ascend within a row; block {at + 1} follows block {at} in its row, but has "
                         f"column {int(columns[at + 1])} after {int(columns[at])}")  # fmt: skip


def block_mask_of(dense: Tensor, B: int) -> Tensor:
    """Which blocks of [N, K] are not all zero: bool [N / B, K / B]. ValueError if B does not divide both."""
    N, K = dense.shape
    check_block(N, K, B)
    return _blocks(dense, B).ne(0).any(3).any(1)


def _blocks(dense: Tensor, B: int) -> Tensor:
    """[N / B, n, K / B, k], a view."""
    return dense.unflatten(1, (-1, B)).unflatten(0, (-1, B))


def pack_blocks(dense: Tensor, mask_blocks: Tensor, B: int) -> BlockSparseWeight:
    """The blocks of `dense` [N, K] that `mask_blocks`, bool [N / B, K / B], keeps; what the others hold is dropped.

    The tensors are new, on the device of `dense`. Raises ValueError for shapes and dtypes that do not fit.
    """
    if dense.ndim != 2 or dense.dtype not in DTYPES:
        raise ValueError(
            f"a weight must be a float16, bfloat16 or float32 matrix; got {dense.dtype} {list(dense.shape)}"
        )
    N, K = dense.shape
    check_block(N, K, B)
    if mask_blocks.dtype != torch.bool or mask_blocks.shape != (N // B, K // B):
        raise ValueError(
            f"the mask of blocks of {B} x {B} of [{N}, {K}] must be bool [{N // B}, {K // B}]; "
            f"got {mask_blocks.dtype} {list(mask_blocks.shape)}"
        )
    mask = mask_blocks.to(dense.device)
    values = _blocks(dense, B).permute(0, 2, 3, 1)[mask].contiguous()  # [nnz, k, n]
    rows = torch.zeros(N // B + 1, dtype=torch.int32, device=dense.device)
    rows[1:] = mask.sum(1).cumsum(0)
    return BlockSparseWeight(values, mask.nonzero()[:, 1].int(), rows)


def row_of_blocks(columns: Tensor, rows: Tensor) -> Tensor:
    """The row of blocks that each block is in: int32 [nnz]."""
    return torch.repeat_interleave(rows.diff(), output_size=len(columns))


def to_dense(weight: BlockSparseWeight, shape: tuple[int, int], dtype: torch.dtype | None = None) -> Tensor:
    """W of `shape`, [N, K], exact; zeros where there is no block. dtype: by default that of the values."""
    values, columns, rows = weight
    B, (N, K) = values.shape[1], shape
    dense = values.new_zeros(N // B, K // B, B, B, dtype=dtype or values.dtype)
    dense[row_of_blocks(columns, rows), columns] = values.transpose(1, 2).to(dense.dtype)
    return dense.transpose(1, 2).reshape(N, K)


def order_of(rows: Tensor) -> Tensor:
    """Rows of blocks, those with most blocks first: int32 [N / B]. Equal ones in their own order."""
    return rows.diff().argsort(descending=True, stable=True).int()
