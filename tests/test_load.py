"""`fastllm.load`: packed checkpoints stay packed, dense ones are quantized on the way in, damaged ones are refused."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
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


# --- a checkpoint written by hand, from the description of the format, without any code of fastllm


def write_by_hand(folder: Path, symmetric: bool = True, group: int | None = 32) -> PreTrainedModel:
    """Write a quantized llama to `folder`; return the dense model that it stands for."""
    model = build("llama", seed=3)
    tensors: Tensors = {}
    for name, p in list(model.named_parameters()):
        if not name.endswith("_proj.weight"):
            tensors[name] = p.detach().clone()
            continue
        N, K = p.shape
        g = group or K
        q = torch.randint(0, 16, (N, K))
        scale = (torch.rand(N, K // g) * 0.02 + 0.001).to(torch.bfloat16)
        zero = torch.full((N, K // g), 8) if symmetric else torch.randint(0, 16, (N, K // g))
        base = name.removesuffix(".weight")
        tensors[f"{base}.weight_packed"] = words(q)
        tensors[f"{base}.weight_scale"] = scale
        tensors[f"{base}.weight_shape"] = torch.tensor([N, K])
        if not symmetric:
            tensors[f"{base}.weight_zero_point"] = words(zero.T).T.contiguous()
        dense = (q - zero.repeat_interleave(g, 1)).to(torch.bfloat16) * scale.repeat_interleave(g, 1)
        model.get_submodule(base).weight = nn.Parameter(dense)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": "channel"}
    if group:
        weights |= {"strategy": "group", "group_size": group}
    config = json.loads(model.config.to_json_string(use_diff=False)) | {"dtype": "bfloat16"}
    config["architectures"] = ["LlamaForCausalLM"]
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return model


def words(q: Tensor) -> Tensor:
    """Eight 4-bit values to an int32, the first in the lowest bits."""
    shifted = q.reshape(len(q), -1, 8).long() << torch.arange(0, 32, 4)
    total = shifted.sum(-1)
    return torch.where(total >= 2**31, total - 2**32, total).to(torch.int32)


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
    assert torch.equal(output(base), saved.model(torch.tensor(_ids()))[0])


def _ids() -> list[list[int]]:
    from tiny import tokens

    return tokens().tolist()


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


# --- what is wrong is refused


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


def weights_with(**settings: Any) -> dict[str, Any]:
    base = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    return {"config_groups": {"g": {"targets": ["Linear"], "weights": base | settings}}}


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4}, "quantized by 'gptq'.*compressed-tensors"),
    "format": ({"format": "float-quantized"}, "format 'float-quantized'"),
    "sparse": ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
    "cache": ({"kv_cache_scheme": {"num_bits": 8}}, "KV cache"),
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
