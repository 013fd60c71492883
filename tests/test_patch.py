"""`optimize`, `restore`, `optimized`: every family patched, right, restored to the bit."""

import copy

import pytest
import torch
from close import assert_close, assert_equal
from families import FAMILIES, VOCABULARY, build, ids, outputs
from torch import nn
from transformers import GenerationConfig, T5Config, T5ForConditionalGeneration

import fastllm
from fastllm import QuantExperts, QuantLinear
from fastllm.nn.experts import is_experts
from fastllm.patch import NotSupportedError
from fastllm.patch.plan import Planner

QUIET = {"quiet": True}


def linears(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}


def dequantized(patched, original):
    """A copy of `original` that holds the weights of `patched` as they read back: stock modules, quantized values."""
    model = copy.deepcopy(original)
    for name, module in patched.named_modules():
        if isinstance(module, QuantExperts):
            experts = model.get_submodule(name)
            up = "gate_up_proj" if experts.has_gate else "up_proj"
            for layers, weight in ((module.up, getattr(experts, up)), (module.down, experts.down_proj)):
                dense = torch.stack([layer.dequantize() for layer in layers])
                weight.data.copy_(dense.transpose(1, 2) if experts.is_transposed else dense)
        elif isinstance(module, QuantLinear) and isinstance(found := _get(model, name), nn.Module):
            dense = module.dequantize()
            if not isinstance(found, nn.Linear):
                dense = dense.t()
            found.weight = nn.Parameter(dense.contiguous())  # a new tensor: a tied embedding keeps its own
    return model


def _get(model, name):
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


@pytest.mark.parametrize("weights", ["int4", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, weights):
    model = build(family, every_expert=True)
    original = copy.deepcopy(model)
    keys, shown, logits, tied = list(model.state_dict()), str(model), outputs(model), model.config.tie_word_embeddings

    report = fastllm.optimize(model, weights, group_size=32 if weights == "int4" else None, **QUIET)
    assert (
        report.coverage > 0.99 and report.bytes_per_token < (0.36 if weights == "int4" else 0.56) * report.plan.before
    )
    assert not [m for m in model.modules() if type(m) is nn.Linear or is_experts(m)], "a linear layer was left"
    got = outputs(model)
    # the arithmetic: stock modules with the weights that the packed ones read back
    assert_close(got, outputs(dequantized(model, original)).double(), worst=0.2, rms=0.03, dtype=torch.bfloat16)
    # the rounding: close to the original, and not the original
    assert 0 < (got - logits).float().norm() < (0.35 if weights == "int4" else 0.05) * logits.float().norm()
    if family != "bert":
        config = GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert model.generate(ids(), generation_config=config).shape == (2, 14)

    assert fastllm.restore(model) is model
    assert list(model.state_dict()) == keys and str(model) == shown and model.config.tie_word_embeddings == tied
    assert_equal(outputs(model), logits)
    assert not hasattr(model, "hf_quantizer") and not hasattr(model.config, "quantization_config")
    for name, tensor in original.state_dict().items():
        assert_equal(model.state_dict()[name], tensor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_other_dtypes(dtype):
    model = build("llama", dtype)
    logits = outputs(model)
    with fastllm.optimized(model, "int8", **QUIET):
        assert outputs(model).dtype == dtype
        assert_close(outputs(model), logits.double(), worst=0.2, rms=0.04, dtype=dtype)
    assert_equal(outputs(model), logits)


def test_padding_and_batches():
    """A left-padded batch gives each row what it gives alone."""
    model = build("llama", torch.float32)
    fastllm.optimize(model, "int8", **QUIET)
    tokens = ids(1, 6)
    padded, mask = nn.functional.pad(tokens, (3, 0)), nn.functional.pad(torch.ones_like(tokens), (3, 0))
    batch = torch.cat((padded, ids(1, 9)))
    with torch.no_grad():
        alone = model(tokens).logits
        both = model(batch, attention_mask=torch.cat((mask, torch.ones(1, 9, dtype=mask.dtype)))).logits
    assert_close(both[:1, 3:], alone.double(), worst=0.1, rms=0.02, dtype=torch.float32)


def test_compiles_whole():
    model = build("llama")
    # the layers alone: what else is traced is fused in another order
    fastllm.optimize(model, "int4", group_size=32, attention=False, fuse=False, decode=False, **QUIET)
    want = outputs(model)
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_close(compiled(ids(), use_cache=False).logits, want.double(), dtype=torch.bfloat16)


def test_a_second_call_does_nothing(caplog):
    model = build("llama")
    report = fastllm.optimize(model, "int4", **QUIET)
    shown = str(model)
    assert fastllm.optimize(model, "int8", **QUIET) is report and str(model) == shown
    assert "already optimized" in caplog.text


def test_the_context_manager_undoes_on_errors():
    model = build("llama")
    logits = outputs(model)
    with pytest.raises(RuntimeError, match="inside"), fastllm.optimized(model, "int4", **QUIET) as report:
        assert report.coverage > 0.9 and linears(model)
        raise RuntimeError("inside")
    assert_equal(outputs(model), logits)
    fastllm.optimize(model, "int4", **QUIET)
    with pytest.raises(NotSupportedError, match="already optimized"), fastllm.optimized(model):
        pass


def test_the_context_manager_has_no_dry_run():
    model = build("llama")
    with pytest.raises(ValueError, match="would change nothing"), fastllm.optimized(model, dry_run=True):
        pass
    assert "_fastllm" not in model.__dict__ and not linears(model)


@pytest.mark.parametrize("tied", [False, True])
def test_an_encoder_with_a_decoder(tied):
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY}
    config = T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, tie_word_embeddings=tied)
    torch.manual_seed(0)
    model = T5ForConditionalGeneration._from_config(config, dtype=torch.bfloat16).eval()

    def logits():
        with torch.no_grad():
            return model(input_ids=ids(), decoder_input_ids=ids()).logits

    before, shown = logits(), str(model)
    report = fastllm.optimize(model, "int8", min_coverage=0.3, **QUIET)
    assert report.accuracy.top1 > 0.5 and len(linears(model)) >= 2 * 6 + 2 * 10
    assert 0 < (logits() - before).float().norm() < 0.05 * before.float().norm()
    assert model.generate(ids(), max_new_tokens=4, do_sample=False).shape[0] == 2
    fastllm.restore(model)
    assert str(model) == shown
    assert_equal(logits(), before)


