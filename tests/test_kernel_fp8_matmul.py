"""The kernels of float8 activations: exact where arithmetic is exact, close where it rounds, never finite after a NaN.

Triton's interpreter multiplies float8 as float16, which holds every one of them. Exact cases have sums of integers
below 2**11, because the tensor cores of a GPU keep some 14 bits of a sum (see `PRECISE_K`).
"""

from collections.abc import Callable

import pytest
import torch
from close import BOUNDS, assert_close, assert_equal
from test_kernel_int8_matmul import CASES, DTYPES, MS, TINY, VIEWS, WRONG, Problem, check_exact, one_at
from torch import Tensor

from fastllm.kernels.scaled_matmul import LARGEST_K, config, quantize_rows, scaled_matmul

FP8 = torch.float8_e4m3fn
EVERY = torch.arange(127, dtype=torch.uint8).view(FP8).float()  # every number from 0 to 448, in order


def same_bits(got: Tensor, want: Tensor) -> None:
    """-0 is 0."""
    assert got.dtype == FP8
    assert_equal(got.float(), want.float())


def exact(M: int, N: int, K: int, dtype: torch.dtype, bias: bool, device: str) -> Problem:
    """Rows of q with few numbers other than 0, whose products with w are integers; scales are powers of two."""
    q = torch.zeros(M, K, device=device)
    where = torch.rand(M, K, device=device).argsort(1)[:, :24]
    q.scatter_(1, where, torch.randint(-3, 4, where.shape, device=device).float())
    q[:, K - 1] = 3  # the very last column, where tails go wrong
    return Problem(
        q=q.to(FP8),
        x_scale=2.0 ** torch.randint(-3, 2, (M,), device=device),
        w=torch.randint(-15, 16, (N, K), device=device).float().to(FP8),
        w_scale=2.0 ** torch.randint(-3, 2, (N,), device=device).to(dtype),
        bias=torch.randint(-8, 9, (N,), device=device).to(dtype) if bias else None,
        dtype=dtype,
    )


@pytest.mark.parametrize("M, N, K, dtype, bias", CASES)
def test_exact(M: int, N: int, K: int, dtype: torch.dtype, bias: bool, device: str) -> None:
    p = exact(M, N, K, dtype, bias, device)
    assert (p.q.double() @ p.w.double().T).abs().max() < 2**11
    check_exact(p)


