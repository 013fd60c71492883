"""The yardstick must fail on wrong results, or no other test means anything."""

from collections.abc import Callable

import pytest
import torch
from close import BOUNDS, WIDEST, assert_close, assert_equal
from torch import Tensor

ROW = torch.tensor([3])
ELEMENT = torch.tensor(3), torch.tensor(5)
WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "doubled": lambda y: 2 * y,
    "negated": lambda y: -y,
    "one percent": lambda y: 1.01 * y,
    "shifted": lambda y: y + 0.1,
    "rolled rows": lambda y: y.roll(1, 0),
    "rolled columns": lambda y: y.roll(1, 1),
    "transposed": lambda y: y.T,
    "tiles swapped": lambda y: torch.cat([y[:, 32:], y[:, :32]], 1),
    "row of zeros": lambda y: y.index_fill(0, ROW, 0),
    "column of its neighbour": lambda y: y.index_copy(1, ROW, y[:, 4:5]),
    "one element": lambda y: y.index_put(ELEMENT, torch.tensor(9.0, dtype=y.dtype)),
    "last element": lambda y: y.index_put((torch.tensor(-1), torch.tensor(-1)), y[-1, -1] + 0.1),
    "noise of two percent": lambda y: y + 0.02 * torch.randn(y.shape, generator=torch.Generator().manual_seed(1)),
    "nan": lambda y: y.index_put(ELEMENT, torch.tensor(torch.nan, dtype=y.dtype)),
    "infinite": lambda y: y.index_put(ELEMENT, torch.tensor(torch.inf, dtype=y.dtype)),
    "unwritten": lambda y: torch.empty_like(y),
    "all zeros": lambda y: torch.zeros_like(y),
}
each_dtype = pytest.mark.parametrize("dtype", BOUNDS, ids=str)


def reference() -> Tensor:
    return torch.randn(64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@each_dtype
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_wrong_results_fail(wrong: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    with pytest.raises(AssertionError):
        assert_close(wrong(reference()).to(dtype), reference(), dtype=dtype)


@each_dtype
def test_a_rounded_result_passes(dtype: torch.dtype) -> None:
    y = torch.randn(2**22, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert_close(y.to(dtype), y, dtype=dtype)
    assert_close(y.to(dtype), y.to(dtype))


@each_dtype
@pytest.mark.parametrize("K", [64, 4096])
def test_a_good_matmul_passes(K: int, dtype: torch.dtype) -> None:
    """Operands and result rounded to `dtype`, float32 in between: what a kernel does."""
    x, w = torch.randn(2, 128, K, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert_close((x.to(dtype).float() @ w.to(dtype).float().T).to(dtype), x @ w.T, dtype=dtype)


def test_bfloat16_arithmetic_is_no_float32_result() -> None:
    got = reference().bfloat16().float()
    assert_close(got, reference(), *BOUNDS[torch.bfloat16], dtype=torch.float32)
    with pytest.raises(AssertionError, match="rms"):
        assert_close(got, reference(), dtype=torch.float32)


@pytest.mark.parametrize("sign", [1, -1])
def test_each_bound_fails_alone(sign: int) -> None:
    few, one = reference(), reference()
    few[:2] += sign * 0.025  # 1/32 of the elements: an RMS of 4.4e-3
    one[-1, -1] += sign * 0.1  # of 4096: an RMS of 1.6e-3
    for got, worst, rms in ((few, 0.03, 4e-3), (one, 0.09, 2e-3)):
        with pytest.raises(AssertionError, match="worst .* rms"):
            assert_close(got, reference(), worst, rms)
        assert_close(got, reference(), 1.2 * worst, 1.2 * rms)


def test_shape_and_dtype_are_part_of_the_result() -> None:
    y = reference()
    with pytest.raises(AssertionError, match=r"shape \(64, 64\), want \(4096,\)"):
        assert_close(y, y.flatten(), worst=1e-2, rms=1e-2)
    with pytest.raises(AssertionError, match="float32, want torch.float64"):
        assert_close(y.float(), y)
    with pytest.raises(AssertionError, match="float32, want torch.bfloat16"):
        assert_close(y.float(), y, dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match="want torch.int32"):
        assert_equal(torch.arange(3), torch.arange(3, dtype=torch.int32))
    with pytest.raises(AssertionError, match="shape"):
        assert_equal(torch.zeros(1, 3), torch.zeros(3))


def test_the_message_says_where() -> None:
    y = reference().float()
    with pytest.raises(AssertionError, match=r"at \(3, 5\): got 9, want .* 1 of 4096 elements in \[3:4, 5:6\]"):
        assert_close(WRONG["one element"](y), y)
    with pytest.raises(AssertionError, match=r"not finite: 1 of 4096 elements in \[3:4, 5:6\]"):
        assert_close(WRONG["nan"](y), y)
    with pytest.raises(AssertionError, match=r"64 of 4096 elements in \[3:4, 0:64\]; first at \(3, 0\): got 0.0"):
        assert_equal(WRONG["row of zeros"](y), y)


def test_a_bad_reference_fails() -> None:
    bad = WRONG["nan"](reference())
    with pytest.raises(AssertionError, match="the reference is not finite: 1 of 4096"):
        assert_close(bad, bad, worst=1e-2, rms=1e-2)


@pytest.mark.parametrize("worst, rms", [(1.0, 1e-3), (1e-2, 0.1), (torch.nan, 1e-3), (0.0, 1e-3), (-1.0, 1e-3)])
def test_bounds_that_cannot_fail_are_refused(worst: float, rms: float) -> None:
    with pytest.raises(ValueError, match="needs 0 < bounds"):
        assert_close(reference(), reference(), worst=worst, rms=rms)


def test_a_dtype_without_bounds_needs_them_named() -> None:
    with pytest.raises(ValueError, match="needs 0 < bounds"):
        assert_close(torch.arange(3), torch.arange(3))


@pytest.mark.parametrize("wrong", ["doubled", "negated", "rolled rows", "transposed", "row of zeros", "one element"])
def test_even_the_widest_bounds_see_gross_errors(wrong: str) -> None:
    with pytest.raises(AssertionError):
        assert_close(WRONG[wrong](reference()), reference(), *WIDEST)


def test_zeros_and_nothing() -> None:
    zeros = torch.zeros(3, 4)
    assert_close(zeros, zeros)
    assert_close(zeros[:0], zeros[:0])
    assert_close(torch.tensor(2.0), torch.tensor(2.0))
    with pytest.raises(AssertionError, match="worst 1.00e-03"):
        assert_close(zeros + 1e-3, zeros)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.float16], ids=str)
def test_equal_means_to_the_bit(dtype: torch.dtype) -> None:
    y = torch.arange(12).reshape(3, 4).to(dtype)
    assert_equal(y, y.clone())
    for wrong in (y.roll(1), y.flip(0), y + 1, y.reshape(4, 3).T):
        with pytest.raises(AssertionError):
            assert_equal(wrong, y)


def test_nan_equals_nothing() -> None:
    nan = torch.full((2,), torch.nan)
    with pytest.raises(AssertionError, match="2 of 2 elements"):
        assert_equal(nan, nan)


def test_unwritten_memory_is_nan() -> None:
    """`conftest.py` turns this on; without it a kernel that skips a tile may pass on memory freed a moment ago."""
    like = torch.ones(4, 1024)
    for unwritten in (torch.empty(4, 1024), like.new_empty(4, 1024), torch.empty_like(like)):
        assert unwritten.isnan().all()
