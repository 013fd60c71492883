"""Integer products of weights and activations: every implementation that runs here against the definition.

The Triton layout is tested wherever Triton runs: on a CPU that is its interpreter.
"""

import os

import pytest
import torch
from close import assert_close, assert_equal

from fastllm import QuantLinear
from fastllm.formats import IntFormat, QuantizedWeight, dequantize, pack_bits, parse_format
from fastllm.ops import INT8_LAYOUTS, LAYOUTS, dynamic_matmul, layout_for
from fastllm.ops.int8_matmul import LARGEST_K, LARGEST_K_UNSIGNED, quantize_rows
from fastllm.quantizers import quantize

FORMAT = IntFormat(8, activations="int8")
MS = [1, 2, 3, 5, 8, 16, 17, 31, 33, 64, 65, 127, 129]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SHAPES = [(64, 256), (65, 264), (33, 201), (5, 37), (1, 1)]


def layouts(device: str, N: int = 64, K: int = 64) -> list[str]:
    """Those that run on this machine."""
    interpreted = "TRITON_INTERPRET" in os.environ
    found = []
    for name, layout in INT8_LAYOUTS.items():
        why = layout.reasons(FORMAT, N, K, torch.bfloat16, torch.device(device))
        if not [w for w in why if not (interpreted and "CUDA" in w)]:
            found.append(name)
    return found


def packed_for(layout, weight, shape):
    """The function of x and bias that multiplies by `weight` in `layout`; checks that packing can be undone."""
    own = QuantizedWeight(weight.packed.clone(), weight.scale)
    p = INT8_LAYOUTS[layout].pack(own, FORMAT, shape)
    assert_equal(INT8_LAYOUTS[layout].unpack(p.w, FORMAT, shape), weight.packed)
    return lambda x, bias=None: dynamic_matmul(x, *p, bias, shape[0], layout)


def integers(N, K, dtype, device):
    """A weight whose every value is an integer times a power of two, and that value in float64."""
    q = torch.randint(-127, 128, (N, K))
    scale = torch.tensor([0.25, 0.5, 1, 2])[torch.randint(4, (N, 1))]
    packed = pack_bits((q + 128).to(torch.uint8), 8).to(device)
    return QuantizedWeight(packed, scale.to(dtype).to(device)), q.double() * scale.double()


def spikes(M, K):
    """x with 127 as the largest of each row, so that its scale is 1 and rounding changes nothing."""
    x = torch.zeros(M, K, dtype=torch.float64)
    where = torch.rand(M, K).argsort(1)[:, :4]
    where[0, 0] = K - 1  # the very last column, where tails go wrong
    x.scatter_(1, where, torch.randint(-3, 4, where.shape).double())
    x[torch.arange(M), where[:, 0]] = 127 * (1 - 2 * torch.randint(2, (M,))).double()
    return x


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_integers_are_exact(dtype, shape, device):
    weight, w = integers(*shape, dtype, device)
    bias = torch.randint(-8, 9, shape[:1]).to(dtype).to(device)
    for layout in layouts(device):
        multiply = packed_for(layout, weight, shape)
        for M in MS if layout != "int8-triton" else MS[::5]:  # the kernel has tests of its own
            x = spikes(M, shape[1])
            want = x @ w.t()
            assert want.abs().max() < 65504
            assert_equal(multiply(x.to(dtype).to(device)), want.to(dtype))
            assert_equal(multiply(x.to(dtype).to(device), bias), (want + bias.cpu().double()).to(dtype))


def reference(x, weight, shape, bias=None):
    """The definition, in float64 but for the rounding of x."""
    q, scale = quantize_rows(x)
    w = dequantize(weight._replace(scale=weight.scale.double()), FORMAT, shape, torch.float64)
    y = (q.double() * scale.double()[:, None]) @ w.t()
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_values(dtype, device):
    shape = (96, 1544)  # more than one exact float32 sum
    w, bias = torch.randn(shape, dtype=dtype, device=device), torch.randn(96, dtype=dtype, device=device)
    weight = quantize(w, FORMAT, "rtn")
    for layout in layouts(device):
        multiply = packed_for(layout, weight, shape)
        for M in (1, 4, 40):
            x = torch.randn(M, shape[1], dtype=dtype, device=device)
            got = multiply(x, bias)
            assert_close(got, reference(x, weight, shape, bias), dtype=dtype)
            assert_equal(multiply(x, bias), got)  # the same bits at every run
            assert_close(got, x.double() @ w.double().t() + bias.double(), worst=0.1, rms=0.02, dtype=dtype)


@pytest.mark.parametrize("layout", INT8_LAYOUTS)
def test_a_fault_is_seen(layout, device):
    if layout not in layouts(device):
        pytest.skip(f"{layout} does not run on this machine")
    shape = (64, 256)
    weight = quantize(torch.randn(shape).bfloat16(), FORMAT, "rtn")
    x = torch.randn(4, 256).bfloat16()
    want = reference(x, weight, shape)
    assert_close(packed_for(layout, weight, shape)(x), want, dtype=torch.bfloat16)
    for wrong in (
        weight._replace(scale=weight.scale.roll(1, 0)),
        weight._replace(packed=weight.packed.roll(1, 1)),
        weight._replace(packed=weight.packed ^ 4),
    ):
        with pytest.raises(AssertionError):
            assert_close(packed_for(layout, wrong, shape)(x), want, dtype=torch.bfloat16)
    with pytest.raises(AssertionError):  # the activations were rounded, which the bounds see
        assert_close(
            packed_for(layout, weight, shape)(x), x.double() @ dequantize(weight, FORMAT, shape, torch.double).t()
        )


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
    (q, scale), (want, want_scale) = quantize_rows(x), kernel(x)
    assert_equal(q, want)
    assert scale.isnan().tolist() == want_scale.isnan().tolist() == [False, False, False, True, True, False, False]
    assert_equal(scale.nan_to_num(), want_scale.nan_to_num())


