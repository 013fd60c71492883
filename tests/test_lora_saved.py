"""Adapters of packed models: saved, loaded, merged elsewhere, refused; and the configuration that PEFT needs."""

import copy
import importlib.util
import json
import pickle
import sys

import pytest
import torch
from close import assert_close, assert_equal
from families import build, rough
from torch import nn

import fastllm
from fastllm.nn import BlockSparseLinear, QuantLinear

pytest.importorskip("peft")
from adapters import adapt, adapted, answer, exact_products, is_fused, packed
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model

from fastllm.nn.lora import QuantLoraLinear


@pytest.fixture
def exact(monkeypatch):
    exact_products(monkeypatch)


# Saved, loaded, merged.


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_saving_and_loading_onto_a_loaded_model(settings, tmp_path):
    base = rough(build("llama"))
    fastllm.optimize(base, "int4", group_size=32, quiet=True)
    base.save_pretrained(tmp_path / "base")
    trained = adapt(fastllm.load(tmp_path / "base"), **settings)
    want = answer(trained)
    trained.save_pretrained(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["peft_type"] == "LORA" and len(saved["target_modules"]) == 14
    for given in (tmp_path / "adapter", str(tmp_path / "adapter"), PeftConfig.from_pretrained(tmp_path / "adapter")):
        model = fastllm.load(tmp_path / "base")
        loaded = PeftModel.from_pretrained(model, tmp_path / "adapter", config=fastllm.lora_config(given, model))
        assert_equal(answer(loaded), want)
        assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    loaded.load_adapter(tmp_path / "adapter", "again")
    loaded.set_adapter("again")
    assert_equal(answer(loaded), want)
    model = fastllm.load(tmp_path / "base")
    model.add_adapter(fastllm.lora_config(tmp_path / "adapter", model))  # transformers' own way in
    assert len(adapted(model)) == 14


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies(way):
    model = adapt(packed()[0])
    want = answer(model)
    twin = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert_equal(answer(twin), want)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.zero_()
    assert_equal(answer(twin), want)


def test_merging_is_refused_and_done_on_the_dense_model(tmp_path, exact):
    model, dense = packed()
    peft = adapt(model)
    want = answer(peft)
    for merge in (peft.merge_and_unload, peft.merge_adapter):
        with pytest.raises(
            NotImplementedError, match=r"adapter default cannot be merged into int4-g32 weights: .*unload"
        ):
            merge()
    assert_equal(answer(peft), want)
    peft.save_pretrained(tmp_path)
    merged = PeftModel.from_pretrained(dense, tmp_path).merge_and_unload()
    assert type(merged.model.layers[0].mlp.up_proj) is nn.Linear
    assert_close(answer(merged), want.double(), dtype=torch.float32)
    assert peft.unload() is model


@pytest.mark.parametrize("start", ["pissa", "olora", "lora_ga", "mica"])
def test_starts_that_need_the_dense_weight_are_refused(start):
    model = packed("int8")[0]
    want = answer(model)
    with pytest.raises(NotImplementedError, match=f"init_lora_weights='{start}' needs the dense weight"):
        adapt(model, ["q_proj"], init_lora_weights=start)
    assert is_fused(model)
    assert_equal(answer(model), want)


def test_other_variants_are_refused():
    with pytest.raises(ValueError, match="unsupported variant combination.*alora_invocation_tokens"):
        adapt(packed("int8")[0], ["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[1, 2])


@pytest.mark.parametrize("start", [True, "gaussian", "orthogonal"])
def test_starts_that_leave_the_weight_alone(start):
    layer = QuantLinear.from_linear(nn.Linear(64, 32))
    model = adapt(nn.Sequential(layer), ["0"], init_lora_weights=start)
    assert torch.isfinite(model(torch.randn(2, 64))).all()


# The configuration.


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3-moe"])
def test_all_linear_means_what_it_means_on_the_dense_model(family):
    model, given = rough(build(family)), LoraConfig(target_modules="all-linear", fan_in_fan_out=family == "gpt2")
    dense = get_peft_model(copy.deepcopy(model), copy.copy(given)).get_base_model()
    want = {name for name, m in dense.named_modules() if hasattr(m, "base_layer")}
    want = {name for name in want if ".mlp.experts" not in name and not name.endswith(".mlp.gate")}  # no linear layers
    fastllm.optimize(model, "int8", quiet=True)  # the head too, and experts
    config = fastllm.lora_config(given, model)
    assert config.target_modules == want and given.target_modules == "all-linear"
    peft = get_peft_model(model, config)
    assert set(adapted(model)) == want
    assert fastllm.lora_config(given, peft).target_modules == want


@pytest.mark.parametrize("task", ["SEQ_CLS", None])
def test_the_head_of_a_classifier_is_left_out(task):
    model = nn.ModuleDict({"body": QuantLinear.from_linear(nn.Linear(32, 32)), "score": nn.Linear(32, 2)})
    config = fastllm.lora_config(LoraConfig(target_modules="all-linear", task_type=task), model)
    assert config.target_modules == ({"body"} if task else {"body", "score"})


def test_adapters_of_packed_experts_are_refused():
    model = rough(build("mixtral"))
    wanted = [{"target_parameters": ["experts.gate_up_proj"]}, {"target_modules": ["w1", "w2", "w3", "q_proj"]}]
    for given in wanted:
        fastllm.lora_config(LoraConfig(**given), model)
    fastllm.optimize(model, "int8", quiet=True)
    for given in wanted:
        with pytest.raises(ValueError, match=r'gate_up_proj: experts that are packed .*exclude="\*.experts"'):
            fastllm.lora_config(LoraConfig(**given), model)
    fastllm.restore(model)
    fastllm.optimize(model, "int8", exclude="*.experts", min_coverage=0, quiet=True)
    fastllm.lora_config(LoraConfig(**wanted[0]), model)


def test_the_configuration_is_a_copy_and_keeps_what_else_is_registered():
    given = LoraConfig(target_modules=["q_proj"])
    given._register_custom_module({nn.Bilinear: nn.Identity})
    config = fastllm.lora_config(given, nn.Identity())
    packed = dict.fromkeys((QuantLinear, BlockSparseLinear), QuantLoraLinear)
    assert config._custom_modules == {nn.Bilinear: nn.Identity, **packed}
    assert QuantLinear not in given._custom_modules


def test_bad_configurations():
    model = nn.Identity()
    with pytest.raises(TypeError, match=r"peft.LoraConfig, got IA3Config"):
        fastllm.lora_config(IA3Config(), model)
    with pytest.raises(TypeError, match="revision: only for an adapter"):
        fastllm.lora_config(LoraConfig(), model, revision="main")


def test_without_it_peft_refuses_and_leaves_the_model_as_it_was():
    model = packed("int8")[0]
    want = answer(model)
    with pytest.raises(ValueError, match=r"QuantLinear.*int8.* is not supported"):
        get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="target_modules"):
        get_peft_model(model, LoraConfig(target_modules="all-linear"))
    assert is_fused(model)
    assert_equal(answer(model), want)
    assert adapted(adapt(model, ["q_proj"]))


def test_without_peft(monkeypatch):
    assert "lora_config" in fastllm.__all__
    file = sys.modules["fastllm.nn.lora"].__file__
    monkeypatch.setitem(sys.modules, "peft", None)
    spec = importlib.util.spec_from_file_location("fastllm.nn.alone", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # imports all the same
    with pytest.raises(ImportError, match=r"needs PEFT, as of 0.21 \(.*peft.*\): pip install -U peft"):
        module.lora_config("adapter", nn.Identity())
