"""Fused modules: found where they are and not where something only looks like it, and right in every family."""

import copy

import families
import pytest
import torch
from close import assert_close, assert_equal
from families import build, ids, rough
from pairs import OPTIONS, PADDINGS, answer, counts, made, mask
from torch import nn
from transformers import DynamicCache, StaticCache

import fastllm
from fastllm.patch.fuse import find

# how many norms, gated blocks, attentions and whole layers are fused, and of how many
FUSED = {
    "llama": "5/5 2/2 2/2 2/2",
    "qwen3": "9/9 2/2 2/2 2/2",
    "gemma3": "13/13 2/2 2/2 2/2",
    "gemma2": "9/9 2/2 2/2 2/2",
    "gpt2": "0/0 0/0 0/0 0/0",
    "mixtral": "5/5 0/0 2/2 2/2",
    "gpt-oss": "5/5 0/0 2/2 2/2",
    "bert": "0/0 0/0 0/0 0/0",
    "qwen2": "5/5 2/2 2/2 2/2",
    "phi3": "5/5 0/0 0/0 0/0",
    "olmo2": "9/9 2/2 0/2 0/2",
    "starcoder2": "0/0 0/0 2/2 0/0",
    "cohere": "0/3 2/2 2/2 0/0",
    "glm": "5/5 0/0 0/2 2/2",
    "phi": "0/0 0/0 2/2 0/0",
    "mistral": "5/5 2/2 2/2 2/2",
}
FEW = ["llama", "qwen3", "gemma3", "gpt-oss"]


@pytest.mark.parametrize("family", FUSED)
def test_every_family(family):
    model, plain = made(family)
    before = families.outputs(model)
    report = fastllm.optimize(model, None, **OPTIONS)
    assert counts(report) == FUSED[family]
    for padding in PADDINGS:
        assert_close(answer(model, padding), answer(plain, padding).double(), dtype=torch.float32)
    fastllm.restore(model)
    assert_equal(families.outputs(model), before)


@torch.no_grad()
def by_steps(model, padding, cache, steps=(4, 3, 1, 1)):
    """The answer to the same tokens, that are given bit by bit."""
    seen, found, at = mask(padding), [], 0
    positions = (seen.cumsum(1) - 1).clamp(min=0)
    for T in steps:
        here = slice(at, at + T)
        given = None if padding == "none" else seen[:, : here.stop]
        out = model(
            ids()[:, here],
            attention_mask=given,
            position_ids=positions[:, here],
            past_key_values=cache,
            use_cache=True,
        )
        found.append(out.logits)
        at += T
    return torch.cat(found, 1)[seen.bool()]


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache, fastllm.KVCache])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt-oss", "cohere"])
def test_with_a_cache(family, kind):
    model, plain = made(family)
    fastllm.optimize(model, None, **OPTIONS)
    for padding in PADDINGS:
        want = by_steps(plain, padding, DynamicCache(config=plain.config)).double()
        settings = {"max_cache_len": 12} if kind is StaticCache else {}
        cache = kind(model.config, **settings) if kind is fastllm.KVCache else kind(config=model.config, **settings)
        assert_close(by_steps(model, padding, cache), want, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", [*FEW, "gemma2", "qwen2", "olmo2"])
def test_in_fewer_bits_it_is_as_good_as_the_model_itself(family, dtype):
    model, plain = made(family, dtype)
    exact = copy.deepcopy(plain).float()
    report = fastllm.optimize(model, None, **OPTIONS)
    assert counts(report) == FUSED[family]
    want = torch.cat([answer(exact, padding) for padding in PADDINGS])
    errors = [
        (torch.cat([answer(m, padding) for padding in PADDINGS]).float() - want).square().mean().sqrt()
        for m in (model, plain)
    ]
    eps = torch.finfo(dtype).eps * want.square().mean().sqrt()
    assert errors[0] <= 1.2 * errors[1] + 0.1 * eps and errors[1] < 8 * eps


def test_what_was_probed_in_float32_rounds_as_the_model_does():
    for family in ("llama", "gemma3", "olmo2"):
        model, _ = made(family)
        report = fastllm.optimize(model, None, fuse="norm", attention=False, **OPTIONS)
        twins = [f.twin for f in report.speedups.fusions.found]
        assert twins and all(t.cast_first == (family == "llama") for t in twins)
        assert all(t.offset == (family == "gemma3") for t in twins)


# Modules that only look alike.


class Block(nn.Module):
    """A model of one module, with what `find` asks of a model."""

    def __init__(self, inside, hidden=32):
        super().__init__()
        self.embed, self.inside = nn.Embedding(64, hidden), inside
        self.config = object()

    def forward(self, input_ids):
        return self.inside(self.embed(input_ids))


class Norm(nn.Module):
    def __init__(self, kind="rms"):
        super().__init__()
        self.weight, self.eps, self.kind = nn.Parameter(torch.rand(32) + 0.5), 1e-5, kind

    def forward(self, x):
        x = x - x.mean(-1, keepdim=True) if self.kind == "layer" else x
        size = x.square().mean(-1, keepdim=True)
        if self.kind == "eps outside":
            return self.weight * x / (size.sqrt() + self.eps)
        if self.kind == "other eps":
            return self.weight * x * torch.rsqrt(size + 10 * self.eps)
        if self.kind == "sum":
            return self.weight * x * torch.rsqrt(32 * size + self.eps)
        return self.weight * x * torch.rsqrt(size + self.eps) * (0.99 if self.kind == "scaled" else 1)


class MLP(nn.Module):
    def __init__(self, kind="plain"):
        super().__init__()
        self.a, self.b = (nn.Linear(32, 48, bias=kind == "bias" and i == 0) for i in range(2))
        self.c, self.act, self.kind = nn.Linear(48, 32, bias=False), nn.SiLU(), kind

    def forward(self, x):
        if self.kind == "clamped":
            return self.c(self.act(self.a(x)).clamp(max=0.1) * self.b(x))
        if self.kind == "sum":
            return self.c(self.act(self.a(x)) + self.b(x))
        if self.kind == "tanh":
            return self.c(torch.tanh(self.a(x)) * self.b(x))
        return self.c(self.act(self.a(x)) * self.b(x)) + (0.1 * x if self.kind == "extra" else 0)


def found(inside, part):
    model = Block(inside).eval()
    with torch.no_grad():
        own = model.embed.weight.mul_(2)
        own.sub_(own.mean(-1, keepdim=True))  # of such rows a layer norm is no other
    fusions = find(model, torch.arange(64)[None], (part,))
    return model, fusions


@pytest.mark.parametrize("kind", ["layer", "eps outside", "other eps", "sum", "scaled"])
def test_norms_that_only_look_like_one(kind):
    torch.manual_seed(0)
    assert found(Norm(), "norm")[1].count("norm") == (1, 1)
    fusions = found(Norm(kind), "norm")[1]
    assert fusions.count("norm") == (0, 1)
    assert list(fusions.reasons()) == ["it is not a root-mean-square norm, with or without 1 added to its weight"]


@pytest.mark.parametrize("kind", ["extra", "clamped", "sum", "tanh", "bias"])
def test_feed_forward_blocks_that_only_look_like_one(kind):
    torch.manual_seed(0)
    assert found(MLP(), "mlp")[1].count("mlp") == (1, 1)
    model, fusions = found(MLP(kind), "mlp")
    assert fusions.count("mlp") == (0, 1)
    (reason,) = fusions.reasons()
    assert reason == (
        "some have a bias and some have none"
        if kind == "bias"
        else "it is not down(act(gate(x)) * up(x)) with any known activation"
    )
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.inside.parameters()), "weights were merged"


