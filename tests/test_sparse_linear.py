"""`SparseLinear` as a module: what it computes, what leaves and enters it, and what it refuses."""

import copy
import pickle
from itertools import product

import pytest
import torch
from close import assert_close, assert_equal
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastllm import SparseLinear
from fastllm.compress.patterns import parse_pattern
from fastllm.compress.sparse_solver import Pruning
from fastllm.nn import QuantLinear, build_layer
from fastllm.nn.linear import move_hook
from fastllm.ops import SPARSE, layouts_of, what_runs
from fastllm.ops.expanded import EXPANDED
from fastllm.sparse_formats import QuantizedWeight, SparseFormat, dequantize_sparse, parse_sparse

IN, OUT = 128, 48
FLOATS = ["16:32", "2:4", "5:32", "32:32"]
INTEGERS = ["16:32-int8", "2:4-int4-g64", "16:32-int4-g128", "2:4-int8-g32"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def make(name: str, dtype: torch.dtype = torch.bfloat16, bias: bool = True, device: str = "cpu") -> SparseLinear:
    torch.manual_seed(3)
    linear = nn.Linear(IN, OUT, bias=bias, dtype=dtype, device=device)
    format = parse_sparse(name)
    if format.values is None:
        return SparseLinear.from_linear(linear, name)
    found = Pruning("magnitude", repair=False).prune(linear.weight.detach().float(), parse_pattern(name), None, None)
    layer = build_layer(found.stored(dtype), (OUT, IN), format, linear.bias)
    assert isinstance(layer, SparseLinear)
    return layer


def x_for(layer: SparseLinear, *shape: int) -> Tensor:
    torch.manual_seed(4)
    return torch.randn(*shape, IN, dtype=layer.weight.dtype, device=layer.weight.device)


def meant(layer: SparseLinear, x: Tensor) -> Tensor:
    y = x.double() @ layer.dequantize(torch.float64).t()
    return y if layer.bias is None else y + layer.bias.double()


@pytest.fixture(params=[*FLOATS[:3], *INTEGERS[:2]])
def layer(request, device):
    return make(request.param, device=device)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FLOATS + INTEGERS)
def test_it_is_the_dense_layer_with_zeros(name, dtype, bias, device):
    layer = make(name, dtype, bias, device)
    rough = {"worst": 5e-2, "rms": 1e-2} if layer.format.values else {}  # products of integers are in bfloat16
    for shape in ((), (1,), (7,), (2, 3), (0,), (2, 0)):
        x = x_for(layer, *shape)
        assert_close(layer(x), meant(layer, x), dtype=dtype, **rough)
    if layer.format.values is None:
        kept = layer.dequantize()
        assert_close(layer(x_for(layer, 5)), nn.functional.linear(x_for(layer, 5).double(), kept.double(),
                     None if layer.bias is None else layer.bias.double()), dtype=dtype)  # fmt: skip
        other = torch.float32 if dtype != torch.float32 else torch.bfloat16
        assert layer(x_for(layer, 5).to(other)).dtype == other


@pytest.mark.parametrize("name", FLOATS)
def test_the_largest_stay_as_they_are(name, device):
    linear = nn.Linear(IN, OUT, dtype=torch.bfloat16, device=device)
    layer = SparseLinear.from_linear(linear, name)
    mask = layer.format.largest(linear.weight.abs())
    assert_equal(layer.dequantize(), linear.weight.detach() * mask)
    given = SparseLinear.from_linear(linear, layer.format, mask.roll(32, 1))
    assert_equal(given.dequantize(), linear.weight.detach() * mask.roll(32, 1))
    assert layer.bias.data_ptr() == linear.bias.data_ptr()
    with torch.no_grad():
        linear.weight.zero_()  # and it is not the same memory
    assert layer.dequantize().any()


def test_conv1d(device):
    conv = Conv1D(OUT, IN).to(device)
    conv.bias.data.normal_()
    layer = SparseLinear.from_linear(conv, "16:32")
    assert layer.transposed and layer.shape == (OUT, IN)
    x = torch.randn(3, IN, device=device)
    conv.weight.data.mul_(layer.format.largest(conv.weight.t().abs()).t())
    assert_close(layer(x), conv(x).detach().double(), dtype=torch.float32)


