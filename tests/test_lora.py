"""LoRA by PEFT on packed layers: what it computes and what it learns, beside all else that fastllm does to a model."""

import warnings

import pytest
import replay
import torch
from close import assert_close, assert_equal
from torch import nn

import fastllm
from fastllm.nn import QuantLinear

pytest.importorskip("peft")
from adapters import (
    LORA,
    PLAIN,
    adapt,
    adapted,
    answer,
    assert_all_close,
    exact_products,
    generate,
    gradients,
    is_fused,
    packed,
    pair,
    tokens,
)
from families import build
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

from fastllm.nn.lora import QuantLoraLinear
from fastllm.patch.errors import NotSupportedError


@pytest.fixture
def exact(monkeypatch):
    exact_products(monkeypatch)


# What a layer computes, on any device.


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("format", ["int4", "int4-g32", "int8", "int8-a8", "fp8", "fp8-a8"])
def test_a_layer_is_its_base_and_a_product_of_two_small_ones(format, bias, device):
    linear = nn.Linear(128, 96, bias=bias, device=device)
    base = QuantLinear.from_linear(linear, format)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = adapt(nn.Sequential(base), ["0"]).base_model.model[0]
    assert isinstance(layer, QuantLoraLinear) and layer.get_base_layer() is base
    x = torch.randn(2, 5, 128, device=device, requires_grad=True)
    grad = torch.randn(2, 5, 96, device=device)
    layer(x).backward(grad)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    inner = x.detach() @ a.detach().T
    with torch.no_grad():
        assert_close(layer(x), (base(x) + 4 * (inner @ b.T)).double(), dtype=torch.float32)
    rows, inner = grad.flatten(0, 1), inner.flatten(0, 1)
    assert_close(b.grad, (4 * rows.T @ inner).double(), dtype=torch.float32)
    assert_close(a.grad, (4 * (rows @ b).T @ x.flatten(0, 1)).detach().double(), dtype=torch.float32)
    want = grad.double() @ base.dequantize().double() + 4 * (grad @ b @ a).double()
    assert_close(x.grad, want.detach(), worst=0.1, rms=0.01, dtype=torch.float32)
    assert base.weight_scale.grad is None and base.weight_packed.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_and_adapters_learn_in_float32(dtype, device):
    base = QuantLinear.from_linear(nn.Linear(128, 96, device=device, dtype=dtype))
    layer = adapt(nn.Sequential(base), ["0"]).base_model.model[0]
    assert layer.lora_A["default"].weight.dtype == torch.float32
    x = torch.randn(3, 128, device=device, dtype=dtype)
    a, b = (layer.get_submodule(f"lora_{which}.default").weight.detach().double() for which in "AB")
    assert_close(layer(x), base(x).double() + 4 * x.double() @ (b @ a).T, dtype=dtype)


# What a model computes and learns.


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("weights", ["int4-g32", "int8"])
def test_a_model_is_the_dense_one_with_the_same_adapter(weights, family, exact, device):
    a, b = pair(weights, family, device, fan_in_fan_out=family == "gpt2")
    assert len(adapted(a)) == (8 if family == "gpt2" else 14)
    assert_close(answer(a), answer(b).double(), dtype=torch.float32)
    assert (answer(a) - answer(a.get_base_model())).norm() == 0  # the base has the adapters inside
    assert_all_close(gradients(a), gradients(b), worst=2e-3, rms=1e-4)


@pytest.mark.parametrize("weights", ["int4", "int8", "int8-a8"])
def test_training_lowers_the_loss(weights, device):
    model = packed(weights, device=device)[0]
    base = answer(model)
    peft = adapt(model, init_lora_weights=True)
    assert_close(answer(peft), base.double(), worst=0.1, rms=0.02, dtype=torch.float32)  # not fused any more
    assert_equal(answer(peft), answer(peft.base_model.model))
    before = {name: t.clone() for name, t in model.state_dict().items() if "lora_" not in name}
    peft.train()
    optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(6):
        loss = peft(tokens(peft), labels=tokens(peft)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.3 and sorted(losses, reverse=True) == losses
    for name, t in before.items():
        assert_equal(model.state_dict()[name], t)
    peft.eval()
    with peft.disable_adapter():
        assert_close(answer(peft), base.double(), worst=0.1, rms=0.02, dtype=torch.float32)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, exact):
    model = adapt(packed()[0]).train()
    want = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    assert_all_close(gradients(model), want)


@pytest.mark.parametrize(
    "dtype, train", [(t, train) for t in (torch.float32, torch.bfloat16) for train in (True, False)]
)
@pytest.mark.parametrize("weights", ["int4-g32", {"*.mlp.*": "int8", "*.q_proj": "int8"}], ids=["all", "some"])
def test_autocast(weights, dtype, train):
    """Dense layers then give bfloat16, packed ones what they are given."""
    model = adapt(packed(weights, dtype=dtype)[0], ["q_proj", "down_proj"]).train(train)
    want, logits = gradients(model), answer(model)
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(model)
        assert_close(answer(model).float(), logits.double(), worst=0.2, rms=0.03, dtype=torch.float32)
    for name, t in want.items():
        assert torch.cosine_similarity(got[name].flatten(), t.flatten(), 0) > 0.98


