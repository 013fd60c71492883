"""GPTQ, AWQ and nf4 checkpoints written in loops, from descriptions alone, and what to hold their readers to."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import build, output
from torch import Tensor, nn
from transformers import PreTrainedModel

import fastllm.nn.linear
from fastllm.nn import QuantLinear
from fastllm.ops import LAYOUTS

Tensors = dict[str, Tensor]
SMALL: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "head_dim": 16}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output in each field of a word, lowest first


def words(row: list[int], bits: int) -> list[int]:
    """Values to int32 words, the first in the lowest bits."""
    out = []
    for start in range(0, len(row), 32 // bits):
        word = 0
        for i, value in enumerate(row[start : start + 32 // bits]):
            assert 0 <= value < 2**bits
            word |= value << (i * bits)
        out.append(word - 2**32 if word >= 2**31 else word)
    return out


def pack_rows(values: Tensor, bits: int) -> Tensor:
    """Words along the columns: [R, C] -> [R, C * bits / 32]."""
    return torch.tensor([words(row, bits) for row in values.tolist()], dtype=torch.int32)


def pack_columns(values: Tensor, bits: int) -> Tensor:
    """Words along the rows: [R, C] -> [R * bits / 32, C]."""
    return pack_rows(values.t(), bits).t().contiguous()


def in_awq_order(values: Tensor) -> Tensor:
    rows = [[row[c + i] for c in range(0, len(row), 8) for i in AWQ_ORDER] for row in values.tolist()]
    return torch.tensor(rows)


def numbers(N: int, K: int, group: int | None, bits: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random (q [N, K], z [N, G], float16 scale [N, G]) and the dense weight that they stand for, float32."""
    g = group or K
    G, top = -(-K // g), 2**bits
    q, scale = torch.randint(0, top, (N, K)), (torch.rand(N, G) * 0.2 / top + 0.001).half()
    z = torch.full((N, G), top // 2) if symmetric else torch.randint(1, top, (N, G))
    which = torch.arange(K) // g
    return q, z, scale, (q - z[:, which]).float() * scale.float()[:, which]


def gptq_parts(q: Tensor, z: Tensor, scale: Tensor, group: int | None, bits: int, first: bool) -> Tensors:
    K = q.shape[1]
    return {
        "qweight": pack_columns(q.t(), bits),
        "qzeros": pack_rows((z.t() - 1) if first else z.t(), bits),
        "scales": scale.t().contiguous(),
        "g_idx": torch.tensor([i // (group or K) for i in range(K)], dtype=torch.int32),
    }


def awq_parts(q: Tensor, z: Tensor, scale: Tensor) -> Tensors:
    return {
        "qweight": pack_rows(in_awq_order(q.t()), 4),
        "qzeros": pack_rows(in_awq_order(z.t()), 4),
        "scales": scale.t().contiguous(),
    }


def write_gptq(folder: Path, bits: int = 4, group: int | None = 32, symmetric: bool = True, **more: Any) -> Any:
    """version: 1 or 2, of the tensors; label: what the config calls it. Returns the dense model that it stands for."""
    first, label = more.pop("version", 1) == 1, more.pop("label", None)
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group or -1,
        "sym": symmetric,
        "desc_act": False,
        "lm_head": False,
        "checkpoint_format": label or ("gptq" if first else "gptq_v2"),
        **more.pop("config", {}),
    }

    def parts(N: int, K: int) -> tuple[Tensors, Tensor]:
        q, z, scale, dense = numbers(N, K, group, bits, symmetric)
        return gptq_parts(q, z, scale, group, bits, first), dense

    return write(folder, config, parts, **more)


def write_awq(folder: Path, group: int | None = 32, **more: Any) -> Any:
    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group or -1,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
        **more.pop("config", {}),
    }

    def parts(N: int, K: int) -> tuple[Tensors, Tensor]:
        q, z, scale, dense = numbers(N, K, group, 4, False)
        return awq_parts(q, z, scale), dense

    return write(folder, config, parts, **more)


NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
NF4 += [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
NF4 += [0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]


def nf4_parts(q: Tensor, absmax: Tensor) -> Tensors:
    """Of q [N, K] and float32 absmax [N * K / 64]."""
    flat = q.flatten().tolist()
    pairs = [[flat[i] << 4 | flat[i + 1]] for i in range(0, len(flat), 2)]
    return {
        "weight": torch.tensor(pairs, dtype=torch.uint8),
        "weight.absmax": absmax,
        "weight.quant_map": torch.tensor(NF4),
        **nf4_state(q, {}),
    }


def nf4_state(q: Tensor, more: dict[str, Any]) -> Tensors:
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(q.shape), **more}
    return {"weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}


def write_nf4(folder: Path, nested: bool = False, **more: Any) -> Any:
    config = {
        "quant_method": "bitsandbytes",
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_use_double_quant": nested,
        "llm_int8_skip_modules": None,
        **more.pop("config", {}),
    }

    def parts(N: int, K: int) -> tuple[Tensors, Tensor]:
        q, blocks = torch.randint(0, 16, (N, K)), N * K // 64
        absmax = torch.rand(blocks) * 0.2 + 0.01
        own = nf4_parts(q, absmax)
        if nested:
            inner, outer = torch.randint(0, 256, (blocks,), dtype=torch.uint8), torch.rand(-(-blocks // 256)) * 0.1
            levels = torch.linspace(-1, 1, 256)
            each = [levels[i] * outer[b // 256] for b, i in enumerate(inner.tolist())]
            absmax = torch.stack(each) + torch.tensor(0.125)
            own |= {"weight.absmax": inner, "weight.nested_absmax": outer, "weight.nested_quant_map": levels}
            own |= nf4_state(q, {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.125})
        return own, torch.tensor(NF4)[q] * absmax.view(N, K // 64).repeat_interleave(64, 1)

    return write(folder, config, parts, **({"intermediate_size": 128} | more))


def write(
    folder: Path,
    config: dict[str, Any],
    parts: Callable[[int, int], tuple[Tensors, Tensor]],
    family: str = "llama",
    packed: str = "_proj",
    shards: int = 1,
    **settings: Any,
) -> PreTrainedModel:
    """Write a model whose `packed` layers are replaced by `parts(N, K)`; return the dense one that it stands for."""
    model = build(family, 3, torch.float32, **SMALL | settings)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")  # experts are layers of their own there
    dense = dict(tensors)
    for key in [
        key for key, t in tensors.items() if re.search(packed, key) and key.endswith(".weight") and t.ndim == 2
    ]:
        N, K = tensors.pop(key).shape
        own, dense[key] = parts(N, K)
        tensors |= {key.removesuffix("weight") + part: t for part, t in own.items()}
    save_file(dense, folder / "model.safetensors", metadata={"format": "pt"})
    model = type(model).from_pretrained(folder).eval()
    (folder / "model.safetensors").unlink()
    save_shards(folder, tensors, shards)
    change_config(folder, lambda c: c | {"dtype": "float32", "quantization_config": config})
    return model


def save_shards(folder: Path, tensors: Tensors, shards: int) -> None:
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    keys, names = sorted(tensors), [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    for i, name in enumerate(names):
        save_file({key: tensors[key] for key in keys[i::shards]}, folder / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: names[i % shards] for i, key in enumerate(keys)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def change_config(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in model.named_modules() if type(m) is nn.Linear}


def packed_layers(model: nn.Module) -> dict[str, QuantLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def by_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fixture: products of integers in float32, as the op defines them: on a CPU the fast ones round to bfloat16."""
    choose = fastllm.nn.linear.layout_for

    def layout_for(format: Any, *rest: Any) -> Any:
        return choose(format, *rest) if format.name == "nf4" else LAYOUTS["rest"]

    monkeypatch.setattr(fastllm.nn.linear, "layout_for", layout_for)


def assert_stands_for(model: PreTrainedModel, dense: PreTrainedModel, count: int) -> None:
    """`count` packed layers that hold the weights of `dense`, a float32 model, to the bit; and its output."""
    layers = packed_layers(model)
    assert len(layers) == count
    for name, layer in layers.items():
        assert torch.equal(layer.dequantize(), dense.get_submodule(name).weight), name
    got, want = output(model), output(dense)
    assert (got - want).abs().max() <= 2e-5 * want.abs().max() and want.std() > 0.01
