"""Checkpoints with activations of 8 bits, `int-quantized` of compressed-tensors: written, read, damaged."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_damage import rewrite
from test_load import assert_same_tensors
from tiny import build, output
from torch import Tensor, nn

import fastllm
from fastllm.checkpoints import FastllmConfig
from fastllm.checkpoints.compressed_tensors import Stored
from fastllm.checkpoints.scheme import Scheme
from fastllm.formats import parse_format
from fastllm.nn import QuantExperts, QuantLinear
from fastllm.nn.experts import is_experts

A8 = Scheme(8, None, True, "int8")
ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False, "strategy": "channel"}
UP = "model.layers.1.mlp.up_proj"  # [256, 128]


def quantized(family: str = "llama", lm_head: Any = None, kind: str = "int8", **settings: Any) -> Any:
    model = build(family, **settings)
    fastllm.optimize(model, kind, activations=kind, lm_head=lm_head, min_coverage=0, quiet=True)
    return model


def quantization_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def formats(model: nn.Module) -> dict[str, str]:
    return {name: m.format.name for name, m in model.named_modules() if isinstance(m, QuantLinear)}


def test_tensors_on_disk_have_the_published_layout(tmp_path: Path) -> None:
    model = quantized(lm_head="int8-a8", intermediate_size=202)  # rows of 202 bytes fill no whole number of words
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            parts = {k.removeprefix(f"{name}."): t for k, t in tensors.items() if k.startswith(f"{name}.")}
            assert {k: (t.dtype, tuple(t.shape)) for k, t in parts.items()} == {
                "weight": (torch.int8, layer.shape),
                "weight_scale": (torch.bfloat16, (layer.out_features, 1)),
            }
            assert torch.equal(parts["weight"] * parts["weight_scale"], layer.dequantize())
    assert quantization_config(tmp_path) == {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": ACTIVATIONS},
        },
        "ignore": [],
    }


def test_several_formats_are_told_apart(tmp_path: Path) -> None:
    quantized().save_pretrained(tmp_path)
    config = quantization_config(tmp_path)
    groups = {tuple(g["targets"]): g for g in config["config_groups"].values()}
    assert config["format"] == "mixed-precision" and groups.keys() == {("lm_head",), ("Linear",)}
    assert groups["lm_head",] == {"targets": ["lm_head"], "weights": WEIGHTS, "format": "pack-quantized"}
    assert groups["Linear",]["format"] == "int-quantized"
    stored = Stored(config)
    assert stored.scheme("lm_head") == Scheme(8, None, True) and stored.scheme(UP) == A8
    for group in config["config_groups"].values():
        del group["format"]  # then the activations tell
    assert Stored(config).scheme("lm_head") == Scheme(8, None, True) and Stored(config).scheme(UP) == A8


SAVED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "throughout": ("llama", {"lm_head": "int8-a8"}),
    "dense head": ("llama", {"lm_head": False}),
    "tied head": ("llama", {"tie_word_embeddings": True}),
    "ragged": ("llama", {"intermediate_size": 202}),
    "bias": ("llama", {"attention_bias": True, "dtype": torch.float16}),
    "gemma3": ("gemma3_text", {"tie_word_embeddings": True}),
    "bert": ("bert", {}),
    "mixtral": ("mixtral", {}),
    "qwen3 moe": ("qwen3_moe", {"dtype": torch.float32}),
    "float8": ("llama", {"kind": "fp8"}),
    "float8 throughout": ("llama", {"kind": "fp8", "lm_head": "fp8", "intermediate_size": 202}),
    "float8 gemma3": ("gemma3_text", {"kind": "fp8", "tie_word_embeddings": True}),
    "float8 bias": ("llama", {"kind": "fp8", "attention_bias": True, "dtype": torch.float16}),
    "float8 mixtral": ("mixtral", {"kind": "fp8"}),
}


@pytest.mark.parametrize("name", SAVED)
def test_what_was_saved_loads_packed_and_saves_the_same(name: str, tmp_path: Path) -> None:
    family, settings = SAVED[name]
    saved = quantized(family, **settings)
    saved.save_pretrained(tmp_path / "a")
    model = fastllm.load(tmp_path / "a", quiet=True)
    assert formats(model) == formats(saved) and f"{settings.get('kind', 'int8')}-a8" in formats(model).values()
    assert torch.equal(output(model), output(saved))
    model.save_pretrained(tmp_path / "b")
    assert_same_tensors(*(load_file(tmp_path / n / "model.safetensors") for n in "ab"))
    a, b = (json.loads((tmp_path / n / "config.json").read_text()) for n in "ab")
    assert a == b


def test_the_file_is_not_written_to(tmp_path: Path) -> None:
    saved = quantized()
    saved.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    model = fastllm.load(tmp_path, quiet=True)
    assert torch.equal(output(model), output(saved))
    assert (tmp_path / "model.safetensors").read_bytes() == before


def write_by_hand(folder: Path) -> Any:
    """A checkpoint from the description of the format alone; returns the dense model that its weights stand for."""
    model, tensors = build("llama", seed=3), {}
    for name, p in list(model.named_parameters()):
        if not name.endswith("_proj.weight"):
            tensors[name] = p.detach().clone()
            continue
        q = torch.randint(-128, 128, p.shape, dtype=torch.int8)
        scale = (torch.rand(len(p), 1) * 0.002 + 0.0001).to(torch.bfloat16)
        tensors |= {name: q, f"{name}_scale": scale}
        model.get_submodule(name.removesuffix(".weight")).weight = nn.Parameter(q * scale)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads(model.config.to_json_string(use_diff=False)) | {"dtype": "bfloat16"}
    config["architectures"] = ["LlamaForCausalLM"]
    more = {"group_size": None, "block_structure": None, "actorder": None, "observer": None, "observer_kwargs": {}}
    group = {"targets": ["Linear"], "weights": WEIGHTS | more, "input_activations": ACTIVATIONS | more}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
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
    model = fastllm.load(tmp_path, quiet=True)
    assert set(formats(model).values()) == {"int8-a8"} and len(formats(model)) == 14
    for name in formats(model):
        assert torch.equal(model.get_submodule(name).dequantize(), dense.get_submodule(name).weight), name
    got, want = output(model).float(), output(dense).float()
    assert (got - want).norm() < 0.1 * want.norm()
    model.save_pretrained(tmp_path / "again")
    assert_same_tensors(load_file(tmp_path / "again/model.safetensors"), load_file(tmp_path / "model.safetensors"))


def test_a_dense_checkpoint_is_quantized_while_it_is_read(tmp_path: Path) -> None:
    for family in ("llama", "mixtral"):
        build(family).save_pretrained(tmp_path / family)
        want = quantized(family)
        model = fastllm.load(tmp_path / family, weights="int8", activations="int8", quiet=True)
        assert formats(model) == formats(want) and torch.equal(output(model), output(want))
    for settings in ({}, {"weights": "int4"}):
        with pytest.raises(ValueError, match="activations='int8'.*weights='int8'"):
            fastllm.load(tmp_path / "llama", activations="int8", **settings)
    assert FastllmConfig("int8", activations="int8").to_dict()["activations"] == "int8"


def test_experts_are_read_but_leave_activations_alone(tmp_path: Path) -> None:
    """Other tools store them so; here, and in stock transformers, their products are not of integers."""
    model, plain = quantized("mixtral"), quantized("mixtral")
    plain.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"].values()
    (experts,) = [g for g in groups if "experts" in g["targets"][0]]
    experts |= {"format": "int-quantized", "input_activations": ACTIVATIONS}
    (tmp_path / "config.json").write_text(json.dumps(config))

    def as_int8(tensors: dict[str, Tensor]) -> None:
        for key in [k for k in tensors if ".experts." in k and k.endswith("_packed")]:
            name = key.removesuffix("_packed")
            tensors[name] = (tensors.pop(key).view(torch.uint8).int() - 128).to(torch.int8)
            del tensors[f"{name}_shape"]

    rewrite(tmp_path, as_int8)
    read = fastllm.load(tmp_path, quiet=True)
    assert formats(read) == formats(plain) and torch.equal(output(read), output(plain))
    for name, module in list(model.named_modules()):
        if is_experts(module) or isinstance(module, QuantExperts):
            experts = build("mixtral").get_submodule(name)
            model.set_submodule(name, QuantExperts.from_experts(experts, parse_format("int8-a8")))
    with pytest.raises(ValueError, match="rounded activations cannot be stored"):
        model.save_pretrained(tmp_path / "no")


# --- damage


def put(part: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({f"{UP}.{part}": change(tensors[f"{UP}.{part}"]).contiguous()})


DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "rows": (put("weight", lambda t: t[:-8]), rf"{UP}.weight has shape \[248, 128\], not \[256, 128\].*int8 act"),
    "cols": (put("weight", lambda t: t[:, :-1]), rf"{UP}.weight has shape \[256, 127\], not \[256, 128\]"),
    "rank": (put("weight", lambda t: t[None]), rf"{UP}.weight has shape \[1, 256, 128\]"),
    "unsigned": (put("weight", lambda t: t.view(torch.uint8)), rf"{UP}.weight has dtype U8, not I8"),
    "dense": (put("weight", lambda t: t.bfloat16()), rf"{UP}.weight has dtype BF16, not I8"),
    "scales": (put("weight_scale", lambda t: t.expand(-1, 2)), rf"{UP}.weight_scale has shape \[256, 2\]"),
    "flat scales": (put("weight_scale", lambda t: t[:, 0]), rf"{UP}.weight_scale has shape \[256\], not \[256, 1\]"),
    "scale dtype": (put("weight_scale", lambda t: t.int()), rf"{UP}.weight_scale has dtype I32, not BF16"),
    "nan": (put("weight_scale", lambda t: t / 0 * 0), rf"{UP}.weight_scale has 256 values that are NaN"),
    "no weight": (lambda t: t.pop(f"{UP}.weight"), rf"{UP}.weight is missing"),
    "no scale": (lambda t: t.pop(f"{UP}.weight_scale"), rf"{UP}.weight_scale is missing from the checkpoint: it is"),
    "packed": (
        lambda t: t.update({f"{UP}.weight_packed": t.pop(f"{UP}.weight").view(torch.int32)}),
        rf"{UP}.weight_packed, but by the quantization_config",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_layer_is_named_with_its_numbers(name: str, intact: Path, tmp_path: Path) -> None:
    change, message = DAMAGE[name]
    copied = Path(shutil.copytree(intact, tmp_path / "copy"))
    rewrite(copied, change)
    with pytest.raises(ValueError, match=message):
        fastllm.load(copied, quiet=True)


GROUP = {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": ACTIVATIONS}
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "static": (
        GROUP | {"input_activations": ACTIVATIONS | {"dynamic": False}},
        "input_activations .*'dynamic': False",
    ),
    "local": (GROUP | {"input_activations": ACTIVATIONS | {"dynamic": "local"}}, "'dynamic': 'local'"),
    "one scale": (GROUP | {"input_activations": ACTIVATIONS | {"strategy": "tensor"}}, "'strategy': 'tensor'"),
    "zero points": (GROUP | {"input_activations": ACTIVATIONS | {"symmetric": False}}, "'symmetric': False"),
    "4 bits": (GROUP | {"input_activations": ACTIVATIONS | {"num_bits": 4}}, "'num_bits': 4"),
    "floats": (GROUP | {"input_activations": ACTIVATIONS | {"type": "float"}}, "'type': 'float'"),
    "none": (GROUP | {"input_activations": None}, "input_activations"),
    "a list": (GROUP | {"input_activations": [8]}, r"input_activations is \[8\], not a table"),
    "text": (GROUP | {"input_activations": {"num_bits": "8"}}, "input_activations.num_bits is '8', not of type int"),
    "outputs": (GROUP | {"output_activations": ACTIVATIONS}, "output_activations"),
    "packed": (GROUP | {"format": "pack-quantized"}, r"\(input_activations\) of packed weights"),
    "floats on disk": (GROUP | {"format": "float-quantized"}, "and type .int.: "),
    "int4": (GROUP | {"weights": WEIGHTS | {"num_bits": 4}}, "int-quantized weights of another kind"),
    "groups": (
        GROUP | {"weights": WEIGHTS | {"strategy": "group", "group_size": 32}},
        "int-quantized weights of another kind",
    ),
    "asymmetric": (GROUP | {"weights": WEIGHTS | {"symmetric": False}}, "int-quantized weights of another kind"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_cannot_be_read_is_refused(name: str, intact: Path, tmp_path: Path) -> None:
    group, message = CONFIGS[name]
    copied = Path(shutil.copytree(intact, tmp_path / "copy"))
    config = json.loads((copied / "config.json").read_text())
    config["quantization_config"]["config_groups"] = {"g": group}
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        fastllm.load(copied, quiet=True)
    with pytest.raises(ValueError, match=message):
        Stored(config["quantization_config"])
