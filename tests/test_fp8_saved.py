"""Checkpoints of float8 weights and activations, `float-quantized` of compressed-tensors: written, read, damaged."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_activations_saved import UP, formats, put, quantization_config, quantized
from test_damage import rewrite
from test_load import assert_same_tensors
from tiny import build, output
from torch import Tensor, nn

import fastllm
from fastllm.checkpoints.compressed_tensors import Stored
from fastllm.checkpoints.scheme import Scheme
from fastllm.nn import QuantLinear

FP8 = torch.float8_e4m3fn
ACTIVATIONS = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True, "strategy": "token"}
WEIGHTS = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": "channel"}
GROUP = {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": ACTIVATIONS}


def test_tensors_on_disk_have_the_published_layout(tmp_path: Path) -> None:
    model = quantized(kind="fp8", lm_head="fp8", intermediate_size=202)  # rows of 202 bytes fill no whole words
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            parts = {k.removeprefix(f"{name}."): t for k, t in tensors.items() if k.startswith(f"{name}.")}
            assert {k: (t.dtype, tuple(t.shape)) for k, t in parts.items()} == {
                "weight": (FP8, layer.shape),
                "weight_scale": (torch.bfloat16, (layer.out_features, 1)),
            }
            assert torch.equal(parts["weight"].bfloat16() * parts["weight_scale"], layer.dequantize())
    assert quantization_config(tmp_path) == {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": GROUP},
        "ignore": [],
    }


def test_several_formats_are_told_apart(tmp_path: Path) -> None:
    model = build("llama")
    fastllm.optimize(model, {"lm_head": "int8", "*.mlp.*": "int8-a8", "*": "fp8"}, quiet=True)
    model.save_pretrained(tmp_path)
    config = quantization_config(tmp_path)
    assert config["format"] == "mixed-precision"
    kinds = {"pack-quantized", "int-quantized", "float-quantized"}
    assert {group["format"] for group in config["config_groups"].values()} == kinds
    read = fastllm.load(tmp_path, quiet=True)
    assert formats(read) == formats(model) and torch.equal(output(read), output(model))
    for group in config["config_groups"].values():
        del group["format"]  # then the activations tell
    stored = Stored(config)
    assert stored.scheme("lm_head") == Scheme(8, None, True) and stored.scheme(UP) == Scheme(8, None, True, "int8")
    assert stored.scheme("model.layers.0.self_attn.q_proj") == Scheme(8, None, True, "fp8")


def write_by_hand(folder: Path) -> Any:
    """A checkpoint from the description of the format alone; returns the dense model that its weights stand for."""
    model, tensors = build("llama", seed=3), {}
    for name, p in list(model.named_parameters()):
        if not name.endswith("_proj.weight"):
            tensors[name] = p.detach().clone()
            continue
        sign = torch.randint(2, p.shape, dtype=torch.uint8) << 7
        q = (torch.randint(127, p.shape, dtype=torch.uint8) | sign).view(FP8)  # every number, -0 included
        scale = (torch.rand(len(p), 1) * 0.001 + 0.0001).to(torch.bfloat16)
        tensors |= {name: q, f"{name}_scale": scale}
        model.get_submodule(name.removesuffix(".weight")).weight = nn.Parameter(q.bfloat16() * scale)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads(model.config.to_json_string(use_diff=False)) | {"dtype": "bfloat16"}
    config["architectures"] = ["LlamaForCausalLM"]
    more = {"group_size": None, "block_structure": None, "actorder": None, "observer": None, "observer_kwargs": {}}
    group = {"targets": ["Linear"], "weights": WEIGHTS | more, "input_activations": ACTIVATIONS | more}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group | {"output_activations": None}},
        "ignore": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return model


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("intact")
    write_by_hand(folder)
    return folder


def test_a_checkpoint_written_by_hand(tmp_path: Path) -> None:
    dense = write_by_hand(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    model = fastllm.load(tmp_path, quiet=True)
    assert set(formats(model).values()) == {"fp8-a8"} and len(formats(model)) == 14
    for name in formats(model):
        assert torch.equal(model.get_submodule(name).dequantize(), dense.get_submodule(name).weight), name
    got, want = output(model).float(), output(dense).float()
    assert 0 < (got - want).norm() < 0.2 * want.norm()
    assert (tmp_path / "model.safetensors").read_bytes() == before
    model.save_pretrained(tmp_path / "again")
    assert_same_tensors(load_file(tmp_path / "again/model.safetensors"), load_file(tmp_path / "model.safetensors"))


def test_a_dense_checkpoint_is_quantized_while_it_is_read(tmp_path: Path) -> None:
    for family in ("llama", "mixtral"):
        build(family).save_pretrained(tmp_path / family)
        want = quantized(family, kind="fp8")
        for settings in ({}, {"activations": "fp8"}):
            model = fastllm.load(tmp_path / family, weights="fp8", quiet=True, **settings)
            assert formats(model) == formats(want) and torch.equal(output(model), output(want))


def test_experts_in_float8_are_refused(tmp_path: Path) -> None:
    model = build("mixtral")
    fastllm.optimize(model, {"*.experts": "int8", "*": "fp8"}, quiet=True)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    (experts,) = [key for key, g in groups.items() if "experts" in g["targets"][0]]
    groups[experts] = GROUP | {"targets": groups[experts]["targets"], "format": "float-quantized"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="experts in float8 are not read.*to int8"):
        fastllm.load(tmp_path, quiet=True)


# --- damage


def with_nan(weight: Tensor) -> Tensor:
    bits = weight.view(torch.uint8).clone()
    bits[7, 9], bits[8, 9] = 0x7F, 0xFF
    return bits.view(FP8)


DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "rows": (put("weight", lambda t: t[:-8]), rf"{UP}.weight has shape \[248, 128\], not \[256, 128\].*fp8, per ch"),
    "rank": (put("weight", lambda t: t[None]), rf"{UP}.weight has shape \[1, 256, 128\]"),
    "integers": (put("weight", lambda t: t.view(torch.int8)), rf"{UP}.weight has dtype I8, not F8_E4M3"),
    "another float8": (put("weight", lambda t: t.view(torch.float8_e5m2)), rf"{UP}.weight has dtype F8_E5M2, not"),
    "dense": (put("weight", lambda t: t.bfloat16()), rf"{UP}.weight has dtype BF16, not F8_E4M3"),
    "nan weights": (put("weight", with_nan), rf"{UP}.weight has 2 values that are NaN: the file is damaged"),
    "scales": (put("weight_scale", lambda t: t.expand(-1, 2)), rf"{UP}.weight_scale has shape \[256, 2\]"),
    "one scale": (put("weight_scale", lambda t: t[:1, 0]), rf"{UP}.weight_scale has shape \[1\], not \[256, 1\]"),
    "scale dtype": (put("weight_scale", lambda t: t.int()), rf"{UP}.weight_scale has dtype I32, not BF16"),
    "nan": (put("weight_scale", lambda t: t / 0 * 0), rf"{UP}.weight_scale has 256 values that are NaN"),
    "no weight": (lambda t: t.pop(f"{UP}.weight"), rf"{UP}.weight is missing"),
    "no scale": (lambda t: t.pop(f"{UP}.weight_scale"), rf"{UP}.weight_scale is missing from the checkpoint: it is"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_layer_is_named_with_its_numbers(name: str, intact: Path, tmp_path: Path) -> None:
    change, message = DAMAGE[name]
    copied = Path(shutil.copytree(intact, tmp_path / "copy"))
    rewrite(copied, change)
    with pytest.raises(ValueError, match=message):
        fastllm.load(copied, quiet=True)


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "static": ({"input_activations": ACTIVATIONS | {"dynamic": False}}, "input_activations .*'dynamic': False"),
    "one scale": ({"input_activations": ACTIVATIONS | {"strategy": "tensor"}}, "'strategy': 'tensor'"),
    "integers": ({"input_activations": ACTIVATIONS | {"type": "int"}}, "input_activations .*'type': 'int'"),
    "none": ({"input_activations": None}, "input_activations"),
    "integer weights": ({"weights": WEIGHTS | {"type": "int"}}, "has type 'int'"),
    "a scale for all": ({"weights": WEIGHTS | {"strategy": "tensor"}}, "float-quantized weights of another kind"),
    "blocks": ({"weights": WEIGHTS | {"strategy": "block"}}, "strategy 'block'"),
    "4 bits": ({"weights": WEIGHTS | {"num_bits": 4}}, "float-quantized weights of another kind"),
    "packed": ({"format": "pack-quantized"}, r"\(input_activations\) of packed weights and type 'float'"),
    "integers on disk": ({"format": "int-quantized"}, "input_activations .*'type': 'float'.* and type 'float'"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_cannot_be_read_is_refused(name: str) -> None:
    change, message = CONFIGS[name]
    config = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"g": GROUP}}
    assert Stored(config).scheme(UP) == Scheme(8, None, True, "fp8")
    with pytest.raises(ValueError, match=message):
        Stored(config | {"config_groups": {"g": GROUP | change}})