def test_the_tiles_of_large_products(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr("fastllm.kernels.scaled_matmul.MULTIPROCESSORS", 1)
    assert config(513, 300, 272, 90, floats=True)[:3] == (128, 128, 128)
    check_exact(exact(513, 300, 272, torch.float16, True, device))


@pytest.mark.parametrize("wrong", [name for name in WRONG if not name.startswith("one w") or "scale" in name])
def test_a_fault_is_seen(wrong: str, device: str) -> None:
    right = exact(17, 65, 304, torch.float16, True, device)
    change: dict[str, Callable[[Problem], Problem]] = WRONG | {
        "one activation": lambda p: p._replace(q=(p.q.float() + one_at(p.q.float(), 16, 303)).to(FP8)),
        "order": lambda p: p._replace(w=p.w.float().roll(1, 1).to(FP8)),
    }
    check_exact(right)
    with pytest.raises(AssertionError, match="not equal"):
        assert_equal(change[wrong](right).got(), right.want().to(torch.float16))


@pytest.mark.parametrize("K", [304, 257])
def test_strides(K: int, device: str) -> None:
    p = exact(5, 65, K, torch.float16, True, device)
    bits, other = p.w.view(torch.uint8), torch.full_like(p.w.view(torch.uint8), 0x7F)  # NaN
    wide = torch.cat((p.q.view(torch.uint8)[:, :1], p.q.view(torch.uint8)), 1).view(FP8)[:, 1:]  # at an odd address
    rows = torch.stack((bits, other), 1).flatten(0, 1)[::2].view(FP8)
    more = torch.cat((bits, other), 1).view(FP8)
    for q, w in ((wide, p.w), (p.q, rows), (p.q, more), (p.q[:1].expand(5, -1), p.w)):
        assert not (q.is_contiguous() and w.is_contiguous() and w.shape[1] == K)
        assert_equal(p._replace(q=q, w=w).got(), p._replace(q=q).want().to(torch.float16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [9, 130])
def test_close_on_random_values(M: int, dtype: torch.dtype, device: str) -> None:
    p = exact(M, 40, 1040, dtype, True, device)
    q, w = (torch.randn(t.shape, device=device).to(FP8) for t in (p.q, p.w))
    p = p._replace(q=q, w=w, x_scale=torch.rand(M, device=device), w_scale=torch.rand(40).to(p.w_scale))
    # float32 sums in the interpreter, and on a GPU sums of 14 bits that join a float32 every so often
    bounds = BOUNDS[torch.float16 if dtype == torch.float32 and device == "cuda" else dtype]
    y = p.got()
    assert_close(y, p.want(), *bounds, dtype=dtype)
    assert_equal(p.got(), y)  # the same bits at every run
    with pytest.raises(AssertionError, match="worst"):
        assert_close(p._replace(x_scale=p.x_scale * 1.01).got(), p.want(), *bounds, dtype=dtype)


def test_a_row_has_the_same_bits_whatever_the_batch(device: str) -> None:
    p = exact(140, 65, 1040, torch.float32, True, device)
    q, w = (torch.randn(t.shape, device=device).to(FP8) for t in (p.q, p.w))
    p = p._replace(q=q, w=w)
    whole = scaled_matmul(*p, batch_invariant=True)
    assert_close(whole, p.want(), *BOUNDS[torch.float16], dtype=torch.float32)
    for rows in (slice(0, 1), slice(7, 12), slice(5, 140)):
        part = p._replace(q=q[rows], x_scale=p.x_scale[rows])
        assert_equal(scaled_matmul(*part, batch_invariant=True), whole[rows])


@pytest.mark.parametrize("M, N", [(0, 65), (5, 0)])
def test_nothing_to_do(M: int, N: int, device: str) -> None:
    q, scale = quantize_rows(torch.ones(M, 64, device=device), FP8)
    y = scaled_matmul(q, scale, torch.ones(N, 64, device=device).to(FP8), scale.new_ones(N), None, torch.float16)
    assert q.shape == (M, 64) and q.dtype == FP8 and y.shape == (M, N) and y.dtype == torch.float16


def test_no_k_is_too_large(device: str) -> None:
    """Sums of floats do not overflow where those of integers would."""
    K = LARGEST_K + 16
    q, ones = torch.full((1, K), 2.0, device=device).to(FP8), torch.ones(1, device=device)
    assert_equal(scaled_matmul(q, ones, q, ones, None, torch.float32), 4.0 * K * ones[None])


# --- the activations


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_quantized_to_the_bit(view: Callable[[Tensor], Tensor], dtype: torch.dtype, device: str) -> None:
    for M, K in ((1, 1), (3, 257), (5, 64), (2, 4097)):
        x = view((torch.randn(M, K, device=device) * 10.0 ** torch.randint(-6, 5, (M, 1), device=device)).to(dtype))
        q, scale = quantize_rows(x, FP8)
        want = (x.float().abs().amax(1) / 448).clamp(min=TINY)
        assert_equal(scale, want)
        same_bits(q, (x.float() / want[:, None]).to(FP8))
        assert q.is_contiguous() and (q.float().abs().amax(1) == 448).all()


def test_every_number_and_every_halfway_point(device: str) -> None:
    """Against torch's own rounding, half to even, subnormal numbers included; the largest does not overflow."""
    between = (EVERY[1:] + EVERY[:-1]) / 2
    row = torch.cat((EVERY, -EVERY, between, -between, between * 1.0001, between * 0.9999)).to(device)
    q, scale = quantize_rows(row[None], FP8)
    assert scale.tolist() == [1.0]
    same_bits(q, row[None].to(FP8))
    nearest = (EVERY[None].double() - row.cpu().abs().double()[:, None]).abs().amin(1)
    assert_equal((q[0].cpu().double() - row.cpu().double()).abs(), nearest)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_so(value: float, dtype: torch.dtype, device: str) -> None:
    x = torch.randn(5, 300, device=device).to(dtype)
    clean = quantize_rows(x, FP8)
    x[1, 299], x[3, 0] = value, value
    q, scale = quantize_rows(x, FP8)
    assert scale.isnan().tolist() == [False, True, False, True, False]
    same_bits(q[::2], clean[0][::2])
    for w in (torch.zeros(2, 300, device=device).to(FP8), torch.ones(2, 300, device=device).to(FP8)):
        y = scaled_matmul(q, scale, w, scale.new_ones(2), scale.new_ones(2), dtype)
        assert y.isnan().all(1).tolist() == scale.isnan().tolist() and y[::2].isfinite().all()


def test_zeros_and_the_smallest_numbers(device: str) -> None:
    x = torch.zeros(5, 40, device=device)
    x[1, 3], x[2, 3], x[3, 3], x[4, 3] = 1e-45, -TINY, 448 * TINY, 3e38
    q, scale = quantize_rows(x, FP8)
    assert scale[:4].tolist() == [TINY] * 4 and q[:, 3].tolist() == [0, 0, -1, 448, 448]


def test_operands_that_do_not_fit_are_refused() -> None:
    p = exact(3, 8, 32, torch.float32, True, "cpu")
    with pytest.raises(ValueError, match="same dtype, got torch.float8_e4m3fn and torch.int8"):
        p._replace(w=p.w.to(torch.int8)).got()
    with pytest.raises(ValueError, match="q must be an int8 or float8_e4m3fn matrix .* torch.float8_e5m2"):
        p._replace(q=p.q.to(torch.float8_e5m2)).got()
    with pytest.raises(ValueError, match="q may have torch.int8 or torch.float8_e4m3fn, not torch.float8_e5m2"):
        quantize_rows(torch.ones(3, 4), torch.float8_e5m2)


@pytest.mark.parametrize("M", MS)
def test_floats_never_get_the_widest_tile(M: int) -> None:
    """It would need twice the registers that there are."""
    for N in (256, 28672):
        tile = config(M * 64, N, 4096, 90, floats=True)
        assert tile.BLOCK_M * tile.BLOCK_N <= 128 * 128
        assert tile[:3] == config(M * 64, N, 4096, 80)[:3]
