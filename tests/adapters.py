"""Packed models with adapters of PEFT's, and what the tests of these compare."""

import copy

import tiny
import torch
from close import assert_close
from families import build, ids, rough
from peft import LoraConfig, PeftModel, get_peft_model

import fastllm
from fastllm.nn.lora import QuantLoraLinear
from fastllm.ops import DYNAMIC_LAYOUTS, LAYOUTS

LORA = {"r": 4, "lora_alpha": 16, "init_lora_weights": False}
OPTIONS = {"lm_head": False, "quiet": True}
PLAIN = {"attention": False, "fuse": False, "decode": False}


def exact_products(monkeypatch):
    """Products in the dtype of x, so that float32 is compared as tightly as float32 can be."""

    def rest(format, *_):
        return DYNAMIC_LAYOUTS["int8-rest"] if format.activations else LAYOUTS["rest"]

    monkeypatch.setattr("fastllm.nn.linear.layout_for", rest)


def adapt(model, targets="all-linear", name="default", seed=0, **settings):
    """With an adapter whose values depend on nothing but the seed."""
    torch.manual_seed(seed)
    config = fastllm.lora_config(LoraConfig(target_modules=targets, **(LORA | settings)), model)
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
        return model
    return get_peft_model(model, config, adapter_name=name).eval()


def packed(weights="int4-g32", family="llama", dtype=torch.float32, device="cpu", **options):
    """A packed model, and the dense one that it stands for."""
    model = rough(build(family, dtype)).to(device)
    like = copy.deepcopy(model)
    fastllm.optimize(model, weights, **(OPTIONS | options))
    return model, tiny.dense_twin(model, like)


def pair(weights="int4-g32", family="llama", device="cpu", **settings):
    """The same adapter on a packed model and on its dense twin."""
    return tuple(adapt(m, **settings) for m in packed(weights, family, device=device))


def tokens(model):
    return ids().to(next(model.parameters()).device)


@torch.no_grad()
def answer(model):
    return model(tokens(model)).logits


def generate(model):
    return model.generate(input_ids=tokens(model), max_new_tokens=8, do_sample=False)


def gradients(model):
    model.zero_grad()
    model(tokens(model), labels=tokens(model)).loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert grads and all("lora_" in name for name in grads)
    return grads


def assert_all_close(got, want, **bounds):
    assert got.keys() == want.keys()
    for name, t in want.items():
        assert t.norm() > 0
        assert_close(got[name], t.double(), dtype=torch.float32, **bounds)


def adapted(model):
    return [name for name, m in model.named_modules() if isinstance(m, QuantLoraLinear)]


@torch.no_grad()
def is_fused(model):
    return all(
        m.forward.__self__.stands_in() for layer in model.model.layers for m in (layer, layer.self_attn, layer.mlp)
    )
