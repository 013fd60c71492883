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
# Others, for what is fused and how attention is called: softcaps, biases, merged projections, norms of whole
# projections, layer norms, other rotations, windows that modules do not tell of.
MORE_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2": (
        "gemma2",
        {"tie_word_embeddings": True, "layer_types": KINDS, "sliding_window": 8, "query_pre_attn_scalar": 32}
        | {"attn_logit_softcapping": 0.5},
    ),
    "qwen2": ("qwen2", {}),
    "phi3": ("phi3", {"sliding_window": 8}),
    "olmo2": ("olmo2", {}),
    "starcoder2": ("starcoder2", {"sliding_window": 8}),
    "cohere": ("cohere", {}),
    "glm": ("glm", {}),
    "phi": ("phi", {"partial_rotary_factor": 0.5}),
    "mistral": ("mistral", {"sliding_window": 8}),
}


def build(
    family: str, dtype: torch.dtype = torch.bfloat16, every_expert: bool = False, seed: int = 0
) -> PreTrainedModel:
    """The model in eval mode. every_expert: a token goes to all of them, so that rounding cannot change its route."""
    kind, settings = (FAMILIES | MORE_FAMILIES)[family]
    more = {"num_experts_per_tok": 4} if every_expert else {}
    return tiny.build(kind, seed, dtype, **(COMMON | settings | more))


def rough(model: PreTrainedModel) -> PreTrainedModel:
    """The model with norm weights and biases that a fused form cannot get right by luck."""
    generator = torch.Generator().manual_seed(2)
    for p in model.parameters():
        if p.ndim == 1:
            p.data += 0.2 * torch.randn(p.shape, generator=generator).to(p)
    return model


def ids(batch: int = 2, length: int = 9) -> Tensor:
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def outputs(model: PreTrainedModel) -> Tensor:
    """Logits, or the last hidden state of an encoder."""
    with torch.no_grad():
        return model(ids().to(model.device))[0]
