"""`fastllm.load`: packed checkpoints stay packed, dense ones are quantized on the way in."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import write_by_hand
from safetensors.torch import load_file
from tiny import build, dense_twin, output
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

import fastllm
from fastllm.checkpoints import FastllmConfig, SaveHook
from fastllm.nn import QuantExperts, QuantLinear

Tensors = dict[str, Tensor]


def quantized(family: str, weights: Any, lm_head: Any = False, **settings: Any) -> PreTrainedModel:
    model = build(family, **settings)
    fastllm.optimize(model, weights, method="rtn", lm_head=lm_head, min_coverage=0, quiet=True)
    return model


def packed_layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]


def assert_same_tensors(a: Tensors, b: Tensors) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]), key


@pytest.mark.parametrize(("symmetric", "group"), [(True, 32), (False, 64), (True, None)])
def test_a_checkpoint_written_by_hand_stays_packed(symmetric: bool, group: int | None, tmp_path: Path) -> None:
    dense = write_by_hand(tmp_path, symmetric, group)
    before = (tmp_path / "model.safetensors").read_bytes()
    model = fastllm.load(tmp_path, quiet=True)
    assert len(packed_layers(model)) == 14 and type(model.lm_head) is nn.Linear and not model.training
    for name in packed_layers(model):
        layer = model.get_submodule(name)
        assert layer.layout, "not prepared for a kernel"
        assert torch.equal(layer.dequantize(), dense.get_submodule(name).weight), name
    got, want = output(model).float(), output(dense).float()
    assert (got - want).norm() < 0.03 * want.norm()
    model.save_pretrained(tmp_path / "again")
    assert_same_tensors(load_file(tmp_path / "again" / "model.safetensors"), load_file(tmp_path / "model.safetensors"))
    assert (tmp_path / "model.safetensors").read_bytes() == before, "a layer was permuted in the file"


# --- what fastllm saved


MIXED = {"lm_head": "int8", "*.up_proj": "int8", "*.0.*": "int4-g64", "*": "int4-g32"}
SAVED: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "llama": ("llama", "int4-g128", {}),
    "mixed": ("llama", MIXED, {"lm_head": None}),
    "asym": ("llama", "int4-g32-asym", {}),
    "tied head": ("llama", "int4-g64", {"lm_head": "int8", "tie_word_embeddings": True}),
    "tied": ("llama", "int4-g64", {"tie_word_embeddings": True}),
    "ragged": ("llama", "int4-g64", {"intermediate_size": 200}),
    "bias": ("llama", "int8", {"attention_bias": True}),
    "gemma3": ("gemma3_text", "int4-g64", {"lm_head": "int8", "tie_word_embeddings": True}),
    "bert": ("bert", "int4-g32", {}),
    "mixtral": ("mixtral", "int4-g32", {"lm_head": "int8"}),
    "mixtral ragged": ("mixtral", "int4-g32", {"intermediate_size": 72}),
    "mixtral without experts": ("mixtral", {"*attn*": "int4-g32"}, {}),
    "qwen3 moe": ("qwen3_moe", {"*experts": "int4-g64", "*": "int8"}, {}),
}


@pytest.mark.parametrize("name", SAVED)
def test_what_was_saved_loads_packed_and_saves_the_same(name: str, tmp_path: Path) -> None:
    family, weights, settings = SAVED[name]
    saved = quantized(family, weights, **settings)
    saved.save_pretrained(tmp_path / "a")
    model = fastllm.load(tmp_path / "a", quiet=True)
    assert type(model) is type(saved) and packed_layers(model) == packed_layers(saved) != []
    assert torch.equal(output(model), output(saved))
    assert isinstance(model.hf_quantizer, SaveHook) and not any(p.is_meta for p in model.parameters())
    model.save_pretrained(tmp_path / "b")
    assert_same_tensors(*(load_file(tmp_path / n / "model.safetensors") for n in "ab"))
    a, b = (json.loads((tmp_path / n / "config.json").read_text()) for n in "ab")
    assert a == b


def test_a_checkpoint_can_be_saved_over_itself(tmp_path: Path) -> None:
    saved = quantized("llama", "int8")
    saved.save_pretrained(tmp_path)
    model = fastllm.load(tmp_path, quiet=True)
    before, want = output(model), load_file(tmp_path / "model.safetensors")
    want = {key: t.clone() for key, t in want.items()}
    model.save_pretrained(tmp_path)
    assert_same_tensors(load_file(tmp_path / "model.safetensors"), want)
    assert torch.equal(output(model), before)


def test_shards_and_dtype_and_base_class(tmp_path: Path) -> None:
    saved = quantized("llama", "int4-g32")
    saved.save_pretrained(tmp_path, max_shard_size="40KB")
    model = fastllm.load(tmp_path, quiet=True)
    assert torch.equal(output(model), output(saved))
    wide = fastllm.load(tmp_path, dtype=torch.float32, quiet=True)
    assert wide.model.layers[0].mlp.up_proj.weight_scale.dtype == torch.float32
    assert output(wide).dtype == torch.float32
    base = fastllm.load(tmp_path, auto_class=AutoModel, quiet=True)
    assert type(base).__name__ == "LlamaModel" and len(packed_layers(base)) == 14
    assert torch.equal(output(base), output(saved.model))


# --- dense checkpoints


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("mixtral", {}),
        ("qwen3_moe", {"tie_word_embeddings": True}),
        ("gpt2", {}),
        ("bert", {}),
    ],
)
def test_streaming_gives_what_optimize_gives(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model = build(family, **settings)
    model.save_pretrained(tmp_path)
    streamed = fastllm.load(tmp_path, weights="int4", group_size=64, exclude="*.1.*", quiet=True)
    fastllm.optimize(model, "int4", group_size=64, exclude="*.1.*", min_coverage=0, quiet=True)
    assert packed_layers(streamed) == packed_layers(model) != []
    assert_same_tensors(streamed.state_dict(), model.state_dict())
    assert torch.equal(output(streamed), output(model))
    assert streamed.config.tie_word_embeddings == model.config.tie_word_embeddings
    assert isinstance(streamed.hf_quantizer, SaveHook) and not streamed.training


def test_the_quantization_config_works_in_plain_from_pretrained(tmp_path: Path) -> None:
    dense = build("llama")
    dense.save_pretrained(tmp_path)
    config = FastllmConfig({"*.up_proj": "int8", "*.down_proj": "int4-g32"})
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert [n for n in packed_layers(model)] == [
        f"model.layers.{i}.mlp.{p}_proj" for i in (0, 1) for p in ("up", "down")
    ]
    assert output(model).isfinite().all()
    model.save_pretrained(tmp_path / "packed")
    assert json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]["quant_method"] == (
        "compressed-tensors"
    )
    json.dumps(config.to_dict())


def test_without_weights_a_dense_checkpoint_stays_dense(tmp_path: Path) -> None:
    model = build("llama")
    model.save_pretrained(tmp_path)
    assert torch.equal(output(fastllm.load(tmp_path)), output(model))


def test_experts_stay_packed_and_compute_the_same(tmp_path: Path) -> None:
    saved = quantized("mixtral", "int4-g32")
    saved.save_pretrained(tmp_path)
    model = fastllm.load(tmp_path, quiet=True)
    assert sum(isinstance(m, QuantExperts) for m in model.modules()) == 2
    twin = dense_twin(model, build("mixtral"))
    got, want = output(model).float(), output(twin).float()
    assert (got - want).norm() < 0.05 * want.norm()


def test_a_nan_weight_is_named(tmp_path: Path) -> None:
    model = build("llama")
    model.model.layers[1].mlp.up_proj.weight.data[5, 3] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"model.layers.1.mlp.up_proj: the weight has 1 values that are NaN.*exclude="
    ):
        fastllm.load(tmp_path, weights="int4", quiet=True)


# --- memory

MEASURE = """
import sys, threading, time
import torch, fastllm
torch.set_num_threads(1)
def anonymous():
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("RssAnon"))
from fastllm.checkpoints import load
import transformers.models.llama.modeling_llama
load(sys.argv[1], weights=sys.argv[3] or None, quiet=True)  # a small one, so that imports and pools are there
base, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
model = load(sys.argv[2], weights=sys.argv[3] or None, method="rtn", quiet=True)
done = True
thread.join()
print(peak - base)
"""


def _measure(small: Path, large: Path, weights: str) -> int:
    command = [sys.executable, "-c", MEASURE, str(small), str(large), weights]
    # glibc then gives freed memory back at once, and what is measured is what is held
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    return int(run.stdout.split()[-1])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_holds_the_packed_model_and_one_layer(tmp_path: Path) -> None:
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 2, "vocab_size": 8192}
    large, small = tmp_path / "large", tmp_path / "small"
    model = build("llama", **sizes)
    dense = sum(p.numel() * p.element_size() for p in model.parameters())
    assert dense > 2e8
    layer = max(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(large)
    build("llama").save_pretrained(small)
    fastllm.optimize(model, "int4", method="rtn", quiet=True)
    packed = sum(p.numel() * p.element_size() for p in model.parameters())
    assert packed < 0.4 * dense
    model.save_pretrained(tmp_path / "large-packed")
    quantized("llama", "int4").save_pretrained(tmp_path / "small-packed")
    for weights, paths in (("int4", (small, large)), ("", (tmp_path / "small-packed", tmp_path / "large-packed"))):
        peak = _measure(*paths, weights)
        assert peak < packed + 1.2 * layer, (
            f"{peak / 1e6:.0f} MB for {packed / 1e6:.0f} packed and {layer / 1e6:.0f} of a layer"
        )
