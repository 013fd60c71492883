"""The families of models that the tests patch, tiny and random."""

from typing import Any

import tiny
import torch
from torch import Tensor
from transformers import PreTrainedModel

VOCABULARY = 512
COMMON: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": None, "initializer_range": 0.02}
KINDS = ["sliding_attention", "full_attention"]
# name -> (model_type, settings beside those of `tiny`)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "gemma3": ("gemma3_text", {"tie_word_embeddings": True, "layer_types": KINDS}),
    "gpt2": ("gpt2", {}),
    "mixtral": ("mixtral", {"intermediate_size": 256, "num_experts_per_tok": 2}),
    "qwen3-moe": ("qwen3_moe", {"moe_intermediate_size": 96}),
    "gpt-oss": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": KINDS}),
    "bert": ("bert", {}),
}


def build(family: str, dtype: torch.dtype = torch.bfloat16, every_expert: bool = False) -> PreTrainedModel:
    """The model in eval mode. every_expert: a token goes to all of them, so that rounding cannot change its route."""
    kind, settings = FAMILIES[family]
    more = {"num_experts_per_tok": 4} if every_expert else {}
    return tiny.build(kind, dtype=dtype, **(COMMON | settings | more))


def ids(batch: int = 2, length: int = 9) -> Tensor:
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def outputs(model: PreTrainedModel) -> Tensor:
    """Logits, or the last hidden state of an encoder."""
    with torch.no_grad():
        return model(ids().to(model.device))[0]
