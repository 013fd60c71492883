"""Tiny random models of several families, and what a packed one stands for."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from fastllm.nn import QuantExperts, QuantLinear

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
}
MORE: dict[str, dict[str, Any]] = {
    "gemma3_text": {"sliding_window": 8, "query_pre_attn_scalar": 32},
    "mixtral": {"num_local_experts": 4, "intermediate_size": 64},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
}


def build(family: str, seed: int = 0, dtype: torch.dtype = torch.bfloat16, **settings: Any) -> PreTrainedModel:
    """A model of `family` (a `model_type`) with random weights, in evaluation mode."""
    torch.manual_seed(seed)
    if family == "gpt2":
        own = {"vocab_size": 64, "n_embd": 128, "n_layer": 2, "n_head": 4, "initializer_range": 0.1}
        own |= {"bos_token_id": 1, "eos_token_id": 2}
    elif family == "bert":
        own = {k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "head_dim", "tie_word_embeddings")}
    else:
        own = SIZES | MORE.get(family, {})
    make: Callable[..., PreTrainedModel] = (
        AutoModel.from_config if family == "bert" else AutoModelForCausalLM.from_config
    )
    return make(AutoConfig.for_model(family, **(own | settings)), dtype=dtype).eval()


def load(family: str, folder: Any) -> PreTrainedModel:
    """The model of `family` that was saved to `folder`, as it was."""
    kind: Any = AutoModel if family == "bert" else AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype="auto").eval()


def dense_twin(packed: PreTrainedModel, like: PreTrainedModel) -> PreTrainedModel:
    """`like`, a dense model of the same make, with the weights that those of `packed` stand for."""
    inside = tuple(f"{name}." for name, module in packed.named_modules() if isinstance(module, QuantExperts))
    for name, module in packed.named_modules():
        if isinstance(module, QuantExperts):
            dense = like.get_submodule(name)
            dense.gate_up_proj = nn.Parameter(torch.stack([layer.dequantize() for layer in module.up]))
            dense.down_proj = nn.Parameter(torch.stack([layer.dequantize() for layer in module.down]))
        elif isinstance(module, QuantLinear) and not (inside and name.startswith(inside)):
            weight = module.dequantize()
            like.get_submodule(name).weight = nn.Parameter(weight.t().contiguous() if module.transposed else weight)
    return like


def tokens() -> torch.Tensor:
    return torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def output(model: PreTrainedModel) -> torch.Tensor:
    """Logits, or the last hidden state."""
    return model(tokens().to(model.device))[0]