def test_parameters_are_those_of_the_format(layer):
    names = [n for n, _ in layer.named_parameters()]
    assert sorted(names) == ["bias", "weight_index", "weight_packed", "weight_scale"]
    assert not any(p.requires_grad for p in layer.parameters())
    state, format = layer.state_dict(), layer.format
    assert sorted(state) == sorted(names)
    assert state["weight_index"].shape == (OUT, IN // 32) and state["weight_index"].dtype == torch.int32
    V = format.kept_of(IN)
    assert state["weight_packed"].shape == (OUT, V if format.values is None else V * format.bits // 32)
    size = sum(t.nbytes for name, t in state.items() if name != "bias")
    assert size == format.bytes(OUT, IN)
    rest = QuantizedWeight(state["weight_packed"], state["weight_scale"], None, state["weight_index"])
    assert_equal(dequantize_sparse(rest, format, (OUT, IN), torch.bfloat16), layer.dequantize())


@pytest.mark.parametrize("assign", [False, True])
def test_a_copy_a_pickle_and_a_loaded_layer_are_equal(layer, assign):
    x = x_for(layer, 3)
    want, state = layer(x), {name: t.clone() for name, t in layer.state_dict().items()}
    fresh, given = make(layer.format.name, device=x.device), {name: t.clone() for name, t in state.items()}
    fresh.load_state_dict({name: t.roll(1, 0) for name, t in state.items()})
    fresh.load_state_dict(given, assign=assign)
    for other in (copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer)), fresh):
        assert type(other) is SparseLinear and other.layout == layer.layout and other.format == layer.format
        assert_equal(other(x), want)
        for name, tensor in other.state_dict().items():
            assert_equal(tensor, state[name])
    for name, tensor in given.items():
        assert_equal(tensor, state[name])
    assert_equal(layer(x), want)


def test_moving_and_casting(layer):
    x, state = x_for(layer, 3), layer.state_dict()
    layer.to("cpu").float().to(torch.bfloat16).to(x.device)
    for name, tensor in layer.state_dict().items():
        assert_equal(tensor, state[name])
    half = layer.half()
    assert half.dequantize().dtype == torch.float16 and half(x.half()).dtype == torch.float16
    assert_close(half(x.half()), layer.bfloat16()(x).double(), worst=6e-2, rms=1e-2, dtype=torch.float16)


def test_rest_and_back(layer):
    x = x_for(layer, 3)
    want, layout = layer(x), layer.layout
    layer.to_rest()
    layer.to_rest()
    assert not layer.layout and "not loaded" in repr(layer)
    layer.prepare()
    assert layer.layout == layout
    assert_equal(layer(x), want)


def test_what_it_says_of_itself(layer):
    assert layer.weight.shape == (OUT, IN) and layer.weight.dtype == torch.bfloat16 and layer.weight.isnan().all()
    assert f"in_features={IN}, out_features={OUT}" in repr(layer) and layer.format.name in repr(layer)
    if layer.weight.device.type == "cpu":
        assert layer.is_expanded and "multiplies zeros too" in repr(layer) or "reads zeros too" in repr(layer)
        assert what_runs(layer.format, OUT, IN, torch.bfloat16, torch.device("cpu")) in repr(layer)
        bits = 16 if layer.format.values is None else layer.format.bits
        assert OUT * IN * bits / 8 <= layer.nbytes <= 1.6 * OUT * IN * bits / 8


