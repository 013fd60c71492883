"""The kernels of int8 activations: exact where arithmetic is exact, close where it rounds, never finite after a NaN.

Exact cases have scales that are powers of two and integer biases, so that nothing but the last step, to the output's
dtype, rounds; and it does so in the reference as well.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from close import BOUNDS, assert_close, assert_equal
from torch import Tensor

from fastllm.kernels.scaled_matmul import LARGEST_K, config, quantize_rows, scaled_matmul

MS = (1, 2, 3, 5, 8, 16, 17, 31, 33, 64, 65, 127, 129)
NS = (1, 31, 64, 65, 97, 131)
KS = (32, 1, 64, 100, 128, 129, 255, 257, 640, 7, 304, 1032, 2064, 2050)
DTYPES = (torch.float16, torch.float32, torch.bfloat16)
TINY = torch.finfo(torch.float32).tiny


class Problem(NamedTuple):
    q: Tensor  # int8 [M, K]
    x_scale: Tensor  # float32 [M]
    w: Tensor  # int8 [N, K]
    w_scale: Tensor  # [N]
    bias: Tensor | None  # [N]
    dtype: torch.dtype

    def got(self) -> Tensor:
        return scaled_matmul(*self)

    def want(self) -> Tensor:
        """The definition in float64, where every integer is exact."""
        y = (self.q.double() @ self.w.double().T) * self.x_scale.double()[:, None] * self.w_scale.double()
        return y if self.bias is None else y + self.bias.double()


def exact(M: int, N: int, K: int, dtype: torch.dtype, bias: bool, device: str) -> Problem:
    """Sums stay within the 24 bits of a float32, however large K: most of q is 0, -1 or 1."""
    q = torch.randint(-1, 2, (M, K), device=device)
    q.scatter_(1, torch.randint(K, (M, 3), device=device), torch.randint(-127, 128, (M, 3), device=device))
    return Problem(
        q=q.to(torch.int8),
        x_scale=2.0 ** torch.randint(-9, -6, (M,), device=device),
        w=torch.randint(-127, 128, (N, K), device=device, dtype=torch.int8),
        w_scale=2.0 ** torch.randint(-3, 2, (N,), device=device).to(dtype),
        bias=torch.randint(-8, 9, (N,), device=device).to(dtype) if bias else None,
        dtype=dtype,
    )


def check_exact(p: Problem) -> None:
    assert p.want().abs().max() < 65504  # an overflow on both sides would prove nothing
    assert_equal(p.got(), p.want().to(p.dtype))


CASES = [(MS[i % 13], NS[i % 6], KS[i % 14], DTYPES[(i + i // 13) % 3], i % 5 < 2) for i in range(56)]
CASES += [(65, 131, 2064, torch.float16, True)]  # a wide tile whose K is split


@pytest.mark.parametrize("M, N, K, dtype, bias", CASES)
def test_exact(M: int, N: int, K: int, dtype: torch.dtype, bias: bool, device: str) -> None:
    check_exact(exact(M, N, K, dtype, bias, device))


def test_the_cases_meet_every_value() -> None:
    assert [{c[i] for c in CASES} for i in range(4)] == [set(MS), set(NS), set(KS), set(DTYPES)]
    tiles = {config(*c[:3])[:3] for c in CASES}
    assert tiles == {(16, 64, 64), (32, 64, 64), (16, 64, 256), (32, 64, 256), (64, 64, 256), (64, 128, 128)}
    split = [config(*c[:3])[:2] for c in CASES if config(*c[:3]).SPLIT_K > 1 and c[4]]
    assert {(16, 64), (64, 128)} <= set(split)


def test_the_tiles_of_large_products(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Those that a GPU gets when there are enough of them; several groups of rows, and a last group that is short."""
    monkeypatch.setattr("fastllm.kernels.scaled_matmul.MULTIPROCESSORS", 1)
    monkeypatch.setattr("fastllm.kernels.scaled_matmul.GROUP_M", 2)
    assert config(513, 300, 272)[:3] == (128, 256, 128) and config(513, 300, 272, 80)[:3] == (128, 128, 128)
    check_exact(exact(513, 300, 272, torch.float16, True, device))
    monkeypatch.setattr("fastllm.kernels.scaled_matmul.config", lambda M, N, K, *_: config(M, N, K, 80))
    check_exact(exact(389, 130, 144, torch.float16, False, device))


def one_at(like: Tensor, *at: int) -> Tensor:
    one = torch.zeros_like(like)
    one[at] = 1
    return one


