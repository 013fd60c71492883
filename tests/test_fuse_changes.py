"""Fused modules keep out of the way of whoever watches, trains, changes, moves or compiles what they stand in for."""

import copy

import pytest
import torch
from close import assert_close, assert_equal
from families import build, ids, rough
from pairs import OPTIONS, answer, counts, fused, made, mask, same
from torch import nn

import fastllm

FEW = ["llama", "qwen3", "gemma3", "gpt-oss"]
INSIDE = {
    "": "whole",
    ".self_attn": "attention",
    ".mlp": "mlp",
    ".input_layernorm": "norm",
    ".post_attention_layernorm": "norm",
    ".self_attn.q_proj": "projection",
    ".self_attn.v_proj": "projection",
    ".self_attn.o_proj": "output",
    ".self_attn.q_norm": "head norm",
    ".self_attn.k_norm": "head norm",
    ".mlp.gate_proj": "projection",
    ".mlp.act_fn": "activation",
    ".mlp.down_proj": "output",
}


@pytest.mark.parametrize("name", INSIDE)
def test_hooks_fire_and_change_what_they_return(name):
    model, plain = fused("qwen3")
    calls, changed = [], []
    for m in (model, plain):
        module = m.get_submodule(f"model.layers.0{name}")

        def change(module, args, output):
            return (output[0] * 1.1 + 0.1, *output[1:]) if isinstance(output, tuple) else output * 1.1 + 0.1

        handles = [
            module.register_forward_pre_hook(lambda module, args: calls.append("before")),
            module.register_forward_hook(change),
        ]
        before = len(calls)
        changed.append(answer(m))
        assert len(calls) == before + 1
        for handle in handles:
            handle.remove()
    assert_close(changed[0], changed[1].double(), dtype=torch.float32)
    same(model, plain)
    assert (changed[0] - answer(plain)).norm() > 1e-3 * changed[0].norm()


def test_what_is_watched_or_replaced_before_is_left():
    model, plain = made("llama")
    layers, calls = model.model.layers, []
    layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    layers[1].input_layernorm.forward = lambda x: 2 * x
    plain.model.layers[1].input_layernorm.forward = lambda x: 2 * x
    report = fastllm.optimize(model, None, **OPTIONS)
    assert counts(report) == "4/5 1/2 2/2 1/2"
    reason = "it has hooks, or another library has replaced its forward"
    assert set(report.to_dict()["not_fused"][reason]) == {"model.layers.0.mlp", "model.layers.1.input_layernorm"}
    calls.clear()
    same(model, plain)
    assert calls == [1]


@pytest.mark.parametrize("name", [".self_attn.k_proj", ".mlp.up_proj", ".self_attn.q_norm", ".mlp.act_fn"])
def test_backward_hooks_fire(name):
    model, _ = fused("qwen3")
    model.requires_grad_(False)
    calls = []
    model.get_submodule(f"model.layers.0{name}").register_full_backward_hook(lambda *_: calls.append(1))
    embeds = model.get_input_embeddings()(ids()).requires_grad_()
    model(inputs_embeds=embeds).logits.sum().backward()
    assert calls == [1]


@pytest.mark.parametrize(
    "name", [".self_attn.k_proj", ".mlp.gate_proj", ".self_attn.k_norm", ".input_layernorm", ".mlp"]
)
def test_a_child_that_is_replaced_counts(name):
    model, plain = fused("qwen3")
    for m in (model, plain):
        new = copy.deepcopy(m.get_submodule(f"model.layers.0{name}"))
        new.__dict__.pop("forward", None)
        with torch.no_grad():
            for p in new.parameters():
                p.mul_(1.3)
        m.set_submodule(f"model.layers.0{name}", new)
    same(model, plain)


@pytest.mark.parametrize("name", ["self_attn.v_proj", "mlp.up_proj"])
def test_a_forward_that_is_replaced_counts(name):
    model, plain = fused()
    for m in (model, plain):
        layer = m.get_submodule(f"model.layers.0.{name}")
        layer.forward = lambda x, layer=layer: 2 * type(layer).forward(layer, x)
    same(model, plain)


def test_a_parametrization_counts():
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    model, plain = fused()
    for m in (model, plain):
        nn.utils.parametrize.register_parametrization(m.model.layers[0].self_attn.q_proj, "weight", Doubled())
    same(model, plain)


@pytest.mark.parametrize("family", FEW)
def test_new_weights_take_effect(family):
    model, plain = fused(family)
    answer(model)
    with torch.no_grad():
        for a, b in zip(model.parameters(), plain.parameters(), strict=True):
            a.mul_(1.1), b.mul_(1.1)
    same(model, plain)
    other = rough(build(family, torch.float32, seed=7)).state_dict()
    for m in (model, plain):
        m.load_state_dict({name: 3 * t for name, t in other.items()})
    same(model, plain)
    for m in (model, plain):
        m.load_state_dict({name: t.clone() for name, t in other.items()}, assign=True)
    same(model, plain)


