"""GPTQ, AWQ and nf4 checkpoints that are damaged, lie, or are of another kind are refused, with name and numbers."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from others_by_hand import SMALL, Tensors, change_config, save_shards, write_awq, write_gptq, write_nf4
from safetensors.torch import load_file
from tiny import build
from torch import Tensor

from fastllm.checkpoints import load
from fastllm.checkpoints.coding import CheckpointError

UP = "model.layers.0.mlp.up_proj"  # [96, 64] in groups of 32; nf4: [128, 64]
WRITERS: dict[str, Callable[..., Any]] = {
    "gptq": write_gptq,
    "awq": write_awq,
    "nf4": write_nf4,
    "double": lambda folder: write_nf4(folder, nested=True),
}


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) for name in WRITERS}
    for name, folder in folders.items():
        WRITERS[name](folder)
        load(folder, quiet=True)  # it loads, so what fails below fails by what is done to it
    return folders


@pytest.fixture
def copy(intact: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(intact[name], tmp_path / name))


def part(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({f"{UP}.{name}": change(tensors[f"{UP}.{name}"]).contiguous()})


def at(value: float, *index: int) -> Callable[[Tensor], Tensor]:
    def change(t: Tensor) -> Tensor:
        t[index] = value
        return t

    return change


def lose(name: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.pop(f"{UP}.{name}")


def cut(t: Tensor) -> Tensor:
    return t[:-1]


STATE = "weight.quant_state.bitsandbytes__nf4"


def text(content: str | bytes) -> Callable[[Tensors], Any]:
    raw = content if isinstance(content, bytes) else content.encode()
    return part(STATE, lambda _: torch.tensor(list(raw), dtype=torch.uint8))


def state(**change: Any) -> Callable[[Tensors], Any]:
    def write(tensors: Tensors) -> None:
        table = json.loads(bytes(tensors[f"{UP}.{STATE}"].tolist())) | change
        text(json.dumps(table))(tensors)

    return write


def fp4(tensors: Tensors) -> None:
    state(quant_type="fp4")(tensors)
    tensors[f"{UP}.{STATE.replace('nf4', 'fp4')}"] = tensors.pop(f"{UP}.{STATE}")


Damage = tuple[str, Callable[[Tensors], Any], str]
DAMAGE: dict[str, Damage] = {
    "gptq swapped": (
        "gptq",
        part("qweight", lambda t: t.t()),
        r"qweight has shape \[96, 8\], not \[8, 96\].*\[96, 64\]",
    ),
    "gptq swapped scales": ("gptq", part("scales", lambda t: t.t()), r"scales has shape \[96, 2\], not \[2, 96\]"),
    "gptq int64": ("gptq", part("qweight", lambda t: t.long()), "qweight has dtype I64, not I32"),
    "gptq uint8": ("gptq", part("qzeros", lambda t: t.to(torch.uint8)), "qzeros has dtype U8, not I32"),
    "gptq integer scales": ("gptq", part("scales", lambda t: t.int()), "scales has dtype I32, not BF16 or F16 or F32"),
    "gptq double scales": ("gptq", part("scales", lambda t: t.double()), "scales has dtype F64, not BF16"),
    "gptq NaN": ("gptq", part("scales", at(float("nan"), 1, 5)), "scales has 1 values that are NaN or infinite"),
    "gptq inf": ("gptq", part("scales", at(float("inf"), 0)), "scales has 96 values that are NaN or infinite"),
    "gptq short zeros": ("gptq", part("qzeros", cut), r"qzeros has shape \[1, 12\], not \[2, 12\]"),
    "gptq narrow zeros": ("gptq", part("qzeros", lambda t: t[:, 1:]), r"qzeros has shape \[2, 11\], not \[2, 12\]"),
    "gptq other zeros": ("gptq", part("qzeros", at(0x77787777, 1, 3)), "word 0x77787777, but symmetric .* 0x77777777"),
    "gptq zeros of both": ("gptq", part("qzeros", at(-0x77777778, 0, 0)), "word 0x88888888, but symmetric weights"),
    "gptq far g_idx": ("gptq", part("g_idx", at(2, 63)), "g_idx has values from 0 to 2, but 64 inputs .* 2 groups"),
    "gptq huge g_idx": ("gptq", part("g_idx", at(2**31 - 1, 0)), "g_idx has values from 0 to 2147483647, but"),
    "gptq negative g_idx": ("gptq", part("g_idx", at(-1, 4)), "g_idx has values from -1 to 1, but"),
    "gptq act-order": ("gptq", part("g_idx", lambda t: t.flip(0)), "64 of 64 inputs into another.*desc_act: false"),
    "gptq short g_idx": ("gptq", part("g_idx", cut), r"g_idx has shape \[63\], not \[64\]"),
    "gptq float g_idx": ("gptq", part("g_idx", lambda t: t.float()), "g_idx has dtype F32, not I32"),
    "gptq no qweight": ("gptq", lose("qweight"), "qweight is missing from the checkpoint"),
    "gptq no qzeros": ("gptq", lose("qzeros"), "qzeros is missing from the checkpoint"),
    "gptq no scales": ("gptq", lose("scales"), "scales is missing from the checkpoint"),
    "gptq no layer": (
        "gptq",
        lambda tensors: [tensors.pop(f"{UP}.{p}") for p in ("qweight", "qzeros", "scales", "g_idx")],
        f"lacks 1 weights .*{UP}.weight",
    ),
    "gptq no norm": ("gptq", lambda tensors: tensors.pop("model.norm.weight"), "lacks 1 weights .*model.norm"),
    "gptq integer norm": (
        "gptq",
        lambda tensors: tensors.update({"model.norm.weight": torch.ones(64, dtype=torch.int32)}),
        "model.norm.weight has dtype I32, not floating point",
    ),
    "gptq packed embedding": (
        "gptq",
        lambda tensors: tensors.update({"model.embed_tokens.qweight": torch.zeros(8, 8, dtype=torch.int32)}),
        "model.embed_tokens is not packed, or it is a Embedding",
    ),
    "awq swapped": ("awq", part("qweight", lambda t: t.t()), r"qweight has shape \[12, 64\], not \[64, 12\]"),
    "awq int8": ("awq", part("qweight", lambda t: t.to(torch.int8)), "qweight has dtype I8, not I32"),
    "awq NaN": ("awq", part("scales", at(float("nan"), 0, 0)), "scales has 1 values that are NaN"),
    "awq short scales": ("awq", part("scales", cut), r"scales has shape \[1, 96\], not \[2, 96\].*awq int4-g32-asym"),
    "awq short zeros": ("awq", part("qzeros", cut), r"qzeros has shape \[1, 12\], not \[2, 12\]"),
    "awq no zeros": ("awq", lose("qzeros"), "qzeros is missing from the checkpoint"),
    "awq no qweight": ("awq", lose("qweight"), "qweight is missing from the checkpoint"),
    "nf4 short": ("nf4", part("weight", cut), rf"{UP}.weight has shape \[4095, 1\], not \[4096, 1\].*blocks of 64"),
    "nf4 flat": ("nf4", part("weight", lambda t: t.flatten()), r"weight has shape \[4096\], not \[4096, 1\]"),
    "nf4 int8": ("nf4", part("weight", lambda t: t.view(torch.int8)), "weight has dtype I8, not U8"),
    "nf4 no weight": ("nf4", lose("weight"), "up_proj.weight is missing from the checkpoint: it is incomplete"),
    "nf4 short absmax": ("nf4", part("weight.absmax", cut), r"weight_absmax has shape \[127\], not \[128\]"),
    "nf4 NaN": ("nf4", part("weight.absmax", at(float("nan"), 3)), "weight.absmax has 1 values that are NaN"),
    "nf4 inf": ("nf4", part("weight.absmax", at(float("-inf"), 3)), "weight.absmax has 1 values that are NaN or inf"),
    "nf4 half": ("nf4", part("weight.absmax", lambda t: t.half()), "weight_absmax has dtype F16, not F32"),
    "nf4 bytes": ("nf4", part("weight.absmax", lambda t: t.byte()), "weight_absmax has dtype U8, not F32"),
    "nf4 no absmax": ("nf4", lose("weight.absmax"), "weight_absmax is missing from the checkpoint"),
    "nf4 levels": ("nf4", part("weight.quant_map", at(0.5, 3)), "quant_map has other levels than nf4"),
    "nf4 NaN level": ("nf4", part("weight.quant_map", at(float("nan"), 3)), "quant_map has other levels than nf4"),
    "nf4 few levels": ("nf4", part("weight.quant_map", cut), r"quant_map has shape \[15\], not \[16\]"),
    "nf4 no state": ("nf4", lose(STATE), "weight_quant_state is missing from the checkpoint"),
    "nf4 no JSON": ("nf4", text("{'quant_type': 1"), "quant_state is not JSON .*the file is damaged"),
    "nf4 code": ("nf4", text("__import__('os').abort()"), "quant_state is not JSON"),
    "nf4 no text": ("nf4", text(b"\xff\xfe{}"), "quant_state is not JSON"),
    "nf4 deep": ("nf4", text("[" * 60000), "quant_state is not JSON"),
    "nf4 digits": ("nf4", text('{"blocksize": ' + "9" * 60000 + "}"), "quant_state is not JSON"),
    "nf4 empty": ("nf4", text(""), "quant_state is not JSON"),
    "nf4 long state": ("nf4", text(" " * 70000), r"quant_state has shape \[70000\], not \[n\] with n up to 65536"),
    "nf4 list": ("nf4", text("[1, 2]"), r"quant_state is \[1, 2\], not a table"),
    "nf4 transposed": ("nf4", state(shape=[64, 128]), r"has shape \[64, 128\], not \[128, 64\]"),
    "nf4 huge": ("nf4", state(shape=[2**62, 2**62]), r"has shape \[4611686018427387904, .*, not \[128, 64\]"),
    "nf4 no shape": ("nf4", state(shape="a" * 999), "has shape 'aaa.{0,70} not"),
    "nf4 blocks": ("nf4", state(blocksize=128), "has blocksize 128, not 64"),
    "nf4 is fp4": ("nf4", fp4, "has quant_type 'fp4', not 'nf4'"),
    "double no nested": ("double", lose("weight.nested_absmax"), "weight_nested_absmax is missing"),
    "double no map": ("double", lose("weight.nested_quant_map"), "weight_nested_quant_map is missing"),
    "double short": ("double", part("weight.nested_absmax", lambda t: t[:0]), r"nested_absmax has shape \[0\], not"),
    "double NaN": ("double", part("weight.nested_absmax", at(float("nan"), 0)), "absmax has 128 values that are NaN"),
    "double floats": ("double", part("weight.absmax", lambda t: t.float()), "weight_absmax has dtype F32, not U8"),
    "double offset": ("double", state(nested_offset="a"), "nested_offset 'a', not a number"),
    "double no offset": ("double", state(nested_offset=None), "nested_offset None, not a number"),
    "double inf offset": ("double", state(nested_offset=float("inf")), "nested_offset inf, not a number"),
    "double blocks": ("double", state(nested_blocksize=64), "has nested_blocksize 64, not 256"),
}


def rewrite(folder: Path, change: Callable[[Tensors], Any], shards: int = 1) -> None:
    tensors = {key: t.clone() for key, t in load_file(folder / "model.safetensors").items()}
    change(tensors)
    (folder / "model.safetensors").unlink()
    save_shards(folder, tensors, shards)


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_tensors_are_named_with_their_numbers(name: str, copy: Callable[[str], Path]) -> None:
    kind, change, message = DAMAGE[name]
    folder = copy(kind)
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=message):
        load(folder, quiet=True)


CONFIGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "gptq 3 bits": ("gptq", {"bits": 3}, "with bits 3: 4 and 8 bits"),
    "gptq 8 bits": ("gptq", {"bits": 8}, r"qweight has shape \[12, 64\], not \[24, 64\] for .*gptq int8-g32"),
    "gptq bits of text": ("gptq", {"bits": "4"}, "bits is '4', not of type int"),
    "gptq bits of truth": ("gptq", {"bits": True}, "bits is True, not of type int"),
    "gptq no bits": ("gptq", {"bits": None}, "bits is None, not of type int"),
    "gptq other group": ("gptq", {"group_size": 64}, r"qzeros has shape \[3, 8\], not \[2, 8\]"),
    "gptq channel": ("gptq", {"group_size": -1}, r"has shape \[3, .*\], not \[1, .*gptq int4-channel"),
    "gptq group 0": ("gptq", {"group_size": 0}, "group_size 0: multiples of 32"),
    "gptq group -128": ("gptq", {"group_size": -128}, "group_size -128: multiples of 32"),
    "gptq huge group": ("gptq", {"group_size": 2**70}, r"has shape \[3, .*\], not \[1, "),
    "gptq sym of text": ("gptq", {"sym": "yes"}, "sym is 'yes', not of type bool"),
    "gptq marlin": ("gptq", {"checkpoint_format": "marlin"}, "the format 'marlin'"),
    "gptq two formats": ("gptq", {"format": "gptq_v2"}, "the format .*gptq.* and "),
    "gptq int16": ("gptq", {"pack_dtype": "int16"}, "pack_dtype 'int16'"),
    "gptq adapter": ("gptq", {"adapter": {"name": "lora"}}, "adapter {'name': 'lora'}"),
    "gptq rotation": ("gptq", {"rotation": "hadamard"}, "rotation 'hadamard'"),
    "gptq rules of a list": ("gptq", {"dynamic": ["a"]}, r"dynamic is \['a'\], not a table"),
    "gptq rule of a number": ("gptq", {"dynamic": {"a": 5}}, r"dynamic\['a'\] is 5, not a table"),
    "gptq no rule": ("gptq", {"dynamic": {"+:(": {}}}, r"'\+:\(', not a regular expression"),
    "gptq rule for 2 bits": ("gptq", {"dynamic": {"+:.*up": {"bits": 2}}}, "with bits 2"),
    "gptq rule for 8 bits": (
        "gptq",
        {"dynamic": {".*up": {"bits": 8}}},
        rf"{UP}.qweight has shape \[8, 96\], not \[16",
    ),
    "awq 8 bits": ("awq", {"bits": 8}, "with bits 8: 4 bits with zero points"),
    "awq no bits": ("awq", {"bits": None}, "bits is None, not of type int"),
    "awq gemv": ("awq", {"version": "gemv"}, "version 'gemv'"),
    "awq two versions": ("awq", {"format": "marlin"}, "version 'gemm' and 'marlin'"),
    "awq no zero points": ("awq", {"zero_point": False}, "zero_point false"),
    "awq group": ("awq", {"group_size": -32}, "AWQ checkpoint with group_size -32"),
    "awq other group": ("awq", {"group_size": 64}, r"has shape \[3, .*\], not \[2, "),
    "awq skipped of text": ("awq", {"modules_to_not_convert": "lm_head"}, "is 'lm_head', not a list of names"),
    "nf4 fp4": ("nf4", {"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type 'fp4'"),
    "nf4 8 bits": ("nf4", {"load_in_4bit": False, "load_in_8bit": True}, "load_in_4bit False and load_in_8bit True"),
    "nf4 storage": ("nf4", {"bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage 'bfloat16'"),
    "nf4 not double": ("nf4", {"bnb_4bit_use_double_quant": True}, "weight_absmax has dtype F32, not U8"),
    "awq read as gptq": ("awq", {"quant_method": "gptq"}, r"qweight has shape \[96, 8\], not \[12, 64\]"),
    "gptq read as awq": (
        "gptq",
        {"quant_method": "awq", "checkpoint_format": None},
        r"qweight has shape \[12, 64\], not \[96, 8\]",
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_lies_or_cannot_be_read_is_refused(name: str, copy: Callable[[str], Path]) -> None:
    kind, change, message = CONFIGS[name]
    folder = copy(kind)
    change_config(folder, lambda c: c | {"quantization_config": c["quantization_config"] | change})
    with pytest.raises(CheckpointError, match=message):
        load(folder, quiet=True)


def test_asymmetric_weights_that_claim_to_be_symmetric_are_refused(tmp_path: Path) -> None:
    write_gptq(tmp_path, symmetric=False, config={"sym": True})
    with pytest.raises(CheckpointError, match="qzeros has the word 0x.*, but symmetric .* or sym: true is wrong"):
        load(tmp_path, quiet=True)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_dense_checkpoint_that_claims_to_be_packed_is_refused(kind: str, copy: Callable[[str], Path]) -> None:
    folder = copy(kind)
    build("llama", **SMALL | {"dtype": torch.float32}).save_pretrained(folder / "dense")
    shutil.copy(folder / "dense" / "model.safetensors", folder)
    change_config(folder, lambda c: c | {"intermediate_size": 96})
    with pytest.raises(CheckpointError, match="no packed layer of those that quantization_config describes"):
        load(folder, quiet=True)


def test_experts_that_are_packed_and_not_known_to_be_are_refused(tmp_path: Path) -> None:
    write_nf4(tmp_path, family="mixtral", packed=r"\.experts\.|_proj", intermediate_size=64, num_local_experts=2)
    rewrite(tmp_path, lambda tensors: [tensors.pop(k) for k in list(tensors) if re.search(r"\.experts.*absmax$", k)])
    with pytest.raises(CheckpointError, match=r"experts.0.*weight \(U8\) belongs to a packed .* joins or cuts"):
        load(tmp_path, quiet=True)


@pytest.mark.parametrize("kind", WRITERS)
def test_truncated_and_missing_files_are_named(kind: str, copy: Callable[[str], Path]) -> None:
    folder = copy(kind)
    rewrite(folder, lambda tensors: None, shards=2)
    load(folder, quiet=True)
    second = folder / "model-00002-of-00002.safetensors"
    for size in (second.stat().st_size - 1, 500, 0):
        os.truncate(second, size)
        with pytest.raises(CheckpointError, match="model-00002-of-00002.safetensors is truncated or damaged"):
            load(folder, quiet=True)
    second.unlink()
    with pytest.raises(CheckpointError, match="lacks 1 of its 2 files: model-00002-of-00002.safetensors"):
        load(folder, quiet=True)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor"):
        load(folder, quiet=True)


@pytest.mark.parametrize("path", ["../secret.safetensors", "/secret.safetensors", "a/../../b", "..", "a\\b", ""])
def test_an_index_that_leads_out_of_the_folder_is_refused(path: str, copy: Callable[[str], Path]) -> None:
    folder = copy("gptq")
    rewrite(folder, lambda tensors: None, shards=2)
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder.parent / "secret.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], path)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="index.json names .*, which is no file of that folder"):
        load(folder, quiet=True)
