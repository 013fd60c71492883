"""`SaveHook`: what it writes, what it refuses, and that it leaves no trace."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import build, output
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from fastllm.checkpoints.compressed_tensors import Stored
from fastllm.checkpoints.save import SaveHook
from fastllm.checkpoints.scheme import Scheme
from fastllm.formats import IntFormat, QuantizedWeight, dequantize, parse_format
from fastllm.nn import QuantExperts, QuantLinear
from fastllm.nn.experts import is_experts
from fastllm.quantizers import quantize


def pack(model: PreTrainedModel, formats: dict[str, str], hook: bool = True) -> SaveHook | None:
    """Replace every linear layer and experts module whose name contains one of the keys."""
    for name, module in list(model.named_modules()):
        format = next((f for part, f in formats.items() if part in name), None)
        if format and is_experts(module):
            model.set_submodule(name, QuantExperts.from_experts(module, parse_format(format), "rtn"))
        elif format and (type(module) is nn.Linear or type(module).__name__ == "Conv1D"):
            model.set_submodule(name, QuantLinear.from_linear(module, format, "rtn"))
    return SaveHook.attach(model) if hook else None


def config_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())


def state_of(model: PreTrainedModel) -> dict[str, Any]:
    """Everything that attaching may touch."""
    parts = {}
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            keys = ("hf_quantizer", "all_tied_weights_keys", "_weight_conversions")
            parts[name] = {k: module.__dict__[k] for k in keys if k in module.__dict__}
            parts[f"{name}.config"] = dict(module.config.__dict__)
    return parts


def test_tensors_on_disk_have_the_published_layout(tmp_path: Path) -> None:
    model = build("llama")
    original = {n: m.weight.detach().clone() for n, m in model.named_modules() if type(m) is nn.Linear}
    pack(model, {"lm_head": "int4-g64-asym", "_proj": "int4-g64-asym"})
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    parts = {k.removeprefix(f"{name}."): t for k, t in tensors.items() if k.startswith(name)}
    assert {k: (t.dtype, tuple(t.shape)) for k, t in parts.items()} == {
        "weight_packed": (torch.int32, (128, 32)),
        "weight_scale": (torch.bfloat16, (128, 4)),
        "weight_zero_point": (torch.int32, (16, 4)),
        "weight_shape": (torch.int64, (2,)),
    }
    assert parts["weight_shape"].tolist() == [128, 256]
    # decoded by the definition, one weight at a time
    want = quantize(original[name], IntFormat(4, 64, False), "rtn")
    words, zeros = parts["weight_packed"], parts["weight_zero_point"]
    for n, k in ((0, 0), (3, 70), (127, 255), (64, 129)):
        q = (int(words[n, k // 8]) >> 4 * (k % 8)) & 15
        z = (int(zeros[n // 8, k // 64]) >> 4 * (n % 8)) & 15
        value = (q - z) * float(parts["weight_scale"][n, k // 64])
        assert value == pytest.approx(
            float(dequantize(want, IntFormat(4, 64, False), (128, 256), torch.float32)[n, k])
        )
    config = config_of(tmp_path)["quantization_config"]
    assert config["quant_method"] == "compressed-tensors" and config["format"] == "pack-quantized"
    assert config["dequantize"] is True and len(config["config_groups"]) == 1


def test_config_names_exceptions_and_dense_layers(tmp_path: Path) -> None:
    model = build("llama")
    pack(model, {"up_proj": "int8", "down_proj": "int4-g128", "self_attn": "int4-g32"})
    model.save_pretrained(tmp_path)
    stored = Stored(config_of(tmp_path)["quantization_config"])
    expected = {"up_proj": Scheme(8, None, True), "down_proj": Scheme(4, 128, True), "gate_proj": None}
    for prefix in ("model.", ""):  # a task model's names, and those of its base model
        for layer in ("0", "1"):
            for part, scheme in expected.items():
                assert stored.scheme(f"{prefix}layers.{layer}.mlp.{part}") == scheme
            assert stored.scheme(f"{prefix}layers.{layer}.self_attn.q_proj") == Scheme(4, 32, True)
    assert stored.scheme("lm_head") is None
    assert stored.scheme("model.layers.10.mlp.up_proj") == Scheme(4, 32, True)  # not an exception: "1" is not "10"


def test_detach_leaves_no_trace() -> None:
    model = build("llama", tie_word_embeddings=True)
    model.hf_quantizer = old = object()
    model.config.quantization_config = {"quant_method": "gguf"}
    before = state_of(model)
    assert before[""]["all_tied_weights_keys"], "the model must start tied, or the test shows nothing"
    hook = pack(model, {"_proj": "int4-g32", "lm_head": "int8"})
    assert hook is not None and model.hf_quantizer is hook and model.model.hf_quantizer is hook
    assert model.config.tie_word_embeddings is False and model.all_tied_weights_keys == {}
    hook.detach()
    assert state_of(model) == before and model.hf_quantizer is old


def test_detach_after_saving_leaves_no_trace(tmp_path: Path) -> None:
    model = build("mixtral")
    model.save_pretrained(tmp_path / "dense")  # notes dtype and architecture in the config
    before = state_of(model)
    hook = pack(model, {"self_attn": "int4-g32"})
    model.save_pretrained(tmp_path / "packed")
    assert hook is not None
    hook.detach()
    assert state_of(model) == before


def test_a_tied_head_is_saved_beside_the_embedding(tmp_path: Path) -> None:
    model = build("llama", tie_word_embeddings=True)
    pack(model, {"lm_head": "int8"})
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "model.embed_tokens.weight" in tensors and "lm_head.weight_packed" in tensors
    assert "lm_head.weight" not in tensors and config_of(tmp_path)["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("K", "group", "stored"), [(200, 64, 8), (192, 128, 64), (72, 32, 8), (204, 64, None), (512, 128, 128)]
)
def test_a_short_last_group_is_stored_without_loss(K: int, group: int, stored: int | None) -> None:
    torch.manual_seed(0)
    for symmetric in (True, False):
        format = IntFormat(4, group, symmetric)
        weight = quantize(torch.randn(24, K), format, "rtn")
        scheme = Scheme.storing(format, K)
        assert (None if scheme is None else scheme.group) == stored
        if scheme is None:
            continue
        again = scheme.regroup(weight, format, K)
        assert tuple(again.scale.shape) == scheme.parts(24, K)["weight_scale"].shape
        q = dequantize(weight, format, (24, K), torch.float32)
        zero = None if again.zero_point is None else _unpack_columns(again.zero_point, 24)
        nibbles = torch.stack([again.packed >> s & 15 for s in range(0, 32, 4)], -1).flatten(1)[:, :K]
        zero = torch.full_like(again.scale, 8) if zero is None else zero
        scale, zero = (t.repeat_interleave(scheme.group or K, 1) for t in (again.scale, zero))
        assert torch.equal((nibbles - zero) * scale, q)


def _unpack_columns(zero: torch.Tensor, N: int) -> torch.Tensor:
    return torch.stack([zero >> s & 15 for s in range(0, 32, 4)], 1).flatten(0, 1)[:N]


def test_experts_are_stored_one_by_one(tmp_path: Path) -> None:
    model = build("mixtral")
    pack(model, {"experts": "int4-g32"})
    experts = model.model.layers[1].mlp.experts
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    base = "model.layers.1.block_sparse_moe.experts"
    for part, layer, rows in (
        ("w1", experts.up[3], slice(0, 64)),
        ("w3", experts.up[3], slice(64, 128)),
        ("w2", experts.down[3], slice(None)),
    ):
        rest: QuantizedWeight = layer.at_rest()
        assert torch.equal(tensors[f"{base}.3.{part}.weight_packed"], rest.packed[rows])
        assert torch.equal(tensors[f"{base}.3.{part}.weight_scale"], rest.scale[rows])
        assert tensors[f"{base}.3.{part}.weight_shape"].tolist() == [rest.packed[rows].shape[0], layer.in_features]
    assert not any(".up." in key or ".shell." in key or "gate_up" in key for key in tensors)


def test_saving_changes_nothing_in_memory(tmp_path: Path) -> None:
    model = build("mixtral")
    pack(model, {"_proj": "int4-g32", "experts": "int8"})
    before = output(model)
    model.save_pretrained(tmp_path / "a")
    assert torch.equal(output(model), before)
    model.save_pretrained(tmp_path / "b")
    a, b = (load_file(tmp_path / n / "model.safetensors") for n in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_shards_hold_the_same_tensors(tmp_path: Path) -> None:
    model = build("llama")
    pack(model, {"_proj": "int4-g32"})
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="40KB")
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2
    one = load_file(tmp_path / "one" / "model.safetensors")
    many = {key: t for file in files for key, t in load_file(file).items()}
    assert one.keys() == many.keys() and all(torch.equal(one[k], many[k]) for k in one)


def test_a_part_of_the_model_is_saved_with_names_of_its_own(tmp_path: Path) -> None:
    model = build("llama")
    pack(model, {"_proj": "int4-g32"})
    model.model.save_pretrained(tmp_path)
    assert "layers.0.mlp.up_proj.weight_packed" in load_file(tmp_path / "model.safetensors")
    assert config_of(tmp_path)["architectures"] == ["LlamaModel"]
    stored = Stored(config_of(tmp_path)["quantization_config"])
    assert stored.scheme("layers.0.mlp.up_proj") == Scheme(4, 32, True)


def test_nothing_packed_is_an_ordinary_checkpoint(tmp_path: Path) -> None:
    model = build("llama")
    SaveHook.attach(model)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in config_of(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(output(again), output(model))


@pytest.mark.parametrize(
    ("family", "formats", "message"),
    [
        (
            "llama",
            {"up_proj": "int4-g32-asym", "_proj": "int4-g32"},
            "zero points next to a second scheme .* symmetric",
        ),
        ("mixtral", {"experts": "int4-g32-asym"}, "experts with zero points .*int4-g64"),
        ("mixtral", {"0.mlp.experts": "int4-g32", "1.mlp.experts": "int8"}, r"several formats \(int4-g32, int8\)"),
    ],
)
def test_what_no_reader_loads_is_refused_before_writing(
    family: str, formats: dict[str, str], message: str, tmp_path: Path
) -> None:
    model = build(family)
    pack(model, formats)  # attaching is fine: it runs well in memory
    assert output(model).isfinite().all()
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_layers_without_a_public_form_are_written_dense_with_one_warning(tmp_path: Path) -> None:
    model = build("gpt2")
    pack(model, {"c_": "int8"})
    with pytest.warns(UserWarning, match=r"8 packed layers are stored dense \(0.8 MB\)") as caught:
        model.save_pretrained(tmp_path)
    assert len([w for w in caught if "stored dense" in str(w.message)]) == 1
    tensors = load_file(tmp_path / "model.safetensors")
    layer = model.transformer.h[0].mlp.c_fc
    assert layer.transposed and tensors["transformer.h.0.mlp.c_fc.weight"].shape == (128, 512)
    assert torch.equal(tensors["transformer.h.0.mlp.c_fc.weight"], layer.dequantize().t())
    assert "quantization_config" not in config_of(tmp_path)
