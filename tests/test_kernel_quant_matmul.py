"""The kernels of quantized weights and the planar layout: exact where arithmetic is exact, close where it rounds.

Exact cases have x in {-1, 0, 1}, scales that are powers of two and integer biases: every partial sum is a float32
without rounding, in any order, so a single misplaced weight, scale or zero point shows.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from close import assert_close, assert_equal
from torch import Tensor

from fastllm.formats import pack_bits
from fastllm.kernels.dequantize import dequantize
from fastllm.kernels.quant_config import BLOCK, ROWS, SMALL, Config, config, split_k
from fastllm.kernels.quant_matmul import _plan, quant_matmul
from fastllm.ops.planar import to_planar

MS = (1, 2, 3, 5, 8, 16, 17, 31, 33, 64, 65, 127, 129)
NS = (1, 31, 64, 65, 97)
KS = (32, 1, 64, 100, 128, 129, 160, 255, 257, 384, 511, 7, 640, 304, 1032, 1100, 1280)
GROUPS = (32, 64, 96, 128, 256, None)  # None: one scale a row
DTYPES = (torch.float16, torch.float32, torch.bfloat16)


class Case(NamedTuple):
    bits: int
    group: int | None
    symmetric: bool
    dtype: torch.dtype
    M: int
    N: int
    K: int
    bias: bool
    scale_dtype: torch.dtype


def cases(count: int) -> list[Case]:
    """Walks all combinations of format, and every value of the other axes at another pace."""
    found = []
    for i in range(count):
        dtype, M, N = DTYPES[(i + i // 24) % 3], MS[i % 13], NS[i % 5]
        if M > 64 and dtype != torch.float16:
            N = min(N, 31)  # float32 tiles are small, and each takes the interpreter its time
        format = (4, 8)[i % 2], GROUPS[i // 4 % 6], i // 2 % 2 == 0
        found.append(Case(*format, dtype, M, N, KS[i % 17], i % 7 < 3, torch.float32 if i % 4 == 1 else dtype))
    return found


CASES = cases(53)


class Problem(NamedTuple):
    x: Tensor
    q: Tensor  # uint8 [N, K]
    scale: Tensor  # [N, G]
    zero: Tensor | None  # uint8 [N, G]
    bias: Tensor | None
    bits: int
    group: int  # at least K: one scale a row

    def weight(self) -> Tensor:
        """The definition: (q - zero) * scale, float64 [N, K]."""
        K = self.q.shape[1]
        zero = self.zero if self.zero is not None else torch.full_like(self.scale, 2 ** (self.bits - 1))
        scale, zero = (t.double().repeat_interleave(self.group, 1)[:, :K] for t in (self.scale, zero))
        return (self.q.double() - zero) * scale

    def want(self) -> Tensor:
        y = self.x.double() @ self.weight().T
        return y if self.bias is None else y + self.bias.double()

    def words(self) -> Tensor:
        """[N, KW], planar. Rows that are not part of the weight follow: whoever reads them gets a wrong result."""
        more = torch.cat((self.q, torch.full_like(self.q[:1].expand(3, -1), 2**self.bits - 1)))
        return to_planar(pack_bits(more, self.bits), self.q.shape[1], self.bits)[:-3]

    def got(self) -> Tensor:
        return quant_matmul(self.x, self.words(), self.scale, self.zero, self.bias, self.bits, self.group)


def exact(case: Case, device: str) -> Problem:
    bits, group, symmetric, dtype, M, N, K, bias, scale_dtype = case
    group = group or K
    G = -(-K // group)
    return Problem(
        x=torch.randint(-1, 2, (M, K), device=device).to(dtype),
        q=torch.randint(0, 2**bits, (N, K), device=device, dtype=torch.uint8),
        scale=2.0 ** torch.randint(-4, 0, (N, G), device=device).to(scale_dtype),
        zero=None if symmetric else torch.randint(0, 2**bits, (N, G), device=device, dtype=torch.uint8),
        bias=torch.randint(-8, 9, (N,), device=device).to(dtype) if bias else None,
        bits=bits,
        group=group,
    )


def check_exact(p: Problem) -> None:
    assert p.want().abs().max() < 65504  # an overflow on both sides would prove nothing
    assert_equal(p.got(), p.want().to(p.x.dtype))


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(str(v).removeprefix("torch.") for v in c[:7]))
def test_exact(case: Case, device: str) -> None:
    check_exact(exact(case, device))


def test_the_cases_meet_every_value() -> None:
    assert {c[:3] for c in CASES} == {(b, g, s) for b in (4, 8) for g in GROUPS for s in (True, False)}
    assert {(c.bits, c.M) for c in CASES} == {(b, M) for b in (4, 8) for M in MS}
    assert {(c.bits, c.K) for c in CASES} >= {(b, K) for b in (4, 8) for K in KS}
    assert {(c.group, c.dtype) for c in CASES} == {(g, d) for g in GROUPS for d in DTYPES}
    assert {c.N for c in CASES} == set(NS)
    tiles = {config(c.M, c.N, c.K, c.bits, c.dtype == torch.float32)[:2] for c in CASES}
    assert tiles >= {row.tile[:2] for row in (SMALL, *ROWS[90])} - {(128, 16)}  # which meets every tile's test
    assert any(config(c.M, c.N, c.K).SPLIT_K > 1 and c.bias for c in CASES)
    assert any(c.group and c.K > c.group and c.K % c.group for c in CASES)  # a last group that is short


def one_at(like: Tensor, *at: int) -> Tensor:
    one = torch.zeros_like(like)
    one[at] = 1
    return one


BASE = Case(4, 32, False, torch.float16, 17, 65, 304, True, torch.float16)
WRONG: dict[str, Callable[[Problem], Problem]] = {
    "group": lambda p: p._replace(group=64, scale=p.scale[:, ::2], zero=p.zero[:, ::2]),
    "one scale": lambda p: p._replace(scale=p.scale + one_at(p.scale, 40, 5)),
    "zero points": lambda p: p._replace(zero=p.zero.roll(1, 1)),
    "no zero points": lambda p: p._replace(zero=None),
    "one weight": lambda p: p._replace(q=p.q ^ one_at(p.q, 64, 303)),
    "bias": lambda p: p._replace(bias=None),
    "order": lambda p: p._replace(q=p.q.roll(1, 1)),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_fault_is_seen(wrong: Callable[[Problem], Problem], device: str) -> None:
    right = exact(BASE, device)
    right.x[0, 303] = 1
    with pytest.raises(AssertionError, match="not equal"):
        assert_equal(wrong(right).got(), right.want().to(torch.float16))


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows of a wider tensor": lambda x: torch.cat((x, x + 1), 1)[:, : x.shape[1]],
    "at an odd address": lambda x: torch.cat((x[:, :1] + 1, x), 1)[:, 1:],
    "every other row": lambda x: torch.stack((x, x + 1), 1).flatten(0, 1)[::2],
    "transposed": lambda x: x.T.contiguous().T,
    "one row expanded": lambda x: x[:1].expand(len(x), -1),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("K", [304, 257])
def test_any_strides_of_x(view: Callable[[Tensor], Tensor], K: int, device: str) -> None:
    p = exact(BASE._replace(K=K), device)
    x = view(p.x)
    assert not x.is_contiguous()
    check_exact(p._replace(x=x))


@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_by_group_first(symmetric: bool, device: str) -> None:
    p = exact(BASE._replace(symmetric=symmetric), device)
    zero = None if p.zero is None else p.zero.T.contiguous().T
    check_exact(p._replace(scale=p.scale.T.contiguous().T, zero=zero))


@pytest.mark.parametrize("M, N", [(0, 65), (5, 0), (0, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_to_do(M: int, N: int, dtype: torch.dtype, device: str) -> None:
    p = exact(BASE._replace(dtype=dtype), device)
    y = quant_matmul(p.x[:M], p.words()[:N], p.scale[:N], p.zero[:N], p.bias[:N], p.bits, p.group)
    assert y.shape == (M, N) and y.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M, bits, group", [(9, 4, 128), (9, 4, 32), (9, 8, 1024), (9, 8, 128), (70, 4, 128)])
def test_close_on_random_values(M: int, bits: int, group: int, dtype: torch.dtype, device: str) -> None:
    p = exact(Case(bits, group, False, dtype, M, 40, 1024, True, dtype), device)
    p = p._replace(x=torch.randn_like(p.x), scale=torch.rand_like(p.scale) / 50, bias=torch.randn_like(p.bias))
    assert config(M, 40, 1024).SPLIT_K > 1 or M > 64
    y = p.got()
    assert_close(y, p.want(), dtype=dtype)
    assert_equal(p.got(), y)  # the same bits at every run
    with pytest.raises(AssertionError, match="worst"):
        assert_close(p._replace(scale=p.scale * 1.01).got(), p.want(), dtype=dtype)


def test_nan_stays_where_it_is(device: str) -> None:
    p = exact(BASE, device)
    p.x[3, 200] = torch.nan
    assert p.got().isnan().nonzero()[:, 0].unique().tolist() == [3]


@pytest.mark.gpu  # NumPy, and so the interpreter, widens a product that would overflow
@pytest.mark.parametrize("far", ["x", "w"])
def test_offsets_beyond_32_bits(far: str, device: str) -> None:
    p = exact(BASE._replace(bits=8, M=2, N=2), device)
    x, words = p.x, p.words()
    if far == "x":
        x = torch.zeros(2**31 + 512, dtype=x.dtype, device=device).as_strided((2, 304), (2**31, 1)).copy_(x)
    else:  # 2**31 bytes from row to row
        words = torch.zeros(2**29 + 128, dtype=torch.int32, device=device).as_strided((2, 96), (2**29, 1)).copy_(words)
        assert_equal(dequantize(words, p.scale, p.zero, 8, p.group, 304, torch.float32), p.weight().float())
    assert_equal(quant_matmul(x, words, p.scale, p.zero, p.bias, 8, p.group), p.want().to(x.dtype))


TILES = sorted({row.tile._replace(maxnreg=0) for row in (SMALL, *ROWS[80], *ROWS[90])})


@pytest.mark.parametrize("tile", TILES, ids=lambda t: "-".join(str(int(v)) for v in t))
def test_every_tile_with_every_split(tile: Config, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastllm.kernels.quant_matmul.PRESCALED", (torch.float16, torch.bfloat16))
    _plan.cache_clear()
    tile = tile._replace(PRESCALE=tile.PRESCALE and device == "cpu")  # not every device takes it
    for i, (bits, group) in enumerate([(4, 128), (8, None), (4, 32), (8, 64), (4, 256), (4, None)]):
        K, split = (
            (1104, 640, 768, 1280, 1024, 512)[i],
            min(i + 2, 8 // tile.BLOCKS),
        )  # 1104: steps that are not shared
        M, N = (tile.BLOCK_M + 1, tile.BLOCK_N + 3) if i < 2 else (3, tile.BLOCK_N - 1)
        p = exact(Case(bits, group, i % 3 == 0, torch.float16, M, N, K, i % 2 == 0, torch.float16), device)
        tile = tile._replace(SPLIT_K=split)
        y = quant_matmul(p.x, p.words(), p.scale, p.zero, p.bias, bits, p.group, tile=tile)
        assert_equal(y, p.want().to(torch.float16))
    _plan.cache_clear()


@pytest.mark.parametrize("fp32", [True, False])
@pytest.mark.parametrize("capability, multiprocessors", [(80, 108), (90, 132), (100, 148)])
def test_splits_share_all_steps(fp32: bool, capability: int, multiprocessors: int) -> None:
    for M in (1, 16, 33, 64, 4096):
        for N in (1, 4096, 28672, 128256):
            for K in (1, 127, 128, 896, 4096, 4304, 14336, 28672):
                tile = config(M, N, K, 4, fp32, False, capability, multiprocessors)
                steps = -(-K // (BLOCK * tile.BLOCKS))
                each = -(-steps // tile.SPLIT_K)
                assert 1 <= tile.SPLIT_K <= 8 and each * (tile.SPLIT_K - 1) < steps <= each * tile.SPLIT_K
                assert tile.SPLIT_K == 1 or each > 1


def test_splits_are_as_few_as_keep_the_memory_busy() -> None:
    tile = ROWS[90][0].tile  # two steps of 8 KiB on their way

    def splits(M: int, N: int, K: int) -> int:
        return split_k(tile, M, N, K, bits=4, multiprocessors=132)

    assert splits(1, 8192, 8192) == 2  # 256 programs of 16 KiB
    assert splits(1, 4096, 4096) == 4
    assert splits(1, 28672, 4096) == 1
    assert splits(1, 64, 768) == 1  # a program takes two steps at least
    assert splits(256, 64, 4096) == 1  # partial sums would be more bytes than the weights


@pytest.mark.parametrize("bits, group, K", [(4, 128, 1024), (4, 32, 650), (8, None, 2048)])
def test_rows_do_not_depend_on_each_other(
    bits: int, group: int | None, K: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastllm.kernels.quant_matmul.INVARIANT_ROWS", 64)
    p = exact(Case(bits, group, False, torch.float16, 70, 40, K, True, torch.float16), device)
    p = p._replace(x=torch.randn_like(p.x), scale=torch.rand_like(p.scale) / 50)

    def rows(of: slice) -> Tensor:
        return quant_matmul(p.x[of], p.words(), p.scale, p.zero, p.bias, bits, p.group, batch_invariant=True)

    whole = rows(slice(None))
    assert_close(whole, p.want(), dtype=torch.float16)
    for of in (slice(0, 1), slice(3, 20), slice(60, 70)):
        assert_equal(rows(of), whole[of])
    assert len({config(M, 4096, K, batch_invariant=True) for M in (1, 16, 17, 64, 128, 4096)}) == 1


@pytest.mark.parametrize("case", CASES[::5], ids=str)
def test_dequantize(case: Case, device: str) -> None:
    p = exact(case, device)
    p = p._replace(scale=torch.randn_like(p.scale))
    operands, (N, K) = (p.bits, p.group, case.K, case.dtype), p.q.shape
    want = p.weight().float().to(case.dtype)  # rounded where the kernel rounds
    whole = dequantize(p.words(), p.scale, p.zero, *operands)
    assert_equal(whole, want)
    scratch = want.new_full((N + 1, K + 3), torch.nan)
    half, out = slice(N // 2, N), scratch[1 : 1 + N - N // 2, :K]
    zero = None if p.zero is None else p.zero[half]
    assert dequantize(p.words()[half], p.scale[half], zero, *operands, out=out) is out
    assert_equal(out, whole[half])
    assert scratch.isnan().sum() == scratch.numel() - out.numel()


@pytest.mark.parametrize("K, bits, G", [(128, 4, 4), (257, 4, 4), (256, 8, 8), (256, 4, 7), (256, 4, 9)])
def test_operands_that_do_not_fit_are_refused(K, bits, G):
    with pytest.raises(ValueError, match="must be"):
        quant_matmul(torch.ones(1, K), torch.zeros(8, 32).int(), torch.ones(8, G), None, None, bits, 32)
