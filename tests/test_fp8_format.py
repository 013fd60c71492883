"""Float8 weights: the format and its names, packing, rounding, and the layer that multiplies by them."""

import pytest
import torch
from close import assert_close, assert_equal
from test_int8_matmul import DTYPES, SHAPES

from fastllm import QuantLinear
from fastllm.formats import Fp8Format, IntFormat, QuantizedWeight, check, dequantize, from_fp8, parse_format, to_fp8
from fastllm.ops import FP8_LAYOUTS, INT8_LAYOUTS, LAYOUTS, layout_for, what_runs
from fastllm.quantizers import quantize

FORMAT, FP8 = Fp8Format(), torch.float8_e4m3fn
CPU = torch.device("cpu")


def test_the_format_and_its_name():
    for name in ("fp8", "fp8-a8", FORMAT):
        assert parse_format(name) == parse_format(name, activations="fp8") == parse_format(name, -1) == FORMAT
    assert FORMAT.name == "fp8-a8" and FORMAT != IntFormat(8, activations="int8")
    for settings in ({"group_size": 128}, {"symmetric": False}, {"activations": "int8"}):
        with pytest.raises(ValueError, match="fp8 weights with .*one scale per channel.*activations='fp8'"):
            parse_format("fp8", **settings)
    for name in ("int8", "int4", IntFormat(8)):
        with pytest.raises(ValueError, match="activations='fp8' with .*: use weights='fp8'"):
            parse_format(name, activations="fp8")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packing(shape):
    q = torch.randint(256, shape, dtype=torch.uint8)
    packed = from_fp8(q.view(FP8))
    assert packed.dtype == torch.int32 and packed.shape == (shape[0], FORMAT.words(shape[1]))
    assert_equal(to_fp8(packed, shape[1]).view(torch.uint8), q)
    weight = QuantizedWeight(packed, torch.rand(shape[0], 1))
    check(weight, FORMAT, shape)
    assert FORMAT.bytes(*shape, 4) == packed.numel() * 4 + shape[0] * 4
    with pytest.raises(ValueError, match="fp8-a8 of"):
        check(weight._replace(packed=packed[:, :0]), FORMAT, shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_is_to_the_nearest(dtype):
    """Against every float8, times the scale; beyond the largest, which the rounding of the scale allows, stays it."""
    w = torch.randn(33, 200).to(dtype) * torch.tensor([[1e-4], [1e-2], [1.0]]).repeat(11, 1).to(dtype)
    weight = quantize(w, FORMAT, "rtn")
    assert weight.scale.dtype == dtype
    numbers = torch.arange(127, dtype=torch.uint8).view(FP8).double()
    got = dequantize(weight, FORMAT, (33, 200), torch.float64)
    grid = numbers[None] * weight.scale.double()
    nearest = (w.double().abs()[..., None] - grid[:, None]).abs().amin(-1)
    assert_close((got - w.double()).abs(), nearest, worst=1e-3, rms=1e-5)
    assert (dequantize(quantize(torch.zeros(4, 64), FORMAT, "rtn"), FORMAT, (4, 64), torch.float32) == 0).all()
    with pytest.raises(ValueError, match="method='hqq' solves for the scales of integers"):
        quantize(w, FORMAT, "hqq")


def test_layouts_hold_what_they_multiply(device):
    operands = 4096, 4096, torch.bfloat16, torch.device(device)
    for layout in LAYOUTS.values():
        assert layout.reasons(FORMAT, *operands)
    for layout in INT8_LAYOUTS.values():
        assert "it multiplies int8, not fp8" in layout.reasons(FORMAT, *operands)
    for layout in FP8_LAYOUTS.values():
        assert "it multiplies fp8, not int8" in layout.reasons(IntFormat(8, activations="int8"), *operands)
        assert "it rounds activations, which int8 leaves as they are" in layout.reasons(IntFormat(8), *operands)


def test_the_report_says_why_nothing_faster_runs(monkeypatch):
    operands = FORMAT, 64, 64, torch.bfloat16
    assert (
        what_runs(*operands, CPU) == "dequantise + matmul, no faster than dense (it runs on a CUDA device, not on cpu)"
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    older = "float8 needs compute capability 8.9 or newer, and this GPU has 8.0"
    assert older in what_runs(*operands, torch.device("cuda"))
    assert layout_for(*operands, torch.device("cuda")).name == "fp8-rest"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    assert what_runs(*operands, torch.device("cuda")) == FP8_LAYOUTS["fp8-cuda"].runs


def test_layer(device):
    linear = torch.nn.Linear(201, 48, dtype=torch.bfloat16, device=device)
    layer = QuantLinear.from_linear(linear, "fp8")
    x = torch.randn(2, 3, 201, dtype=torch.bfloat16, device=device)
    assert_close(layer(x), linear(x).detach().double(), worst=0.25, rms=0.05, dtype=torch.bfloat16)
    assert_close(layer(x), (x @ layer.dequantize().t() + linear.bias).detach().double(), 0.25, 0.05, dtype=x.dtype)
    assert "fp8-a8" in repr(layer) and "fp8" in layer.layout
    again = QuantLinear.empty(201, 48, True, FORMAT, torch.bfloat16, device)
    again.load_state_dict(layer.state_dict())
    assert_equal(again(x), layer(x))
    assert_equal(again.float().bfloat16()(x), layer(x))  # what is cast are the scales, not the floats of 8 bits
    assert_equal(layer.weight_packed, again.weight_packed)


def test_a_layer_passes_on_that_it_is_to_be_batch_invariant(device, monkeypatch):
    layer = QuantLinear.from_linear(torch.nn.Linear(64, 48, device=device), "fp8")
    kind = type(FP8_LAYOUTS[layer.layout])
    asked, multiply = [], kind.multiply

    def seen(self, x, p, bias, N, batch_invariant=False):
        asked.append(batch_invariant)
        return multiply(self, x, p, bias, N)

    monkeypatch.setattr(kind, "multiply", seen)
    for invariant in (False, True):
        layer.batch_invariant = invariant
        with torch.no_grad():
            layer(torch.randn(2, 64, device=device))
    assert asked == [False, True]
