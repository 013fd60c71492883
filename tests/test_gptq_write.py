"""`write_gptq`: what it writes is a GPTQ checkpoint of version 1, and is read back to the bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from others_by_hand import SMALL, pack_columns, packed_layers
from safetensors.torch import load_file
from tiny import build, output
from transformers import PreTrainedModel

import fastllm
from fastllm.checkpoints import SaveHook, load, write_gptq
from fastllm.formats import unpack_bits
from fastllm.nn import QuantExperts


def quantized(family: str, weights: Any, lm_head: Any = False, **settings: Any) -> PreTrainedModel:
    model = build(family, **SMALL | settings)
    fastllm.optimize(
        model, weights, method="rtn", lm_head=lm_head, min_coverage=0, quiet=True, attention=False, fuse=False
    )
    return model


CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "int4": ("llama", "int4-g32", {}),
    "int8": ("llama", "int8", {}),
    "channel": ("qwen3", "int4-channel", {}),
    "int8 groups, float16": ("llama", "int8-g32", {"dtype": torch.float16, "attention_bias": True}),
    "float32": ("llama", "int4-g32", {"dtype": torch.float32}),
    "tied": ("llama", "int4-g32", {"tie_word_embeddings": True}),
    "mixtral": ("mixtral", "int4-g32", {"intermediate_size": 64}),
    "qwen3 moe": ("qwen3_moe", "int8-g32", {}),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_is_read_to_the_bit(name: str, tmp_path: Path) -> None:
    family, weights, settings = CASES[name]
    model = quantized(family, weights, **settings)
    config, want = dict(model.config.quantization_config), output(model)
    write_gptq(model, tmp_path)
    assert model.config.quantization_config == config and type(model.hf_quantizer) is SaveHook
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (stored["quant_method"], stored["sym"], stored["desc_act"]) == ("gptq", True, False)
    assert stored["checkpoint_format"] == "gptq" and stored["lm_head"] is False
    again = load(tmp_path, quiet=True)
    assert packed_layers(again).keys() == packed_layers(model).keys() != set()
    for key, t in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], t), key
    assert torch.equal(output(again), want)
    model.save_pretrained(tmp_path / "public")
    assert json.loads((tmp_path / "public" / "config.json").read_text())["quantization_config"]["quant_method"] == (
        "compressed-tensors"
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_the_tensors_are_those_of_version_1(bits: int, tmp_path: Path) -> None:
    model = quantized("llama", f"int{bits}-g32")
    write_gptq(model, tmp_path)
    tensors, layer = load_file(tmp_path / "model.safetensors"), model.model.layers[0].mlp.down_proj  # [64, 96]
    own = {key.rpartition(".")[2]: t for key, t in tensors.items() if "down_proj" in key}
    assert own.keys() == {"qweight", "qzeros", "scales", "g_idx"}
    q = unpack_bits(layer.at_rest().packed, bits, 96)
    assert torch.equal(own["qweight"], pack_columns(q.t(), bits))
    assert own["g_idx"].tolist() == [i // 32 for i in range(96)] and own["g_idx"].dtype == torch.int32
    assert set(own["qzeros"].flatten().tolist()) == {0x77777777 if bits == 4 else 0x7F7F7F7F}
    assert own["qzeros"].shape == (3, 64 * bits // 32) and own["qzeros"].dtype == torch.int32
    assert own["scales"].dtype == torch.float16 and torch.equal(own["scales"].t().bfloat16(), layer.weight_scale)


def test_what_the_format_cannot_hold_is_stored_dense(tmp_path: Path) -> None:
    model = quantized("llama", "int4-g64", lm_head="int8", tie_word_embeddings=True)
    with pytest.warns(
        UserWarning, match=r"2 packed layers are stored dense .*\[64, 96\] does not divide .*head dense"
    ):
        write_gptq(model, tmp_path)
    again = load(tmp_path, quiet=True)
    layers = packed_layers(again)
    assert layers.keys() == packed_layers(model).keys() - {"lm_head", "model.layers.0.mlp.down_proj"}
    assert torch.equal(again.lm_head.weight, model.lm_head.dequantize()) and not again.config.tie_word_embeddings
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored["dynamic"] == {r"-:^model\.layers\.0\.mlp\.down_proj$": {}}
    packed = [f"self_attn.{p}_proj" for p in "koqv"]
    assert stored["modules_in_block_to_quantize"] == [["mlp.gate_proj", "mlp.up_proj", *packed]]


def test_scales_beyond_float16_keep_their_type(tmp_path: Path) -> None:
    model = quantized("llama", "int4-g32")
    layer = model.model.layers[0].mlp.up_proj
    layer.to_rest()
    layer.weight_scale.data[0, 0] = 1e-30
    layer.prepare()
    write_gptq(model, tmp_path)
    assert load_file(tmp_path / "model.safetensors")["model.layers.0.mlp.up_proj.scales"].dtype == torch.bfloat16
    assert load(tmp_path, quiet=True).model.layers[0].mlp.up_proj.weight_scale[0, 0] == layer.weight_scale[0, 0]


REFUSED: dict[str, tuple[Any, str]] = {
    "asymmetric": ("int4-g32-asym", "is int4-g32-asym, and GPTQ holds symmetric .* version 1"),
    "activations": ("int8-a8", "is int8-a8, and GPTQ holds symmetric"),
    "floats": ("fp8", "is fp8-a8, and GPTQ holds symmetric"),
    "mixed": ({"*up_proj": "int8", "*": "int4-g32"}, "holds one format for all layers, .*int4-g32, .*up_proj is int8"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_formats_are_refused(name: str, tmp_path: Path) -> None:
    weights, message = REFUSED[name]
    model = quantized("llama", weights)
    with pytest.raises(ValueError, match=message):
        write_gptq(model, tmp_path / "a")
    assert not list(tmp_path.glob("a/*.safetensors"))
    model.save_pretrained(tmp_path / "b")  # it is as it was


def test_experts_of_another_format_are_refused(tmp_path: Path) -> None:
    model = quantized("mixtral", {"*experts": "int4-g32", "*": "int8"}, intermediate_size=64)
    assert any(isinstance(m, QuantExperts) for m in model.modules())
    with pytest.raises(ValueError, match="holds one format for all layers"):
        write_gptq(model, tmp_path)


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds one format for all layers, and here none is packed"):
        write_gptq(build("llama", **SMALL), tmp_path)
