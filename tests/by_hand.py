"""A packed checkpoint written from the description of the format alone, without any code of fastllm."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import build
from torch import Tensor, nn
from transformers import PreTrainedModel


def write_by_hand(folder: Path, symmetric: bool = True, group: int | None = 32) -> PreTrainedModel:
    """Write a quantized llama to `folder`; return the dense model that it stands for."""
    model = build("llama", seed=3)
    tensors: dict[str, Tensor] = {}
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