@pytest.mark.parametrize("family", ["gemma3", "qwen3"])
def test_moving_takes_effect(family):
    model, plain = fused(family)
    for m in (model, plain):
        m.bfloat16()
    got, want = answer(model), answer(copy.deepcopy(plain).float())
    error, allowed = ((y.float() - want).square().mean().sqrt() for y in (got, answer(plain)))
    assert got.dtype == torch.bfloat16 and error <= 1.3 * allowed
    for m in (model, plain):
        m.float()
    same(model, plain)


@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral"])
def test_gradients_are_those_of_the_model(family):
    model, plain = fused(family)
    grads, seen = [], mask("left")
    labels = ids().masked_fill(seen.cumsum(1) <= 1, -100)  # what follows padding says nothing
    for m in (model, plain):
        m(ids(), attention_mask=seen, labels=labels).loss.backward()
        grads.append({name: p.grad for name, p in m.named_parameters()})
    assert grads[0].keys() == grads[1].keys()
    for name, want in grads[1].items():
        assert (want is None) == (grads[0][name] is None)
        if want is not None:
            assert_close(grads[0][name], want.double(), worst=1e-3, rms=1e-4, dtype=torch.float32)


def test_gradients_pass_through_what_does_not_learn():
    model, plain = fused()
    grads = []
    for m in (model, plain):
        m.requires_grad_(False)
        embeds = m.get_input_embeddings()(ids()).requires_grad_()
        m(inputs_embeds=embeds).logits.square().sum().backward()
        grads.append(embeds.grad)
    assert_close(grads[0], grads[1].double(), worst=1e-3, rms=1e-4, dtype=torch.float32)


def test_training_trains():
    model, plain = fused(dtype=torch.float32)
    for m in (model, plain):
        m.train()
        optimizer = torch.optim.SGD(m.parameters(), lr=0.5)
        for _ in range(2):
            m(ids(), labels=ids()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        m.eval()
    assert_close(answer(model), answer(plain).double(), worst=1e-3, rms=1e-4, dtype=torch.float32)


def test_dropout_drops():
    model = rough(build("llama", torch.float32))
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
        layer.mlp.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(0.5)).eval()
    report = fastllm.optimize(model, None, quiet=True)
    assert counts(report) == "5/5 2/2 2/2 2/2"
    assert_equal(answer(model), answer(model))
    assert "dropout" not in str(report)
    model.requires_grad_(False).train()
    assert (answer(model) - answer(model)).norm() > 0
    assert "torch's ran for dropout" in str(report)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.0
    assert (answer(model) - answer(model)).norm() > 0, "that of the feed-forward blocks"
    assert report.to_dict()["fallbacks"] == ["dropout"]
    fastllm.restore(model)
    assert not [name for m in model.modules() for name in m.__dict__ if name.startswith("_fastllm")]


@pytest.mark.parametrize(
    "family, first",
    [
        ("llama", "called"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("llama", "copied"), ("gemma3", "called"))),
    ],
)
def test_it_compiles_whole(family, first):
    torch._dynamo.reset()
    model, plain = fused(family)
    if first == "copied":
        model = copy.deepcopy(model)  # whose projections are not merged yet
    else:
        answer(model)
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")

    def check(padding):
        seen = mask(padding)
        with torch.no_grad():
            got = compiled(ids(), attention_mask=None if padding == "none" else seen, use_cache=False).logits
        assert_close(got[seen.bool()], answer(plain, padding).double(), dtype=torch.float32)

    check("none")
    other = rough(build(family, torch.float32, seed=7)).state_dict()
    for m in (model, plain):
        m.load_state_dict({name: t.clone() for name, t in other.items()}, assign=True)
    check("none")
    if family == "gemma3":
        check("left")


def test_hidden_states_and_attentions():
    model, plain = fused("gemma3")
    with torch.no_grad():
        got, want = (m(ids(), output_hidden_states=True).hidden_states for m in (model, plain))
    assert len(got) == len(want) == 3
    for a, b in zip(got, want, strict=True):
        assert_close(a, b.double(), dtype=torch.float32)


def test_the_weights_of_attention_come_from_the_model_itself():
    model, plain = fused("llama", quiet=True)
    with torch.no_grad():
        out = model(ids(), output_attentions=True)
        want = plain(ids(), output_attentions=True)
    assert_close(out.logits, want.logits.double(), dtype=torch.float32)
    assert "torch's ran for output_attentions" in str(model._fastllm.report)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(ids(), output_attentions=True)
    for a, b in zip(out.attentions, want.attentions, strict=True):
        assert_close(a, b.double(), dtype=torch.float32)
