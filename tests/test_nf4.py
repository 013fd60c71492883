"""bitsandbytes nf4 checkpoints written by hand load packed, to the bit; the format, and its product."""

from pathlib import Path
from typing import Any

import pytest
import torch
from close import assert_close
from others_by_hand import (
    NF4,
    assert_stands_for,
    by_definition,
    linears,
    nf4_parts,
    packed_layers,
    write_nf4,
)
from safetensors.torch import load_file, save_file
from tiny import build, dense_twin, output
from torch import Tensor

import fastllm
from fastllm.checkpoints import load
from fastllm.checkpoints.coding import CheckpointError
from fastllm.checkpoints.nf4 import Nf4, Nf4Layer
from fastllm.formats import FORMATS, IntFormat, Nf4Format, QuantizedWeight, check, dequantize, pack_bits, parse_format
from fastllm.nf4_format import NF4_LEVELS
from fastllm.nn import QuantExperts, QuantLinear
from fastllm.ops import NF4_LAYOUTS, layout_for, layouts_of, quant_matmul, what_runs

exact = pytest.fixture(by_definition, name="exact")
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "double": {"nested": True},
    "bias and shards": {"family": "qwen3", "attention_bias": True, "shards": 3, "nested": True},
    "some dense": {"packed": "q_proj|down_proj"},
    "the config lies of double": {"nested": True, "config": {"bnb_4bit_use_double_quant": False}},
    "older config": {"config": {"load_in_4bit": True, "_load_in_4bit": None, "bnb_4bit_quant_storage": None}},
}


@pytest.mark.parametrize("name", CASES)
def test_it_loads_to_the_bit_and_is_saved_dense(name: str, tmp_path: Path) -> None:
    dense = write_nf4(tmp_path / "a", **CASES[name])
    before = (tmp_path / "a" / "config.json").read_bytes()
    model = load(tmp_path / "a", quiet=True)
    count = 2 if name == "some dense" else 7
    assert_stands_for(model, dense, count)
    assert len(linears(model)) == 8 - count and (tmp_path / "a" / "config.json").read_bytes() == before
    with pytest.warns(UserWarning, match=f"{count} packed layers are stored dense .*compressed-tensors has no nf4"):
        model.save_pretrained(tmp_path / "b")
    saved = load_file(tmp_path / "b" / "model.safetensors")
    assert all("weight_" not in key and "absmax" not in key for key in saved)
    again = load(tmp_path / "b", quiet=True)
    assert not packed_layers(again)
    assert all(torch.equal(p, again.state_dict()[key]) for key, p in dense.state_dict().items())


def test_it_runs_with_everything_else(tmp_path: Path) -> None:
    dense = write_nf4(tmp_path)
    model = fastllm.load(tmp_path, quiet=True, dtype="bfloat16")
    assert {layer.layout for layer in packed_layers(model).values()} == {"nf4"}
    got, want = output(model).float(), output(dense)
    assert (got - want).norm() < 0.03 * want.norm()


def test_experts_stay_packed(tmp_path: Path) -> None:
    sizes = {"intermediate_size": 64, "num_local_experts": 3}
    dense = write_nf4(tmp_path, family="mixtral", packed=r"\.experts\.", **sizes)
    model = load(tmp_path, quiet=True)
    assert sum(isinstance(m, QuantExperts) for m in model.modules()) == 1 and len(packed_layers(model)) == 6
    twin = dense_twin(model, type(dense)(dense.config).eval())
    assert all(torch.equal(twin.state_dict()[key], p) for key, p in dense.state_dict().items() if "experts" in key)
    with pytest.warns(UserWarning, match="1 packed layers are stored dense .*experts: compressed-tensors has no nf4"):
        model.save_pretrained(tmp_path / "b")
    assert torch.equal(output(load(tmp_path / "b", quiet=True)), output(dense))


def test_inputs_that_blocks_do_not_divide_are_refused(tmp_path: Path) -> None:
    write_nf4(tmp_path, intermediate_size=96, packed="q_proj")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight.absmax"] = torch.ones(96)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="down_proj has 96 inputs, no multiple of 64"):
        load(tmp_path, quiet=True)


# --- the format

SHAPES = [(64, 256), (5, 64), (1, 128), (33, 200)]