def test_dropout_acts_in_training_only(exact):
    plain = adapt(packed()[0])
    model = adapt(packed()[0], lora_dropout=0.5)
    assert_equal(answer(model), answer(plain))
    model.train()
    first, second = answer(model), answer(model)
    assert (first - second).norm() > 1e-3 * first.norm()
    gradients(model)


@pytest.mark.parametrize(
    "settings", [{"use_rslora": True}, {"use_dora": True}, {"use_dora": True, "lora_dropout": 0.3}]
)
def test_variants(settings, exact):
    a, b = pair(**settings)
    for train in (False, True):
        a.train(train), b.train(train)
        torch.manual_seed(1)
        got = gradients(a)
        torch.manual_seed(1)
        want = gradients(b)
        assert_all_close(got, want, worst=2e-3, rms=1e-4)
    assert len(got) == 14 * (3 if "use_dora" in settings else 2)
    a.eval(), b.eval()
    assert_close(answer(a), answer(b).double(), dtype=torch.float32)


def test_what_8_bit_training_prepares_changes_nothing(exact):
    model = packed("int8", dtype=torch.bfloat16)[0]
    want = answer(model)
    model = prepare_model_for_kbit_training(model)
    assert_close(answer(model), want.double(), worst=0.1, rms=0.02, dtype=torch.float32)
    gradients(adapt(model))


# Beside the other things that fastllm does to a model.


TARGETS = [["q_proj"], ["gate_proj", "v_proj"], ["o_proj", "down_proj"], "all-linear"]


@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_fused_modules_do_not_pass_adapters_by(targets, exact, device):
    fast, plain = (adapt(packed(device=device, **options)[0], targets) for options in ({}, PLAIN))
    with fast.disable_adapter():
        base = generate(fast)
    assert_close(answer(fast), answer(plain).double(), dtype=torch.float32)
    assert_all_close(gradients(fast), gradients(plain), worst=2e-3, rms=1e-4)
    got, want = generate(fast), generate(plain)
    assert torch.equal(got, want) and not torch.equal(got, base)
    assert not fast.get_base_model()._fastllm.speedups.loop.reasons


def test_unloading_gives_the_fast_model_back():
    model = packed()[0]
    want, layers = answer(model), {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    peft = adapt(model)
    assert not is_fused(model)
    assert peft.unload() is model
    assert is_fused(model) and not adapted(model)
    assert all(model.get_submodule(name) is m for name, m in layers.items())
    assert_equal(answer(model), want)
    fastllm.restore(model)
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear


def test_adapters_are_switched_and_mixed(exact):
    model = packed()[0]
    base = answer(model)
    peft = adapt(model, "all-linear", "first")
    a = answer(peft)
    adapt(peft, "all-linear", "second", seed=1)
    assert_equal(answer(peft), a)
    peft.set_adapter("second")
    b = answer(peft)
    want = adapt(packed()[0], seed=1)
    assert_equal(b, answer(want))
    with peft.disable_adapter():
        assert_close(answer(peft), base.double(), dtype=torch.float32)
    with torch.no_grad():
        both = peft(tokens(peft), adapter_names=["first", "second"]).logits
        none = peft(tokens(peft), adapter_names=["__base__", "first"]).logits
    assert_close(both, torch.stack((a[0], b[1])).double(), dtype=torch.float32)
    assert_close(none, torch.stack((base[0], a[1])).double(), dtype=torch.float32)
    assert_equal(answer(peft), b)
    peft.set_adapter("first")
    peft.delete_adapter("second")
    assert_equal(answer(peft), a)


def test_a_replayed_step_notices_which_adapter_is_on(monkeypatch):
    model = packed("int8", decode=True)[0]
    loop = model._fastllm.speedups.loop
    model = adapt(adapt(model, lora_alpha=64), name="b", seed=1, lora_alpha=64)

    def texts():
        settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        found = []
        for name in ("default", "b"):
            model.set_adapter(name)
            found.append(model.generate(tokens(model), **settings))
        with model.disable_adapter():
            found.append(model.generate(tokens(model), **settings))
        return [*found, model.generate(tokens(model), **settings)]

    want = texts()
    monkeypatch.setattr(loop, "replays", lambda ids: True)
    loop.graphs.capture = replay.capture
    got = texts()
    assert loop.graphs.kept and not loop.reasons
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert len({tuple(t.flatten().tolist()) for t in got}) == 3


def test_adapters_are_neither_dropped_nor_quantized():
    model = adapt(packed("int8")[0])
    with pytest.raises(NotSupportedError, match="unload"):
        fastllm.restore(model.base_model.model)
    dense = get_peft_model(build("llama", torch.float32), LoraConfig(**LORA, target_modules=["q_proj"])).eval()
    with pytest.raises(NotSupportedError, match="merge_and_unload"):
        fastllm.optimize(dense.base_model.model, "int8", quiet=True)
