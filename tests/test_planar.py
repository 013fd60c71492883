"""The planar layout: what it says it is, and exact both ways."""

from collections.abc import Callable

import pytest
import torch
from close import assert_equal
from test_kernel_quant_matmul import KS
from torch import Tensor

from fastllm.formats import pack_bits
from fastllm.ops.planar import from_planar, planar_words, to_planar, unpack_planar


def slow_planar(q: Tensor, bits: int) -> Tensor:
    """Straight from the words of the layout's description."""
    N, K = q.shape
    halves, planes = torch.zeros(N, -(-K // 128) * 8 * bits, dtype=torch.int32), 16 // bits
    for k in range(-(-K // 128) * 128):
        block, p, j = k // (32 * planes), k // 32 % planes, k % 32
        halves[:, block * 32 + j] |= (q[:, k].int() if k < K else 2 ** (bits - 1)) << (bits * p)
    return halves[:, 0::2] | halves[:, 1::2] << 16


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("K", [128, 384, 1, 8, 40, 104, 136, 1000])
def test_planar_is_what_it_says(K: int, bits: int) -> None:
    q = torch.randint(0, 2**bits, (5, K), dtype=torch.uint8)
    planar, word = to_planar(pack_bits(q.clone(), bits), K, bits), 32 // bits
    padded = torch.nn.functional.pad(q, (0, -K % word))  # words at rest are kept whole; further words hold middles
    assert_equal(planar, slow_planar(padded, bits))
    assert planar.shape[1] == planar_words(K, bits) == -(-K // 128) * 4 * bits


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("K", [*KS, 122, 4096])
@pytest.mark.parametrize("N", [1, 37])
def test_planar_round_trip(bits: int, K: int, N: int) -> None:
    packed = torch.randint(-(2**31), 2**31, (N, -(-K * bits // 32)), dtype=torch.int32)  # any bits past K survive
    before = packed.clone()
    planar = to_planar(packed, K, bits)
    if planar.shape == packed.shape:
        assert planar.data_ptr() == packed.data_ptr()
    values = before.view(torch.uint8) if N > 1 else before.flatten().view(torch.uint8).view(1, -1)
    if bits == 4:
        values = torch.stack((values & 15, values >> 4), -1).flatten(1)
    assert_equal(unpack_planar(planar, K, bits), values[:, :K])
    again = from_planar(planar, K, bits)
    assert_equal(again, before)
    assert again.shape != planar.shape or again.data_ptr() == planar.data_ptr()


@pytest.mark.parametrize("K, same", [(128, True), (127, True), (121, True), (120, False), (129, False), (1280, True)])
def test_planar_is_in_place_when_it_fits(K: int, same: bool) -> None:
    packed = torch.nn.Parameter(torch.ones(3, -(-K // 8), dtype=torch.int32), requires_grad=False)
    assert (to_planar(packed, K, 4) is packed) is same


def test_planar_in_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = torch.randint(0, 2**31, (11, 48), dtype=torch.int32)
    whole = to_planar(packed.clone(), 384, 4)
    monkeypatch.setattr("fastllm.ops.planar.SCRATCH", 16 * 48 * 3 + 1)  # three rows at a time
    assert_equal(to_planar(packed.clone(), 384, 4), whole)
    assert_equal(from_planar(whole, 384, 4), packed)


@pytest.mark.parametrize("change", [to_planar, from_planar, unpack_planar])
def test_planar_refuses_another_shape(change: Callable[[Tensor, int, int], Tensor]) -> None:
    with pytest.raises(ValueError, match=r"\[2, 17\], expected torch.int32 \[N, 16\]"):
        change(torch.zeros(2, 17, dtype=torch.int32), 128, 4)
    with pytest.raises(ValueError, match="torch.int64"):
        change(torch.zeros(2, 16, dtype=torch.int64), 128, 4)
