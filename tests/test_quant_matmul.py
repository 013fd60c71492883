"""The op on whatever this machine has, against its definition, in every layout that can hold the weight."""

import pytest
import torch
from close import assert_close, assert_equal

from fastllm.formats import (
    FORMATS,
    IntFormat,
    QuantizedWeight,
    dequantize,
    pack_bits,
    pack_zero_point,
    parse_format,
)
from fastllm.ops import LAYOUTS, choose_layout, quant_matmul
from fastllm.ops.layout import Prepared
from fastllm.quantizers import quantize

INTEGERS = {name: f for name, f in FORMATS.items() if isinstance(f, IntFormat)}
MS = [1, 2, 3, 5, 8, 16, 17, 31, 33, 64, 65, 127, 129]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SHAPES = [(64, 256), (65, 264), (33, 200), (5, 37)]
LARGE = {"int8blocks"}  # chosen for large layers only, right at any size
SMALL_SUMS = {4: 7, 8: 15}


def layouts(format: IntFormat, N: int, K: int, dtype: torch.dtype, device: str) -> list[str]:
    """Those that can hold the weight on this machine."""
    found = []
    for name, layout in LAYOUTS.items():
        why = layout.reasons(format, N, K, dtype, torch.device(device))
        if not [w for w in why if not (name in LARGE and "below" in w)]:
            found.append(name)
    return found


def packed_for(layout, weight, format, shape):
    """The function of x and bias that multiplies by `weight` in `layout`; checks that packing can be undone."""
    own = QuantizedWeight(weight.packed.clone(), weight.scale, weight.zero_point)
    p = LAYOUTS[layout].pack(own, format, shape)
    assert_equal(LAYOUTS[layout].unpack(p.w, format, shape), weight.packed)
    return lambda x, bias=None: quant_matmul(x, *p, bias, shape[0], format.bits, format.group_of(shape[1]), layout)


def bounds(layout: str, dtype: torch.dtype) -> tuple[float, float]:
    """(worst, rms): the packed operators of the CPU compute in bfloat16 whatever x is."""
    return (4e-2, 5e-3) if dtype == torch.bfloat16 or layout not in ("rest", "planar") else (8e-3, 1e-3)


def integers(format, N, K, dtype, top, device):
    """A weight whose every value is an integer times a power of two, and that value in float64."""
    G = format.groups(K)
    z = torch.full((N, G), format.middle) if format.symmetric else torch.randint(1, 2**format.bits - 1, (N, G))
    group = torch.arange(K) // format.group_of(K)
    low, high = (-z[:, group]).clamp(min=-top), (2**format.bits - 1 - z[:, group]).clamp(max=top)
    q = (low + (torch.rand(N, K) * (high - low + 1)).long()).clamp(low, high)
    scale = torch.tensor([0.25, 0.5, 1, 2])[torch.randint(4, (N, G))]
    zero = None if format.symmetric else pack_zero_point(z.to(torch.uint8), format.bits).to(device)
    packed = pack_bits((q + z[:, group]).to(torch.uint8), format.bits).to(device)
    return QuantizedWeight(packed, scale.to(dtype).to(device), zero), q.double() * scale.double()[:, group]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", INTEGERS.values(), ids=INTEGERS)
