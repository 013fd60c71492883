"""What people do to a model before, between and after: move it, compile it, hook into it, feed it NaN."""

import copy

import pytest
import torch
from close import assert_close, assert_equal
from families import build, ids, outputs
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, MambaConfig, ViTConfig

import fastllm
from fastllm import QuantLinear
from fastllm.formats import parse_format

QUIET = {"quiet": True}


@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_a_model_that_was_moved_is_restored(weights):
    model = build("mixtral", every_expert=True)
    want = outputs(copy.deepcopy(model).float())
    fastllm.optimize(model, weights, **QUIET)
    model.float().train()
    fastllm.restore(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32} and all(m.training for m in model.modules())
    assert_equal(outputs(model.eval()), want)


def test_a_compiled_model_is_patched_and_restored():
    model = build("llama")
    compiled, logits = torch.compile(model, backend="eager"), outputs(model)
    report = fastllm.optimize(compiled, "int8", **QUIET)
    assert isinstance(model.lm_head, QuantLinear) and fastllm.optimize(compiled, "int8", **QUIET) is report
    assert fastllm.restore(compiled) is compiled
    assert_equal(outputs(model), logits)
    with fastllm.optimized(compiled, "int8", **QUIET):
        assert isinstance(model.lm_head, QuantLinear)
    assert not hasattr(model, "_fastllm") and type(model.lm_head) is nn.Linear


def test_a_module_with_hooks_keeps_them():
    model, calls = build("llama"), []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: calls.append("after"))
    model.model.layers[1].mlp.up_proj.register_forward_pre_hook(lambda *_: calls.append("before"))
    report = fastllm.optimize(model, "int8", **QUIET)
    assert {d.name for d in report.plan.skipped if d.reason == "it has forward hooks"} == {
        f"model.layers.{i}.mlp.up_proj" for i in (0, 1)
    }
    calls.clear()
    outputs(model)
    assert calls == ["after", "before"]


def mamba():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 512, "state_size": 8, "time_step_rank": 16}
    return AutoModelForCausalLM.from_config(MambaConfig(**sizes, pad_token_id=0), dtype=torch.bfloat16).eval()


def test_a_model_that_reads_weights_by_itself_is_refused(tmp_path):
    model = mamba()
    logits = outputs(model)
    assert logits.isfinite().all()
    with pytest.raises(ValueError, match="answers NaN: some part of it reads the weight.*exclude="):
        fastllm.optimize(model, "int8", **QUIET)
    assert_equal(outputs(model), logits)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="answers NaN"):
        fastllm.load(tmp_path, weights="int8", quiet=True)
    assert fastllm.optimize(model, "int8", exclude="*.dt_proj", **QUIET).accuracy.kl < 0.1
    assert outputs(fastllm.load(tmp_path, weights="int8", exclude="*.dt_proj", quiet=True)).isfinite().all()


def test_a_model_without_tokens_is_refused():
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = AutoModel.from_config(ViTConfig(**sizes, image_size=32, patch_size=16)).eval()
    with pytest.raises(ValueError, match="ViTModel reads pixel_values, not tokens"):
        fastllm.optimize(model, "int8", min_coverage=0.0, **QUIET)


def test_the_memory_of_the_originals_is_what_keeping_them_costs():
    model = build("llama-tied")
    sizes = {n: m.weight.numel() * 2 for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"}
    report = fastllm.optimize(model, "int8", **QUIET)
    assert report.memory_kept == sum(sizes.values())  # the tied head's is the embedding's, which stays anyway
    assert "of originals" in str(report) and report.to_dict()["memory_of_originals"] == report.memory_kept


@pytest.mark.parametrize("format", ["int4", "int8"])
def test_weights_given_by_assignment_are_left_alone(format):
    linear = nn.Linear(128, 64, dtype=torch.bfloat16)
    given = QuantLinear.from_linear(linear, format).state_dict()
    kept = {name: t.clone() for name, t in given.items()}
    layers = [QuantLinear.empty(128, 64, True, parse_format(format), torch.bfloat16) for _ in range(2)]
    for layer in layers:
        layer.load_state_dict(given, assign=True)
    for name, t in given.items():
        assert_equal(t, kept[name])
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    assert_equal(layers[0](x), layers[1](x))
    want = x.double() @ layers[1].dequantize(torch.float64).t() + linear.bias.double()
    assert_close(layers[0](x), want, worst=4e-2, rms=6e-3, dtype=torch.bfloat16)


@pytest.mark.parametrize("rows", [1, 20])
def test_float16_sums_do_not_overflow(rows):
    linear = nn.Linear(1024, 64, dtype=torch.float16)
    nn.init.normal_(linear.weight, std=0.02)
    x = torch.randn(rows, 1024, dtype=torch.float16)
    x[:, 5] = 600
    want = linear(x).double()
    assert_close(QuantLinear.from_linear(linear, "int8")(x), want, worst=5e-2, rms=2e-2, dtype=torch.float16)


@pytest.mark.parametrize("format", ["int8", "int8-g32", "int8-asym"])
def test_small_float16_weights_keep_their_bits(format):
    linear = nn.Linear(256, 64, bias=False, dtype=torch.float16)
    nn.init.normal_(linear.weight, std=5e-4)
    error = QuantLinear.from_linear(linear, format).dequantize(torch.float64) - linear.weight.double()
    assert error.norm() < 0.02 * linear.weight.double().norm()


@pytest.mark.parametrize("format, shape", [("int4", (64, 128)), ("int8", (64, 128)), ("int8", (2048, 2048))])
def test_nan_and_infinity_stay_in_their_rows(format, shape):
    layer = QuantLinear.from_linear(nn.Linear(*shape[::-1], dtype=torch.bfloat16), format)
    x = torch.randn(4, shape[1], dtype=torch.bfloat16)
    x[1, 5], x[2, 7] = float("nan"), float("inf")
    finite = layer(x).isfinite()
    assert finite[0].all() and finite[3].all() and not finite[1].any() and not finite[2].any()


def test_the_dtype_of_the_bias_does_not_matter():
    layer = QuantLinear.from_linear(nn.Linear(128, 64), "int8")
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
    bias = layer.bias.detach().clone().requires_grad_()
    layer.bias = nn.Parameter(bias)
    layer(x).sum().backward()
    assert layer.bias.grad.dtype == torch.float32


@pytest.mark.parametrize("format, shape", [("int4", (64, 128)), ("int8", (64, 128)), ("int8", (2048, 2048))])
def test_the_default_device_does_not_matter(format, shape):
    linear = nn.Linear(*shape[::-1], dtype=torch.bfloat16)
    x = torch.randn(2, shape[1], dtype=torch.bfloat16)
    want = QuantLinear.from_linear(linear, format)(x)
    with torch.device("meta"):
        layer = QuantLinear.from_linear(linear, format)
        got = layer(x)
    assert layer.weight_packed.device.type == "cpu"
    assert_equal(got, want)
    assert ids().device.type == "cpu"
