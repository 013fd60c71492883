"""The kernels of sparse weights: exact where arithmetic is exact, close where it rounds, the same bits at any M.

Exact cases have integer values, integer activations and scales that are powers of two, so that nothing but the last
step, to the output's dtype, rounds; and it does so in the reference as well.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from close import assert_close, assert_equal
from test_unpack import prmt
from torch import Tensor

from fastllm.formats import QuantizedWeight
from fastllm.kernels import sparse_parts
from fastllm.kernels.sparse_expand import sparse_expand
from fastllm.kernels.sparse_matmul import WARPS, Config, _plan, config, sparse_matmul, turn
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
        return sparse_matmul(self.x, p.w, p.index, p.scale, self.bias, self.shape[0], self.kept, **options)

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
KS = (512, 32, 288, 544, 64, 1024)
CASES = [(FORMATS[i % 12], MS[i % 8], NS[i % 5], KS[(i + i // 12) % 6], DTYPES[(i + i // 12) % 3], i % 3 < 2)
         for i in range(36)]  # fmt: skip
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
    assert met >= {("split", s) for s in (1, 2, 3, 4)} | {("even", e) for e in (True, False)}
    assert met >= {("unroll", u) for u in (1, 2)} | {("rows", m) for m in (1, 2, 4, 8, 16)}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*(f"{k}:32{v}" for k in range(1, 33) for v in ("", "-int8")), "2:4", "2:4-int8"])
def test_exact_for_every_number_kept(name: str, dtype: torch.dtype, device: str) -> None:
    for M, N, K in ((1, 40, 288), (6, 33, 544)):
        check_exact(exact(name, M, N, K, dtype, True, device))


@pytest.mark.parametrize("name", ["16:32", "2:4", "16:32-int8"])
@pytest.mark.parametrize("M, dtype", [(1, torch.float16), (4, torch.bfloat16), (2, torch.float32)])
def test_close_on_random_values(name: str, M: int, dtype: torch.dtype, device: str) -> None:
    p = exact(name, M, 40, 544, dtype, True, device)
    x, w = torch.randn(M, 544, device=device).to(dtype), torch.randn(40, 544, device=device).to(dtype)
    if not p.format.values:
        p = p._replace(weight=weight_of(w, w.new_empty(40, 0), p.format))
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


@pytest.mark.parametrize("name", ["16:32", "16:32-int8"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_fault_is_seen(wrong: str, name: str, device: str) -> None:
    right = exact(name, 3, 34, 288, torch.float32, True, device)
    right.x.copy_(torch.arange(288) % 5 + 1)  # nowhere 0, and neighbours differ
    if name.endswith("int8"):
        right.weight.packed[-1] &= ~(1 << 24)  # room for one more
    check_exact(right)
    if wrong == "a scale" and name == "16:32":
        return  # it has none
    with pytest.raises(AssertionError, match="not equal"):
        assert_equal(WRONG[wrong](right).got(), right.want().float())


@pytest.mark.parametrize("name, dtype", [("8:32", torch.float16), ("2:4-int8", torch.float32)])
def test_a_row_has_the_same_bits_at_any_number_of_rows(name: str, dtype: torch.dtype, device: str) -> None:
    p = exact(name, 18, 33, 544, dtype, True, device)
    p = p._replace(x=torch.randn(18, 544, device=device).to(dtype))
    whole = p.got()
    for rows in (slice(0, 1), slice(17, 18), slice(3, 5), slice(4, 8)):
        assert_equal(p._replace(x=p.x[rows]).got(), whole[rows])


@pytest.mark.parametrize("M", [1, 3])
def test_strides(M: int, device: str) -> None:
    p = exact("16:32", M, 33, 288, torch.float16, True, device)
    x = p.x
    wide = torch.cat((x[:, :1] + 1, x, x + 1), 1)[:, 1:289]  # at an odd address, between other values
    rows = torch.stack((x, x + 1), 1).flatten(0, 1)[::2]
    columns = torch.stack((x, x + 1), 2).flatten(1)[:, ::2]
    for moved in (wide, rows, columns, x[:1].expand(M, -1), x.T.contiguous().T):
        check_exact(p._replace(x=moved))


def test_many_rows_are_taken_some_at_a_time(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr("fastllm.kernels.sparse_matmul.INVARIANT_ROWS", 2)
    check_exact(exact("8:32", 5, 33, 1056, torch.float16, True, device))


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
    y = sparse_matmul(p.x, w.w[:tiles], w.index[:tiles], None, None, N, p.kept)
    assert y.shape == (M, N) and y.dtype == torch.float16
    assert sparse_expand(w.w[:tiles], w.index[:tiles], None, N, p.kept, torch.float16).shape == (N, 64)


# --- the dense form


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_dense_form_to_the_bit(name: str, dtype: torch.dtype, device: str) -> None:
    for N, K in ((33, 160), (70, 32)):
        p = exact(name, 1, N, K, dtype, False, device)
        w = p.prepared
        for out in (dtype, torch.float32):
            dense = sparse_expand(w.w, w.index, w.scale, N, p.kept, out)
            assert_equal(dense, p.dense().to(out))
        tail = sparse_expand(w.w[1:], w.index[1:], w.scale[32:], N - 32, p.kept, dtype)
        assert_equal(tail, dense.to(dtype)[32:])


# --- parts


@triton.jit
def _bits(m, place, count):
    offs = tl.arange(0, 1024)
    word = tl.load(m + offs)
    tl.store(place + offs, sparse_parts.highest(word, False))
    tl.store(count + offs, sparse_parts.count_bits(word, False))


def test_places_and_numbers_of_bits(device: str) -> None:
    one = [1 << b for b in range(31)] + [-(1 << 31), -1, 0x7FFFFFFF]
    more = torch.randint(-(2**31), 2**31, (1024 - len(one),))
    words = torch.cat((torch.tensor(one), more)).to(torch.int32).to(device)
    place, count = torch.empty_like(words), torch.empty_like(words)
    _bits[(1,)](words, place, count)
    unsigned = [int(word) & 0xFFFFFFFF for word in words]
    assert place.tolist() == [word.bit_length() - 1 for word in unsigned]
    assert count.tolist() == [word.bit_count() for word in unsigned]


def test_the_ptx_that_unpacks_bytes() -> None:
    """As `test_unpack.py` does: executed here, on every byte in every place."""
    source = Path(sparse_parts.__file__).read_text()
    assert 'f"prmt.b32 $0, $1, $2, 0x744{j % 4};"' in source and "0x4B000000 | " in source + kernel_source()
    words = np.arange(256, dtype=np.uint32) * np.uint32(0x01010101) ^ np.uint32(0x5A00A5FF)
    magic = np.full_like(words, 0x4B000000)
    for j in range(4):
        got = prmt(words, magic, 0x7440 + j).view(np.float32)
        assert (
            got - np.float32(8388736) == (words >> np.uint32(8 * j) & np.uint32(255)).astype(np.float32) - 128
        ).all()
        assert len(set(got)) == 256


def kernel_source() -> str:
    return Path(sparse_parts.__file__).with_name("sparse_matmul.py").read_text()


@pytest.mark.parametrize("multiprocessors", [108, 132])
@pytest.mark.parametrize("words", [1, 4, 8, 9, 32])
def test_splits_share_all_blocks_at_any_number_of_rows(words: int, multiprocessors: int) -> None:
    for N in (1, 4096, 28672, 128256):
        for K in (32, 896, 4096, 4320, 11008, 14336, 28672):
            tiles = [config(M, N, K, words, multiprocessors) for M in (1, 2, 3, 8, 16, 33)]
            assert {tile.SPLIT_K for tile in tiles} == {tiles[0].SPLIT_K}
            assert [tile.BLOCK_M for tile in tiles] == [1, 2, 4, 8, 16, 16]
            for tile in tiles:
                kept = Kept(1, False, torch.float32)
                each = turn(words)
                share = -(-K // (32 * WARPS * each * tile.SPLIT_K)) * each * WARPS  # blocks of a program
                assert each % tile.UNROLL == 0 and 1 <= tile.SPLIT_K <= 16
                assert share * (tile.SPLIT_K - 1) < K // 32 <= share * tile.SPLIT_K
                plan = _plan(1, N, K, kept, tile, False)
                steps = getattr(plan.steps, "value", plan.steps)
                assert steps * tile.UNROLL * WARPS * tile.SPLIT_K >= K // 32


def test_common_shapes_are_shared_without_rest() -> None:
    for N, K in ((4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (8192, 8192)):
        tile = config(1, N, K, 8)
        assert _plan(1, N, K, Kept(16, False, torch.bfloat16), tile, False).constants["EVEN"], (N, K, tile)
        assert -(-N // 32) * tile.SPLIT_K >= 132 * 3.8


def test_operands_that_do_not_fit_are_refused(device: str) -> None:
    p = exact("16:32-int8", 3, 40, 64, torch.float32, True, device)
    w, kept = p.prepared, p.kept
    good = dict(x=p.x, w=w.w, index=w.index, scale=w.scale, bias=p.bias, N=40, kept=kept)
    for wrong, message in (
        ({"x": p.x[0]}, r"x must be a floating-point \[M, K\], got torch.float32 \[64\]"),
        ({"x": p.x.int()}, "x must be a floating-point"),
        ({"x": p.x[:, :32]}, r"w must be a contiguous int32 \[2, 1, 4, 32\] for \[40, 32\]"),
        ({"x": p.x[:, :40]}, "K=40 is not a multiple of 32"),
        ({"N": 32}, r"int32 \[1, 2, 4, 32\]"),
        ({"w": w.w.float()}, "got torch.float32"),
        ({"w": w.w.transpose(1, 2)}, "w must be"),
        ({"index": w.index[:1]}, r"index must be a contiguous int32 \[2, 2, 32\]"),
        ({"index": w.index.transpose(0, 1)}, "index must be a contiguous"),
        ({"scale": None}, r"scale of int8 values must be a contiguous \[40, 1\].*got None"),
        ({"scale": w.scale[:39]}, r"got \[39, 1\]"),
        ({"bias": p.bias[:1].expand(40)}, r"bias must be a contiguous \[40\]"),
        ({"kept": kept._replace(number=33)}, "1 to 32 of 32"),
        ({"kept": kept._replace(number=8, quads=True)}, "16 in quads"),
        ({"kept": kept._replace(values=torch.float64)}, "int8 or floats"),
    ):
        with pytest.raises(ValueError, match=message):
            sparse_matmul(**(good | wrong))
    with pytest.raises(ValueError, match="w must be"):
        sparse_expand(w.w[:1], w.index, w.scale, 40, kept, torch.float32)


@pytest.mark.gpu  # NumPy, and so the interpreter, widens a product that would overflow
def test_offsets_beyond_32_bits(device: str) -> None:
    tiles, K, kept = (1 << 16) + 64, 4096, Kept(16, False, torch.bfloat16)
    w = torch.zeros(tiles, K // 32, 8, 32, dtype=torch.int32, device=device)
    index = torch.full((tiles, K // 32, 32), 0x5555, dtype=torch.int32, device=device)
    index |= 0x5555 << 16
    w[-1, -1, 7, 31] = 0x3F80 << 16  # 1, the last value of all: column 4094
    x = torch.zeros(1, K, dtype=torch.bfloat16, device=device)
    x[0, 4094] = 3
    y = sparse_matmul(x, w, index, None, None, tiles * 32, kept)
    assert y[0, -1] == 3 and y.count_nonzero() == 1