WRONG: dict[str, Callable[[Problem], Problem]] = {
    "one weight": lambda p: p._replace(w=p.w + one_at(p.w, 64, 303)),
    "one activation": lambda p: p._replace(q=p.q + one_at(p.q, 16, 303)),
    "one weight's scale": lambda p: p._replace(w_scale=p.w_scale + one_at(p.w_scale, 64)),
    "one row's scale": lambda p: p._replace(x_scale=p.x_scale * (1 + one_at(p.x_scale, 16))),
    "scales of other rows": lambda p: p._replace(x_scale=p.x_scale.roll(1)),
    "no bias": lambda p: p._replace(bias=None),
    "order": lambda p: p._replace(w=p.w.roll(1, 1)),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_fault_is_seen(wrong: Callable[[Problem], Problem], device: str) -> None:
    right = exact(17, 65, 304, torch.float16, True, device)
    right.q[:, 303], right.w[64, 303] = 1, 100
    check_exact(right)
    with pytest.raises(AssertionError, match="not equal"):
        assert_equal(wrong(right).got(), right.want().to(torch.float16))


@pytest.mark.parametrize("K", [304, 257])
def test_strides(K: int, device: str) -> None:
    p = exact(5, 65, K, torch.float16, True, device)
    wide = torch.cat((p.q[:, :1] + 1, p.q, p.q + 1), 1)[:, 1 : K + 1]  # at an odd address, between other values
    rows = torch.stack((p.w, p.w + 1), 1).flatten(0, 1)[::2]
    more = torch.cat((p.w, torch.full_like(p.w, 99)), 1)
    for q, w in ((wide, p.w), (p.q, rows), (p.q, more), (p.q[:1].expand(5, -1), p.w)):
        assert not (q.is_contiguous() and w.is_contiguous() and w.shape[1] == K)
        moved = p._replace(q=q, w=w)
        assert_equal(moved.got(), p._replace(q=q).want().to(torch.float16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_close_on_random_values(dtype: torch.dtype, device: str) -> None:
    p = exact(9, 40, 1040, dtype, True, device)
    q = torch.randint(-127, 128, p.q.shape, device=device, dtype=torch.int8)
    p = p._replace(q=q, x_scale=torch.rand(9, device=device) / 99, w_scale=torch.rand(40, device=device).to(dtype) / 9)
    y = p.got()
    assert_close(y, p.want(), dtype=dtype)
    assert_equal(p.got(), y)  # the same bits at every run
    with pytest.raises(AssertionError, match="worst"):
        assert_close(p._replace(x_scale=p.x_scale * 1.01).got(), p.want(), dtype=dtype)


def test_sums_fill_an_int32(device: str) -> None:
    """The largest K, every product at its largest: no float32 sum would come out right to the last unit."""
    full = torch.full((1, LARGEST_K), 127, dtype=torch.int8, device=device)
    ones, w = torch.ones(1, device=device), torch.full_like(full, -128)
    w[0, -1] = -127
    got = scaled_matmul(full, ones, w, ones, torch.full((1,), float(2**31), device=device), torch.float32)
    assert_equal(got, torch.tensor([[float(torch.tensor(-127.0 * 128 * LARGEST_K + 127).float()) + 2.0**31]]))


@pytest.mark.parametrize("M, N", [(0, 65), (5, 0), (0, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_to_do(M: int, N: int, dtype: torch.dtype, device: str) -> None:
    q, scale = quantize_rows(torch.ones(M, 64, dtype=dtype, device=device))
    y = scaled_matmul(q, scale, torch.ones(N, 64, dtype=torch.int8, device=device), scale.new_ones(N), None, dtype)
    assert q.shape == (M, 64) and y.shape == (M, N) and y.dtype == dtype


# --- the activations


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """The definition of `quantize_rows` for finite x."""
    scale = (x.float().abs().amax(1) / 127).clamp(min=TINY)
    return (x.float() / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "rows of a wider tensor": lambda x: torch.cat((x, x + 1), 1)[:, : x.shape[1]],
    "every other row": lambda x: torch.stack((x, x + 1), 1).flatten(0, 1)[::2],
    "every other column": lambda x: torch.stack((x, 99 * x), 2).flatten(1)[:, ::2],
    "transposed": lambda x: x.T.contiguous().T,
    "one row expanded": lambda x: x[:1].expand(len(x), -1),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_quantized_to_the_bit(view: Callable[[Tensor], Tensor], dtype: torch.dtype, device: str) -> None:
    for M, K in ((1, 1), (3, 257), (5, 64), (2, 4097)):
        x = view((torch.randn(M, K, device=device) * 10.0 ** torch.randint(-6, 5, (M, 1), device=device)).to(dtype))
        q, scale = quantize_rows(x)
        want, want_scale = rounded(x)
        assert_equal(scale, want_scale)
        assert_equal(q, want)
        assert q.is_contiguous() and q.abs().max() == 127


def test_halves_go_to_the_even_neighbour(device: str) -> None:
    x = torch.tensor([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -126.5, -127]], device=device)
    q, scale = quantize_rows(x)
    assert scale.tolist() == [1.0]
    assert q.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126, -126, -127]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_so(value: float, dtype: torch.dtype, device: str) -> None:
    x = torch.randn(5, 300, device=device).to(dtype)
    clean = quantize_rows(x)
    x[1, 299], x[3, 0] = value, value
    q, scale = quantize_rows(x)
    assert scale.isnan().tolist() == [False, True, False, True, False]
    assert_equal(q[::2], clean[0][::2])
    for w in (torch.zeros(2, 300, dtype=torch.int8, device=device), torch.ones(2, 300, dtype=torch.int8).to(device)):
        y = scaled_matmul(q, scale, w, scale.new_ones(2), scale.new_ones(2), dtype)
        assert y.isnan().all(1).tolist() == scale.isnan().tolist() and y[::2].isfinite().all()


def test_zeros_and_the_smallest_numbers(device: str) -> None:
    x = torch.zeros(5, 40, device=device)
    x[1, 3], x[2, 3], x[3, 3], x[4, 3] = 1e-45, -TINY, 127 * TINY, 3e38
    q, scale = quantize_rows(x)
    assert scale[:4].tolist() == [TINY] * 4 and q[:, 3].tolist() == [0, 0, -1, 127, 127]
    assert_equal(scaled_matmul(q[:1], scale[:1], q.new_ones(2, 40), scale.new_ones(2), None, x.dtype), x[:1, :2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_together_are_close_to_the_product(dtype: torch.dtype, device: str) -> None:
    """Two roundings of 8 bits: within 1 % of the product of the numbers that were rounded."""
    x, w = torch.randn(6, 512, device=device).to(dtype), torch.randn(50, 512, device=device)
    q, scale = quantize_rows(w)
    got = scaled_matmul(*quantize_rows(x), q, scale, None, dtype)
    assert_close(got, x.double() @ w.double().T, worst=0.08, rms=0.02, dtype=dtype)
    with pytest.raises(AssertionError):  # and no closer than that: something was rounded
        assert_close(got, x.double() @ w.double().T, *BOUNDS[torch.float16], dtype=dtype)


def test_operands_that_do_not_fit_are_refused() -> None:
    p = exact(3, 8, 32, torch.float32, True, "cpu")
    for wrong, message in (
        (p._replace(q=p.q.int()), r"q must be an int8 or float8_e4m3fn matrix .* torch.int32 \[3, 32\]"),
        (p._replace(w=p.w.float()), r"w must be an int8 or .* torch.float32 \[8, 32\]"),
        (p._replace(w=p.w.T.contiguous().T), "w must be .* unit inner stride"),
        (p._replace(w=p.w[:, :31]), r"w must be \[8, 32\] for q \[3, 32\], .*; got \[8, 31\]"),
        (p._replace(q=p.q[:, :0]), "with K from 1, of int8 to 131072"),
        (p._replace(x_scale=p.x_scale[:2]), r"x_scale must be a contiguous \[3\], got \[2\]"),
        (p._replace(w_scale=p.w_scale[:, None]), r"w_scale must be a contiguous \[8\], got \[8, 1\]"),
        (p._replace(bias=p.bias[:1].expand(8)), r"bias must be a contiguous \[8\], got \[8\]"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong.got()
    for x in (torch.ones(3), torch.ones(3, 4, dtype=torch.int8)):
        with pytest.raises(ValueError, match="x must be a floating-point"):
            quantize_rows(x)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("M", [1, 16, 33, 64, 65, 4096])
def test_splits_share_all_blocks(M: int, capability: int) -> None:
    for N in (1, 4096, 28672, 128256):
        for K in (1, 127, 128, 896, 4096, 4304, 14336, 28672):
            tile = config(M, N, K, capability)
            blocks = -(-K // tile.BLOCK_K)
            steps = -(-blocks // tile.SPLIT_K)
            assert 1 <= tile.SPLIT_K <= 8 and steps * (tile.SPLIT_K - 1) < blocks <= steps * tile.SPLIT_K


@pytest.mark.gpu  # NumPy, and so the interpreter, widens a product that would overflow
@pytest.mark.parametrize("far", ["x", "w"])
def test_offsets_beyond_32_bits(far: str, device: str) -> None:
    p = exact(2, 2, 304, torch.float16, True, device)
    big = torch.zeros(2**31 + 512, dtype=torch.int8, device=device).as_strided((2, 304), (2**31, 1))
    check_exact(p._replace(q=big.copy_(p.q)) if far == "x" else p._replace(w=big.copy_(p.w)))
