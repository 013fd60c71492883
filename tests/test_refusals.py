"""What `optimize` refuses, leaving the model as it was, and what it leaves alone."""

import pytest
import tiny
import torch
from close import assert_equal
from families import build, outputs
from torch import nn
from transformers import AutoModelForSeq2SeqLM, UMT5Config

import fastllm
from fastllm import QuantLinear
from fastllm.patch import CoverageError, NotSupportedError

QUIET = {"quiet": True}


def refused(model, error, match, loaded=False, **options):
    shown, patch = str(model), model.__dict__.get("_fastllm")
    with pytest.raises(error, match=match):
        fastllm.optimize(model, **{**QUIET, **options})
    assert str(model) == shown and model.__dict__.get("_fastllm") is patch
    assert loaded == (patch is not None) == hasattr(model, "hf_quantizer")


def test_training_mode_is_refused():
    refused(build("llama").train(), NotSupportedError, r"training mode; call model.eval\(\)")


def test_low_coverage_is_refused():
    model = build("mixtral")
    match = r"only \d+\.\d% of .* MixtralForCausalLM .* below min_coverage=50%.*mlp.experts .*matches exclude"
    refused(model, CoverageError, match, exclude="*.experts")
    refused(model, CoverageError, "only 0.0%", include="nothing", min_coverage=0.0)
    fastllm.optimize(model, exclude="*.experts", min_coverage=0.0, **QUIET)


@pytest.mark.parametrize("where", ["model.layers.1.mlp.up_proj", "lm_head"])
def test_nan_is_refused_and_all_is_undone(where):
    model = build("llama")
    model.get_submodule(where).weight.data[3, 4] = float("nan")
    refused(model, ValueError, f"{where}: the weight has 1 values that are NaN or infinite.*exclude='{where}'")


def test_nan_in_an_expert_is_refused():
    model = build("mixtral")
    model.model.layers[1].mlp.experts.down_proj.data[2, 0, 0] = float("inf")
    refused(model, ValueError, r"model.layers.1.mlp.experts: ")


def test_meta_weights_are_refused():
    with torch.device("meta"):
        model = build("llama")
    refused(model, NotSupportedError, "model.embed_tokens.weight is on the meta device.*load the weights first")


def test_offloaded_weights_are_refused(tmp_path):
    from accelerate import cpu_offload

    model = build("llama")
    cpu_offload(model)
    refused(model, NotSupportedError, r"offloaded by accelerate; load the model with device_map=\{'': device\}")


def test_hooks_that_do_not_offload_are_kept():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = build("llama")
    logits = outputs(model)
    for name in ("model.layers.0.mlp.up_proj", "lm_head"):
        add_hook_to_module(model.get_submodule(name), AlignDevicesHook(execution_device="cpu", io_same_device=True))
    fastllm.optimize(model, "int8", **QUIET)
    assert isinstance(model.lm_head, QuantLinear) and isinstance(model.lm_head._hf_hook, AlignDevicesHook)
    assert (outputs(model) - logits).float().norm() < 0.05 * logits.float().norm()
    fastllm.restore(model)
    assert_equal(outputs(model), logits)


@pytest.mark.parametrize("origin", ["bitsandbytes.nn", "gptqmodel.nn_modules"])
def test_a_quantized_module_of_others_is_refused(origin):
    model = build("llama")
    model.model.layers[0].mlp.up_proj = type("Linear4bit", (nn.Linear,), {"__module__": origin})(128, 256, bias=False)
    refused(model, NotSupportedError, f"model.layers.0.mlp.up_proj is already quantized by {origin.partition('.')[0]}")


def test_a_quantized_parameter_of_others_is_refused():
    model = build("llama")
    kind = type("Int8Tensor", (nn.Parameter,), {})
    model.lm_head.weight = kind(model.lm_head.weight.data, requires_grad=False)
    refused(model, NotSupportedError, "lm_head.weight is a Int8Tensor, not a plain parameter.*torchao")


def test_a_quantized_checkpoint_is_refused():
    model = build("llama")
    model.hf_quantizer = type("Q", (), {"quantization_config": type("C", (), {"quant_method": "gptq"})()})()
    with pytest.raises(NotSupportedError, match="already quantized by 'gptq'; load the dense checkpoint"):
        fastllm.optimize(model, **QUIET)


@pytest.mark.parametrize(
    "prompt", [torch.zeros(4, dtype=torch.long), torch.full((1, 4), 512), torch.zeros(1, 0).long()]
)
def test_a_wrong_prompt_is_refused(prompt):
    refused(build("llama"), ValueError, r"token ids \[1, T\] below 512", prompt=prompt)


def test_subclasses_and_small_classifiers_are_left_alone():
    model = build("bert")
    model.pooler.dense = type("LoraLinear", (nn.Linear,), {})(128, 128).bfloat16()
    model.encoder.layer[0].output.dense = nn.Linear(256, 3).bfloat16()
    report = fastllm.optimize(model, "int8", dry_run=True, **QUIET)
    why = {d.name: d.reason for d in report.plan.skipped}
    assert "LoraLinear is a subclass of Linear" in why["pooler.dense"]
    assert why["encoder.layer.0.output.dense"] == "3 outputs: too small to matter"
    assert "3-D weights" in fused_reason()


def fused_reason():
    """A 3-D parameter that does not declare itself as transformers' experts do."""
    model = build("llama")
    model.model.layers[0].mlp.weird = nn.Module()
    model.model.layers[0].mlp.weird.weights = nn.Parameter(torch.randn(4, 128, 128).bfloat16())
    report = fastllm.optimize(model, dry_run=True, **QUIET)
    return next(d.reason for d in report.plan.skipped if d.name.endswith("weird"))


def test_a_head_that_must_stay_tied_is_left_alone(tmp_path):
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4, "vocab_size": 512}
    config = UMT5Config(**sizes, num_decoder_layers=1, decoder_start_token_id=0, tie_word_embeddings=True)
    model = AutoModelForSeq2SeqLM.from_config(config, dtype=torch.bfloat16).eval()
    report = fastllm.optimize(model, "int8", min_coverage=0.0, **QUIET)
    head = next(d for d in report.plan.decisions if d.kind == "head")
    assert head.format is None and "computes something else when its head is not tied" in head.reason
    assert type(model.lm_head) is nn.Linear and model.config.tie_word_embeddings
    fastllm.restore(model).save_pretrained(tmp_path)
    loaded = fastllm.load(tmp_path, weights="int8", quiet=True)
    assert type(loaded.lm_head) is nn.Linear and loaded.lm_head.weight is loaded.shared.weight


def test_experts_that_do_not_run_are_refused(tmp_path):
    # 200 bytes a row: torch's grouped product wants a multiple of 16
    tiny.build("mixtral", intermediate_size=100).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="layers.0.mlp.experts: MixtralExperts does not run as it is: .*exclude="):
        fastllm.load(tmp_path, weights="int8", quiet=True)


def test_a_loaded_packed_model_is_not_packed_again(tmp_path):
    model = build("llama")
    fastllm.optimize(model, "int8", **QUIET)
    model.save_pretrained(tmp_path)
    loaded = fastllm.load(tmp_path, quiet=True)
    refused(loaded, CoverageError, "already quantized by fastllm.*start from the dense checkpoint", loaded=True)


@pytest.mark.parametrize("option", [{"device_map": "cpu"}, {"weights": "int8"}, {"attn_implementation": "eager"}])
def test_a_gguf_file_takes_no_options(tmp_path, option):
    with pytest.raises(ValueError, match=f"without {next(iter(option))}=; call model.to"):
        fastllm.load(tmp_path / "model.gguf", **option)
