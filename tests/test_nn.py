"""`QuantLinear` and `QuantExperts` as modules: what leaves and enters them, and what they refuse."""

import copy
import pickle
import time

import pytest
import torch
from close import assert_close, assert_equal
from torch import nn
from transformers.pytorch_utils import Conv1D

from fastllm import QuantExperts, QuantLinear
from fastllm.formats import FORMATS, QuantizedWeight, parse_format
from fastllm.nn.experts import agrees, is_experts
from fastllm.quantizers import QUANTIZERS, quantize

FORMATS_HERE = ["int4-g32", "int4-g64-asym", "int8", "int8-g64"]


@pytest.fixture(params=FORMATS_HERE)
def layer(request, device):
    return QuantLinear.from_linear(nn.Linear(200, 48, dtype=torch.bfloat16, device=device), request.param)


def x_for(layer, *shape):
    return torch.randn(*shape, layer.in_features, dtype=layer.weight.dtype, device=layer.weight.device)


def test_forward(layer):
    x = x_for(layer, 2, 3)
    want = x.double() @ layer.dequantize(torch.float64).t() + layer.bias.double()
    assert_close(layer(x), want, worst=4e-2, rms=6e-3, dtype=torch.bfloat16)


def test_parameters_are_those_of_the_public_format(layer):
    names = [n for n, _ in layer.named_parameters()]
    zeros = [] if layer.format.symmetric else ["weight_zero_point"]
    assert names == ["weight_scale", "weight_packed", *zeros, "bias"]
    assert not any(p.requires_grad for p in layer.parameters())
    state = layer.state_dict()
    assert list(state) == names
    assert (
        state["weight_packed"].shape == (48, layer.format.words(200)) and state["weight_packed"].dtype == torch.int32
    )


def test_a_copy_a_pickle_and_a_loaded_layer_are_equal(layer):
    x = x_for(layer, 3)
    want, state = layer(x), layer.state_dict()
    fresh = QuantLinear.empty(200, 48, True, layer.format, torch.bfloat16, layer.weight.device)
    fresh.load_state_dict(state)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh):
        assert other.layout == layer.layout
        assert_equal(other(x), want)
        for name, tensor in other.state_dict().items():
            assert_equal(tensor, state[name])
    assert_equal(layer(x), want)


def test_moving_and_casting(layer):
    x = x_for(layer, 3)
    state = layer.state_dict()
    layer.to("cpu").float().to(torch.bfloat16)
    for name, tensor in layer.state_dict().items():
        assert_equal(tensor, state[name])
    half = layer.half()
    assert half(x.half()).dtype == torch.float16
    assert_close(half(x.half()), layer.bfloat16()(x).double(), worst=6e-2, rms=1e-2, dtype=torch.float16)


def test_rest_and_back(layer):
    x = x_for(layer, 3)
    want, layout = layer(x), layer.layout
    layer.to_rest()
    layer.to_rest()
    assert not layer.layout
    layer.prepare()
    layer.prepare()
    assert layer.layout == layout
    assert_equal(layer(x), want)


def test_weight_tells_shape_and_nothing_else(layer):
    assert layer.weight.shape == (48, 200) and layer.weight.dtype == torch.bfloat16
    assert layer.weight.isnan().all() and layer.weight.untyped_storage().nbytes() <= 4
    assert "int" in repr(layer) and "in_features=200, out_features=48" in repr(layer)


def test_one_copy_of_the_weight(device):
    linear = nn.Linear(1024, 512, bias=False, dtype=torch.bfloat16, device=device)
    for format in ("int4-g128", "int8"):
        layer = QuantLinear.from_linear(linear, format, method="rtn")
        format = parse_format(format)
        tensors = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in (*layer.parameters(), *layer.buffers())
        }
        scales = 512 * format.groups(1024) * 2
        assert sum(tensors.values()) <= format.bytes(512, 1024) + 3 * scales
        assert layer.nbytes <= format.bytes(512, 1024) + 2 * scales


def test_conv1d(device):
    conv = Conv1D(48, 200).to(device)
    layer = QuantLinear.from_linear(conv, "int8")
    x = torch.randn(3, 200, device=device)
    assert layer.shape == (48, 200)
    assert_close(layer(x), conv(x).detach(), worst=6e-2, rms=2e-2)


def test_adapters_train_on_top(layer):
    down = torch.randn(4, 200, dtype=torch.bfloat16, device=layer.weight.device, requires_grad=True)
    x = x_for(layer, 5) @ down.t() @ down
    layer(x).sum().backward()
    assert down.grad.isfinite().all() and down.grad.abs().sum() > 0


def test_meta_and_mismatch():
    format = FORMATS["int4-g32"]
    layer = QuantLinear.empty(64, 32, False, format)
    assert layer.weight_packed.is_meta and not layer.layout
    layer.prepare()
    assert not layer.layout and "not loaded" in repr(layer)
    good = QuantLinear.from_linear(nn.Linear(64, 32, bias=False), format).state_dict()
    with pytest.raises(RuntimeError, match="size mismatch for weight_scale"):
        QuantLinear.empty(128, 32, False, format, device="cpu").load_state_dict(good)
    with pytest.raises(ValueError, match=r"weight_packed has shape \[32, 8\], but int4-g32 of \[32, 128\] needs"):
        QuantLinear(QuantizedWeight(good["weight_packed"], good["weight_scale"]), (32, 128), format)


