"""How far the patched model's answer is from the original's, on one prompt."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Accuracy:
    """kl: mean over positions of KL(before || after), nats. top1: share of positions with the same first choice.

    For a model without a vocabulary (an encoder): cosine similarity of the last hidden states; kl and top1 are None.
    """

    tokens: int
    real: bool  # a prompt, not random tokens
    kl: float | None = None
    top1: float | None = None
    cosine: float | None = None

    def __str__(self) -> str:
        what = f"{self.tokens} {'prompt' if self.real else 'random'} tokens"
        if self.cosine is not None:
            return f"cosine of hidden states {self.cosine:.4f} on {what}"
        return f"KL {self.kl:.3g} nats, same top-1 {self.top1:.0%} on {what}"


def probe(model: Any, prompt: Tensor | None) -> Tensor:
    """Token ids [1, T] on the model's device: the prompt's, or 64 random ones.

    Raises ValueError if the prompt is not a matrix of ids within the vocabulary.
    """
    vocabulary = model.config.get_text_config().vocab_size
    if prompt is None:
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(vocabulary, (1, 64), generator=generator)
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


def agreement(before: Tensor, after: Tensor, has_vocabulary: bool, real: bool) -> Accuracy:
    """Compare two results of `outputs`."""
    tokens = len(before)
    if not has_vocabulary:
        cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1).mean()
        return Accuracy(tokens, real, cosine=float(cosine))
    p, q = before.log_softmax(-1), after.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean()
    top1 = (before.argmax(-1) == after.argmax(-1)).float().mean()
    return Accuracy(tokens, real, kl=float(kl), top1=float(top1))
