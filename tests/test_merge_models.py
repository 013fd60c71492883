"""Models with merged projections: saved, loaded, copied and adapted as if nothing had been merged."""

import copy
import pickle

import pytest
import torch
from close import assert_close, assert_equal
from families import build, ids, rough
from pairs import OPTIONS, answer, fused, same
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

import fastllm
from fastllm.patch.report import memory


def is_merged(model):
    """Whether the projections of each layer lie in one tensor."""
    return all(
        len({layer.self_attn.get_submodule(f"{n}_proj").weight.untyped_storage().data_ptr() for n in "qkv"}) == 1
        for layer in model.model.layers
    )


@pytest.mark.parametrize("size", ["50GB", "200KB"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_saving_and_loading(family, size, tmp_path):
    model, plain = fused(family)
    assert is_merged(model)
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (size == "200KB")
    bytes_on_disk = sum(f.stat().st_size for f in tmp_path.glob("*.safetensors"))
    assert bytes_on_disk < 1.02 * memory(plain)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert loaded.config._attn_implementation != "fastllm"
    for name, t in plain.state_dict().items():
        assert_equal(loaded.state_dict()[name], t)
    assert is_merged(model)
    same(model, plain)


@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_saving_and_loading_packed_weights(weights, tmp_path):
    model = rough(build("qwen2"))
    fastllm.optimize(model, weights, group_size=32 if weights == "int4" else None, quiet=True)
    want, fused_logits = copy.deepcopy(model.state_dict()), answer(model)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    for loaded in (fastllm.load(tmp_path), fastllm.load(tmp_path, attention=False, fuse=False, decode=False)):
        state = loaded.state_dict()
        assert state.keys() == want.keys()
        for name, t in want.items():
            assert_equal(state[name], t)
        assert_close(answer(loaded), fused_logits.double(), worst=0.1, rms=0.02, dtype=torch.bfloat16)


def test_no_second_copy_is_kept():
    model = build("llama", torch.float32)
    before = memory(model)
    report = fastllm.optimize(model, None, quiet=True)
    assert is_merged(model) and report.memory_after == report.memory_before == before == memory(model)
    answer(model.bfloat16())
    assert memory(model) < 0.51 * before
    for layer in model.model.layers:
        whole = layer.self_attn.forward.__self__.qkv.whole.w
        assert whole.data_ptr() == layer.self_attn.q_proj.weight.data_ptr() and whole.dtype == torch.bfloat16
    fastllm.restore(model)
    assert not is_merged(model) and memory(model) < 0.51 * before


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("weights", [None, "int8"])
def test_copies_are_on_their_own(way, weights):
    model = rough(build("llama"))
    fastllm.optimize(model, weights, quiet=True)
    logits = answer(model)
    twin = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert_equal(answer(twin), logits)
    assert twin.generate.__self__.model is twin
    for name, module in twin.named_modules():
        if own := module.__dict__.get("forward"):
            assert own.__self__.module is module, name
    with torch.no_grad():
        for p in twin.parameters():
            if p.is_floating_point():
                p.zero_()
    assert_equal(answer(model), logits)
    assert not answer(twin).any()
    twin = copy.deepcopy(model)
    fastllm.restore(twin)
    assert "generate" not in twin.__dict__ and not [m for m in twin.modules() if "forward" in m.__dict__]
    assert_equal(answer(model), logits)
    assert "generate" in model.__dict__


def test_adding_to_data_takes_effect():
    model, plain = fused("llama")
    for m in (model, plain):
        m.model.layers[0].self_attn.q_proj.weight.data += 0.1
        m.model.layers[1].mlp.gate_proj.weight.data.mul_(2)
    same(model, plain)


LORA = {"lora_alpha": 16, "lora_dropout": 0.0, "init_lora_weights": False}


@pytest.mark.parametrize("targets", [["q_proj"], ["up_proj", "v_proj"], ["o_proj", "down_proj"]], ids=str)
def test_adapters_are_not_passed_by(targets):
    model, plain = fused("llama", fuse=True)
    adapted = []
    for m in (model, plain):
        torch.manual_seed(0)
        adapted.append(get_peft_model(m, LoraConfig(r=4, target_modules=targets, **LORA)).eval())
    a, b = adapted
    same(a, b)
    assert (answer(a) - answer(b.get_base_model())).norm() < 1e-3  # the base model has the adapters inside
    grads = []
    for m in adapted:
        m(ids(), labels=ids()).loss.backward()
        grads.append({name: p.grad for name, p in m.named_parameters() if p.requires_grad})
    assert len(grads[0]) == 4 * len(targets)
    for name, want in grads[1].items():
        assert want.norm() > 0
        assert_close(grads[0][name], want.double(), worst=1e-3, rms=1e-4, dtype=torch.float32)
    for m in adapted:
        m.train()
        optimizer = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1)
        optimizer.step()
        m.eval()
    same(a, b)
    with a.disable_adapter(), b.disable_adapter():
        same(a, b)
    merged = [m.merge_and_unload() for m in adapted]
    same(*merged)
    assert merged[0] is model and is_merged(model)
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear


def test_adapters_that_were_there_before_are_not_passed_by():
    model = rough(build("llama", torch.float32))
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "gate_proj"], **LORA)).eval()
    want = answer(adapted)
    base = adapted.get_base_model()
    report = fastllm.optimize(base, None, **OPTIONS)
    assert report.speedups.fusions.count("attention")[0] == report.speedups.fusions.count("mlp")[0] == 0
    assert_close(answer(adapted), want.double(), dtype=torch.float32)
    fastllm.restore(base)
    assert_equal(answer(adapted), want)
