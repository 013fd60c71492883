"""Products of float8 weights and activations: every implementation that runs here against the definition.

The layout of the GPU is tested wherever Triton runs: on a CPU that is its interpreter.
"""

import os

import pytest
import torch
from close import BOUNDS, assert_close, assert_equal
from test_int8_matmul import DTYPES, MS, SHAPES

from fastllm.formats import Fp8Format, QuantizedWeight, dequantize, from_fp8
from fastllm.ops import FP8_LAYOUTS, dynamic_matmul
from fastllm.ops.fp8_matmul import LIBRARY_ROWS, by_library, library_takes
from fastllm.ops.int8_matmul import quantize_rows
from fastllm.ops.layout import Prepared
from fastllm.quantizers import quantize

FORMAT, FP8 = Fp8Format(), torch.float8_e4m3fn
CPU = torch.device("cpu")


def layouts(device: str) -> list[str]:
    """Those that run on this machine."""
    interpreted = "TRITON_INTERPRET" in os.environ
    found = []
    for name, layout in FP8_LAYOUTS.items():
        why = layout.reasons(FORMAT, 64, 64, torch.bfloat16, torch.device(device))
        if not [w for w in why if not (interpreted and "CUDA" in w)]:
            found.append(name)
    return found


def packed_for(layout, weight, shape):
    """The function of x and bias that multiplies by `weight` in `layout`; checks that packing can be undone."""
    own = QuantizedWeight(weight.packed.clone(), weight.scale)
    p = FP8_LAYOUTS[layout].pack(own, FORMAT, shape)
    assert_equal(FP8_LAYOUTS[layout].unpack(p.w, FORMAT, shape), weight.packed)
    return lambda x, bias=None, invariant=False: dynamic_matmul(x, *p, bias, shape[0], layout, invariant)


def powers(N, K, dtype, device):
    """A weight of integers, to each of which a float8 is equal, times powers of two; and it in float64."""
    q = torch.randint(-15, 16, (N, K)).double()
    scale = torch.tensor([0.25, 0.5, 1, 2], dtype=torch.float64)[torch.randint(4, (N, 1))]
    return QuantizedWeight(from_fp8(q.to(FP8)).to(device), scale.to(dtype).to(device)), q * scale


def spikes(M, K):
    """x with 448 as the largest of each row, so that its scale is 1 and rounding changes nothing; sums below 2**13."""
    x = torch.zeros(M, K, dtype=torch.float64)
    where = torch.rand(M, K).argsort(1)[:, :4]
    where[0, 0] = K - 1  # the very last column, where tails go wrong
    x.scatter_(1, where, torch.randint(-3, 4, where.shape).double())
    x[torch.arange(M), where[:, 0]] = 448 * (1 - 2 * torch.randint(2, (M,))).double()
    return x


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_powers_of_two_are_exact(dtype, shape, device):
    weight, w = powers(*shape, dtype, device)
    bias = torch.randint(-8, 9, shape[:1]).to(dtype).to(device)
    for layout in layouts(device):
        multiply = packed_for(layout, weight, shape)
        for M in MS if layout == "fp8-rest" else MS[::4]:  # the kernel has tests of its own
            x = spikes(M, shape[1])
            want = x @ w.t()
            assert want.abs().max() < 2**15
            assert_equal(multiply(x.to(dtype).to(device)), want.to(dtype))
            assert_equal(multiply(x.to(dtype).to(device), bias), (want + bias.cpu().double()).to(dtype))


def reference(x, weight, shape, bias=None):
    """The definition, in float64 but for the rounding of x."""
    q, scale = quantize_rows(x, FP8)
    w = dequantize(weight._replace(scale=weight.scale.double()), FORMAT, shape, torch.float64)
    y = (q.double() * scale.double()[:, None]) @ w.t()
    return y if bias is None else y + bias.double()