def random_weight(N: int, K: int, dtype: torch.dtype = torch.float32) -> tuple[QuantizedWeight, Tensor]:
    """(a weight at rest, the float64 numbers that it stands for)."""
    q, scale = torch.randint(0, 16, (N, K), dtype=torch.uint8), torch.rand(N, -(-K // 64)).to(dtype) + 0.1
    dense = torch.tensor(NF4).double()[q.long()] * scale.double().repeat_interleave(64, 1)[:, :K]
    return QuantizedWeight(pack_bits(q, 4), scale), dense


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dequantized_values_are_rounded_once(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, want = random_weight(*shape, dtype)
    check(weight, Nf4Format(), shape)
    got = dequantize(weight, Nf4Format(), shape, torch.float64)
    assert torch.equal(got, want)
    assert torch.equal(dequantize(weight, Nf4Format(), shape, dtype), want.float().to(dtype))


def test_the_format_has_what_the_others_have() -> None:
    format, integers = Nf4Format(), IntFormat(4, 64)
    for K in (64, 100, 640):
        assert format.words(K) == integers.words(K) and format.groups(K) == integers.groups(K)
        assert format.bytes(7, K) == integers.bytes(7, K) and format.group_of(K) == 64
    assert format.weight_only == format == Nf4Format() and format.symmetric and format.activations is None
    assert list(NF4_LEVELS) == NF4 and "nf4" not in FORMATS
    for name in ("nf4", format):
        with pytest.raises(ValueError, match="it is read from bitsandbytes checkpoints; use int4"):
            parse_format(name)
    with pytest.raises(ValueError, match="nf4 of"):
        check(random_weight(8, 64)[0], format, (8, 128))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("M", [1, 5, 65])
def test_the_product(shape: tuple[int, int], M: int, device: str) -> None:
    weight, dense = random_weight(*shape)
    weight = QuantizedWeight(weight.packed.to(device), weight.scale.to(device))
    layer = QuantLinear(weight, shape, Nf4Format(), torch.randn(shape[0], device=device))
    x = torch.randn(M, shape[1], device=device, requires_grad=True)
    y = layer(x)
    want = x.double() @ dense.to(device).t() + layer.bias.double()
    assert_close(y, want, 1e-5, dtype=torch.float32)
    y.backward(g := torch.randn_like(y))
    assert_close(x.grad, g.double() @ dense.to(device), 1e-5, dtype=torch.float32)


def test_a_layer_is_moved_copied_and_loaded(device: str) -> None:
    weight, dense = random_weight(16, 128)
    layer = QuantLinear(weight, (16, 128), Nf4Format())
    half = QuantLinear.empty(128, 16, False, Nf4Format(), device="cpu")
    half.load_state_dict(layer.state_dict())
    half = half.to(torch.float16)
    assert half.weight_scale.dtype == torch.float16 and half._zero.dtype == torch.float32
    assert_close(half.dequantize(torch.float32), dense, 2e-3, 1e-3, dtype=torch.float32)
    x = torch.randn(3, 128)
    assert torch.equal(
        layer(x), quant_matmul(x, layer.weight_packed, layer._scale, layer._zero, None, 16, 4, 64, "nf4")
    )
    layer.batch_invariant = True
    assert torch.equal(layer(x)[1:2], layer(x[1:2]))


def test_layouts_say_what_they_hold() -> None:
    operands = 64, 128, torch.bfloat16, torch.device("cpu")
    assert list(layouts_of(Nf4Format())) == ["nf4"] and layout_for(Nf4Format(), *operands).slow
    assert NF4_LAYOUTS["nf4"].reasons(IntFormat(4, 64), *operands) == ["it holds nf4, not int4-g64"]
    assert what_runs(Nf4Format(), *operands) == NF4_LAYOUTS["nf4"].runs


def test_every_value_and_the_first_is_the_high_half() -> None:
    q = torch.arange(64 * 4).view(2, 128) % 16
    parts = {key.replace("weight.", "weight_"): t for key, t in nf4_parts(q, torch.arange(1.0, 5.0)).items()}
    parts["weight_quant_state"] = parts.pop("weight_quant_state.bitsandbytes__nf4")
    assert parts["weight"][0, 0] == 0x01
    weight = Nf4Layer(False).read("a", parts, (2, 128), torch.float32)
    want = torch.tensor(NF4)[q] * torch.tensor([[1.0, 2], [3, 4]]).repeat_interleave(64, 1)
    assert torch.equal(dequantize(weight, Nf4Format(), (2, 128), torch.float32), want)


def test_the_files_say_which_layers_are_packed() -> None:
    source = Nf4({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    assert source.coding("a", {"weight_absmax"}) == Nf4Layer(False) == source.experts()
    assert source.coding("a", {"weight_nested_absmax"}) == Nf4Layer(True) and source.coding("a", set()) is None


def test_a_quantized_layer_is_left_as_it_is_by_optimize(tmp_path: Path) -> None:
    write_nf4(tmp_path, packed="mlp")
    model = load(tmp_path, quiet=True)
    fastllm.optimize(model, "int8", min_coverage=0, quiet=True)
    formats = {layer.format.name for layer in packed_layers(model).values()}
    assert formats == {"nf4", "int8"} and output(model).shape == output(build("llama")).shape
