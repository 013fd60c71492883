"""AWQ checkpoints (gemm) written by hand load packed, to the bit, and save as compressed-tensors."""

from pathlib import Path
from typing import Any

import pytest
import torch
from others_by_hand import (
    assert_stands_for,
    awq_parts,
    by_definition,
    in_awq_order,
    linears,
    numbers,
    packed_layers,
    write_awq,
)
from safetensors.torch import load_file
from tiny import dense_twin, output

import fastllm
from fastllm.checkpoints import awq, load
from fastllm.checkpoints.awq import Awq, AwqLayer
from fastllm.formats import unpack_bits, unpack_zero_point
from fastllm.nn import QuantExperts

exact = pytest.fixture(by_definition, name="exact")
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "group 64": {"group": 64, "hidden_size": 128, "intermediate_size": 192, "head_dim": 32},
    "channel": {"group": None},
    "short group": {"group": 64},
    "bias": {"attention_bias": True},
    "shards": {"family": "qwen3", "shards": 2},
    "capitals": {"config": {"version": "GEMM", "modules_to_not_convert": None}},
    "older keys": {"config": {"w_bit": 4, "q_group_size": 32, "bits": 4}},
    "some dense": {"packed": "q_proj|down_proj"},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("exact")
def test_it_loads_to_the_bit_and_is_saved(name: str, tmp_path: Path) -> None:
    dense = write_awq(tmp_path / "a", **CASES[name])
    model = load(tmp_path / "a", quiet=True)
    assert_stands_for(model, dense, 2 if name == "some dense" else 7)
    assert len(linears(model)) == (6 if name == "some dense" else 1)
    if name == "short group":  # smaller groups for one layer, and their zero points next to those of others
        with pytest.raises(ValueError, match="zero points next to a second scheme"):
            model.save_pretrained(tmp_path / "b")
        return
    model.save_pretrained(tmp_path / "b")
    again = load(tmp_path / "b", quiet=True)
    for key, layer in packed_layers(again).items():
        assert torch.equal(layer.dequantize(), model.get_submodule(key).dequantize())
    saved = load_file(tmp_path / "b" / "model.safetensors")
    assert any(key.endswith("q_proj.weight_zero_point") for key in saved)


def test_it_runs_with_everything_else(tmp_path: Path) -> None:
    dense = write_awq(tmp_path)
    model = fastllm.load(tmp_path, quiet=True, dtype="bfloat16")
    got, want = output(model).float(), output(dense)
    assert (got - want).norm() < 0.03 * want.norm()


@pytest.mark.usefixtures("exact")
def test_experts_stay_packed_and_say_that_they_cannot_be_saved(tmp_path: Path) -> None:
    sizes = {"moe_intermediate_size": 64, "num_experts": 3}
    dense = write_awq(tmp_path, family="qwen3_moe", packed=r"\.experts\.|self_attn", **sizes)
    model = load(tmp_path, quiet=True)
    assert sum(isinstance(m, QuantExperts) for m in model.modules()) == 1 and len(packed_layers(model)) == 10
    twin = dense_twin(model, type(dense)(dense.config).eval())
    assert all(torch.equal(twin.state_dict()[key], p) for key, p in dense.state_dict().items() if "experts" in key)
    assert (output(model) - output(dense)).abs().max() < 1e-5 * output(dense).abs().max()
    with pytest.raises(ValueError, match="experts with zero points .* cannot be stored"):
        model.save_pretrained(tmp_path / "b")


@pytest.mark.parametrize("chunk", [1, 1 << 24])
def test_every_value_of_every_field(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(awq, "CHUNK", chunk)  # 1: word by word
    N, K = 24, 100  # the last word of a row at rest is half empty
    q, z = (torch.arange(N * K).view(N, K) * 7) % 16, torch.arange(N * 4).view(N, 4) % 16
    scale = torch.rand(N, 4).half()
    weight = AwqLayer(32).read("a", awq_parts(q, z, scale), (N, K), torch.float16)
    assert torch.equal(unpack_bits(weight.packed, 4, K).long(), q) and weight.packed.shape == (24, 13)
    assert torch.equal(unpack_zero_point(weight.zero_point, 4, N).long(), z)
    assert torch.equal(weight.scale, scale)


def test_the_packer_of_these_tests() -> None:
    assert in_awq_order(torch.arange(16)[None]).tolist() == [[0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]]
    q, z, scale, _ = numbers(8, 64, 32, 4, False)
    word = awq_parts(q, z, scale)["qweight"][5, 0].item() & 0xFFFFFFFF
    assert [word >> 4 * i & 15 for i in range(8)] == [int(q[o, 5]) for o in (0, 2, 4, 6, 1, 3, 5, 7)]


def test_the_files_say_which_layers_are_packed() -> None:
    source = Awq({"bits": 4, "group_size": 128, "modules_to_not_convert": ["q_proj"]})
    assert source.coding("q_proj", {"qweight"}) == AwqLayer(128) == source.experts()
    assert source.coding("q_proj", {"bias"}) is None and source.coding("up_proj", set()) is None
