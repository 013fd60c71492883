"""Checkpoints of sparse models: the same answers, the bytes that the format says, and the way back to dense ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, outputs
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

import fastllm
from fastllm.nn import BlockSparseLinear, QuantLinear, SparseLinear
from fastllm.sparse_formats import parse_sparse

QUICK: dict[str, Any] = {"method": "magnitude", "repair": False, "quiet": True}
PATTERNS = ["16:32", "2:4", "7:32", "16:32-int8", "2:4-int4-g64", "block32@0.5"]
SHAPES = 2 * [(128, 128), (64, 128), (64, 128), (128, 128), (256, 128), (256, 128), (128, 256)]
UP = "model.layers.0.mlp.up_proj"  # [256, 128]


def sparse(pattern: str, folder: Path, family: str = "llama", dtype: torch.dtype = torch.bfloat16, **more: Any) -> Any:
    """A sparse model that was saved to `folder`."""
    model = build(family, dtype)
    fastllm.sparsify(model, pattern, **(QUICK | more))
    model.save_pretrained(folder)
    return model


def load(folder: Path, **more: Any) -> PreTrainedModel:
    return fastllm.load(folder, quiet=True, **{"attention": False, "fuse": False, "decode": False, **more})


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


def bytes_of(pattern: str, floats: int = 2) -> float:
    """Of the layers in blocks, by the table of formats: 1/8 for the index, then the values."""
    size = sum(N * K for N, K in SHAPES)
    if "block" in pattern:
        return size * (floats / 2) + 4 * size / 2 / 32**2 + sum(4 * (N // 32 + 1) for N, _ in SHAPES)
    format = parse_sparse(pattern)
    scales = sum(N * format.groups(K) for N, K in SHAPES)
    bits = format.values.bits if format.values else 8 * floats
    return size * (1 / 8 + format.kept / 32 * bits / 8) + floats * scales


@pytest.mark.parametrize(
    "pattern, lm_head", [*((pattern, None) for pattern in PATTERNS), ("16:32", "int8"), ("block32@0.5", "int8")]
)
def test_what_comes_back_is_what_was_saved(pattern, lm_head, tmp_path):
    model = sparse(pattern, tmp_path / "a", lm_head=lm_head)
    loaded = load(tmp_path / "a")
    assert torch.equal(outputs(loaded), outputs(model))
    kind = BlockSparseLinear if "block" in pattern else SparseLinear
    assert sum(isinstance(m, kind) for m in loaded.modules()) == 14
    assert type(loaded.lm_head) is (QuantLinear if lm_head else torch.nn.Linear) and not loaded.training
    loaded.save_pretrained(tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert (tmp_path / "a/config.json").read_text() == (tmp_path / "b/config.json").read_text()
    tensors = load_file(tmp_path / "a/model.safetensors")
    stored = sum(t.nbytes for name, t in tensors.items() if "_proj." in name)
    assert stored == pytest.approx(bytes_of(pattern), rel=0.02)
    assert sum(map(len, files(tmp_path / "a").values())) <= sum(t.nbytes for t in tensors.values()) + 10000


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_types(dtype, tmp_path):
    for pattern in ("16:32", "2:4-int8", "block64@0.5"):
        model = sparse(pattern, tmp_path / pattern, dtype=dtype)
        assert torch.equal(outputs(load(tmp_path / pattern)), outputs(model))
        other = load(tmp_path / pattern, dtype=torch.bfloat16)
        assert other.dtype == torch.bfloat16 and outputs(other).dtype == torch.bfloat16
        torch.testing.assert_close(outputs(other).to(dtype), outputs(model), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("pattern", ["16:32", "block32@0.5", "16:32-int8"])
def test_shards_and_the_model_without_its_head(pattern, tmp_path):
    model = sparse(pattern, tmp_path / "one", lm_head="int8")
    model.save_pretrained(tmp_path / "many", max_shard_size=100_000)
    assert len(files(tmp_path / "many")) > 3
    assert torch.equal(outputs(load(tmp_path / "many")), outputs(model))
    base = load(tmp_path / "many", auto_class=AutoModel)
    with torch.no_grad():
        hidden = model.model(torch.arange(1, 9)[None]).last_hidden_state
        assert torch.equal(base(torch.arange(1, 9)[None]).last_hidden_state, hidden)
    base.save_pretrained(tmp_path / "base")
    again = load(tmp_path / "base", auto_class=AutoModel)
    assert torch.equal(again(torch.arange(1, 9)[None]).last_hidden_state, hidden)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma3"])
def test_tied_heads(family, tmp_path):
    """A packed one is untied for readers, and a dense one stays tied."""
    for name, lm_head in (("packed", "int8"), ("dense", None)):
        model = sparse("2:4", tmp_path / name, family, lm_head=lm_head)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["tie_word_embeddings"] == (family != "llama" and lm_head is None)
        loaded: Any = load(tmp_path / name)
        assert torch.equal(outputs(loaded), outputs(model))
        fastllm.to_dense(loaded).save_pretrained(tmp_path / f"{name}-plain")
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-plain").eval()
        assert torch.equal(outputs(stock), outputs(loaded))
        assert torch.equal(stock.model.embed_tokens.weight, model.model.embed_tokens.weight)
        if family != "llama" and lm_head is None:
            assert stock.lm_head.weight is stock.model.embed_tokens.weight


@pytest.mark.parametrize("pattern", ["16:32", "2:4", "block32@0.5", "16:32-int8", "2:4-int4-g64"])
def test_dense_again_for_everyone(pattern, tmp_path):
    """`to_dense` of the loaded model: its weights exactly, nothing of fastllm in the files."""
    model = sparse(pattern, tmp_path / "a", dtype=torch.float32)
    loaded = fastllm.to_dense(load(tmp_path / "a"))
    loaded.save_pretrained(tmp_path / "b")
    assert "fastllm" not in (tmp_path / "b/config.json").read_text()
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "b").eval()
    assert torch.equal(outputs(stock), outputs(loaded))
    original, weights = build("llama", torch.float32).state_dict(), stock.state_dict()
    assert weights.keys() == original.keys()
    for name, module in model.named_modules():
        if isinstance(module, (SparseLinear, BlockSparseLinear)):
            found, dense = weights[f"{name}.weight"], original[f"{name}.weight"]
            assert torch.equal(found, module.dequantize())
            if "int" not in pattern:
                assert torch.equal(found, dense * (found != 0)) and (found == 0).float().mean() == 0.5
    if "int" not in pattern:
        torch.testing.assert_close(outputs(stock), outputs(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pattern", ["16:32", "block32@0.5"])
def test_transformers_alone_refuses_them(pattern, tmp_path):
    sparse(pattern, tmp_path)
    with pytest.raises(ValueError, match="quant_method"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="packed already"):
        fastllm.load(tmp_path, weights="int4")


def test_layers_that_keep_nothing(tmp_path):
    """Blocks of which none is left: tensors without elements."""
    model = build("llama", torch.float32)
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data.zero_()
    fastllm.sparsify(model, "block32", method="zeros", quiet=True)
    assert model.get_submodule(UP).count == 0
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(load(tmp_path)), outputs(model))


def test_mixed_layers(tmp_path):
    """Some sparse, one of another pattern, some dense."""
    model = build("llama", torch.float32)
    fastllm.sparsify(model, "16:32", include="*.0.mlp.*", min_coverage=0, **QUICK)
    attention = model.model.layers[1].self_attn
    attention.q_proj = SparseLinear.from_linear(attention.q_proj, "2:4")
    attention.o_proj = BlockSparseLinear.from_linear(attention.o_proj, 32)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert {entry["format"] for entry in config["sparse"].values()} == {"16:32", "2:4", "block32"}
    assert torch.equal(outputs(load(tmp_path)), outputs(model))
