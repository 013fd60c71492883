"""The kernels of sparse weights: exact where arithmetic is exact, close where it rounds, the same bits at any M.

Exact cases have integer values, integer activations and scales that are powers of two, so that nothing but the last
step, to the output's dtype, rounds; and it does so in the reference as well.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from close import assert_close, assert_equal
from torch import Tensor

from fastllm.formats import QuantizedWeight
from fastllm.kernels.sparse_expand import sparse_expand
from fastllm.kernels.sparse_matmul import Config, _plan, config, sparse_matmul
from fastllm.kernels.sparse_parts import Kept
from fastllm.ops.lanes import Lanes
from fastllm.ops.layout import Prepared
from fastllm.sparse_formats import SparseFormat, compress, dequantize_sparse, parse_sparse

DTYPES = (torch.float16, torch.float32, torch.bfloat16)
FORMATS = ("16:32", "2:4", "1:32", "8:32-int8", "2:4-int8", "12:32", "31:32-int8", "32:32")
FORMATS += ("8:32", "31:32", "16:32-int8", "1:32-int8")


class Problem(NamedTuple):
    weight: QuantizedWeight
    format: SparseFormat
    shape: tuple[int, int]
    x: Tensor  # [M, K]
    bias: Tensor | None  # [N]

    @property
    def prepared(self) -> Prepared:
        return Lanes().pack(self.weight, self.format, self.shape)

    @property
    def kept(self) -> Kept:
        return Lanes(self.format).kept(self.prepared)

    def got(self, **options: Config) -> Tensor:
        p = self.prepared
        return sparse_matmul(self.x, p.w, p.zero, p.scale, self.bias, self.shape[0], self.kept, **options)

    def dense(self) -> Tensor:
        return dequantize_sparse(self.weight, self.format, self.shape, torch.float64)

    def want(self) -> Tensor:
        """The definition in float64, where every integer is exact."""
        y = self.x.double() @ self.dense().T
        return y if self.bias is None else y + self.bias.double()


def weight_of(values: Tensor, scale: Tensor, format: SparseFormat, mask: Tensor | None = None) -> QuantizedWeight:
    mask = format.largest(torch.rand(values.shape, device=values.device)) if mask is None else mask
    return compress(values, mask, scale, format)


def exact(name: str, M: int, N: int, K: int, dtype: torch.dtype, bias: bool, device: str) -> Problem:
    """One row of w in eight is all zeros."""
    format = parse_sparse(name)
    if format.values:
        values = torch.randint(0, 256, (N, K), device=device, dtype=torch.uint8)
        scale = 2.0 ** torch.randint(-4, -1, (N, 1), device=device).to(dtype)
    else:
        values = torch.randint(-8, 9, (N, K), device=device).to(dtype)
        scale = values.new_empty(N, 0)
    values[::8] = 128 if format.values else 0
    x = torch.randint(-1, 2, (M, K), device=device).to(dtype)
    b = torch.randint(-8, 9, (N,), device=device).to(dtype) if bias else None
    return Problem(weight_of(values, scale, format), format, (N, K), x, b)


def check_exact(p: Problem) -> None:
    assert p.want().abs().max() < 65504  # an overflow on both sides would prove nothing
    assert_equal(p.got(), p.want().to(p.x.dtype))


MS = (1, 2, 3, 5, 16, 17, 1, 4)
NS = (33, 1, 32, 31, 65)
KS = (512, 32, 288, 544, 64, 96)
CASES = [(FORMATS[i % 12], MS[i % 8], NS[i % 5], KS[(i + i // 12) % 6], DTYPES[(i + i // 12) % 3], i % 3 < 2)
         for i in range(26)]  # fmt: skip
CASES += [("16:32", 1, 33, 2080, torch.float16, True), ("2:4-int8", 3, 33, 1536, torch.bfloat16, True)]


@pytest.mark.parametrize("name, M, N, K, dtype, bias", CASES)
def test_exact(name: str, M: int, N: int, K: int, dtype: torch.dtype, bias: bool, device: str) -> None:
    check_exact(exact(name, M, N, K, dtype, bias, device))


def test_the_cases_meet_every_value() -> None:
    assert [{c[i] for c in CASES} for i in range(5)] == [
        set(FORMATS),
        set(MS),
        set(NS),
        {*KS, 2080, 1536},
        set(DTYPES),
    ]
    met = set()
    for name, M, N, K, dtype, _ in CASES:
        format = parse_sparse(name)
        kept = Kept(format.kept, format.quads, torch.int8 if format.values else dtype)
        tile = config(M, N, K, kept.words)
        plan = _plan(M, N, K, kept, tile, False).constants
        met |= {("split", tile.SPLIT_K), ("even", plan["EVEN"]), ("unroll", tile.UNROLL), ("rows", tile.BLOCK_M)}
    assert met >= {("split", s) for s in (1, 2, 3, 5)} | {("even", e) for e in (True, False)}
    assert met >= {("unroll", u) for u in (1, 2)} | {("rows", m) for m in (1, 2, 4, 8, 16)}


@pytest.mark.parametrize("tile", [Config(1, 2, 1), Config(2, 1, 2), Config(4, 2, 2)])
def test_several_steps(tile: Config, device: str) -> None:
    """As on a GPU for most weights; in the other tests programs are so many that each takes one step."""
    for name, K in (("6:32", 1568), ("2:4-int8", 1024)):
        p = exact(name, tile.BLOCK_M, 31, K, torch.float16, True, device)
        assert_equal(p.got(tile=tile), p.want().half())


def test_tickets_are_left_at_zero(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """The next launch of the stream counts with the same ones."""
    tickets = torch.zeros(8, dtype=torch.int32, device=device)
    monkeypatch.setattr("fastllm.kernels.sparse_matmul.take_tickets", lambda tiles, device: tickets)
    p = exact("6:32", 2, 40, 1056, torch.float16, True, device)
    for _ in range(2):
        assert_equal(p.got(tile=Config(2, 1, 3)), p.want().half())
        assert not tickets.count_nonzero()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*(f"{k}:32{v}" for k in range(1, 33) for v in ("", "-int8")), "2:4", "2:4-int8"])
def test_exact_for_every_number_kept(name: str, dtype: torch.dtype, device: str) -> None:
    for M, N, K in ((1, 40, 288), (6, 33, 544)):
        check_exact(exact(name, M, N, K, dtype, True, device))


@pytest.mark.parametrize("name", ["16:32", "2:4", "16:32-int8"])
@pytest.mark.parametrize("M, dtype", [(1, torch.float16), (3, torch.bfloat16)])
def test_close_on_random_values(name: str, M: int, dtype: torch.dtype, device: str) -> None:
    p = exact(name, M, 31, 160, dtype, True, device)
    x, w = torch.randn(M, 160, device=device).to(dtype), torch.randn(31, 160, device=device).to(dtype)
    if not p.format.values:
        p = p._replace(weight=weight_of(w, w.new_empty(31, 0), p.format))
    p = p._replace(x=x)
    y = p.got()
    assert_close(y, p.want(), dtype=dtype)
    assert_equal(p.got(), y)  # the same bits at every run
    with pytest.raises(AssertionError, match="worst"):
        assert_close(p._replace(x=x.roll(1, 1)).got(), p.want(), dtype=dtype)


def changed(index: Tensor) -> Tensor:
    """One bit of the last word moves to the next place that is free."""
    word = int(index[-1, -1]) & 0xFFFFFFFF
    place = next(b for b in range(31) if word >> b & 3 == 1)
    word ^= 3 << place
    index = index.clone()
    index[-1, -1] = word - (1 << 32 if word >> 31 else 0)
    return index


WRONG: dict[str, Callable[[Problem], Problem]] = {
    "a column": lambda p: p._replace(weight=p.weight._replace(index=changed(p.weight.index))),
    "a value": lambda p: p._replace(weight=p.weight._replace(packed=p.weight.packed + last(p))),
    "an activation": lambda p: p._replace(x=p.x + 1),
    "a scale": lambda p: p._replace(weight=p.weight._replace(scale=p.weight.scale * 2)),
    "no bias": lambda p: p._replace(bias=None),
}


def last(p: Problem) -> Tensor:
    """1 in the place of the last value."""
    one = torch.zeros_like(p.weight.packed)
    one[-1, -1] = 1 << 24 if p.format.values else 1
    return one


@pytest.mark.parametrize("name", ["8:32", "8:32-int8"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_fault_is_seen(wrong: str, name: str, device: str) -> None:
    right = exact(name, 2, 34, 96, torch.float32, True, device)
    right.x.copy_(torch.arange(96) % 5 + 1)  # nowhere 0, and neighbours differ
    if name.endswith("int8"):
        right.weight.packed[-1] &= ~(1 << 24)  # room for one more
    else:
        right.weight.packed[-1] = 3
    check_exact(right)
    if wrong == "a scale" and name == "8:32":
        return  # it has none
    with pytest.raises(AssertionError, match="not equal"):
        assert_equal(WRONG[wrong](right).got(), right.want().float())


@pytest.mark.parametrize("name, dtype", [("8:32", torch.float16), ("2:4-int8", torch.float32)])
def test_a_row_has_the_same_bits_at_any_number_of_rows(name: str, dtype: torch.dtype, device: str) -> None:
    p = exact(name, 18, 31, 544, dtype, True, device)
    p = p._replace(x=torch.randn(18, 544, device=device).to(dtype))
    whole = p.got()
    for rows in (slice(0, 1), slice(17, 18), slice(3, 5), slice(4, 8)):
        assert_equal(p._replace(x=p.x[rows]).got(), whole[rows])


@pytest.mark.parametrize("M", [1, 3])
def test_strides(M: int, device: str) -> None:
    p = exact("8:32", M, 31, 96, torch.float16, True, device)
    x = p.x
    wide = torch.cat((x[:, :1] + 1, x, x + 1), 1)[:, 1:97]  # at an odd address, between other values
    rows = torch.stack((x, x + 1), 1).flatten(0, 1)[::2]
    columns = torch.stack((x, x + 1), 2).flatten(1)[:, ::2]
    for moved in (wide, rows, columns, x[:1].expand(M, -1), x.T.contiguous().T):
        check_exact(p._replace(x=moved))


def test_many_rows_are_taken_some_at_a_time(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr("fastllm.kernels.sparse_matmul.INVARIANT_ROWS", 2)
    check_exact(exact("8:32", 5, 31, 544, torch.float16, True, device))


@pytest.mark.filterwarnings("ignore:invalid value")  # NumPy, of what is looked for here
def test_a_nan_stays_where_it_is_kept(device: str) -> None:
    p = exact("8:32", 3, 40, 288, torch.float32, False, device)
    clean = p.got()
    p.x[1, 287], p.x[1, 0] = float("nan"), float("inf")
    y, kept = p.got(), p.dense() != 0
    assert_equal(y[::2], clean[::2])
    assert y[1][kept[:, 287] | kept[:, 0]].isfinite().sum() == 0 and kept[:, 287].any()
    assert (y[1].isfinite() == clean[1].isfinite()).logical_or(kept[:, 287] | kept[:, 0] | ~y[1].isfinite()).all()


@pytest.mark.parametrize("M, N", [(0, 65), (5, 0), (0, 0)])
def test_nothing_to_do(M: int, N: int, device: str) -> None:
    p = exact("16:32", M, max(N, 1), 64, torch.float16, False, device)
    w = p.prepared
    tiles = -(-N // 32)
    y = sparse_matmul(p.x, w.w[:tiles], w.zero[:tiles], None, None, N, p.kept)
    assert y.shape == (M, N) and y.dtype == torch.float16
    assert sparse_expand(w.w[:tiles], w.zero[:tiles], None, N, p.kept, torch.float16).shape == (N, 64)