def allowed(dtype, layout):
    """A GPU keeps some 14 bits of a sum of float8 products."""
    return BOUNDS[torch.float16 if dtype == torch.float32 and layout == "fp8-cuda" else dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_values(dtype, device):
    shape = (96, 1544)
    w, bias = torch.randn(shape, dtype=dtype, device=device), torch.randn(96, dtype=dtype, device=device)
    weight = quantize(w, FORMAT, "rtn")
    for layout in layouts(device):
        multiply = packed_for(layout, weight, shape)
        for M in (1, 4, 40, 130):  # the last of them for the library, on a GPU
            x = torch.randn(M, shape[1], dtype=dtype, device=device)
            got = multiply(x, bias)
            assert_close(got, reference(x, weight, shape, bias), *allowed(dtype, layout), dtype=dtype)
            assert_equal(multiply(x, bias), got)  # the same bits at every run
            assert_close(got, x.double() @ w.double().t() + bias.double(), worst=0.25, rms=0.05, dtype=dtype)


@pytest.mark.parametrize("layout", FP8_LAYOUTS)
def test_a_fault_is_seen(layout, device):
    if layout not in layouts(device):
        pytest.skip(f"{layout} does not run on this machine")
    shape, dtype = (64, 256), torch.bfloat16
    weight = quantize(torch.randn(shape, device=device).to(dtype), FORMAT, "rtn")
    x = torch.randn(4, 256, device=device).to(dtype)
    want = reference(x, weight, shape)
    assert_close(packed_for(layout, weight, shape)(x), want, dtype=dtype)
    for wrong in (
        weight._replace(scale=weight.scale.roll(1, 0)),
        weight._replace(packed=weight.packed.roll(1, 1)),
        weight._replace(packed=weight.packed ^ 4),
    ):
        with pytest.raises(AssertionError):
            assert_close(packed_for(layout, wrong, shape)(x), want, dtype=dtype)
    with pytest.raises(AssertionError):  # the activations were rounded, which the bounds see
        exact = x.double() @ dequantize(weight, FORMAT, shape, torch.double).t()
        assert_close(packed_for(layout, weight, shape)(x), exact, dtype=dtype)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_so(value, dtype, device):
    shape = (32, 70)
    weight = quantize(torch.randn(shape, device=device).to(dtype), FORMAT, "rtn")
    for layout in layouts(device):
        multiply = packed_for(layout, weight, shape)
        x = torch.randn(3, 70, device=device).to(dtype)
        clean = multiply(x)
        x[1, 69] = value
        y = multiply(x)
        assert y[1].isnan().all()
        assert_equal(y[::2], clean[::2])
        assert_equal(multiply(torch.zeros_like(x)), torch.zeros_like(clean))


def test_both_definitions_of_the_rows_agree(device):
    from fastllm.kernels.scaled_matmul import quantize_rows as kernel

    x = torch.randn(7, 300, device=device) * 10.0 ** torch.arange(-9, 5, 2, device=device)[:, None]
    x[2], x[3, 4], x[4, 5] = 0, float("nan"), float("inf")
    (q, scale), (want, want_scale) = quantize_rows(x, FP8), kernel(x, FP8)
    assert q.dtype == want.dtype == FP8
    assert_equal(q.float(), want.float())
    assert scale.isnan().tolist() == want_scale.isnan().tolist() == [False, False, False, True, True, False, False]
    assert_equal(scale.nan_to_num(), want_scale.nan_to_num())


def prepared(N, K, dtype, device, layout):
    weight = quantize(torch.randn(N, K, dtype=dtype, device=device), FORMAT, "rtn")
    dense = dequantize(weight, FORMAT, (N, K), torch.float64)
    return FP8_LAYOUTS[layout].pack(weight, FORMAT, (N, K)), dense


def test_every_shape_of_x(device):
    N, K = 64, 128
    for layout in layouts(device):
        p, _ = prepared(N, K, torch.bfloat16, device, layout)

        def op(x, p=p, layout=layout):
            return dynamic_matmul(x, *p, None, N, layout)

        x = torch.randn(2, 3, 2 * K, dtype=torch.bfloat16, device=device)
        strided = x[..., ::2]
        assert_equal(op(strided), op(strided.contiguous()))
        assert_equal(op(x[0, 0, :K].expand(5, K)), op(x[0, 0, :K].repeat(5, 1)))
        for empty in ((0, K), (2, 0, K)):
            assert op(x.new_empty(empty)).shape == (*empty[:-1], N)


def test_a_row_has_the_same_bits_whatever_the_batch(device):
    """On request: sums of floats have an order."""
    shape = (65, 1100)
    weight = quantize(torch.randn(shape, device=device), FORMAT, "rtn")
    x, bias = torch.randn(140, 1100, device=device), torch.randn(65, device=device)
    for layout in layouts(device):
        multiply = packed_for(layout, weight, shape)
        whole = multiply(x, bias, True)
        assert_close(whole, reference(x, weight, shape, bias), *allowed(torch.float32, layout), dtype=torch.float32)
        for rows in (slice(0, 1), slice(7, 12), slice(5, 140)):
            assert_equal(multiply(x[rows], bias, True), whole[rows])


def test_the_weight_is_taken_in_chunks(monkeypatch, device):
    shape = (200, 64)
    weight = quantize(torch.randn(shape, device=device), FORMAT, "rtn")
    x = torch.randn(5, 64, device=device)
    whole = packed_for("fp8-rest", weight, shape)(x)
    monkeypatch.setattr("fastllm.ops.layout.SCRATCH", 1)
    assert FP8_LAYOUTS["fp8-rest"].step(64) == 64
    assert_close(packed_for("fp8-rest", weight, shape)(x), whole.double(), dtype=torch.float32)


# --- what the library is asked for


def test_the_library_is_asked_for_what_it_can_do():
    brain = torch.bfloat16
    bias = torch.zeros(64, dtype=brain)
    assert library_takes(LIBRARY_ROWS, 64, brain, bias) and library_takes(4096, 64, brain, None)
    for refused in ((LIBRARY_ROWS - 1, 64, brain, bias), (4096, 65, brain, None), (4096, 64, torch.float16, None)):
        assert not library_takes(*refused)
    assert not library_takes(4096, 64, brain, bias.float())


def test_the_library_takes_our_operands():
    """torch's own checks of shapes, strides and types, for a GPU that is not there."""
    x_scale, scale, bias = (torch.ones(n, device="meta") for n in (130, 64, 64))
    q, w = (torch.zeros(n, 128, dtype=torch.uint8, device="meta") for n in (130, 64))
    y = by_library(q.view(FP8), x_scale, Prepared(w, scale, None), bias.bfloat16())
    assert y.shape == (130, 64) and y.dtype == torch.bfloat16
    for wrong in ((q.view(FP8), x_scale[:-1], w), (q[:, :120].view(FP8), x_scale, w[:, :120])):
        with pytest.raises(RuntimeError):
            by_library(*wrong[:2], Prepared(wrong[2], scale, None), None)