class Experts(nn.Module):
    """Fused experts as transformers v5 declares them; `skew` makes it compute something else."""

    def __init__(self, transposed=False, bias=False, gate=True, skew=0.0):
        super().__init__()
        E, H, inner = 4, 64, 96
        wide = 2 * inner if gate else inner
        shapes = [(E, H, wide), (E, inner, H)] if transposed else [(E, wide, H), (E, H, inner)]
        up = "gate_up_proj" if gate else "up_proj"
        self.register_parameter(up, nn.Parameter(torch.randn(shapes[0]) / 8))
        self.down_proj = nn.Parameter(torch.randn(shapes[1]) / 8)
        if bias:
            self.register_parameter(up + "_bias", nn.Parameter(torch.randn(E, wide)))
            self.down_proj_bias = nn.Parameter(torch.randn(E, H))
        self.has_gate, self.has_bias, self.is_transposed, self.up, self.skew = gate, bias, transposed, up, skew
        self.act_fn = nn.SiLU()

    def _apply_gate(self, x):
        gate, up = x.chunk(2, -1)
        return self.act_fn(gate) * up

    def forward(self, hidden, index, weights):
        out = torch.zeros_like(hidden)
        for t in range(len(hidden)):
            for k, e in enumerate(index[t].tolist()):
                up, down = getattr(self, self.up)[e], self.down_proj[e]
                y = hidden[t] @ (up if self.is_transposed else up.t())
                y = y + getattr(self, self.up + "_bias")[e] if self.has_bias else y
                y = self._apply_gate(y) if self.has_gate else self.act_fn(y)
                y = y @ (down if self.is_transposed else down.t())
                y = y + self.down_proj_bias[e] if self.has_bias else y
                out[t] += (weights[t, k] + self.skew) * y
        return out


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gate", [False, True])
def test_experts(transposed, bias, gate, device):
    experts = Experts(transposed, bias, gate)
    assert is_experts(experts) and agrees(experts)
    quantized = QuantExperts.from_experts(experts, FORMATS["int8"])
    # the definition, over the weights as they read back
    for which, name in (("up", experts.up), ("down", "down_proj")):
        dense = torch.stack([layer.dequantize() for layer in getattr(quantized, which)])
        getattr(experts, name).data = dense.transpose(1, 2) if transposed else dense
    hidden, weights = torch.randn(6, 64), torch.rand(6, 2)
    index = torch.stack([torch.randperm(4)[:2] for _ in range(6)])
    got = quantized(hidden, index, weights)
    assert_close(got, experts(hidden, index, weights).detach().double(), worst=5e-2, rms=8e-3, dtype=torch.float32)
    assert not any(p.ndim == 3 for p in quantized.parameters())


def test_experts_that_do_something_else_are_refused():
    assert not agrees(Experts(skew=0.2))
    with pytest.raises(ValueError, match="Experts does not compute the sum of its experts"):
        QuantExperts.from_experts(Experts(skew=0.2), FORMATS["int8"])
    assert not is_experts(nn.Linear(4, 4))


@pytest.mark.parametrize("format", ["int4", "int8", "int8-g64", "int4-g32-asym"])
def test_what_x_must_be(format):
    layer = QuantLinear.from_linear(nn.Linear(128, 64, dtype=torch.bfloat16), format)
    for width in (127, 64, 129, 256, 0):
        with pytest.raises(ValueError, match=rf"\[\.\.\., 128\], got torch.bfloat16 \[3, {width}\]"):
            layer(torch.randn(3, width, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="must be floating point .* got torch.int64"):
        layer(torch.ones(3, 128, dtype=torch.long))


@pytest.mark.parametrize("method", QUANTIZERS)
@pytest.mark.parametrize("format", FORMATS_HERE)
def test_layers_take_either_method(format, method):
    linear = nn.Linear(128, 64, dtype=torch.bfloat16)
    layer = QuantLinear.from_linear(linear, format, method, group_size=32)
    assert layer.format.group == 32
    want = quantize(linear.weight.detach(), layer.format, method)
    for got, expected in zip(layer.at_rest(), want, strict=True):
        assert (got is None) == (expected is None)
        if expected is not None:
            assert_equal(got, expected)


def test_little_is_added_to_a_call(device):
    """A small layer's call costs at most 10 us more than nn.Linear's; the best of interleaved rounds is compared."""
    linear = nn.Linear(64, 64, dtype=torch.bfloat16, device=device)
    layer, x = QuantLinear.from_linear(linear, "int4-g32"), torch.randn(1, 64, dtype=torch.bfloat16, device=device)

    def seconds(module, calls=300):
        start = time.perf_counter()
        for _ in range(calls):
            module(x)
        return (time.perf_counter() - start) / calls

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            rounds = [(seconds(layer), seconds(linear)) for _ in range(30)]
    finally:
        torch.set_num_threads(threads)
    ours, theirs = (min(column) for column in zip(*rounds, strict=True))
    assert ours - theirs <= 10e-6, f"{ours * 1e6:.1f} us against {theirs * 1e6:.1f} us"