def prepared(N, K, dtype, device, layout):
    weight = quantize(torch.randn(N, K, dtype=dtype, device=device), FORMAT, "rtn")
    dense = dequantize(weight, FORMAT, (N, K), torch.float64)
    return INT8_LAYOUTS[layout].pack(weight, FORMAT, (N, K)), dense


def test_every_shape_of_x(device):
    N, K = 64, 128
    for layout in layouts(device):
        p, _ = prepared(N, K, torch.bfloat16, device, layout)

        def op(x, p=p, layout=layout):
            return dynamic_matmul(x, *p, None, N, layout)

        x = torch.randn(2, 3, 2 * K, dtype=torch.bfloat16, device=device)
        strided = x[..., ::2]
        assert_equal(op(strided), op(strided.contiguous()))
        assert_equal(op(strided[0]), op(strided)[0])
        assert_equal(op(x[0, 0, :K].expand(5, K)), op(x[0, 0, :K].repeat(5, 1)))
        assert_equal(op(x[0, 0, :K]), op(x[0, :1, :K])[0])
        for empty in ((0, K), (2, 0, K)):
            assert op(x.new_empty(empty)).shape == (*empty[:-1], N)


def test_many_rows_are_cut_into_parts(monkeypatch, device):
    shape = (64, 64)
    weight = quantize(torch.randn(shape, device=device), FORMAT, "rtn")
    x = torch.randn(50, 64, device=device)
    for layout in layouts(device):
        whole = packed_for(layout, weight, shape)(x)
        with monkeypatch.context() as patch:
            patch.setattr("fastllm.ops.int8_matmul.OUTPUT_SCRATCH", 64 * 9)
            assert_equal(packed_for(layout, weight, shape)(x), whole)


def test_a_row_has_the_same_bits_whatever_the_batch(device):
    """Sums of integers have no order, and scales belong to rows: batch invariance costs nothing here."""
    shape = (65, 1100)
    weight = quantize(torch.randn(shape, device=device).bfloat16(), FORMAT, "rtn")
    x, bias = torch.randn(130, 1100, device=device), torch.randn(65, device=device)
    for layout in layouts(device):
        multiply = packed_for(layout, weight, shape)
        whole = multiply(x, bias)
        for rows in (slice(0, 1), slice(7, 12), slice(90, 130)):
            assert_equal(multiply(x[rows], bias), whole[rows])


def test_a_sum_that_may_overflow_is_refused():
    """At the largest K of each layout, with every product at its largest, the sum is right; beyond, it is refused."""
    cpu = torch.device("cpu")
    for layout in layouts("cpu"):
        K = LARGEST_K_UNSIGNED if layout == "int8-onednn" else LARGEST_K
        assert "overflow" in " ".join(INT8_LAYOUTS[layout].reasons(FORMAT, 1, K + 1, torch.float32, cpu))
        packed = torch.zeros(1, K // 4, dtype=torch.int32)  # -128 throughout
        multiply = packed_for(layout, QuantizedWeight(packed, torch.ones(1, 1)), (1, K))
        for sign in (-1, 1):
            assert_equal(multiply(torch.full((1, K), 127.0 * sign)), torch.full((1, 1), -128.0 * 127 * sign * K))
    with pytest.raises(ValueError, match=f"int8-rest: the sums of K={LARGEST_K + 1} products may overflow"):
        layout_for(FORMAT, 1, LARGEST_K + 1, torch.float32, cpu)


# --- the format and the layer


def test_the_format_and_its_name():
    assert parse_format("int8-a8") == parse_format("int8", activations="int8") == FORMAT and FORMAT.name == "int8-a8"
    assert FORMAT.weight_only == parse_format("int8")
    for name in ("int4", "int8-g64", "int8-asym", "int4-channel"):
        with pytest.raises(ValueError, match=f"activations='int8' with {parse_format(name).name} weights.*'int8'"):
            parse_format(name, activations="int8")
    with pytest.raises(ValueError, match="with int8-g128 weights"):
        parse_format("int8-a8", group_size=128)
    with pytest.raises(ValueError, match="activations='int4': only 'int8'"):
        parse_format("int8", activations="int4")


def test_layouts_hold_what_they_multiply(device):
    """A layout of the one op never takes a format of the other."""
    operands = 4096, 4096, torch.bfloat16, torch.device(device)
    for name in ("rest", "int8rows", "int8blocks"):
        assert "it leaves activations as they are" in LAYOUTS[name].reasons(FORMAT, *operands)
    for layout in INT8_LAYOUTS.values():
        why = "it rounds activations, which int8 leaves as they are"
        assert why in layout.reasons(FORMAT.weight_only, *operands)
        assert why not in layout.reasons(FORMAT, *operands)


def test_layer(device):
    linear = torch.nn.Linear(200, 48, dtype=torch.bfloat16, device=device)
    layer, plain = (QuantLinear.from_linear(linear, name) for name in ("int8-a8", "int8"))
    x = torch.randn(2, 3, 200, dtype=torch.bfloat16, device=device)
    assert_close(layer(x), linear(x).detach().double(), worst=0.1, rms=0.02, dtype=torch.bfloat16)
    assert not torch.equal(layer(x), plain(x)), "the activations were not rounded"
    assert "int8-a8" in repr(layer) and "int8" in layer.layout
    for key, tensor in plain.state_dict().items():
        assert_equal(layer.state_dict()[key], tensor)
