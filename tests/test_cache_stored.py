"""The scales that servers have for a cache of keys and values, in checkpoints of compressed-tensors."""

import json
import logging

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_cache_scales import SCHEME, tiny_blocks

import fastllm
from fastllm.compress.cache_scales import fp8_scales
from fastllm.decode import KVCache


def test_fp8_scales_are_those_of_the_largest_key_and_value():
    """Of all samples, without padding, as a cache has them."""
    model, blocks = tiny_blocks("llama", pad=3)
    found = fp8_scales(blocks, 0)
    largest = torch.zeros(2, 1)
    for batch in blocks.batches:
        cache = KVCache(model.config)
        with torch.no_grad():
            model(input_ids=batch.ids, attention_mask=batch.seen.long(), past_key_values=cache)
        held = torch.stack([x[:, :, 3:].abs().max() for x in cache.layers[0].dense()])
        largest = torch.maximum(largest, held[:, None])
    assert len(blocks.batches) > 1
    for scale, most in zip(found, largest, strict=True):
        torch.testing.assert_close(scale, most / 448)
    model.model.layers[0].self_attn.v_proj.weight.data.zero_()
    assert fp8_scales(blocks, 0) is None


def saved_with_scales(folder):
    """A packed checkpoint with scales for a cache, as llm-compressor writes them."""
    model = tiny.build("llama")
    fastllm.optimize(model, "int4-g32", lm_head=False, quiet=True)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for i in range(2):
        for which in "kv":
            tensors[f"model.layers.{i}.self_attn.{which}_scale"] = torch.tensor([0.05], dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = SCHEME
    (folder / "config.json").write_text(json.dumps(config))
    return model


def test_a_checkpoint_with_scales_for_a_cache_is_loaded_without_them(tmp_path, caplog):
    model = saved_with_scales(tmp_path)
    with caplog.at_level(logging.INFO):
        loaded = fastllm.load(tmp_path, quiet=True)
    assert [r.message for r in caplog.records if "kv_cache_scheme is not used" in r.message]
    assert not [r for r in caplog.records if "UNEXPECTED" in r.message]
    assert torch.equal(tiny.output(loaded), tiny.output(model))
    assert getattr(loaded.config, "quantization_config", {}).get("kv_cache_scheme") is None


def test_a_scheme_that_is_no_table_is_refused(tmp_path):
    saved_with_scales(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = "fp8"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="kv_cache_scheme is 'fp8', not a table"):
        fastllm.load(tmp_path, quiet=True)


@pytest.mark.peers
def test_transformers_loads_it_and_rounds_keys_and_values(tmp_path):
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    model = saved_with_scales(tmp_path)
    stock, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert float(stock.model.layers[1].self_attn.k_scale.detach()) == pytest.approx(0.05, rel=1e-2)
    want, got = tiny.output(model), tiny.output(stock.eval())
    assert 0 < float((got - want).norm()) < 0.1 * float(want.norm())
