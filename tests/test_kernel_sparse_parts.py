"""What the kernels of sparse weights are made of: the dense form, bits and bytes, tiles, what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from close import assert_equal
from test_kernel_sparse_matmul import DTYPES, FORMATS, exact
from test_unpack import prmt

from fastllm.kernels import sparse_parts
from fastllm.kernels.sparse_expand import sparse_expand
from fastllm.kernels.sparse_matmul import WARPS, _plan, config, sparse_matmul, turn
from fastllm.kernels.sparse_parts import Kept


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_dense_form_to_the_bit(name: str, dtype: torch.dtype, device: str) -> None:
    for N, K in ((33, 160), (70, 32)):
        p = exact(name, 1, N, K, dtype, False, device)
        w = p.prepared
        for out in (dtype, torch.float32):
            dense = sparse_expand(w.w, w.zero, w.scale, N, p.kept, out)
            assert_equal(dense, p.dense().to(out))
        tail = sparse_expand(w.w[1:], w.zero[1:], w.scale[32:], N - 32, p.kept, dtype)
        assert_equal(tail, dense.to(dtype)[32:])


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
    good = dict(x=p.x, w=w.w, index=w.zero, scale=w.scale, bias=p.bias, N=40, kept=kept)
    for wrong, message in (
        ({"x": p.x[0]}, r"x must be a floating-point \[M, K\], got torch.float32 \[64\]"),
        ({"x": p.x.int()}, "x must be a floating-point"),
        ({"x": p.x[:, :32]}, r"w must be a contiguous int32 \[2, 1, 4, 32\] for \[40, 32\]"),
        ({"x": p.x[:, :40]}, "K=40 is not a multiple of 32"),
        ({"N": 32}, r"int32 \[1, 2, 4, 32\]"),
        ({"w": w.w.float()}, "got torch.float32"),
        ({"w": w.w.transpose(1, 2)}, "w must be"),
        ({"index": w.zero[:1]}, r"index must be a contiguous int32 \[2, 2, 32\]"),
        ({"index": w.zero.transpose(0, 1)}, "index must be a contiguous"),
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
        sparse_expand(w.w[:1], w.zero, w.scale, 40, kept, torch.float32)


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