@pytest.mark.parametrize("name", [*FLOATS[:2], *INTEGERS[:2]])
def test_gradients(name, device):
    """Of x and of what comes before it; the weight does not learn."""
    layer = make(name, torch.float32, device=device)
    x = x_for(layer, 2, 5).requires_grad_()
    grad = torch.randn(2, 5, OUT, device=device)
    layer(x).backward(grad)
    assert_close(x.grad, grad.double() @ layer.dequantize(torch.float64), 2e-2, 4e-3, dtype=torch.float32)
    assert all(p.grad is None for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", [*FLOATS[:2], *INTEGERS])
def test_batch_invariance(name, dtype, device):
    """A row has the same bits alone, in any company, and at any place."""
    layer = make(name, dtype, device=device)
    layer.batch_invariant = True
    x = x_for(layer, 3, 7)
    y = layer(x)
    assert_close(y, meant(layer, x), 5e-2, 1e-2, dtype=dtype)
    for i, j in product(range(3), range(7)):
        assert_equal(layer(x[i, j]), y[i, j])
    assert_equal(layer(x[1:, 2:5]), y[1:, 2:5])


@pytest.mark.parametrize("name", ["16:32", "2:4-int8"])
def test_compiled_without_a_break(name):
    layer = make(name, torch.float32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for rows in (1, 5):
        x = x_for(layer, rows)
        assert_close(compiled(x), layer(x).double(), 1e-2, 2e-3, dtype=torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", FLOATS + INTEGERS)
def test_compiled_by_inductor(name):
    for dtype in (torch.bfloat16, torch.float32):
        torch._dynamo.reset()  # each of them compiles the same code again
        layer = make(name, dtype)
        compiled = torch.compile(layer, fullgraph=True)
        assert_close(compiled(x_for(layer, 2, 3)), layer(x_for(layer, 2, 3)).double(), 3e-2, 5e-3, dtype=dtype)


def test_a_hook_of_accelerate_goes_along(layer):
    hooks = pytest.importorskip("accelerate.hooks")
    want = layer(x_for(layer, 3))
    move_hook(hooks.AlignDevicesHook(layer.weight.device), layer)
    assert_equal(layer(x_for(layer, 3)), want)


@pytest.mark.parametrize("width", [127, 64, 129, 0])
def test_what_x_must_be(layer, width):
    with pytest.raises(ValueError, match=rf"\[\.\.\., 128\], got torch.bfloat16 \[3, {width}\]"):
        layer(torch.randn(3, width, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="must be floating point .* got torch.int64"):
        layer(torch.ones(3, IN, dtype=torch.long))


def test_what_a_layer_is_not_made_of():
    linear = nn.Linear(IN, OUT)
    for given, message in (
        (("16:32-int8",), "16:32-int8: fastllm.sparsify rounds values to integers; from_linear leaves them"),
        (("4:8",), "unknown pattern '4:8'"),
        (("2:4", torch.ones(OUT, IN, dtype=torch.bool)), "stretches of 4 columns do not keep exactly 2"),
    ):
        with pytest.raises(ValueError, match=message):
            SparseLinear.from_linear(linear, *given)
    with pytest.raises(ValueError, match="40 .* 32|32 .* 40|K=40 is not a multiple of 32"):
        SparseLinear.from_linear(nn.Linear(40, 8), "2:4")
    linear.weight.data[3, 4] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        SparseLinear.from_linear(linear, "2:4")
    with pytest.raises(NotImplementedError, match="from_linear, or fastllm.load"):
        SparseLinear.empty(IN, OUT, False, SparseFormat())
    good = make("16:32").at_rest()
    with pytest.raises(ValueError, match=r"weight_packed: 8:32 of \[48, 128\] needs \[48, 32\], got \[48, 64\]"):
        SparseLinear(good, (OUT, IN), parse_sparse("8:32"))


@pytest.mark.parametrize("shape, dtype", [((OUT, 64), bool), ((OUT - 1, IN), bool), ((OUT, IN), torch.float32)])
def test_masks_that_are_none(shape, dtype):
    mask = torch.tensor([0, 1]).repeat(shape[0], shape[1] // 2).to(torch.bool if dtype is bool else dtype)
    with pytest.raises(ValueError, match="mask"):
        SparseLinear.from_linear(nn.Linear(IN, OUT), "16:32", mask)


@pytest.mark.parametrize("into, given", [("16:32", "2:4"), ("2:4", "16:32")])
def test_a_state_dict_of_another_pattern_is_refused(into, given):
    with pytest.raises((ValueError, RuntimeError), match=f"index.*none of {into}"):
        make(into).load_state_dict(make(given).state_dict())


def test_layouts_agree_and_come_back(device):
    """Every layout that can hold a weight gives it back to the bit, and rows of it."""
    for name, dtype in product([*FLOATS, *INTEGERS], DTYPES):
        layer = make(name, dtype)
        rest, format, shape = layer.at_rest(), layer.format, (OUT, IN)
        assert layouts_of(format) is SPARSE
        cpu = torch.device("cpu")
        able = [layout for layout in EXPANDED.values() if not layout.reasons(format, *shape, dtype, cpu)]
        assert able and all(("expanded" == layout.name) == (format.values is None) for layout in able)
        for layout in able:
            packed = layout.pack(QuantizedWeight(*(None if t is None else t.clone() for t in rest)), format, shape)
            back = layout.rest(packed, format, shape)
            assert_equal(back.packed, rest.packed)
            assert_equal(back.index, rest.index)
            if not packed.w.is_mkldnn:
                dense = layout.dense(packed, format.bits, format.group_of(IN), slice(0, OUT), IN, torch.float32)
                assert_close(dense, layer.dequantize(torch.float32), 2e-2, 4e-3)


def test_layers_of_each_kind_are_built():
    layer = make("16:32")
    assert type(build_layer(layer.at_rest(), (OUT, IN), layer.format)) is SparseLinear
    quantized = QuantLinear.from_linear(nn.Linear(IN, OUT), "int8")
    assert type(build_layer(quantized.at_rest(), (OUT, IN), quantized.format)) is QuantLinear
