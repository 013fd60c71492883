"""What `optimize` does beside the weights: asked for in parts, reported, refused with a reason, undone to the bit."""

import copy
import json

import families
import pytest
import torch
from close import assert_close, assert_equal
from families import FAMILIES, MORE_FAMILIES, build, ids, rough
from pairs import answer, counts, made
from test_attention_interface import encoder_decoder
from transformers import GPTJConfig, GPTJForCausalLM, MambaConfig, MambaForCausalLM

import fastllm
from fastllm.patch import fuse, is_patched
from fastllm.patch.speedups import Speedups

QUIET = {"quiet": True}


def traces(model):
    """What fastllm left on the instances of a model."""
    names = [name for m in model.modules() for name in m.__dict__ if name == "forward" or name.startswith("_fastllm")]
    names += [name for name in ("generate",) if name in model.__dict__]
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    return names + hooks


def state(model):
    return {name: (t.data_ptr(), t.clone()) for name, t in model.state_dict().items()}


def generated(model):
    return model.generate(ids(), max_new_tokens=6, do_sample=False)


FAST = ["llama", "gemma3", "gpt-oss", "bert", "cohere"]
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in (*FAMILIES, *MORE_FAMILIES) if name not in FAST]


@pytest.mark.parametrize("weights", [None, "int8"])
@pytest.mark.parametrize("family", [*FAST, *SLOW])
def test_restoring_leaves_nothing_behind(family, weights):
    model = rough(build(family, every_expert=family in ("mixtral", "gpt-oss", "qwen3-moe")))
    implementation, config = model.config._attn_implementation, copy.deepcopy(model.config.to_dict())
    values, modules, want = state(model), dict(model.named_modules()), answer(model, "left")
    tokens = generated(model) if family != "bert" else None
    for _ in range(2):
        fastllm.optimize(model, weights, **QUIET)
        answer(model)
        assert model.config._attn_implementation == "fastllm" and traces(model)
        if tokens is not None:
            generated(model)
        assert fastllm.restore(model) is model
        assert not traces(model) and not is_patched(model)
        assert model.config._attn_implementation == implementation and model.config.to_dict() == config
        found = dict(model.named_modules())
        assert list(found) == list(modules) and all(found[name] is modules[name] for name in found)
        for name, (_, t) in values.items():
            assert_equal(model.state_dict()[name], t)
        assert_equal(answer(model, "left"), want)
        if tokens is not None:
            assert_equal(generated(model), tokens)
    parameters = {id(p): p for p in model.parameters()}.values()
    assert len({p.untyped_storage().data_ptr() for p in parameters}) == len(parameters)


def parts_of(model):
    """Whether attention is fastllm's, which parts are fused, and whether generating is."""
    twins = {type(own.__self__).__name__ for m in model.modules() if (own := m.__dict__.get("forward"))}
    return model.config._attn_implementation == "fastllm", twins, "generate" in model.__dict__


@pytest.mark.parametrize(
    "given, attention, twins, generate",
    [
        ({}, True, {"FusedNorm", "FusedMLP", "FusedAttention", "FusedLayer"}, True),
        ({"attention": False}, False, {"FusedNorm", "FusedMLP", "FusedLayer"}, False),
        ({"fuse": False}, True, set(), True),
        ({"fuse": ()}, True, set(), True),
        ({"fuse": "norm"}, True, {"FusedNorm"}, True),
        ({"fuse": ("mlp",)}, True, {"FusedMLP"}, True),
        ({"fuse": "attention"}, True, {"FusedAttention"}, True),
        ({"fuse": "attention", "attention": False}, False, set(), False),
        ({"fuse": "layer", "decode": False}, True, {"FusedLayer"}, False),
        ({"fuse": ("norm", "attention"), "decode": False}, True, {"FusedNorm", "FusedAttention"}, False),
        ({"decode": False}, True, {"FusedNorm", "FusedMLP", "FusedAttention", "FusedLayer"}, False),
        ({"decode": False, "kv_cache": "int8"}, True, {"FusedNorm", "FusedMLP", "FusedAttention", "FusedLayer"}, True),
        ({"attention": False, "fuse": False, "decode": False}, False, set(), False),
    ],
    ids=str,
)
def test_each_can_be_asked_for(given, attention, twins, generate):
    model, plain = made("qwen3")
    report = fastllm.optimize(model, None, **given, **QUIET)
    assert parts_of(model) == (attention, twins, generate)
    assert_close(answer(model, "left"), answer(plain, "left").double(), dtype=torch.float32)
    lines = str(report)
    assert ("attention: fastllm's, in place of eager" in lines) == attention
    assert ("generate: fastllm's loop" in lines) == generate
    if "attention" in given and given.get("decode", True):
        assert "generate: transformers' own loop (it needs fastllm's attention)" in lines
    if not attention:
        assert "not fused" not in lines, "what was not looked at"
    if given.get("fuse", True) is False:
        assert "fused" not in lines
    everything = report.to_dict()
    assert everything["attention"]["fastllm"] == attention and everything["generate"]["fastllm"] == generate
    done = {part for part, n in everything["fused"].items() if n["fused"]}
    assert {f"Fused{ {'mlp': 'MLP'}.get(p, p.capitalize()) }" for p in done} == twins
    assert json.loads(json.dumps(everything)) == everything
    fastllm.restore(model)
    assert parts_of(model) == (False, set(), False)


