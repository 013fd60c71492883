"""The readers of GPTQ, AWQ and nf4, and the writer of GPTQ, against the libraries that define the formats."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from others_by_hand import NF4, SMALL, awq_parts, gptq_parts, numbers, packed_layers, write_awq
from safetensors.torch import load_file
from tiny import build, output, tokens

from fastllm.checkpoints import load
from fastllm.checkpoints.awq import AwqLayer
from fastllm.checkpoints.gptq import GptqLayer
from fastllm.checkpoints.nf4 import PARTS, Nf4Layer
from fastllm.formats import Nf4Format, dequantize

pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def bitsandbytes() -> ModuleType:
    pytest.importorskip("bitsandbytes")
    import bitsandbytes.functional

    return bitsandbytes.functional


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("shape", [(96, 320), (1, 64), (7, 4096)], ids=str)
def test_nf4_is_dequantized_as_bitsandbytes_does(nested: bool, shape: tuple[int, int], bitsandbytes: Any) -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        w = torch.randn(shape).to(dtype)
        q, state = bitsandbytes.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=nested)
        parts = {PARTS[f"weight.{key}"]: t for key, t in state.as_dict(packed=True).items()} | {"weight": q}
        coding = Nf4Layer(nested)
        declared = coding.parts(*shape)
        assert parts.keys() == declared.keys()
        assert all(part.shape in (None, tuple(parts[key].shape)) for key, part in declared.items())
        coding.look("a", parts, shape)
        weight = coding.read("a", parts, shape, torch.float32)
        got = dequantize(weight, Nf4Format(), shape, dtype)
        assert torch.equal(got, bitsandbytes.dequantize_4bit(q, state)) and got.float().std() > 0.9
    assert state.code.tolist() == NF4


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "double"])
def test_a_checkpoint_that_bitsandbytes_saved_stays_packed(nested: bool, tmp_path: Path, bitsandbytes: Any) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    build("llama", dtype=torch.float32, **SMALL | {"intermediate_size": 128}).save_pretrained(tmp_path / "dense")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.float32,
    )
    peer = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=config, device_map="cpu"
    ).eval()
    peer.save_pretrained(tmp_path / "nf4")
    model = load(tmp_path / "nf4", quiet=True)
    layers = packed_layers(model)
    assert len(layers) == 7 and {layer.format for layer in layers.values()} == {Nf4Format()}
    for name, layer in layers.items():
        params = peer.get_submodule(name).weight
        want = bitsandbytes.dequantize_4bit(params.data, params.quant_state)
        assert torch.equal(layer.dequantize(), want.float()), name
    with torch.no_grad():
        want = peer(tokens()).logits
    assert (output(model) - want).norm() < 0.02 * want.norm()  # on a CPU, its own product is the less exact one


@pytest.mark.parametrize("group", [32, 64])
def test_awq_is_converted_as_compressed_tensors_does(group: int, tmp_path: Path) -> None:
    convert = pytest.importorskip("compressed_tensors.entrypoints.convert.converters.autoawq")
    converter = convert.AutoAWQConverter(group_size=group)
    q, z, scale, _ = numbers(64, 128, group, 4, False)
    weight = AwqLayer(group).read("a", awq_parts(q, z, scale), (64, 128), torch.float16)
    theirs = converter.process({f"a.{part}": t for part, t in awq_parts(q, z, scale).items()})
    assert torch.equal(theirs["a.weight_packed"], weight.packed)
    assert torch.equal(theirs["a.weight_zero_point"], weight.zero_point)
    assert torch.equal(theirs["a.weight_scale"], weight.scale)
    # and what is saved after loading is what their converter makes of the checkpoint
    write_awq(tmp_path / "a", group, hidden_size=128, intermediate_size=192, head_dim=32)
    load(tmp_path / "a", quiet=True).save_pretrained(tmp_path / "b")
    theirs = converter.process(load_file(tmp_path / "a" / "model.safetensors"))
    ours = load_file(tmp_path / "b" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(t.to(theirs[key].dtype), theirs[key]) for key, t in ours.items())


@pytest.fixture(scope="module")
def gptqmodel() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPTQMODEL_DISABLE_PACK_EXT", "1")  # or it compiles one
        pytest.importorskip("gptqmodel")
        import gptqmodel.nn_modules.qlinear.torch
        import gptqmodel.nn_modules.qlinear.torch_awq
        import gptqmodel.quantization.awq.utils.packing_utils
        import gptqmodel.quantization.config
        import gptqmodel.utils.model
    return gptqmodel


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("first", [True, False], ids=["v1", "v2"])
def test_gptq_is_dequantized_as_gptqmodel_does(bits: int, symmetric: bool, first: bool, gptqmodel: Any) -> None:
    N, K, half = 64, 128, torch.float16
    q, z, scale, _ = numbers(N, K, 32, bits, symmetric)
    if not symmetric:
        z[::3, 1:] = 0  # what its version 1 cannot hold in a field
    layer = gptqmodel.nn_modules.qlinear.torch.TorchLinear(
        bits=bits,
        group_size=32,
        sym=symmetric,
        desc_act=False,
        in_features=K,
        out_features=N,
        bias=False,
        register_buffers=True,
    )
    for part, t in gptq_parts(q, z, scale, 32, bits, first=False).items():
        setattr(layer, part, t)
    layer.qzero_format(format=2)
    if first:
        settings = gptqmodel.quantization.config.QuantizeConfig(bits=bits)
        gptqmodel.utils.model.convert_gptq_v2_to_v1_format_module(layer, settings)
    coding = GptqLayer(bits, 32, symmetric, first)
    parts = {part: getattr(layer, part).clone() for part in coding.parts(N, K)}
    weight = coding.read("a", parts, (N, K), half)
    if first:
        gptqmodel.utils.model.convert_gptq_v1_to_v2_format_module(layer, bits, torch.int32)
        layer.qzero_format(format=2)
    if first and symmetric:
        assert all(torch.equal(t, parts[part]) for part, t in coding.tensors(weight, N, K).items())
    layer.post_init()
    got = dequantize(weight, coding.format, (N, K), half)
    assert torch.equal(got, layer.dequantize_weight().t()) and got.float().std() > 0.01


def test_awq_is_dequantized_as_gptqmodel_does(gptqmodel: Any) -> None:
    q, z, scale, _ = numbers(64, 128, 32, 4, False)
    parts, coding = awq_parts(q, z, scale), AwqLayer(32)
    unpack = gptqmodel.quantization.awq.utils.packing_utils.dequantize_gemm
    want = unpack(parts["qweight"], parts["qzeros"], parts["scales"], 4, 32).t()
    weight = coding.read("a", parts, (64, 128), torch.float16)
    assert torch.equal(dequantize(weight, coding.format, (64, 128), torch.float16), want)
