"""AWQ and SmoothQuant: scales move between layers without changing the model, and rounding then costs less."""

import copy

import pytest
import tiny
import torch
from test_gptq_solver import error, statistics
from torch import nn
from trained import WINDOW, calibration, linears, observed, outliers, trained

from fastllm.compress import awq
from fastllm.compress import fold as fold_module
from fastllm.compress.blocks import Blocks
from fastllm.compress.calibrate import find_groups
from fastllm.compress.fold import Fold, find_folds, take_back
from fastllm.compress.samples import batches
from fastllm.compress.solvers import AWQ
from fastllm.formats import IntFormat, parse_format
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


def test_awq_gives_shared_channels_one_scale():
    (w, x), format = outliers(), parse_format("int4-g64")
    seen = statistics(x)
    fold = Fold(nn.Linear(8, 128), [nn.Linear(256, 8)], True, repeats=2, head=32)
    scale = AWQ().scale([w], [format], seen, fold.share).view(4, 2, 32)
    assert torch.equal(scale[:, 0], scale[:, 1]) and scale[0, 0].unique().numel() > 16
    torch.testing.assert_close(fold.share(scale.flatten()), scale.flatten(), rtol=1e-6, atol=0)


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


def folds_of(model, index=0):
    ids = calibration(2).view(2, WINDOW)
    blocks = Blocks(model, batches(ids, None, 256, 2, WINDOW))
    layers = {
        name: layer for name, layer in linears(model, "int4-g64").items() if name.startswith(blocks.name(index) + ".")
    }
    return find_folds(blocks, index, layers, find_groups(blocks, index, layers))


def test_of_two_offsets_the_closer_one_is_taken():
    """Weights of hundreds: that one is added to them changes the answer by less than may be put down to rounding."""
    model = with_offset(trained())
    for layer in model.model.layers:
        for norm, readers in (
            (layer.input_layernorm, [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]),
            (layer.post_attention_layernorm, [layer.mlp.gate_proj, layer.mlp.up_proj]),
        ):
            norm.weight.data = (norm.weight.data + 1) * 500 - 1
            for reader in readers:
                reader.weight.data /= 500
    found = folds_of(model, 1)
    assert [fold.offset for fold in found.values() if not fold.rows] == [1.0, 1.0]


def test_what_roundings_do_is_told_from_what_a_wrong_fold_does(monkeypatch):
    """Where roundings alone change the answer by more than is taken for close: bfloat16, and nothing taken for it."""
    monkeypatch.setattr(fold_module, "CLOSE", 1e-6)
    model = with_offset(trained(torch.bfloat16))
    found = folds_of(model)
    assert len(found) == 4 and [fold.offset for fold in found.values() if not fold.rows] == [1.0, 1.0]
    attention = model.model.layers[0].self_attn
    attention.register_forward_hook(lambda module, args, kwargs, out: (
        out[0] + 0.2 * kwargs["hidden_states"], *out[1:]
    ), with_kwargs=True)  # fmt: skip
    assert {name[0].rpartition(".")[2] for name in folds_of(model)} == {"o_proj", "gate_proj", "down_proj"}


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_a_scale_that_heads_share_moves_into_the_values(family):
    """Exactly, biases of the values included; and a scale that differs between the heads is made one that does not."""
    model = tiny.build(family, dtype=torch.float32)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p, std=0.5)
    ids = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = model(ids).logits
    blocks = Blocks(model, batches(ids, None, 64, 2, 24))
    layers = {
        name: layer for name, layer in linears(model, "int4-g64").items() if name.startswith(blocks.name(1) + ".")
    }
    groups = find_groups(blocks, 1, layers)
    folds = find_folds(blocks, 1, layers, groups)
    name = f"{blocks.name(1)}.self_attn.o_proj"
    fold = folds[(name,)]
    assert len(folds) == 4 and fold.producer is model.get_submodule(name.replace("o_proj", "v_proj"))
    assert (fold.repeats, fold.head) == (2, 32)
    scale = torch.rand(128, generator=torch.Generator().manual_seed(2)) * 3 + 0.3
    weight = fold.producer.weight.detach().clone()
    reached, changes = fold.apply(scale)
    assert torch.equal(reached, fold.share(scale))
    heads = reached.view(2, 2, 32)
    assert torch.equal(heads[:, 0], heads[:, 1]) and not torch.equal(heads[0], heads[1])
    torch.testing.assert_close(heads[:, 0], scale.view(2, 2, 32).mean(1))
    torch.testing.assert_close(fold.producer.weight.detach() * heads[:, 0].reshape(-1, 1), weight)
    with torch.no_grad():
        assert (model(ids).logits - want).abs().max() < 1e-4 * want.abs().max()
    take_back(changes)
    assert torch.equal(fold.producer.weight, weight)


def test_heads_in_another_order_take_no_scale():
    """The values' heads come in turns here, not each as often as it is shared before the next: nothing is claimed."""
    model = tiny.build("llama", dtype=torch.float32)
    attention = model.model.layers[0].self_attn
    order = torch.arange(128).view(2, 2, 32).transpose(0, 1).reshape(-1)

    class Turned(nn.Linear):
        def forward(self, x):
            return super().forward(x[..., order])

    turned = Turned(128, 128, bias=False)
    turned.weight = attention.o_proj.weight
    attention.o_proj = turned
    layers = {name: layer for name, layer in linears(model, "int4-g64").items() if name.startswith("model.layers.0.")}
    blocks = Blocks(model, batches(torch.arange(48).view(2, 24), None, 64, 2, 24))
    folds = find_folds(blocks, 0, layers, find_groups(blocks, 0, layers))
    assert len(folds) == 3 and ("model.layers.0.self_attn.o_proj",) not in folds


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