def test_the_report_says_it_all():
    report = fastllm.optimize(rough(build("qwen3")), "int8", kv_cache="int8", **QUIET)
    text = str(report)
    assert "attention: fastllm's, in place of sdpa" in text
    assert "fused: 9 of 9 norms, 2 of 2 mlps, 2 of 2 attentions, 2 of 2 layers" in text
    assert "generate: fastllm's loop, int8 keys and values" in text
    assert report.to_dict()["kv_cache"] == "int8"
    assert max(map(len, text.splitlines())) <= 160


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2", "bert"])
def test_a_dry_run_changes_nothing(family):
    model = rough(build(family))
    values = state(model)
    report = fastllm.optimize(model, "int8", dry_run=True, **QUIET)
    assert not traces(model) and model.config._attn_implementation != "fastllm"
    assert all(model.state_dict()[name].data_ptr() == pointer for name, (pointer, _) in values.items())
    everything = report.to_dict()
    assert everything["attention"] == everything["generate"] == {"fastllm": False, "reason": None}
    assert "fused" not in str(report)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"fuse": "norms"}, r"fuse=\['norms'\]: known are norm, mlp, attention"),
        ({"fuse": ("norm", "rope")}, r"fuse=\['rope'\]"),
        ({"kv_cache": "int3"}, "kv_cache='int3' is not one of 'int8', 'int4' or None"),
        ({"kv_cache": "fp8"}, "kv_cache='fp8' is not one of"),
    ],
)
def test_what_is_unknown_is_refused_before_anything_is_done(given, message, tmp_path):
    model = build("llama")
    for dry_run in (True, False):
        with pytest.raises(ValueError, match=message):
            fastllm.optimize(model, "int8", dry_run=dry_run, **given, **QUIET)
    assert not traces(model) and not is_patched(model)
    model.save_pretrained(tmp_path / "dense")
    fastllm.optimize(model, "int8", **QUIET)
    model.save_pretrained(tmp_path / "packed")
    for folder in ("dense", "packed", "missing"):
        with pytest.raises(ValueError, match=message):
            fastllm.load(tmp_path / folder, **given)


def test_a_cache_that_cannot_hold_the_heads_is_refused():
    model = build("llama")
    with pytest.raises(ValueError, match="kv_cache='int4': heads of 32 are not a multiple of 64"):
        fastllm.optimize(model, None, kv_cache="int4", **QUIET)
    assert not traces(model)


def tiny(kind):
    torch.manual_seed(0)
    if kind == "gptj":
        sizes = {"vocab_size": 512, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8}
        return GPTJForCausalLM(GPTJConfig(**sizes, bos_token_id=1, eos_token_id=2)).eval()
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 512, "state_size": 8, "time_step_rank": 16}
    return MambaForCausalLM(MambaConfig(**sizes, pad_token_id=0)).eval()


@pytest.mark.parametrize("kind", ["gptj", "mamba"])
def test_attention_that_cannot_be_exchanged_is_left(kind):
    model = tiny(kind)
    want = families.outputs(model)
    report = fastllm.optimize(model, None, **QUIET)
    reason = "its attention does not go through transformers' attention interface"
    if kind == "gptj":
        assert f"attention: left as it is ({reason})" in str(report)
        assert report.to_dict()["attention"] == {"fastllm": False, "reason": reason}
        assert "generate: transformers' own loop (it needs fastllm's attention)" in str(report)
    assert "generate" not in model.__dict__
    assert_close(families.outputs(model), want.double(), dtype=torch.float32)
    generated(model)
    fastllm.restore(model)
    assert_equal(families.outputs(model), want)


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_an_encoder_with_a_decoder(kind):
    _, plain = encoder_decoder(kind)
    model = copy.deepcopy(plain)
    report = fastllm.optimize(model, None, **QUIET)
    assert "generate: transformers' own loop (it has an encoder, whose keys the cache does not hold)" in str(report)
    assert model.config._attn_implementation == "fastllm"
    with torch.no_grad():
        got, want = (m(ids(), decoder_input_ids=ids()).logits for m in (model, plain))
    assert_close(got, want.double(), dtype=torch.float32)
    for more in ({}, {"num_beams": 2}):
        tokens = [m.generate(ids(), max_new_tokens=6, do_sample=False, **more) for m in (model, plain)]
        assert_equal(*tokens)
    fastllm.restore(model)
    with torch.no_grad():
        assert_equal(model(ids(), decoder_input_ids=ids()).logits, want)


