"""What `fastllm.prune` refuses, with the model as it was; and that it is all done or nothing."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from pruning_cases import LAYERS, build, data, same, state
from transformers import AutoModelForSeq2SeqLM, BertForMaskedLM, UMT5Config, ViTConfig, ViTModel

import fastllm
from fastllm.compress import prune_model, prune_repair
from fastllm.compress.prune_config import without_layers
from fastllm.compress.prune_edits import Edits
from fastllm.compress.prune_layers import Judge
from fastllm.patch import NotSupportedError

VISION = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 8, "image_size": 8}


def refused(
    model: Any, match: str | None, error: type[Exception] = ValueError, calib: Any = None, **asked: Any
) -> None:
    before = state(model)
    with pytest.raises(error, match=match):
        fastllm.prune(model, calib=data() if calib is None else calib, quiet=True, **asked)
    assert same(state(model), before)


@pytest.fixture(scope="module")
def llama() -> Any:
    """One model for many: they leave it as it is."""
    return build("llama")


@pytest.mark.parametrize("name", ["layers", "ffn", "heads"])
@pytest.mark.parametrize("share", [0.0, 1.0, -0.25, 1.5, float("nan"), True, "0.25"])
def test_what_is_no_share_is_refused(name: str, share: Any, llama: Any) -> None:
    refused(
        llama,
        rf"{name}=.*(share of .* to remove, above 0 and below 1|at most 2 can be removed)",
        **{name: share},
    )


ASKED = [
    ({}, r"what is to be removed\? give layers=, ffn= or heads="),
    ({"layers": 0}, "layers=0: of 4 layers at most 2 can be removed"),
    ({"layers": 3}, "layers=3: of 4 layers at most 2 can be removed: the first and last stay"),
    ({"layers": 0.9}, "at most 2 can be removed"),
    ({"layers": 0.1}, "layers=0.1: less than one of 4 layers; at least 0.25 removes one"),
    ({"layers": [4]}, "layers=.4.: give different numbers of layers from 0 to 3"),
    ({"layers": [1, 1]}, "different numbers"),
    ({"layers": [-1]}, "from 0 to 3"),
    ({"layers": []}, "different numbers"),
    ({"layers": [1.0]}, "different numbers"),
    ({"layers": [0, 1, 2, 3]}, "are all 4 layers"),
    ({"ffn": 0.001}, "ffn=0.001: less than one of 256 neurons"),
    ({"ffn": 0.5, "multiple": 0}, "multiple=0: of what the neurons left are to be a multiple, 1 or more"),
    ({"heads": 0.3}, "heads=0.3: less than one of 2 groups of heads; at least 0.5 removes one"),
    ({"ffn": 0.5, "out": "there"}, "out=, dtype= and device= go with the path of a checkpoint"),
    ({"ffn": 0.5, "length": 1}, "no sample of the calibration data has two tokens"),
    ({"ffn": 0.5, "calib": torch.full((2, 8), 512)}, "token 512, outside of 0 to 511"),
    ({"ffn": 0.5, "calib": [[5]]}, "has 1 tokens"),
]


@pytest.mark.parametrize("asked, match", ASKED, ids=[match[:40] for _, match in ASKED])
def test_what_leaves_nothing_is_refused(asked: dict[str, Any], match: str, llama: Any) -> None:
    refused(llama, match, **asked)


def test_a_text_needs_the_tokenizer() -> None:
    refused(build("llama"), "needs the tokenizer", TypeError, calib="some text", ffn=0.5)


FAMILIES = [
    ("mixtral", {"ffn": 0.5}, r"ffn=0.5: model.layers.0 has a mixture of experts.*layers= and heads= can be removed"),
    (
        "gpt2",
        {"heads": 0.5},
        "heads of GPT2LMHeadModel cannot be removed: transformer.h.0 has no linear layers for queries",
    ),
    ("phi3", {"heads": 0.5}, "one projection makes all three"),
    ("olmo2", {"heads": 0.5}, "or a norm spans all heads"),
    ("bert", {"heads": 0.5}, r"heads of BertModel cannot .*query.weight would be .*no head_dim"),
    (
        "bert",
        {"heads": 0.25},
        "heads=0.25: with 3 heads left, .*not a multiple .*shares that stock .* takes: 0.5, 0.75",
    ),
]


@pytest.mark.parametrize("family, asked, match", FAMILIES, ids=[f"{f}-{a}" for f, a, _ in FAMILIES])
def test_parts_that_cannot_be_cut_are_refused(family: str, asked: dict[str, float], match: str) -> None:
    refused(build(family), match, **asked)


def test_models_that_are_not_as_they_should_be_are_refused() -> None:
    refused(build("llama").train(), "training mode", NotSupportedError, ffn=0.5)
    with torch.device("meta"):
        model = tiny.build("llama")
    with pytest.raises(NotSupportedError, match="on the meta device"):
        fastllm.prune(model, ffn=0.5, calib=data())
    model = build("llama")
    fastllm.optimize(model, "int8", quiet=True, attention=False, fuse=False, decode=False)
    refused(model, "optimized already; fastllm.restore", NotSupportedError, ffn=0.5)
    del model._fastllm
    refused(model, "is quantized already; prune the dense model", NotSupportedError, ffn=0.5)
    model = build("llama")
    model.hf_quantizer = type("Q", (), {"quantization_config": type("C", (), {"quant_method": "gptq"})()})()
    refused(model, "already quantized by 'gptq'", NotSupportedError, ffn=0.5)


def test_models_of_other_makes_are_refused() -> None:
    small = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    model = AutoModelForSeq2SeqLM.from_config(UMT5Config(**small)).eval()
    refused(model, "has an encoder and a decoder", calib=torch.ones(2, 8).long(), layers=1)
    model = build("llama")
    model.model.layers[1].mlp = model.model.layers[2].mlp
    refused(model, "layers of model.layers share parameters", layers=1)
    model = build("llama")
    model.config.num_hidden_layers = 5
    refused(model, "model.layers has 4 layers, and the configuration tells of 5", layers=1)
    model = build("llama")
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(128, 192, bias=False)
    refused(model, r"mlp.up_proj.weight is \[192, 128\], and \(256, 128\) by the model's configuration", ffn=0.5)


@pytest.mark.parametrize(
    "model", [torch.nn.Linear(2, 2), ViTModel(ViTConfig(**VISION)).eval(), None], ids=["linear", "vision", "none"]
)
def test_what_reads_no_tokens_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="is no Hugging Face model that reads tokens"):
        fastllm.prune(model, layers=1, calib=data())


def test_a_norm_between_neurons_is_not_cut() -> None:
    """What looks like a feed-forward part, but whose neurons know of each other."""
    model = build("llama")
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.Softmax(-1)
    refused(model, "neurons of LlamaForCausalLM cannot be removed: model.layers.0.mlp", ffn=0.5)


def test_a_layer_whose_kind_follows_from_its_place_is_not_removed() -> None:
    """Qwen's mixtures name the dense layers by number: what is behind would change its kind."""
    model = build("qwen3-moe", mlp_only_layers=[2])
    refused(model, r"layers=\[1\] cannot be removed: model.layers", layers=[1])
    report = fastllm.prune(model, layers=[3], calib=data(), quiet=True)
    assert report.settings == {"num_hidden_layers": (4, 3)}
    model = build("qwen3-moe", mlp_only_layers=[2])
    refused(model, "no further layer can be removed after 0 of 2: model.layers", layers=2)


