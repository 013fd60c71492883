"""AWQ and SmoothQuant: scales move between layers without changing the model, and rounding then costs less."""

import copy

import pytest
import torch
from test_gptq_solver import error, statistics
from torch import nn
from trained import WINDOW, calibration, linears, observed, outliers, trained

from fastllm.compress import awq
from fastllm.compress.blocks import Blocks
from fastllm.compress.calibrate import find_groups
from fastllm.compress.fold import find_folds, take_back
from fastllm.compress.samples import batches
from fastllm.compress.solvers import AWQ, SmoothQuant
from fastllm.formats import IntFormat, parse_format
from fastllm.nn import QuantLinear
from fastllm.quantizers import quantize


@pytest.mark.parametrize("name", ["int4-g64", "int4-g64-asym", "int4-g128"])
def test_awq_halves_the_error_of_outliers(name):
    (w, x), format = outliers(), parse_format(name)
    seen = statistics(x)
    scale = AWQ().scale([w], [format], seen)
    plain = error(w, quantize(w, format, "rtn"), format, seen.hessian)
    seen.divide(scale)
    scaled = error(w * scale, AWQ().solve([w * scale], [format], seen)[0], format, seen.hessian)
    assert scaled <= 0.5 * plain


def test_awq_is_never_worse_than_rounding():
    format = IntFormat(4, 64)
    for w, seen in list(observed().values())[::3]:
        seen = copy.deepcopy(seen)
        plain = error(w, quantize(w, format, "hqq"), format, seen.hessian)
        scale = awq.search([w], [format], seen.mean, seen.hessian)
        seen.divide(scale)
        scaled = error(w * scale, quantize(w * scale, format, "hqq"), format, seen.hessian)
        cut = awq.clip(w * scale, format, seen.hessian)
        clipped = error(w * scale, quantize(cut, format, "hqq"), format, seen.hessian)
        assert scaled <= 1.0001 * plain and clipped <= 1.02 * scaled


def test_smoothquant_takes_outliers_out_of_the_inputs():
    w, x = outliers()
    format, seen = parse_format("int8-a8"), statistics(x)
    want = x @ w.t()

    def lost(w, x):
        layer = QuantLinear(quantize(w, format, "rtn"), tuple(w.shape), format)
        return float((layer(x) - want).square().sum() / want.square().sum())

    scale = SmoothQuant(0.5).scale([w], [format], seen)
    assert lost(w * scale, x / scale) <= 0.3 * lost(w, x)


def with_offset(model):
    """Norms of Gemma's kind: one more than their weight is what they multiply by."""

    class Norm(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.weight, self.eps = nn.Parameter(norm.weight.detach() - 1), norm.variance_epsilon

        def forward(self, x):
            return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * (1 + self.weight)

    for layer in model.model.layers:
        layer.input_layernorm = Norm(layer.input_layernorm)
        layer.post_attention_layernorm = Norm(layer.post_attention_layernorm)
    return model


@pytest.mark.parametrize("change", [lambda model: model, with_offset], ids=["plain", "offset"])
def test_scales_move_without_changing_the_model(change):
    model = change(trained())
    ids = calibration(2).view(2, WINDOW)
    with torch.no_grad():
        want = model(ids).logits
    layers = linears(model, "int4-g64")
    blocks = Blocks(model, batches(ids, None, 256, 2, WINDOW))
    for index in range(len(blocks)):
        mine = {name: layer for name, layer in layers.items() if name.startswith(blocks.name(index) + ".")}
        groups = find_groups(blocks, index, mine)
        folds = find_folds(blocks, index, mine, groups)
        assert [len(group.names) for group in groups] == [3, 1, 2, 1]
        assert set(folds) == {group.names for group in groups}  # o_proj as well: heads are not shared
        assert {fold.offset for fold in folds.values() if not fold.rows} == {1.0 if change is with_offset else 0.0}
        torch.manual_seed(index)
        kept = {name: p.detach().clone() for name, p in model.named_parameters()}
        changes = []
        for fold in folds.values():
            scale = torch.rand(fold.layers[0].in_features) * 3 + 0.3
            reached, made = fold.apply(scale)
            torch.testing.assert_close(reached, scale, rtol=1e-3, atol=0)
            changes += made
        with torch.no_grad():
            assert (model(ids).logits - want).abs().max() < 1e-3
        assert any(not torch.equal(p, kept[name]) for name, p in model.named_parameters())
        if index % 2:  # the others stay
            take_back(changes)
            assert all(torch.equal(p, kept[name]) for name, p in model.named_parameters())


def test_what_others_read_too_is_left_alone():
    """A norm whose output has another reader, and a projection that is rotated on its way, take no scale."""
    model = trained()
    block = model.model.layers[0]
    gate = block.mlp.gate_proj

    class Other(nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.mlp = mlp

        def forward(self, x):
            return self.mlp(x) + 0.5 * x

    block.mlp = Other(block.mlp)
    layers = {name: layer for name, layer in linears(model, "int4-g64").items() if name.startswith("model.layers.0.")}
    blocks = Blocks(model, batches(calibration(1), None, 256, 1, WINDOW))
    groups = find_groups(blocks, 0, layers)
    folds = find_folds(blocks, 0, layers, groups)
    names = {name.rpartition(".")[2] for found in folds for name in found}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "down_proj"}
    assert gate.weight is block.mlp.mlp.gate_proj.weight or torch.equal(gate.weight, block.mlp.mlp.gate_proj.weight)