def test_attention_that_answers_otherwise_is_left(monkeypatch):
    model, plain = made("llama")
    monkeypatch.setattr("fastllm.patch.attention.attend", lambda q, k, v, mask, **_: torch.zeros_like(q))
    report = fastllm.optimize(model, None, **QUIET)
    assert "attention: left as it is (the model's answer changes, by" in str(report)
    assert parts_of(model) == (False, {"FusedNorm", "FusedMLP", "FusedLayer"}, False)
    assert_close(answer(model), answer(plain).double(), dtype=torch.float32)


def test_attention_that_complains_is_left(monkeypatch):
    model, plain = made("llama")

    def complain(*_):
        raise ValueError("no such thing")

    monkeypatch.setattr("fastllm.patch.attention.refuse_unknown", complain)
    report = fastllm.optimize(model, None, **QUIET)
    assert "attention: left as it is (no such thing)" in str(report)
    assert model.config._attn_implementation == "eager"
    assert_close(answer(model), answer(plain).double(), dtype=torch.float32)


@pytest.mark.parametrize("where", ["find", "install", "_set_loop", "_set_attention"])
def test_a_failure_in_the_middle_leaves_the_model_as_it_was(where, monkeypatch):
    model, _ = made("llama")
    values, want = state(model), answer(model)

    def fail(*_):
        raise RuntimeError("in the middle")

    if where == "find":  # once some are found, and merged
        look, calls = fuse.LOOKS["mlp"], []

        def later(*given):
            calls.append(given)
            return look(*given) if len(calls) < 2 else {}["in the middle"]

        monkeypatch.setitem(fuse.LOOKS, "mlp", later)
    else:
        monkeypatch.setattr(fuse.Fusions if where == "install" else Speedups, where, fail)
    with pytest.raises((RuntimeError, KeyError), match="in the middle"):
        fastllm.optimize(model, "int8", **QUIET)
    assert not traces(model) and model.config._attn_implementation == "eager"
    for name, (_, t) in values.items():
        assert_equal(model.state_dict()[name], t)
    for p in model.parameters():
        assert p.untyped_storage().nbytes() == p.nbytes, "weights are still merged"
    assert_equal(answer(model), want)


def test_patching_twice_does_nothing_more():
    model, plain = made("llama")
    report = fastllm.optimize(model, None, **QUIET)
    before = traces(model)
    assert fastllm.optimize(model, None, fuse=False, **QUIET) is report and traces(model) == before
    assert_close(answer(model), answer(plain).double(), dtype=torch.float32)


def test_a_generate_of_ones_own_is_kept():
    model = build("llama")
    model.generate = lambda *_, **__: "mine"
    report = fastllm.optimize(model, None, **QUIET)
    assert model.generate() == "mine" and "it has a `generate` of its own" in str(report)
    fastllm.restore(model)
    assert model.generate() == "mine"


def test_loading_applies_them(tmp_path):
    model = rough(build("qwen3"))
    fastllm.optimize(model, "int8", **QUIET)
    want = answer(model)
    model.save_pretrained(tmp_path)
    loaded = fastllm.load(tmp_path)
    assert parts_of(loaded) == (True, {"FusedNorm", "FusedMLP", "FusedAttention", "FusedLayer"}, True)
    assert_equal(answer(loaded), want)
    report = loaded._fastllm.report
    assert "fused: 9 of 9 norms, 2 of 2 mlps, 2 of 2 attentions, 2 of 2 layers" in str(report)
    assert fastllm.optimize(loaded, None, **QUIET) is report
    values = {name: t.clone() for name, t in loaded.state_dict().items()}
    fastllm.restore(loaded)
    assert not traces(loaded) and loaded.config._attn_implementation == "sdpa"
    for name, t in loaded.state_dict().items():
        assert_equal(t, values[name])
    assert_close(answer(loaded), want.double(), worst=0.1, rms=0.02, dtype=torch.bfloat16)
    again = fastllm.optimize(loaded, None, fuse="norm", decode=False, **QUIET)
    assert counts(again) == "9/9" and parts_of(loaded) == (True, {"FusedNorm"}, False)
    few = fastllm.load(tmp_path, attention=False, fuse="mlp", decode=False)
    assert parts_of(few) == (False, {"FusedMLP"}, False)