def test_restore_needs_something_to_restore():
    model = build("llama")
    with pytest.raises(NotSupportedError, match="not optimized"):
        fastllm.restore(model)
    fastllm.optimize(model, "int4", keep=False, **QUIET)
    assert type(model.lm_head) is QuantLinear
    with pytest.raises(NotSupportedError, match="keep=False"):
        fastllm.restore(model)


def test_a_dry_run_changes_nothing():
    model = build("mixtral")
    shown, state = str(model), {n: t.clone() for n, t in model.state_dict().items()}
    report = fastllm.optimize(model, "int4", dry_run=True, **QUIET)
    assert str(model) == shown and "_fastllm" not in model.__dict__
    for name, tensor in model.state_dict().items():
        assert_equal(tensor, state[name])
    assert "dry run: nothing changed" in str(report) and report.accuracy is None
    done = fastllm.optimize(model, "int4", **QUIET)
    assert report.bytes_per_token <= done.bytes_per_token <= 1.1 * report.bytes_per_token  # a layout may add scales
    assert done.coverage == report.coverage
    again = Planner({}, None, False, "*", ()).plan(model)
    assert again.before == done.bytes_per_token  # the same bytes, counted in the patched model


def test_what_is_chosen():
    def formats(**options):
        model = build("llama")
        fastllm.optimize(model, **{"min_coverage": 0.0, **QUIET, **options})
        found = {n: m.format.name for n, m in linears(model).items()}
        fastllm.restore(model)
        return found

    assert formats(weights="int4")["lm_head"] == "int8"
    assert "lm_head" not in formats(lm_head=False)
    assert formats(lm_head="int4-g32")["lm_head"] == "int4-g32"
    assert formats(weights="int4-g64", lm_head=True)["lm_head"] == "int4-g64"
    assert set(formats(include="*.mlp.*")) == {
        f"model.layers.{i}.mlp.{p}_proj" for i in (0, 1) for p in ("gate", "up", "down")
    }
    assert not [n for n in formats(exclude=["*.mlp.*", "lm_head"]) if "mlp" in n or "head" in n]
    table = formats(weights={"*.0.mlp.down_proj": "int8-g64", "*.mlp.*": "int4", "*.self_attn.*": None}, group_size=32)
    assert table["model.layers.0.mlp.down_proj"] == "int8-g32" and table["model.layers.1.mlp.up_proj"] == "int4-g32"
    assert not [n for n in table if "self_attn" in n or "head" in n]


def test_the_report():
    model = build("gemma3")
    report = fastllm.optimize(model, "int4", group_size=32, exclude="*.0.self_attn.*", prompt=ids(1), **QUIET)
    text = str(report)
    assert len(text.splitlines()) <= 24 and max(map(len, text.splitlines())) <= 160
    for part in ("model.layers.*.mlp", "lm_head", "int4-g32", "matches exclude=", "narrow exclude=", "per token"):
        assert part in text
    assert "on 9 prompt tokens" in text and "fastllm.restore(model)" in text and "keep=False frees them" in text
    everything = report.to_dict()
    packed = sum(d["after"] for d in everything["decisions"] if d["format"])
    assert packed == sum(m.nbytes for m in linears(model).values())
    assert everything["memory_after"] < everything["memory_before"]
    assert 0 <= everything["accuracy"]["top1"] <= 1 and everything["accuracy"]["kl"] >= 0


def test_experts_count_by_the_share_that_a_token_reads():
    report = fastllm.optimize(build("mixtral"), "int8", dry_run=True, **QUIET)
    experts = [d for d in report.plan.decisions if d.kind == "experts"]
    assert [d.before for d in experts] == [2 * (2 * 256 * 128 + 128 * 256) * 2] * 2  # two of the four, two bytes each


@pytest.mark.gpu
@pytest.mark.parametrize("weights", ["int4", "int8"])
@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "mixtral"])
def test_on_a_gpu(family, weights, tmp_path):
    model = build(family, every_expert=True).cuda()
    logits, original = outputs(model), copy.deepcopy(model)
    report = fastllm.optimize(model, weights, **QUIET)
    assert {layer.layout for layer in linears(model).values()} == {"planar"} and "triton" in str(report)
    got, want = outputs(model), outputs(dequantized(model, original).double())
    assert_close(got, want, worst=0.15, rms=0.03, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = fastllm.load(tmp_path)  # on the CPU, in a layout of its own
    assert_equal(loaded.cuda().lm_head.at_rest().packed, model.lm_head.at_rest().packed)
    assert_equal(outputs(loaded), got)
    assert_equal(outputs(fastllm.restore(model)), logits)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_token_does_not_depend_on_the_batch(family):
    model = build(family)
    fastllm.optimize(model, "int8", batch_invariant=True, **QUIET)
    for layer in linears(model).values():
        x = torch.randn(20, layer.in_features).bfloat16()
        assert layer.batch_invariant
        assert_equal(torch.cat([layer(row) for row in x.split(1)]), layer(x))
