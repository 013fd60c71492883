"""GPTQ checkpoints written by hand load packed, to the bit, and save as compressed-tensors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from close import assert_close
from others_by_hand import (
    assert_stands_for,
    by_definition,
    change_config,
    gptq_parts,
    numbers,
    pack_columns,
    pack_rows,
    packed_layers,
    words,
    write_gptq,
)
from safetensors.torch import load_file, save_file
from tiny import dense_twin, output
from torch import nn

import fastllm
from fastllm.checkpoints import load
from fastllm.checkpoints.gptq import Gptq, GptqLayer, plus_one
from fastllm.formats import dequantize, unpack_bits, unpack_zero_point
from fastllm.nn import QuantExperts

exact = pytest.fixture(by_definition, name="exact")
CASES: dict[str, dict[str, Any]] = {
    "v1": {},
    "v2": {"version": 2},
    "v1 asym": {"symmetric": False},
    "v2 asym": {"version": 2, "symmetric": False},
    "v1 8 bits": {"bits": 8},
    "v2 8 bits": {"bits": 8, "version": 2},
    "v1 8 bits asym": {"bits": 8, "symmetric": False},
    "v2 8 bits asym": {"bits": 8, "symmetric": False, "version": 2},
    "channel": {"group": None},
    "short group": {"group": 64},
    "long group": {"group": 128},
    "label lies": {"label": "gptq_v2"},
    "label lies, too": {"version": 2, "label": "gptq"},
    "8 bits and a lie": {"bits": 8, "version": 2, "label": "gptq"},
    "bias": {"attention_bias": True, "version": 2, "symmetric": False},
    "qwen3": {"family": "qwen3", "shards": 3},
    "no label": {"config": {"checkpoint_format": None, "desc_act": None, "sym": None}},
    "newer key": {"config": {"format": "gptq", "pack_dtype": "int32", "meta": {"quantizer": ["a:1"]}}},
    "head": {"packed": "_proj|lm_head", "config": {"lm_head": True}},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("exact")
def test_it_loads_to_the_bit(name: str, tmp_path: Path) -> None:
    dense = write_gptq(tmp_path, **CASES[name])
    model = load(tmp_path, quiet=True)
    head = name == "head"
    assert_stands_for(model, dense, 7 + head)
    assert (type(model.lm_head) is nn.Linear) is not head
    assert (model.model.layers[0].self_attn.q_proj.bias is not None) is (name == "bias")
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again", quiet=True)
    assert packed_layers(again).keys() == packed_layers(model).keys()
    assert (output(again) - output(model)).abs().max() <= 1e-5 * output(model).abs().max()


def test_it_runs_with_everything_else(tmp_path: Path) -> None:
    dense = write_gptq(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    model = fastllm.load(tmp_path, quiet=True, dtype="bfloat16")
    got, want = output(model).float(), output(dense)
    assert (got - want).norm() < 0.03 * want.norm() and all(layer.layout for layer in packed_layers(model).values())
    assert (tmp_path / "model.safetensors").read_bytes() == before, "a layer was permuted in the file"


def test_groups_longer_than_a_row_are_one_a_channel(tmp_path: Path) -> None:
    write_gptq(tmp_path, group=None, config={"group_size": 2**40})
    model = load(tmp_path, quiet=True)
    assert {layer.format.group for layer in packed_layers(model).values()} == {None}  # nothing is padded to 2**40


def test_a_short_last_group_is_saved(tmp_path: Path) -> None:
    write_gptq(tmp_path, group=64)
    model = load(tmp_path, quiet=True)
    assert model.model.layers[0].mlp.down_proj.weight_scale.shape == (64, 2)  # of 96 inputs
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again", quiet=True)
    for name, layer in packed_layers(again).items():
        assert torch.equal(layer.dequantize(), model.get_submodule(name).dequantize())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.usefixtures("exact")
def test_experts_stay_packed(symmetric: bool, tmp_path: Path) -> None:
    sizes = {"intermediate_size": 64, "num_local_experts": 3, "shards": 2}
    dense = write_gptq(tmp_path, family="mixtral", packed=r"\.experts\.", symmetric=symmetric, **sizes)
    model = load(tmp_path, quiet=True)
    assert sum(isinstance(m, QuantExperts) for m in model.modules()) == 1 and len(packed_layers(model)) == 6
    twin = dense_twin(model, type(dense)(dense.config).eval())
    for key, p in dense.state_dict().items():
        if "experts" in key:
            assert torch.equal(twin.state_dict()[key], p), key
    assert_close(output(model), output(dense), 1e-5)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("first", [True, False])
def test_every_value_of_every_field(bits: int, first: bool) -> None:
    N, K, top = 32, 64, 2**bits
    q = (torch.arange(N * K).view(N, K) * 37) % top
    z = torch.arange(N * 2).view(N, 2) % (top - 1) + 1
    scale = torch.rand(N, 2).half()
    coding = GptqLayer(bits, 32, False, first)
    weight = coding.read("a", gptq_parts(q, z, scale, 32, bits, first), (N, K), torch.float16)
    assert torch.equal(unpack_bits(weight.packed, bits, K).long(), q)
    assert torch.equal(unpack_zero_point(weight.zero_point, bits, N).long(), z)
    assert torch.equal(weight.scale, scale) and weight.scale.dtype == torch.float16
    dense = dequantize(weight, coding.format, (N, K), torch.float32)
    assert torch.equal(dense, (q - z.repeat_interleave(32, 1)).float() * scale.float().repeat_interleave(32, 1))


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_points_of_zero_in_version_1_carry_as_they_borrowed(bits: int) -> None:
    z = [0, 3, 2**bits - 1, 0, 0, 1, 0, 7]
    ones = sum(1 << i for i in range(0, 32, bits))
    stored = [((w & 0xFFFFFFFF) - ones) & 0xFFFFFFFF for w in words(z, bits)]  # as its library writes version 1
    signed = torch.tensor([[w - 2**32 if w >= 2**31 else w for w in stored]], dtype=torch.int32)
    assert plus_one(signed, bits).tolist() == [words(z, bits)]


def test_the_packer_of_these_tests() -> None:
    assert words([1, 2, 3, 4, 5, 6, 7, 8], 4) == [0x87654321 - 2**32] and words([1, 2, 3, 255], 8) == [-0x00FCFDFF]
    q, z, scale, dense = numbers(8, 64, 32, 4, False)
    assert pack_columns(q.t(), 4).shape == (8, 8) and pack_rows(z.t(), 4).shape == (2, 1)
    assert dense[3, 40] == (q[3, 40] - z[3, 1]) * scale[3, 1].float()


def test_rules_for_single_layers() -> None:
    config = {"bits": 4, "group_size": 32, "sym": True, "checkpoint_format": "gptq"}
    rules = {"-:.*k_proj": {}, r"+:model\.0\..*": {"bits": 8, "group_size": -1, "mse": 2.0}, "up": {"sym": False}}
    gptq = Gptq(config | {"dynamic": rules})
    parts = {"qweight", "scales"}
    assert gptq.coding("model.1.q_proj", parts) == GptqLayer(4, 32, True) == gptq.experts()
    assert gptq.coding("model.0.q_proj", parts) == GptqLayer(8, None, True)
    assert gptq.coding("up", parts) == GptqLayer(4, 32, False)
    assert gptq.coding("model.0.q_proj", set()) is None and gptq.coding("model.0.q_proj", {"bias"}) is None


@pytest.mark.usefixtures("exact")
def test_layers_with_rules_and_dense_ones_in_one_model(tmp_path: Path) -> None:
    dense = write_gptq(tmp_path, packed="_proj", config={"dynamic": {"-:.*up_proj": {}, "+:.*down": {"bits": 8}}})
    tensors = load_file(tmp_path / "model.safetensors")
    up, down = (f"model.layers.0.mlp.{name}_proj" for name in ("up", "down"))
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        del tensors[f"{up}.{part}"]
    tensors[f"{up}.weight"] = dense.get_submodule(up).weight.detach()
    q, z, scale, weight = numbers(64, 96, 32, 8, True)
    dense.get_submodule(down).weight = nn.Parameter(weight)
    tensors |= {f"{down}.{part}": t for part, t in gptq_parts(q, z, scale, 32, 8, True).items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = load(tmp_path, quiet=True)
    assert_stands_for(model, dense, 6)
    assert packed_layers(model)[down].format.bits == 8 and torch.equal(
        model.get_submodule(up).weight, dense.get_submodule(up).weight
    )


def test_zeros_for_a_bias_that_the_model_lacks_are_left_out(tmp_path: Path) -> None:
    write_gptq(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.bias"] = torch.zeros(96, dtype=torch.float16)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert load(tmp_path, quiet=True).model.layers[0].mlp.up_proj.bias is None
    tensors["model.layers.0.mlp.up_proj.bias"][7] = 1
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="up_proj.bias is in the checkpoint and not zero, but the model has none"):
        load(tmp_path, quiet=True)


def test_without_g_idx_and_with_a_useless_order(tmp_path: Path) -> None:
    write_gptq(tmp_path)
    want = output(load(tmp_path, quiet=True))
    change_config(tmp_path, lambda c: c | {"quantization_config": c["quantization_config"] | {"desc_act": True}})
    assert torch.equal(output(load(tmp_path, quiet=True)), want)  # the indices are those of the original order
    tensors = {k: t for k, t in load_file(tmp_path / "model.safetensors").items() if not k.endswith("g_idx")}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="g_idx is missing from the checkpoint, which has desc_act: true"):
        load(tmp_path, quiet=True)
    change_config(tmp_path, lambda c: c | {"quantization_config": c["quantization_config"] | {"desc_act": False}})
    assert torch.equal(output(load(tmp_path, quiet=True)), want)


def test_what_is_saved_is_a_public_checkpoint(tmp_path: Path) -> None:
    write_gptq(tmp_path / "a", symmetric=False, bits=8)
    load(tmp_path / "a", quiet=True).save_pretrained(tmp_path / "b")
    config = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    weights = config["config_groups"]["group_0"]["weights"]
    assert config["quant_method"] == "compressed-tensors" and config["ignore"] and weights["num_bits"] == 8
    assert not weights["symmetric"] and weights["group_size"] == 32
