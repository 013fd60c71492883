"""How far the patched model's answer is from the original's, on one prompt."""

from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 16  # of logits that are compared at a time: a copy of all would be larger than many a layer


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


def agreement(before: Tensor, after: Tensor, has_vocabulary: bool, real: bool) -> Accuracy:
    """Compare two results of `outputs`."""
    tokens = len(before)
    if not has_vocabulary:
        cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1).mean()
        return Accuracy(tokens, real, cosine=float(cosine))
    kl = same = 0.0
    for b, a in zip(before.split(ROWS), after.split(ROWS), strict=True):
        p, q = b.log_softmax(-1), a.log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum())
        same += float((p.argmax(-1) == q.argmax(-1)).sum())
    return Accuracy(tokens, real, kl=kl / tokens, top1=same / tokens)
