"""Tiny random models of every family that the tests patch."""

import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCABULARY = 512
SMALL = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "eos_token_id": None,
}
MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}
KINDS = ["sliding_attention", "full_attention"]

FAMILIES = {
    "llama": lambda: LlamaConfig(**SMALL),
    "llama-tied": lambda: LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SMALL),
    "gemma3": lambda: Gemma3TextConfig(**SMALL, layer_types=KINDS),
    "gpt2": lambda: GPT2Config(
        n_embd=128, n_layer=2, n_head=4, vocab_size=VOCABULARY, pad_token_id=0, eos_token_id=None
    ),
    "mixtral": lambda: MixtralConfig(**SMALL, **MIXTURE),
    "qwen3-moe": lambda: Qwen3MoeConfig(**SMALL, moe_intermediate_size=96, num_experts=4, num_experts_per_tok=2),
    "gpt-oss": lambda: GptOssConfig(**SMALL, **MIXTURE, layer_types=KINDS),
    "bert": lambda: BertConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY
    ),
}


def build(family: str, dtype: torch.dtype = torch.bfloat16, every_expert: bool = False) -> PreTrainedModel:
    """The model in eval mode. every_expert: a token goes to all of them, so that rounding cannot change its route."""
    torch.manual_seed(0)
    auto = AutoModel if family == "bert" else AutoModelForCausalLM
    config = FAMILIES[family]()
    if every_expert and hasattr(config, "num_experts_per_tok"):
        config.num_experts_per_tok = 4
    return auto.from_config(config, dtype=dtype).eval()


def ids(batch: int = 2, length: int = 9) -> Tensor:
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def outputs(model: PreTrainedModel) -> Tensor:
    """Logits, or the last hidden state of an encoder."""
    with torch.no_grad():
        return model(ids().to(model.device))[0]
