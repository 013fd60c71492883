"""The block-sparse kernel: exact on integers, at every tile, with rows of blocks that are uneven, full and empty."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from close import assert_close, assert_equal
from torch import Tensor

from fastllm.bsr_format import BlockSparseWeight, block_mask_of, order_of, pack_blocks
from fastllm.kernels.block_sparse_matmul import (
    FLOAT32,
    MOST_SPLITS,
    SIZES,
    TILES,
    Config,
    block_sparse_matmul,
    config,
)

MS = (1, 2, 3, 7, 16, 17, 31, 33, 63, 65)
DTYPES = (torch.float16, torch.float32, torch.bfloat16)


class Problem(NamedTuple):
    x: Tensor  # [M, K]
    dense: Tensor  # [N, K]
    weight: BlockSparseWeight
    bias: Tensor | None

    def got(self, **options: object) -> Tensor:
        return block_sparse_matmul(self.x, *self.weight, order_of(self.weight.rows), self.bias, **options)

    def want(self) -> Tensor:
        """The definition in float64, where every integer is exact."""
        y = self.x.double() @ self.dense.double().T
        return y if self.bias is None else y + self.bias.double()


def mask_of(nb: int, kb: int) -> Tensor:
    """Uneven rows of blocks; the second is empty, the third full, the last has its last column only."""
    mask = torch.rand(nb, kb) < 0.5
    mask[1], mask[2], mask[-1] = False, True, False
    mask[-1, -1] = True
    return mask


def exact(M: int, B: int, nb: int, kb: int, dtype: torch.dtype, bias: bool, device: str) -> Problem:
    """Integers whose sums bfloat16 holds: a weight has few that are not zero."""
    mask = mask_of(nb, kb).to(device)
    dense = torch.randint(-2, 3, (nb * B, kb * B), device=device) * (torch.rand(nb * B, kb * B, device=device) < 0.1)
    dense = (dense * mask.repeat_interleave(B, 0).repeat_interleave(B, 1)).to(dtype)
    x = torch.randint(-2, 3, (M, kb * B), device=device).to(dtype)
    added = torch.randint(-8, 9, (nb * B,), device=device).to(dtype) if bias else None
    return Problem(x, dense, pack_blocks(dense, mask, B), added)


def check_exact(p: Problem, **options: object) -> None:
    assert p.want().abs().max() <= 256  # integers that bfloat16 holds
    assert_equal(p.got(**options), p.want().to(p.x.dtype))


CASES = [(M, SIZES[i % 3], 4, 3 + i % 3, DTYPES[(i + i // 3) % 3], i % 3 < 2) for i, M in enumerate(MS)]
CASES += [(5, B, 4, 5, dtype, True) for B in SIZES for dtype in DTYPES[:2]]


@pytest.mark.parametrize("M, B, nb, kb, dtype, bias", CASES)
def test_exact(M: int, B: int, nb: int, kb: int, dtype: torch.dtype, bias: bool, device: str) -> None:
    check_exact(exact(M, B, nb, kb, dtype, bias, device))


# the interpreter knows neither warps nor stages
TILED = [(B, tile._replace(num_warps=4, num_stages=2)) for (B, _), tiles in TILES.items() for tile in tiles]


@pytest.mark.parametrize("B, tile", dict.fromkeys(TILED))
def test_every_tile(B: int, tile: Config, device: str) -> None:
    """With more rows than a tile, so that the last one is short; split as well, in more parts than there are."""
    p = exact(tile.BLOCK_M + 3, B, 4, 3, torch.float16, True, device)
    check_exact(p, tile=tile)
    if tile.BLOCK_M <= 32:
        check_exact(p._replace(bias=None), tile=tile._replace(SPLIT_K=3))
        check_exact(p, tile=tile._replace(SPLIT_K=8))


@pytest.mark.parametrize("B", SIZES)
def test_float32_is_not_rounded(B: int, device: str) -> None:
    p = exact(35, B, 4, 4, torch.float32, True, device)
    for tile in FLOAT32:
        check_exact(p, tile=tile._replace(SPLIT_K=2))
    p = p._replace(x=p.x + 2.0**-13)  # which TF32 does not hold
    assert_close(p.got(), p.want(), dtype=torch.float32)


def test_tiles_in_groups(device: str) -> None:
    """Groups of tiles of rows that share a pass over the weights, the last group a short one."""
    p = exact(7 * 16 - 5, 32, 4, 3, torch.float16, True, device)
    for group in (1, 2, 3, 100):
        check_exact(p, tile=Config(16, 32, False, 2, 2, GROUP_M=group))
    check_exact(p, tile=Config(16, 32, False, 2, 2, SPLIT_K=2, GROUP_M=3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_close_on_random_values(dtype: torch.dtype, device: str) -> None:
    p = exact(9, 64, 4, 5, dtype, True, device)
    dense = (p.dense.ne(0) * torch.randn(p.dense.shape, device=device)).to(dtype)
    p = p._replace(x=torch.randn_like(p.x), dense=dense, weight=pack_blocks(dense, block_mask_of(p.dense, 64), 64))
    tile = TILES[64, 90][-1]._replace(SPLIT_K=3) if dtype != torch.float32 else FLOAT32[1]
    y = p.got(tile=tile)
    assert_close(y, p.want(), dtype=dtype)
    assert_equal(p.got(tile=tile), y)  # the same bits at every run
    with pytest.raises(AssertionError, match="worst"):
        assert_close(p._replace(x=p.x * 1.02).got(tile=tile), p.want(), dtype=dtype)


def one_at(like: Tensor, *at: int) -> Tensor:
    one = torch.zeros_like(like)
    one[at] = 1
    return one


WRONG: dict[str, Callable[[Problem], Problem]] = {
    "one value": lambda p: p._replace(
        weight=p.weight._replace(values=p.weight.values + one_at(p.weight.values, -1, 63, 0))
    ),
    "one x": lambda p: p._replace(x=p.x + one_at(p.x, 16, -1)),
    "blocks the other way": lambda p: p._replace(
        weight=p.weight._replace(values=p.weight.values.transpose(1, 2).contiguous())
    ),
    "other columns": lambda p: p._replace(weight=p.weight._replace(columns=p.weight.columns.flip(0))),
    "one block less": lambda p: p._replace(weight=p.weight._replace(rows=p.weight.rows - one_at(p.weight.rows, 3))),
    "no bias": lambda p: p._replace(bias=None),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_fault_is_seen(wrong: Callable[[Problem], Problem], device: str) -> None:
    right = exact(17, 64, 4, 5, torch.float16, True, device)
    right.x[16, -1] = 1
    right.dense[-1, -1] = right.weight.values[-1, 63, 63] = 2
    right.x[0, -1], right.weight.values[-1, 63, 0] = 1, 0
    right.dense[-64, -1] = 0
    check_exact(right)
    with pytest.raises(AssertionError, match="not equal"):
        assert_equal(wrong(right).got(), right.want().to(torch.float16))


def test_strides(device: str) -> None:
    p = exact(5, 32, 4, 4, torch.float16, True, device)
    wide = torch.cat((p.x[:, :1] + 1, p.x, p.x + 1), 1)[:, 1 : p.x.shape[1] + 1]  # at an odd address
    for x in (wide, p.x.T.contiguous().T, torch.stack((p.x, p.x + 1), 1).flatten(0, 1)[::2], p.x[:1].expand(5, -1)):
        assert not x.is_contiguous()
        check_exact(p._replace(x=x))


def test_what_no_block_needs_is_not_read(device: str) -> None:
    p = exact(3, 32, 4, 4, torch.float16, False, device)
    dense = p.dense.clone()
    dense[:, 32:64] = 0
    weight = pack_blocks(dense, block_mask_of(dense, 32), 32)
    p = p._replace(dense=dense, weight=weight)
    want = p.want().half()
    p.x[:, 32:64] = float("nan")
    assert_equal(p.got(), want)


@pytest.mark.parametrize("bias", [False, True])
def test_no_blocks_at_all(bias: bool, device: str) -> None:
    p = exact(3, 32, 4, 4, torch.float16, bias, device)
    zeros = torch.zeros_like(p.dense)
    check_exact(p._replace(dense=zeros, weight=pack_blocks(zeros, block_mask_of(zeros, 32), 32)))
    assert p._replace(x=p.x[:0]).got().shape == (0, 128)


def test_rows_do_not_depend_on_each_other(device: str) -> None:
    p = exact(40, 64, 4, 8, torch.float16, True, device)
    p = p._replace(x=torch.randn_like(p.x))
    y = p.got(batch_invariant=True)
    for M in (1, 17):
        assert_equal(p._replace(x=p.x[:M]).got(batch_invariant=True), y[:M])
    large = [config(M, 4096, 4096, 64, 1024, batch_invariant=True) for M in (1, 16, 100, 5000)]
    assert len(set(large)) == 1 and large[0].SPLIT_K > 1


def test_tiles_fit_the_problem() -> None:
    """Narrow for few rows, wide for many; split while there are few programs, never beyond pairs of blocks."""
    for B in SIZES:
        half = 4096 * 4096 // (2 * B * B)
        by_rows = [config(M, 4096, 4096, B, half) for M in (1, 16, 32, 64, 512, 4096)]
        assert [tile.BLOCK_M for tile in by_rows] == sorted(tile.BLOCK_M for tile in by_rows)
        assert by_rows[0].BLOCK_M == 16 and by_rows[-1].BLOCK_M >= 128
        assert by_rows[0].SPLIT_K > 1 and by_rows[-1].SPLIT_K == 1
        assert config(1, 4096, 4096, B, half // 100).SPLIT_K <= 2
        assert config(512, 4096, 4096, B, half, fp32=True).BLOCK_M == FLOAT32[0].BLOCK_M
    assert config(2048, 4096, 4096, 64, 1638).BLOCK_M == 256 and config(2048, 512, 4096, 64, 200).BLOCK_M == 64
    assert config(2048, 4096, 4096, 64, 1638, capability=89) in [
        t._replace(GROUP_M=config(2048, 4096, 4096, 64, 1638, capability=89).GROUP_M) for t in TILES[64, 80]
    ]
    assert config(1, 4096, 4096, 64, 2048).SPLIT_K <= MOST_SPLITS
    assert config(4096, 4096, 14336, 64, 4096).GROUP_M < config(4096, 4096, 4096, 64, 4096).GROUP_M


def test_operands_that_do_not_fit_are_refused() -> None:
    p = exact(3, 32, 4, 4, torch.float32, True, "cpu")
    values, columns, rows = p.weight
    order, bias = order_of(rows), p.bias
    n, must = len(values), "must be a contiguous"
    for operands, message in (
        ((p.x.half(), values, columns, rows, order, bias), r"x must be torch.float32 \[M, K\] like the values"),
        ((p.x[:, :31], values, columns, rows, order, bias), r"K a multiple of 32; got torch.float32 \[3, 31\]"),
        ((p.x, values[:, :16, :16], columns, rows, order, bias), r"B one of \(32, 64, 128\); got \[\d+, 16, 16\]"),
        ((p.x, values.transpose(1, 2), columns, rows, order, bias), "values must be a contiguous"),
        ((p.x, values, columns.long(), rows, order, bias), rf"columns {must} int32 \[{n}\]; got torch.int64"),
        ((p.x, values, columns[1:], rows, order, bias), rf"columns {must} int32 \[{n}\]; got .* \[{n - 1}\]"),
        ((p.x, values, columns, rows, order[1:], bias), rf"order {must} int32 \[4\]; got torch.int32 \[3\]"),
        ((p.x, values, columns, rows[None], order, bias), "rows must be"),
        ((p.x, values, columns, rows, order, bias[:5]), r"bias must be a contiguous \[128\], got \[5\]"),
        ((p.x, values, columns, rows, order, bias.to("meta")), "bias is on meta, x is on cpu"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            block_sparse_matmul(*operands)
