"""A model's answer to a few tokens: what shows that it still works."""

from typing import Any

import torch
from torch import Tensor


def reads_tokens(model: Any) -> bool:
    """Whether the model takes token ids, and nothing else, and says how many there are."""
    text = model.config.get_text_config() if hasattr(model, "config") else None
    return getattr(model, "main_input_name", "input_ids") == "input_ids" and hasattr(text, "vocab_size")


def probe(model: Any, prompt: Tensor | None) -> Tensor:
    """Token ids [1, T] on the model's device: the prompt's, or 64 random ones.

    Raises ValueError if the prompt is not a matrix of ids within the vocabulary, or the model does not read tokens.
    """
    if not reads_tokens(model):
        raise ValueError(
            f"{type(model).__name__} reads {model.main_input_name}, not tokens: language models are patched"
        )
    vocabulary = model.config.get_text_config().vocab_size
    if prompt is None:
        generator = torch.Generator("cpu").manual_seed(0)
        prompt = torch.randint(vocabulary, (1, 64), generator=generator, device="cpu")
        prompt = prompt[:, : getattr(model.config.get_text_config(), "max_position_embeddings", 64)]
    if prompt.ndim != 2 or not prompt.numel() or int(prompt.max()) >= vocabulary or int(prompt.min()) < 0:
        raise ValueError(
            f"prompt must be token ids [1, T] below {vocabulary}, got {prompt.dtype} {list(prompt.shape)}"
        )
    return prompt.to(next(model.parameters()).device)


def outputs(model: Any, ids: Tensor) -> Tensor:
    """Logits, or the last hidden state of an encoder, float32 [T, V]."""
    decoder = {"decoder_input_ids": ids} if getattr(model.config, "is_encoder_decoder", False) else {}
    with torch.no_grad():
        out = model(input_ids=ids, **decoder)
    logits = getattr(out, "logits", None)
    return (out.last_hidden_state if logits is None else logits).flatten(0, -2).float()


def refuse_nan(answer: Tensor) -> None:
    """Raise ValueError if there is NaN in what the packed model answered."""
    if bool(answer.isnan().any()):
        raise ValueError(
            "the packed model answers NaN: some part of it reads the weight of a layer by itself, as Mamba's mixers "
            "do with dt_proj; leave those layers out with exclude="
        )