def test_integers_are_exact(format, dtype, shape, device):
    (N, K) = shape
    for top, nonzeros in ((2**format.bits, 1), (SMALL_SUMS[format.bits], 4)):
        weight, w = integers(format, N, K, dtype, top, device)
        for layout in layouts(format, N, K, dtype, device):
            multiply = packed_for(layout, weight, format, shape)
            for M in MS:
                where = torch.rand(M, K).argsort(1)[:, :nonzeros]
                where[0, 0] = K - 1  # the very last column, where tails go wrong
                x = torch.zeros(M, K, dtype=torch.float64)
                x.scatter_(1, where, torch.randint(2, where.shape).double() * 2 - 1)
                want = (x @ w.t()).to(dtype)
                assert_equal(multiply(x.to(dtype).to(device)), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", INTEGERS.values(), ids=INTEGERS)
def test_random_values(format, dtype, device):
    N, K = 96, 520
    w, bias = torch.randn(N, K, dtype=dtype, device=device), torch.randn(N, dtype=dtype, device=device)
    weight = quantize(w, format, "rtn")
    dense = dequantize(weight, format, (N, K), torch.float64)
    for layout in layouts(format, N, K, dtype, device):
        multiply = packed_for(layout, weight, format, (N, K))
        for M in (1, 4, 40):
            x = torch.randn(M, K, dtype=dtype, device=device)
            want = x.double() @ dense.t() + bias.double()
            assert_close(multiply(x, bias), want, *bounds(layout, dtype), dtype=dtype)


@pytest.mark.parametrize("layout", ["rest", "int4pack", "int8rows", "int8blocks"])
def test_the_check_can_fail(layout, device):
    """A weight read with the wrong group, the wrong rows or the wrong order is seen."""
    format, (N, K) = (FORMATS["int4-g32"] if layout == "int4pack" else FORMATS["int8"]), (64, 256)
    if layout not in layouts(format, N, K, torch.bfloat16, device):
        pytest.skip(f"{layout} does not run on this machine")
    weight = quantize(torch.randn(N, K).bfloat16(), format, "rtn")
    x = torch.randn(4, K).bfloat16()
    want = (x.double() @ dequantize(weight, format, (N, K), torch.float64).t()).bfloat16()
    assert_close(packed_for(layout, weight, format, (N, K))(x), want, worst=4e-2, rms=5e-3)
    for wrong in (
        weight._replace(scale=weight.scale.roll(1, 0)),
        weight._replace(packed=weight.packed.roll(1, 1)),
        weight._replace(packed=weight.packed ^ 1),
    ):
        with pytest.raises(AssertionError):
            assert_close(packed_for(layout, wrong, format, (N, K))(x), want, worst=4e-2, rms=5e-3)


def prepared(format, N, K, dtype, device, layout=None):
    weight = quantize(torch.randn(N, K, dtype=dtype, device=device), format, "rtn")
    chosen = LAYOUTS[layout] if layout else choose_layout(format, N, K, dtype, torch.device(device))[0]
    dense = dequantize(weight, format, (N, K), torch.float64)
    return chosen.pack(weight, format, (N, K)), chosen.name, dense


@pytest.mark.parametrize("format", ["int4-g32", "int8", "int8-g64", "int4-g64-asym"])
def test_every_shape_of_x(format, device):
    format, (N, K) = FORMATS[format], (64, 128)
    p, layout, _ = prepared(format, N, K, torch.bfloat16, device)

    def op(x):
        return quant_matmul(x, *p, None, N, format.bits, format.group_of(K), layout)

    x = torch.randn(2, 3, 2 * K, dtype=torch.bfloat16, device=device)
    strided = x[..., ::2]
    assert_equal(op(strided), op(strided.contiguous()))
    assert_equal(op(strided[0]), op(strided)[0])
    assert_equal(op(x[0, 0, :K].expand(5, K)), op(x[0, 0, :K].repeat(5, 1)))
    assert_equal(op(x[0, 0, :K]), op(x[0, :1, :K])[0])
    for empty in ((0, K), (2, 0, K)):
        assert op(x.new_empty(empty)).shape == (*empty[:-1], N)
    nan = x[0, :, :K].clone()
    nan[1, 5] = float("nan")
    assert op(nan).isfinite().all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "format, layout", [("int4-g32", None), ("int8", None), ("int8", "int8blocks"), ("int8-g64", None)]
)
def test_gradient(format, layout, dtype, device):
    format, (N, K) = FORMATS[format], (96, 160)
    if layout and layout not in layouts(format, N, K, dtype, device):
        pytest.skip(f"{layout} does not run on this machine")
    p, layout, dense = prepared(format, N, K, dtype, device, layout)
    x = torch.randn(2, 3, K, dtype=dtype, device=device, requires_grad=True)
    bias = torch.randn(N, dtype=dtype, device=device, requires_grad=True)
    grad = torch.randn(2, 3, N, dtype=dtype, device=device)
    quant_matmul(x, *p, bias, N, format.bits, format.group_of(K), layout).backward(grad)
    assert_close(x.grad, grad.double() @ dense, *bounds(layout, dtype), dtype=dtype)
    assert_close(bias.grad, grad.double().sum((0, 1)), *bounds("rest", dtype), dtype=dtype)


