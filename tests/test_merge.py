"""Layers merged into one product: the same bits, one copy of the weights, and no weight that is out of date."""

import copy
import pickle

import pytest
import torch
from close import assert_equal
from torch import nn

from fastllm import FORMATS, QuantLinear
from fastllm.nn.merge import Merged, why_not
from fastllm.ops import layouts_of
from fastllm.patch.report import memory

WIDTHS = (128, 64, 64)
K = 256


class Owner(nn.Module):
    """Layers beside each other. Whole numbers, so that sums are exact in any order."""

    def __init__(self, format=None, dtype=torch.float32, widths=WIDTHS, bias=False, K=K):
        super().__init__()
        torch.manual_seed(0)
        for name, N in zip("abc", widths, strict=False):
            linear = nn.Linear(K, N, bias=bias, dtype=dtype)
            with torch.no_grad():
                for p in linear.parameters():
                    p.copy_(torch.randint(-7, 8, p.shape))
            self.add_module(name, linear if format is None else QuantLinear.from_linear(linear, format, "rtn"))

    def each(self, x):
        return torch.cat([layer(x) for layer in self.children()], -1)


def x(dtype=torch.float32, rows=3, K=K):
    return torch.randint(-4, 5, (2, rows, K), generator=torch.Generator().manual_seed(3)).to(dtype)


def product(merged, x):
    with torch.no_grad():
        assert merged.is_current()
        return merged(x)


def storages(owner):
    return {t.untyped_storage().data_ptr() for t in owner.parameters()}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dense_products_are_those_of_the_layers(dtype, bias):
    owner = Owner(dtype=dtype, bias=bias)
    want = owner.each(x(dtype))
    values = {name: t.clone() for name, t in owner.state_dict().items()}
    merged = Merged(owner, ("a", "b", "c"))
    assert_equal(product(merged, x(dtype)), want)
    assert_equal(owner.each(x(dtype)), want)
    assert len(storages(owner)) == 1 + bias
    assert list(owner.state_dict()) == list(values)
    for name, t in owner.state_dict().items():
        assert_equal(t, values[name])


MERGEABLE = [
    (format, dtype)
    for format in FORMATS
    for dtype in (torch.bfloat16, torch.float32)
    if not why_not(list(Owner(format, dtype).children()))
]


def test_most_formats_can_be_merged():
    names = {format for format, _ in MERGEABLE}
    assert {"int4-g128", "int4-g32", "int8", "int8-g32", "fp8-a8"} <= names
    used = {Owner(format, dtype).a.layout for format, dtype in MERGEABLE}
    assert len(used) >= 3, used


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("format, dtype", MERGEABLE, ids=str)
def test_packed_products_are_those_of_the_layers(format, dtype, bias):
    owner = Owner(format, dtype, bias=bias)
    values = {name: t.clone() for name, t in owner.state_dict().items()}
    bytes_before = memory(owner)
    for rows in (1, 20):
        want = owner.each(x(dtype, rows))
        merged = Merged(owner, ("a", "b", "c"))
        assert_equal(product(merged, x(dtype, rows)), want)
        assert_equal(owner.each(x(dtype, rows)), want)
    assert memory(owner) <= 1.005 * bytes_before  # zero points of 8 bits are read at rest, and copied
    whole = merged.whole.w
    for layer in owner.children():
        if not whole.is_mkldnn:
            start = layer.weight_packed.data_ptr() - whole.data_ptr()
            assert 0 <= start < whole.nbytes and layer.weight_packed.untyped_storage().nbytes() == whole.nbytes
    for name, t in owner.state_dict().items():
        assert_equal(t, values[name])
        assert t.is_mkldnn or t.untyped_storage().nbytes() == t.nbytes, "files cannot hold shared memory"
    merged.undo()
    for p in owner.parameters():
        assert p.is_mkldnn or p.untyped_storage().nbytes() == p.nbytes
    assert_equal(owner.each(x(dtype, rows)), want)


@pytest.mark.parametrize("format", [None, "int4-g32", "int8"])
def test_undoing_gives_memory_back(format):
    owner = Owner(format, torch.bfloat16, bias=True)
    want = owner.each(x(torch.bfloat16))
    merged = Merged(owner, ("a", "b"))
    merged.undo()
    assert len({t.untyped_storage().data_ptr() for t in owner.parameters()}) == len(list(owner.parameters()))
    for t in (*owner.parameters(), *owner.buffers()):
        assert t.is_mkldnn or t.untyped_storage().nbytes() == t.nbytes
    assert_equal(owner.each(x(torch.bfloat16)), want)


def with_hook(owner):
    owner.b.register_forward_hook(lambda *_: None)


def with_forward(owner):
    owner.b.forward = owner.b.forward


def with_bias(owner):
    owner.b.bias = nn.Parameter(torch.zeros(64))


def in_half(owner):
    owner.b.half()


def packed(owner):
    owner.b = QuantLinear.from_linear(owner.b, "int8")


def wider(owner):
    owner.b = nn.Linear(32, 64, bias=False)


def of_another_class(owner):
    owner.b.__class__ = type("Adapted", (nn.Linear,), {})


def shared(owner):
    owner.b.weight = owner.c.weight


