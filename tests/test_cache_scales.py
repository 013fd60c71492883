"""Keys of which a cache loses less, in a block that answers as before; and the scales of servers for a cache."""

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import nn
from trained import WINDOW, calibration, quality, trained
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import fastllm
from fastllm.compress.blocks import Blocks
from fastllm.compress.cache import (
    Smoothing,
    find_smoothing,
    record,
    search,
    smooth_keys,
)
from fastllm.compress.fold import Fold, take_back
from fastllm.compress.samples import batches
from fastllm.decode import KVCache
from fastllm.kv_formats import KV_FORMATS

SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


def with_outliers(model, factor=16.0):
    """The same model, but two channels of each head's keys, of one pair, are `factor` times as large."""
    for layer in model.model.layers:
        attention, D = layer.self_attn, layer.self_attn.head_dim
        for at in (D // 2 - 1, D - 1):
            attention.k_proj.weight.data[at::D] *= factor
            attention.q_proj.weight.data[at::D] /= factor
    return model


def blocks_of(model, samples=2):
    return Blocks(model, batches(calibration(samples).view(samples, WINDOW), None, 256, samples, WINDOW))


def smoothed(model, blocks, format):
    changes = []
    for index in range(len(blocks)):
        found = smooth_keys(blocks, index, KV_FORMATS[format])
        assert len(found) == 2
        changes += found
        blocks.advance(index)
    return changes


def lost(model, format, want, ids):
    """How far logits are from `want` with a cache of `format`."""
    with torch.no_grad():
        got = model(ids, past_key_values=KVCache(model.config, format)).logits
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("format", ["int4", "int8"])
def test_outliers_of_keys_cost_little(format):
    """And the model itself stays, and is to the bit what it was once the changes are taken back."""
    model = with_outliers(trained())
    ids = calibration(2).view(2, WINDOW)
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        want = model(ids).logits
    before = lost(model, format, want, ids)
    changes = smoothed(model, blocks_of(model), format)
    assert {name for name, p in model.named_parameters() if not torch.equal(p, kept[name])} == {
        f"model.layers.{i}.self_attn.{which}_proj.weight" for i in range(4) for which in "qk"
    }
    with torch.no_grad():
        assert (model(ids).logits - want).abs().max() < 1e-3
    assert lost(model, format, want, ids) < 0.6 * before
    take_back(changes)
    assert all(torch.equal(p, kept[name]) for name, p in model.named_parameters())
    assert lost(model, format, want, ids) == before


def tiny_blocks(family, dtype=torch.float32, pad=0, **settings):
    sizes = {"head_dim": 64, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = tiny.build(family, dtype=dtype, **{**sizes, **settings})
    for name, p in model.named_parameters():
        if p.ndim == 1:  # norms and biases of their own
            p.data += torch.rand(p.shape, generator=torch.Generator().manual_seed(len(name))).to(p.dtype)
    ids = torch.randint(0, 60, (2, 40), generator=torch.Generator().manual_seed(0))
    seen = torch.ones_like(ids)
    seen[:, :pad] = 0
    return model, Blocks(model, batches([{"input_ids": ids, "attention_mask": seen}], None, 64))


FAMILIES = {
    "llama": ("llama", {}, "k_proj", 32, 2),
    "qwen2": ("qwen2", {}, "k_proj", 32, 2),  # with biases
    "qwen3": ("qwen3", {}, "k_norm", 32, 1),
    "gemma3": ("gemma3_text", {}, "k_norm", 32, 1),
    "olmo2": ("olmo2", {}, "k_norm", 32, 2),  # a norm over all heads
    "cohere": ("cohere", {}, "k_proj", 32, 2),  # neighbours rotate
    "part": ("stablelm", {"partial_rotary_factor": 0.25, "hidden_size": 256}, "k_proj", 56, 2),
    "eager": ("llama", {"attn_implementation": "eager"}, "k_proj", 32, 2),
}


@pytest.mark.parametrize("case", FAMILIES)
def test_what_makes_queries_and_keys_is_found(case):
    """And any scales that respect what was found leave the block as it is."""
    family, settings, name, free, scales = FAMILIES[case]
    model, blocks = tiny_blocks(family, pad=3 if case == "llama" else 0, **settings)
    attention = model.model.layers[0].self_attn
    found = find_smoothing(blocks, 0, record(blocks, 0, 0))
    assert found is not None and found.k.producer is getattr(attention, name)
    assert found.q.producer is getattr(attention, name.replace("k_", "q_"))
    assert (len(found.partner.unique()), found.scales) == (free, scales)
    with torch.no_grad():
        want = blocks.answer(0, 0)
        scale = (torch.rand(scales, 64, generator=torch.Generator().manual_seed(1)) * 4 + 0.2)[:, found.partner]
        k = record(blocks, 0, 0).k
        changes = found.apply(scale)
        torch.testing.assert_close(blocks.answer(0, 0), want, rtol=0, atol=1e-4)
        torch.testing.assert_close(record(blocks, 0, 0).k, k / scale[:, None], rtol=1e-4, atol=1e-4)
    take_back(changes)


def test_a_rotation_is_not_mistaken_for_another():
    _, blocks = tiny_blocks("llama")
    found = find_smoothing(blocks, 0, record(blocks, 0, 0))
    assert torch.equal(found.partner, torch.arange(64) % 32)
    _, blocks = tiny_blocks("cohere")
    found = find_smoothing(blocks, 0, record(blocks, 0, 0))
    assert torch.equal(found.partner, torch.arange(64) // 2 * 2)


def test_what_cannot_be_smoothed_is_left_alone():
    """Heads that do not fit the format, one projection for all, keys that are read elsewhere too, and other kinds."""
    int4 = KV_FORMATS["int4"]
    assert len(smooth_keys(tiny_blocks("llama")[1], 0, int4)) == 2
    assert smooth_keys(tiny_blocks("llama", head_dim=32)[1], 0, int4) == []
    assert smooth_keys(tiny_blocks("phi3", pad_token_id=0, hidden_size=256)[1], 0, int4) == []
    model, blocks = tiny_blocks("llama")
    attention = model.model.layers[0].self_attn
    attention.o_proj.register_forward_hook(
        lambda module, args, y: y + attention.k_proj(torch.ones(128))[:64].sum() * torch.arange(128) / 128
    )
    assert smooth_keys(blocks, 0, int4) == []
    model, blocks = tiny_blocks("llama")
    model.model.layers[1].self_attn.k_proj = model.model.layers[0].self_attn.k_proj
    assert smooth_keys(blocks, 0, int4) == []


def test_nothing_is_changed_where_it_would_not_help(monkeypatch):
    model, blocks = tiny_blocks("llama")
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    bad = torch.logspace(-3, 3, 32).repeat(2, 2)
    monkeypatch.setattr("fastllm.compress.cache.search", lambda *_: bad)
    assert smooth_keys(blocks, 0, KV_FORMATS["int4"]) == []
    assert all(torch.equal(p, kept[name]) for name, p in model.named_parameters())


def test_small_weights_do_not_spoil_what_is_rotated_with_them():
    """A norm of Gemma's kind in bfloat16, in which 1 + w is rough where it is near 0."""
    model, blocks = tiny_blocks("gemma3_text", torch.bfloat16)
    attention = model.model.layers[0].self_attn
    for d in range(8):
        attention.k_norm.weight.data[d], attention.k_norm.weight.data[d + 32] = -0.99, 6.0
        attention.q_norm.weight.data[d] = 9.0
    blocks = Blocks(model, blocks.batches)
    seen = record(blocks, 0, 0)
    found = find_smoothing(blocks, 0, seen)
    changes = found.apply((torch.rand(1, 64) * 4 + 0.2)[:, found.partner])
    got = record(blocks, 0, 0)
    take_back(changes)
    a, b = (x.q.float().unflatten(1, (2, 2)) @ x.k.float()[:, :, None].transpose(3, 4) for x in (got, seen))
    assert (a - b).norm() < 0.02 * b.norm()


def test_the_search_lessens_the_error_of_scores():
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(256, 2, 64, generator=generator)
    keys[..., [5, 37]] *= 30
    sizes = torch.rand(2, 64, generator=generator) + 0.1
    norm = Fold(nn.RMSNorm(128), [], False)
    for format in KV_FORMATS.values():
        for partner in (torch.arange(64), torch.arange(64) % 32):
            scale = search(keys, sizes, format, Smoothing(norm, norm, partner, (2, 2)))
            assert scale.shape == (2, 64) and torch.equal(scale, scale[:, partner])

            def error(scale, format=format):
                x = keys / scale
                return float(((format.dequantize(*format.quantize(x), x.dtype) - x) * scale).square().mul(sizes).sum())

            assert error(scale) < 0.2 * error(torch.ones(1))
            assert error(scale) <= error(keys.abs().amax(0)[:, partner] ** 0.5)


def test_the_attention_functions_are_put_back():
    _, blocks = tiny_blocks("llama")
    shared, own = ALL_ATTENTION_FUNCTIONS["sdpa"], lambda *args, **kwargs: shared(*args, **kwargs)
    assert record(blocks, 0, 0) is not None and ALL_ATTENTION_FUNCTIONS["sdpa"] is shared
    assert "eager" not in ALL_ATTENTION_FUNCTIONS
    try:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = own
        record(blocks, 0, 0)
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is own
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def test_smoothing_in_half_precision_keeps_the_quality():
    model = with_outliers(trained(torch.bfloat16))
    before = quality(model, 6)
    smoothed(model, blocks_of(model), "int4")
    assert abs(quality(model, 6) / before - 1) < 2e-3


# By `fastllm.quantize`.


def test_quantize_smooths_keys_and_takes_it_back():
    model = with_outliers(trained())
    before = {name: t.clone() for name, t in model.state_dict().items()}
    ids, lengths = calibration(2).view(2, WINDOW), {"length": WINDOW, "quiet": True}
    with torch.no_grad():
        want = model(ids).logits
    errors = []
    for kv_cache in (None, "int4"):
        fastllm.quantize(model, "int8", calib=calibration(4), kv_cache=kv_cache, **lengths)
        errors.append(lost(model, "int4", want, ids))
        fastllm.restore(model)
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert errors[1] < 0.6 * errors[0]
    with pytest.raises(ValueError, match="kv_cache='int2' is not one of 'int8', 'int4', 'fp8'"):
        fastllm.quantize(model, "int8", calib=calibration(4), kv_cache="int2", **lengths)


@pytest.mark.parametrize("kv_cache", ["int4", "fp8"])
def test_quantize_a_checkpoint_as_in_memory(kv_cache, tmp_path):
    with_outliers(trained(torch.bfloat16)).save_pretrained(tmp_path / "dense")
    ask = {"calib": calibration(4), "length": WINDOW, "quiet": True, "kv_cache": kv_cache}
    fastllm.quantize(tmp_path / "dense", "int8", out=tmp_path / "out", **ask)
    model = with_outliers(trained(torch.bfloat16))
    fastllm.quantize(model, "int8", **ask)
    model.save_pretrained(tmp_path / "twin")
    found, twin = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "twin"))
    assert found.keys() == twin.keys() and all(torch.equal(t, twin[name]) for name, t in found.items())
    scales = {name for name in found if name.endswith(("k_scale", "v_scale"))}
    expected = {f"model.layers.{i}.self_attn.{part}_scale" for i in range(4) for part in "kv"}
    assert scales == (expected if kv_cache == "fp8" else set())
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config.get("kv_cache_scheme") == (SCHEME if kv_cache == "fp8" else None)
    ids = calibration(1).view(1, -1)
    loaded = fastllm.load(tmp_path / "out", attention=False, fuse=False, decode=False, quiet=True)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_keys_alone_and_no_way_back_without_the_originals(caplog):
    model = with_outliers(trained())
    ids = calibration(2).view(2, WINDOW)
    with torch.no_grad():
        want = model(ids).logits
    before = lost(model, "int4", want, ids)
    ask = {"calib": calibration(4), "kv_cache": "int4", "length": WINDOW, "quiet": True}
    fastllm.quantize(model, {}, keep=False, **ask)
    assert not model._fastllm.report.plan.chosen and lost(model, "int4", want, ids) < 0.6 * before
    with pytest.raises(ValueError, match="originals were freed"):
        fastllm.restore(model)
    assert "keys stay as they are" not in caplog.text
    fastllm.quantize(tiny.build("gpt2"), {}, **ask | {"calib": calibration(1) % 60, "length": 24})
    assert "keys stay as they are for a cache of int4 in transformer.h.0, transformer.h.1" in caplog.text


def test_an_error_on_the_way_leaves_the_keys_alone(monkeypatch):
    model, blocks = tiny_blocks("llama")
    before = {name: p for name, p in model.named_parameters()}
    monkeypatch.setattr("fastllm.compress.cache._lost", lambda scores: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        smooth_keys(blocks, 0, KV_FORMATS["int4"])
    assert all(p is before[name] for name, p in model.named_parameters())


def test_blocks_without_visible_keys_give_no_scales(caplog):
    model = tiny.build("gpt2", dtype=torch.float32)
    ids = torch.randint(1, 60, (2, 24), generator=torch.Generator().manual_seed(1))
    fastllm.quantize(model, "int8", calib=ids, kv_cache="fp8", min_coverage=0, quiet=True)
    assert "no scales for an fp8 cache: keys or values not found in transformer.h.0, transformer.h.1" in caplog.text
    assert not model._fastllm.cache_scales