@pytest.mark.parametrize(
    "format, layout", [("int4-g32", None), ("int8", None), ("int8", "int8blocks"), ("int8-g64", "rest")]
)
def test_opcheck_and_compile(format, layout, device):
    format, (N, K) = FORMATS[format], (64, 128)
    if layout and layout not in layouts(format, N, K, torch.bfloat16, device):
        pytest.skip(f"{layout} does not run on this machine")
    p, layout, _ = prepared(format, N, K, torch.bfloat16, device, layout)
    rest = (None, N, format.bits, format.group_of(K), layout)
    x = torch.randn(3, K, dtype=torch.bfloat16, device=device)
    if not p.w.is_mkldnn:  # opcheck compares the storage of its arguments, and oneDNN's blocks have none
        for arg in (x, x.clone().requires_grad_()):
            torch.library.opcheck(torch.ops.fastllm.quant_matmul.default, (arg, *p, *rest))

    torch._dynamo.reset()  # or the limit of recompilations counts those of the other cases
    compiled = torch.compile(lambda x: quant_matmul(x, *p, *rest), fullgraph=True, dynamic=True, backend="aot_eager")
    for M in (1, 3, 40):
        x = torch.randn(M, K, dtype=torch.bfloat16, device=device)
        assert_equal(compiled(x), quant_matmul(x, *p, *rest))


def test_a_weight_without_a_layout_says_every_reason():
    with pytest.raises(ValueError, match="int4pack: it holds 4-bit weights, not 8-bit; int8rows: .*, not groups"):
        choose_layout(FORMATS["int8-g32"], 64, 64, torch.bfloat16, torch.device("cpu"), among=("int4pack", "int8rows"))


def test_scratch_is_bounded(device, monkeypatch):
    """Large weights are dequantised in chunks, and the chunks fit together."""
    monkeypatch.setattr("fastllm.ops.gpu.SCRATCH", 1 << 21)
    monkeypatch.setattr("fastllm.ops.gpu.CROSSOVER", 1)
    format, (N, K) = FORMATS["int4-g128"], (4096 + 64, 1024)
    p, layout, dense = prepared(format, N, K, torch.bfloat16, device)
    assert LAYOUTS[layout].step(K) < N
    x = torch.randn(50, K, dtype=torch.bfloat16, device=device)
    got = quant_matmul(x, *p, None, N, format.bits, 128, layout)
    assert_close(got, x.double() @ dense.t(), *bounds(layout, torch.bfloat16), dtype=torch.bfloat16)
    assert isinstance(p, Prepared)


@pytest.mark.parametrize("format", ["int4-g32", "int8"])
def test_batch_invariant_rows(format, device):
    format = parse_format(format)
    layout, _ = choose_layout(format, 96, 256, torch.bfloat16, torch.device(device))
    w = quantize(torch.randn(96, 256, device=device), format, "rtn", torch.bfloat16)
    p = layout.pack(w, format, (96, 256))
    x, bias = torch.randn(40, 256, device=device).bfloat16(), torch.randn(96, device=device).bfloat16()

    def run(x, batch_invariant=True):
        return quant_matmul(x, *p, bias, 96, format.bits, format.group_of(256), layout.name, batch_invariant)

    whole = run(x)
    assert_close(whole, run(x, False).double(), dtype=torch.bfloat16)
    for rows in (slice(0, 1), slice(7, 20)):
        assert_equal(run(x[rows]), whole[rows])
    assert_equal(torch.compile(run, fullgraph=True)(x), whole)
