"""A checkpoint that is damaged, or of a kind that cannot be read, is refused with the layer and the numbers."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import write_by_hand
from safetensors.torch import load_file, save_file
from tiny import build
from torch import Tensor

import fastllm

Tensors = dict[str, Tensor]


def rewrite(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = {key: t.clone() for key, t in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


UP = "model.layers.1.mlp.up_proj"  # [256, 128], groups of 32


def put(part: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({f"{UP}.{part}": change(tensors[f"{UP}.{part}"]).contiguous()})


DAMAGE: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "rows": (put("weight_packed", lambda t: t[:-8]), rf"{UP}.weight_packed has shape \[248, 16\], not \[256, 16\]"),
    "cols": (put("weight_packed", lambda t: t[:, :-1]), rf"{UP}.weight_packed has shape \[256, 15\], not \[256, 16\]"),
    "rank": (put("weight_packed", lambda t: t[None]), rf"{UP}.weight_packed has shape \[1, 256, 16\]"),
    "int64": (put("weight_packed", lambda t: t.long()), rf"{UP}.weight_packed has dtype I64, not I32"),
    "float": (put("weight_packed", lambda t: t.float()), rf"{UP}.weight_packed has dtype F32, not I32"),
    "scales": (
        put("weight_scale", lambda t: t[:, :3]),
        rf"{UP}.weight_scale has shape \[256, 3\], not \[256, 4\].*int4",
    ),
    "scale dtype": (put("weight_scale", lambda t: t.int()), rf"{UP}.weight_scale has dtype I32, not BF16"),
    "nan": (
        put("weight_scale", lambda t: t.index_fill(1, torch.tensor(2), float("nan"))),
        rf"{UP}.weight_scale has 256 values",
    ),
    "inf": (
        put("weight_scale", lambda t: t.index_fill(0, torch.tensor(2), float("inf"))),
        rf"{UP}.weight_scale has 4 values",
    ),
    "shape": (put("weight_shape", lambda t: t.flip(0)), rf"{UP}.weight_shape says \[128, 256\].*\[256, 128\]"),
    "huge shape": (put("weight_shape", lambda t: t * 2**40), rf"{UP}.weight_shape says"),
    "shape rank": (put("weight_shape", lambda t: t[:1]), rf"{UP}.weight_shape has shape \[1\]"),
    "no packed": (lambda t: t.pop(f"{UP}.weight_packed"), rf"{UP}.weight_packed is missing"),
    "no scale": (lambda t: t.pop(f"{UP}.weight_scale"), rf"{UP}.weight_scale is missing"),
    "no shape": (lambda t: t.pop(f"{UP}.weight_shape"), rf"{UP}.weight_shape is missing"),
    "no norm": (lambda t: t.pop("model.norm.weight"), "lacks 1 weights .*model.norm.weight"),
    "wrong norm": (
        lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:64].clone()}),
        r"model.norm.weight has shape \[64\]",
    ),
    "g_idx": (
        lambda t: t.update({f"{UP}.weight_g_idx": torch.arange(128)}),
        rf"{UP}.weight_g_idx: .*activation order",
    ),
    "head": (
        lambda t: t.update({"lm_head.weight_packed": torch.zeros(64, 16, dtype=torch.int32)}),
        "lm_head is not packed",
    ),
}


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("intact")
    write_by_hand(folder)
    fastllm.load(folder, quiet=True)  # it loads, so what fails below fails by what is done to it
    return folder


@pytest.fixture
def copied(intact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(intact, tmp_path / "copy"))


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_layer_is_named_with_its_numbers(name: str, copied: Path) -> None:
    change, message = DAMAGE[name]
    rewrite(copied, change)
    with pytest.raises(ValueError, match=message):
        fastllm.load(copied, quiet=True)


def test_a_truncated_file_is_named(copied: Path) -> None:
    file = copied / "model.safetensors"
    for size in (file.stat().st_size - 1, 1000, 4, 0):
        os.truncate(file, size)
        with pytest.raises(ValueError, match="model.safetensors is truncated or damaged"):
            fastllm.load(copied, quiet=True)


def test_a_header_that_claims_terabytes_allocates_nothing(copied: Path) -> None:
    file = copied / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header[f"{UP}.weight_packed"]["shape"] = [1 << 40, 16]
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    with pytest.raises(ValueError, match="damaged"):
        fastllm.load(copied, quiet=True)


def test_a_config_of_another_size_is_refused(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"intermediate_size": 1 << 30}))  # a TB, were it dense
    with pytest.raises(ValueError, match=r"_proj.weight_packed has shape .*, not \[128, 134217728\]"):
        fastllm.load(copied, quiet=True)


def test_missing_files_are_named(tmp_path: Path, copied: Path) -> None:
    with pytest.raises(FileNotFoundError, match="neither a folder"):
        fastllm.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no config.json"):
        fastllm.load(tmp_path)
    (copied / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor"):
        fastllm.load(copied)
    index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="lacks 2 of its 2 files: model-1-of-2.safetensors"):
        fastllm.load(copied)
    (copied / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ValueError, match="index.json is damaged"):
        fastllm.load(copied)
    (copied / "model.safetensors.index.json").write_text('{"weight_map": {"a": 5}}')
    with pytest.raises(ValueError, match="index.json is damaged"):
        fastllm.load(copied)


@pytest.mark.parametrize("text", ["{", "[]", "5", '{"quantization_config": "abc"}', '{"quantization_config": [1]}'])
def test_a_config_that_is_no_table_is_refused(copied: Path, text: str) -> None:
    (copied / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json is damaged"):
        fastllm.load(copied)


def test_dense_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({f"{UP}.weight": torch.zeros(256, 96).bfloat16()}))
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    for name in ("model.safetensors", "pytorch_model.bin"):
        with pytest.raises(ValueError, match=r"up_proj.*\[256, 96\]"):
            fastllm.load(tmp_path, weights="int8", quiet=True)
        (tmp_path / name).unlink()


def test_experts_that_are_too_many_are_refused(tmp_path: Path) -> None:
    build("mixtral").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_local_experts": 3}))
    with pytest.raises(ValueError, match=r"layers.\d.mlp.*\[4, .*\[3, "):
        fastllm.load(tmp_path, weights="int8", quiet=True)


def weights_with(**settings: Any) -> dict[str, Any]:
    base = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    return {"config_groups": {"g": {"targets": ["Linear"], "weights": base | settings}}}


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"quant_method": "hqq", "bits": 4}, "quantized by 'hqq'.*compressed-tensors, gptq, awq"),
    "format": ({"format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quantized'"),
    "sparse": ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
    "cache": ({"kv_cache_scheme": "fp8"}, "kv_cache_scheme is 'fp8'"),
    "empty": ({"config_groups": {}}, "no config_groups"),
    "activations": (
        {
            "config_groups": {
                "g": {"targets": ["Linear"], "weights": {"num_bits": 8}, "input_activations": {"num_bits": 8}}
            }
        },
        "config_groups.g has quantized activations",
    ),
    "float": (weights_with(type="float"), "type 'float'"),
    "bits": (weights_with(num_bits=3), "num_bits 3"),
    "bits of a float": (weights_with(num_bits=4.0), r"weights.num_bits is 4.0, not of type int"),
    "symmetric of text": (weights_with(symmetric="false"), "weights.symmetric is 'false', not of type bool"),
    "groups of a number": ({"config_groups": {"g": 5}}, "config_groups.g is 5, not a table"),
    "groups of a list": ({"config_groups": [1]}, "config_groups is .*not a table"),
    "weights of a list": (
        {"config_groups": {"g": {"weights": [1]}}},
        r"g.weights is \[1\], not a table",
    ),
    "targets of a number": ({"config_groups": {"g": {"targets": 5}}}, "targets is 5, not a list of names"),
    "ignore of numbers": ({"ignore": [5]}, r"ignore is \[5\], not a list of names"),
    "ignore of no pattern": ({"ignore": ["re:("]}, r"ignore is 're:\(', not a regular expression"),
    "sparsity of text": ({"sparsity_config": "x"}, "sparsity_config is 'x', not a table"),
    "actorder": (weights_with(actorder="group"), "actorder 'group'"),
    "block": (weights_with(strategy="block"), "strategy 'block'"),
    "group": (weights_with(group_size=0), "group_size 0"),
    "odd group": (weights_with(group_size=48), "128 inputs, which int4, groups of 48, symmetric does not divide"),
    "other bits": (weights_with(num_bits=8), r"weight_packed has shape \[128, 32\], not \[128, 64\].*in int8"),
    "zero points": (weights_with(symmetric=False), "weight_zero_point is missing"),
    "not packed": ({"ignore": ["re:.*up_proj", "lm_head"]}, "up_proj is not packed"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_cannot_be_read_is_refused(name: str, copied: Path) -> None:
    change, message = CONFIGS[name]
    config = json.loads((copied / "config.json").read_text())
    config["quantization_config"] |= change
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        fastllm.load(copied, quiet=True)


def test_weights_for_a_packed_checkpoint_are_refused(intact: Path) -> None:
    with pytest.raises(ValueError, match="packed already"):
        fastllm.load(intact, weights="int4")