@pytest.mark.parametrize(
    "change, reason",
    [
        (with_hook, "one has hooks"),
        (with_forward, "another library has replaced its forward"),
        (with_bias, "some have a bias"),
        (in_half, "weights are of different types"),
        (packed, "different kinds"),
        (wider, "inputs of different widths"),
        (of_another_class, "different kinds"),
        (shared, "they share a weight"),
    ],
)
def test_why_layers_are_not_merged(change, reason):
    owner = Owner()
    change(owner)
    with pytest.raises(ValueError, match=f"a, b, c cannot be merged: .*{reason}"):
        Merged(owner, ("a", "b", "c"))


def test_why_packed_layers_are_not_merged():
    owner = Owner("int8", torch.bfloat16)
    owner.b = QuantLinear.from_linear(nn.Linear(K, 64, bias=False, dtype=torch.bfloat16), "int4")
    with pytest.raises(ValueError, match="their formats or layouts differ"):
        Merged(owner, ("a", "b"))
    with pytest.raises(ValueError, match="their formats or layouts differ, or cannot lie in one tensor"):
        Merged(Owner("int4", torch.bfloat16, widths=(60, 60)), ("a", "b"))


def double_in_place(owner):
    with torch.no_grad():
        owner.b.weight.mul_(2)


def double_data(owner):
    owner.b.weight.data = owner.b.weight.data * 2


def new_parameter(owner):
    owner.b.weight = nn.Parameter(owner.b.weight.detach() * 2)


def new_bias(owner):
    owner.b.bias = nn.Parameter(owner.b.bias.detach() * 2)


def bias_data(owner):
    owner.b.bias.data = owner.b.bias.data * 2


def loaded(owner):
    owner.load_state_dict({name: 2 * t for name, t in owner.state_dict().items()})


def assigned(owner):
    owner.load_state_dict({name: 2 * t for name, t in owner.state_dict().items()}, assign=True)


@pytest.mark.parametrize(
    "change", [double_in_place, double_data, new_parameter, new_bias, bias_data, loaded, assigned]
)
def test_no_dense_weight_is_out_of_date(change):
    owner = Owner(bias=True)
    merged = Merged(owner, ("a", "b", "c"))
    before = product(merged, x())
    change(owner)
    want = owner.each(x())
    assert not torch.equal(before, want)
    assert_equal(product(merged, x()), want)
    assert len(storages(owner)) == 2


@pytest.mark.parametrize("format", ["int4-g32", "int8", "int8-asym", "fp8-a8"])
@pytest.mark.parametrize("assign", [False, True])
def test_no_packed_weight_is_out_of_date(format, assign):
    owner = Owner(format, torch.bfloat16, bias=True)
    merged = Merged(owner, ("a", "b", "c"))
    product(merged, x(torch.bfloat16))
    other = Owner(format, torch.bfloat16, bias=True)
    for name in "abc":
        linear = nn.Linear(K, other.get_submodule(name).out_features, dtype=torch.bfloat16)
        other.set_submodule(name, QuantLinear.from_linear(linear, format))
    owner.load_state_dict(other.state_dict(), assign=assign)
    assert_equal(product(merged, x(torch.bfloat16)), other.each(x(torch.bfloat16)))
    owner.b.bias = nn.Parameter(owner.b.bias.detach() + 5, requires_grad=False)
    assert_equal(product(merged, x(torch.bfloat16)), owner.each(x(torch.bfloat16)))
    owner.a.weight_packed = nn.Parameter(owner.a.weight_packed.detach().flip(0), requires_grad=False)
    assert_equal(product(merged, x(torch.bfloat16)), owner.each(x(torch.bfloat16)))
    owner.float()
    if merged.is_current():  # the layout for the other type may be one that cannot be merged
        assert_equal(product(merged, x()), owner.each(x()))
    owner.bfloat16()
    assert_equal(product(merged, x(torch.bfloat16)), owner.each(x(torch.bfloat16)))


def test_a_layout_that_cannot_be_merged_is_not():
    owner = Owner("int8", torch.bfloat16)
    merged = Merged(owner, ("a", "b", "c"))
    assert merged.is_current()
    owner.b.to(torch.float16)
    assert not merged.is_current()
    owner.b.to(torch.bfloat16)
    assert merged.is_current()


@pytest.mark.parametrize("format", [None, "int8"])
def test_copies_are_on_their_own(format):
    dtype = torch.bfloat16
    owner = Owner(format, dtype)
    owner.merged = Merged(owner, ("a", "b", "c"))
    want = product(owner.merged, x(dtype))
    for twin in (copy.deepcopy(owner), pickle.loads(pickle.dumps(owner))):
        assert twin.merged.owner is twin and twin.merged.layers[0] is twin.a and twin.merged.whole is None
        assert_equal(product(twin.merged, x(dtype)), want)
        assert not storages(twin) & storages(owner)
        twin.a.load_state_dict({n: torch.zeros_like(t) for n, t in twin.a.state_dict().items()})
        assert_equal(product(owner.merged, x(dtype)), want)
        assert not product(twin.merged, x(dtype))[..., : WIDTHS[0]].any()


def test_what_is_merged_in_inference_mode_can_learn_later():
    owner = Owner()
    merged = Merged(owner, ("a", "b"))
    owner.double()
    with torch.inference_mode():
        assert merged.is_current()
        merged(x(torch.float64))
    owner.each(x(torch.float64)).sum().backward()
    assert owner.a.weight.grad is not None and not merged.is_current()  # it learns
    owner.requires_grad_(False)
    assert merged.is_current()


def test_layouts_say_whether_they_can_be_merged():
    for format in (FORMATS[name] for name in FORMATS):
        for name, layout in layouts_of(format).items():
            assert layout.stacks >= 0 and layout.scale_rows in (0, 1), name