def changed_attention(model, change):
    """Every attention of the model, of a class whose forward is `change` of the original one."""
    kind = type(model.model.layers[0].self_attn)

    class Changed(kind):
        def forward(self, hidden_states, **given):
            return change(self, super().forward, hidden_states, given)

    for layer in model.model.layers:
        layer.self_attn.__class__ = Changed
    return model


def gated(self, forward, x, given):
    y, weights = forward(x, **given)
    return y * x.sigmoid(), weights


def scaled_queries(self, forward, x, given):
    cos, sin = given["position_embeddings"]
    return forward(x, **{**given, "position_embeddings": (cos * 1.1, sin * 1.1)})


def twice(self, forward, x, given):
    forward(x, **{**given, "past_key_values": None, "attention_mask": None})
    return forward(x, **given)


@pytest.mark.parametrize(
    "change, reason",
    [
        (gated, "what it does after its attention is not one projection"),
        (scaled_queries, "its queries and keys are not projections with head norms and a rotation that are known"),
        (twice, "it does not call fastllm's attention just once"),
    ],
)
def test_attention_that_only_looks_like_one(change, reason):
    model = changed_attention(rough(build("llama", torch.float32)), change)
    want = families.outputs(model)
    report = fastllm.optimize(model, None, **OPTIONS)
    assert report.speedups.fusions.count("attention") == (0, 2)
    assert f"not fused model.layers.0.self_attn and 1 more: {reason}" in str(report)
    assert_close(families.outputs(model), want.double(), dtype=torch.float32)


def test_a_window_that_only_the_mask_tells():
    model, plain = made("gemma3")
    for m in (model, plain):
        m.model.layers[0].self_attn.sliding_window = None
    report = fastllm.optimize(model, None, quiet=True)
    assert report.speedups.fusions.count("attention") == (2, 2)
    for padding in PADDINGS:
        assert_close(answer(model, padding), answer(plain, padding).double(), dtype=torch.float32)
    reason = "layer 0 tells its attention of a window of None, its config of 8"
    assert f"generate: transformers' own loop ({reason})" in str(report)
    assert "generate" not in model.__dict__


def test_strange_shapes_are_a_reason_and_no_error():
    model = rough(build("llama", torch.float32))
    kind = type(model.model.rotary_emb)

    class Three(kind):
        def forward(self, *args, **given):
            return (*super().forward(*args, **given), None)

    class Attention(type(model.model.layers[0].self_attn)):
        def forward(self, hidden_states, position_embeddings, **given):
            return super().forward(hidden_states, position_embeddings=position_embeddings[:2], **given)

    model.model.rotary_emb.__class__ = Three
    for layer in model.model.layers:
        layer.self_attn.__class__ = Attention
    want = families.outputs(model)
    report = fastllm.optimize(model, None, **OPTIONS)
    assert counts(report) == "5/5 2/2 0/2 2/2"
    assert_close(families.outputs(model), want.double(), dtype=torch.float32)
