"""Block-sparse weights as they are stored: exact both ways, and refusals of what is none."""

from collections.abc import Callable

import pytest
import torch
from blocks import SIZES, weight_of
from close import assert_equal
from torch import Tensor

from fastllm.bsr_format import (
    BlockFormat,
    BlockSparseWeight,
    block_mask_of,
    check,
    order_of,
    pack_blocks,
    row_of_blocks,
    to_dense,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B", SIZES)
def test_packing_is_exact(B: int, dtype: torch.dtype) -> None:
    dense, weight, mask = weight_of(B, dtype=dtype)
    check(weight, (4 * B, 5 * B))
    assert_equal(to_dense(weight, (4 * B, 5 * B)), dense)
    assert_equal(to_dense(weight, (4 * B, 5 * B), torch.float32), dense.float())
    assert_equal(block_mask_of(dense, B), mask)
    assert weight.values.shape == (mask.sum(), B, B) and weight.values.is_contiguous()
    assert weight.rows.tolist() == [0, *mask.sum(1).cumsum(0).tolist()]
    assert weight.columns.tolist() == [int(c) for row in mask for c in row.nonzero()[:, 0]]
    j, (r, c) = 3, mask.nonzero()[3].tolist()
    assert weight.values[j, 5, 7] == dense[r * B + 7, c * B + 5]
    assert weight.nbytes == BlockFormat(B).bytes(4 * B, int(mask.sum()), dtype.itemsize)
    assert BlockFormat(B).name == f"block{B}"


def test_what_the_mask_drops_is_dropped() -> None:
    dense, _, mask = weight_of(32)
    keep = mask.clone()
    keep[2, 1:] = False
    assert_equal(block_mask_of(to_dense(pack_blocks(dense, keep, 32), dense.shape), 32), keep)
    assert_equal(to_dense(pack_blocks(dense.T, keep.T[:, :4], 32), (160, 128))[:32, 64:96], dense.T[:32, 64:96])
    empty = pack_blocks(dense, torch.zeros_like(mask), 32)
    check(empty, (128, 160))
    assert_equal(to_dense(empty, (128, 160)), torch.zeros_like(dense))


def test_a_nan_is_not_a_zero() -> None:
    dense = torch.zeros(64, 64)
    dense[40, 3] = float("nan")
    assert block_mask_of(dense, 32).tolist() == [[False, False], [True, False]]


def test_long_rows_come_first() -> None:
    rows = torch.tensor([0, 2, 2, 7, 9, 14], dtype=torch.int32)
    assert order_of(rows).tolist() == [2, 4, 0, 3, 1] and order_of(rows).dtype == torch.int32
    assert row_of_blocks(torch.zeros(14), rows).tolist() == [0, 0, 2, 2, 2, 2, 2, 3, 3, 4, 4, 4, 4, 4]


def at(t: Tensor, i: int, value: int) -> Tensor:
    t = t.clone()
    t[i] = value
    return t


HOSTILE: dict[str, tuple[Callable[[BlockSparseWeight], BlockSparseWeight], str]] = {
    "values of int": (lambda w: w._replace(values=w.values.int()), "values must be .* float16, .* got torch.int32"),
    "values flat": (lambda w: w._replace(values=w.values[0]), r"values must be \[nnz, B, B\]"),
    "blocks not square": (lambda w: w._replace(values=w.values[:, :16]), r"got torch.float32 \[\d+, 16, 32\]"),
    "blocks of 16": (lambda w: w._replace(values=w.values[:, :16, :16]), "blocks may be of 32, 64 or 128, not 16"),
    "columns of int64": (lambda w: w._replace(columns=w.columns.long()), r"columns must be int32 .* torch.int64"),
    "a column less": (lambda w: w._replace(columns=w.columns[1:]), r"columns must be int32 \[9\]; got .* \[8\]"),
    "rows of int64": (lambda w: w._replace(rows=w.rows.long()), "rows must be int32"),
    "a row less": (lambda w: w._replace(rows=w.rows[:-1]), r"rows must be int32 \[5\]; got torch.int32 \[4\]"),
    "another device": (lambda w: w._replace(rows=w.rows.to("meta")), "rows is on meta, values are on cpu"),
    "rows from 1": (lambda w: w._replace(rows=at(w.rows, 0, 1)), "ascend from 0 to 9, .* go from 1 to 9"),
    "rows beyond": (lambda w: w._replace(rows=at(w.rows, -1, 10)), "ascend from 0 to 9, .* go from 0 to 10"),
    "rows descend": (lambda w: w._replace(rows=at(w.rows, 1, 9)), "from 0 to 9, and descend on the way"),
    "rows below": (lambda w: w._replace(rows=at(w.rows, 1, -1)), "descend on the way"),
    "column beyond": (lambda w: w._replace(columns=at(w.columns, -1, 5)), "from 0 to 4; they are from 0 to 5"),
    "column below": (lambda w: w._replace(columns=at(w.columns, 0, -1)), "from 0 to 4; they are from -1 to"),
    "column twice": (lambda w: w._replace(columns=at(w.columns, 4, 1)), "block 4 follows block 3 .* column 1 after 1"),
    "columns descend": (lambda w: w._replace(columns=at(w.columns, 3, 4)), "must ascend .* column 2 after 4"),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_what_is_no_such_weight_is_refused(fault: str) -> None:
    mask = torch.tensor([[1, 0, 0, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 1, 0]]).bool()
    good = pack_blocks(torch.randn(128, 160), mask, 32)
    check(good, (128, 160))
    change, message = HOSTILE[fault]
    with pytest.raises(ValueError, match=message):
        check(change(good), (128, 160))


def test_sizes_that_do_not_fit_are_refused() -> None:
    w, mask = torch.randn(96, 160), torch.ones(3, 5).bool()
    for call, message in (
        (lambda: pack_blocks(w, mask, 64), r"\[96, 160\] is not .* 64 x 64: 96 leaves 32 and 160 leaves 32"),
        (lambda: pack_blocks(w, mask, 48), "blocks may be of 32, 64 or 128, not 48"),
        (lambda: pack_blocks(w, mask.T, 32), r"must be bool \[3, 5\]; got torch.bool \[5, 3\]"),
        (lambda: pack_blocks(w, mask.int(), 32), r"must be bool \[3, 5\]; got torch.int32"),
        (lambda: pack_blocks(w.double(), mask, 32), "float16, bfloat16 or float32 matrix; got torch.float64"),
        (lambda: pack_blocks(w[0], mask, 32), r"matrix; got torch.float32 \[160\]"),
        (lambda: check(pack_blocks(w, mask, 32), (96, 161)), "161 leaves 1"),
        (lambda: block_mask_of(w, 128), "96 leaves 96"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