def test_nan_is_refused() -> None:
    model = build("llama")
    model.model.layers[2].mlp.up_proj.weight.data[3, 4] = float("nan")
    refused(model, "model.layers.2.mlp.down_proj: what it answers is not finite", ffn=0.5)
    refused(model, "loss on the calibration data is nan as it is", layers=[1])


def failing(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, error: BaseException) -> None:
    real: Callable[..., Any] = getattr(owner, name)
    calls = []

    def fail(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, fail)


@pytest.mark.parametrize("family", ["gemma3", "gpt2", "bert"])
@pytest.mark.parametrize(
    "owner, name, call",
    [(prune_repair, "repair", 1), (prune_repair, "repair", 3), (prune_model, "adopt", -1), (Judge, "loss", -1)],
    ids=["first", "third", "adopt", "loss"],
)
def test_it_is_all_or_nothing(owner: Any, name: str, call: int, family: str, monkeypatch) -> None:
    """An interrupt at any time leaves the very parameters, attributes and configuration that there were."""
    asked = {"layers": 1, "ffn": 0.5} | ({"heads": 0.5} if family == "gemma3" else {})
    counts = []
    with monkeypatch.context() as patched:
        real = getattr(owner, name)
        patched.setattr(owner, name, lambda *args, **kwargs: counts.append(1) or real(*args, **kwargs))
        fastllm.prune(build(family), calib=data(), quiet=True, **asked)
    failing(monkeypatch, owner, name, call if call > 0 else len(counts), KeyboardInterrupt())
    refused(build(family), None, KeyboardInterrupt, **asked)


def test_a_plan_leaves_no_trace(monkeypatch) -> None:
    """Trials with cut blocks and bypassed layers are over before anything is changed."""
    model = build("gemma3")
    before = state(model)

    def stop(*args: Any) -> None:
        assert same(state(model), before)
        raise KeyboardInterrupt

    monkeypatch.setattr(prune_model, "_carry_out", stop)
    with pytest.raises(KeyboardInterrupt):
        fastllm.prune(model, calib=data(), quiet=True, layers=1, ffn=0.5, heads=0.5)


def test_edits_go_back_in_their_order() -> None:
    model, edits = build("llama"), Edits()
    before = state(model)
    attention = model.model.layers[0].self_attn
    for number in (7, 8):
        edits.set(attention, "layer_idx", number)
        edits.set(model.config, "something_new", number)
        edits.parameter(attention.q_proj, "weight", torch.zeros(number, 128))
    edits.keep(model.model.layers, [3, 1])
    assert len(model.model.layers) == 2 and model.model.layers[1].self_attn.layer_idx == 1
    assert not same(state(model), before)
    edits.undo()
    assert same(state(model), before) and not hasattr(model.config, "something_new")
    edits.undo()
    assert same(state(model), before) and [n for n, _ in model.model.layers.named_children()] == list("0123")


def test_lists_that_say_nothing_of_layers_stay() -> None:
    config = build("gemma3").config
    config.eos_token_id, config.some_sizes, config.others = [1, 2, 3, 4], (5, 6, 7, 8), [1, 2]
    assert without_layers(config, [0, 3]) == {
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "some_sizes": (5, 8),
    }


def test_a_masked_language_model_is_not_asked_for_the_next_token(caplog) -> None:
    caplog.set_level(logging.ERROR)
    sizes = {
        k: v for k, v in tiny.SIZES.items() if k not in ("num_key_value_heads", "head_dim", "tie_word_embeddings")
    }
    model = BertForMaskedLM(tiny.build("bert").config.__class__(**sizes | {"num_hidden_layers": LAYERS})).eval()
    report = fastllm.prune(model, layers=1, ffn=0.5, calib=data() % 64, quiet=True)
    assert not report.predicts and report.before.loss == 0 < report.after.loss and not caplog.records
    assert report.settings == {"num_hidden_layers": (4, 3), "intermediate_size": (256, 128)}
