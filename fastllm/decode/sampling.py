"""The next token from the logits: what transformers' processors say, with less work."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process as hf

# Processors that look at the logits alone, one row at a time, wherever in the row a value is: those with which a few
# candidates can be dealt with as the whole vocabulary would be.
ROWWISE = (
    hf.TemperatureLogitsWarper,
    hf.TopPLogitsWarper,
    hf.MinPLogitsWarper,
    hf.TypicalLogitsWarper,
    hf.EpsilonLogitsWarper,
    hf.EtaLogitsWarper,
)


class Sampler:
    """logits [B, V] and the tokens so far -> the next token of each row.

    Greedy choices are those of transformers. Sampled ones have its probabilities; where top-k leaves few candidates,
    random numbers are drawn for these alone, so that one seed does not give the tokens that it gives transformers.
    """

    def __init__(self, processors: Sequence[Any], do_sample: bool):
        self.processors, self.do_sample = list(processors), do_sample
        self.looks = True  # whether it may look at values: not if a graph is to hold it

    def __call__(self, logits: Tensor, ids: Tensor) -> Tensor:
        """logits [B, V] of any floating-point type, ids [B, T] -> int64 [B]."""
        if not self.processors and not self.do_sample:
            return argmax(logits)
        scores = logits.float()
        for i, processor in enumerate(self.processors):
            rest = self.processors[i + 1 :]
            if type(processor) is hf.TopKLogitsWarper and self.do_sample and self.looks and not logits.is_cuda:
                if all(type(p) in ROWWISE for p in rest):
                    return torch.cat([_among(row, processor.top_k, rest, ids) for row in scores.split(1)])
            scores = processor(ids, scores)
        if not self.do_sample:
            return scores.argmax(-1)
        return draw(scores)


def argmax(logits: Tensor) -> Tensor:
    """[B, V] -> int64 [B]: the first of the largest, as `torch.argmax`, which on a CPU takes 20 times as long."""
    B, V = logits.shape
    width = min(V & -V, 512)  # the power of two in V
    if logits.device.type != "cpu":
        return logits.argmax(-1)
    if V < 4096 or width < 32:
        return logits.float().argmax(-1)  # of two bytes a number, it takes four times as long
    blocks = logits.view(B, -1, width)
    block = blocks.amax(-1).argmax(-1)
    inside = blocks[torch.arange(B), block].argmax(-1)
    return block * width + inside


def draw(scores: Tensor) -> Tensor:
    """One token of each row of scores [B, V], with probabilities softmax(scores) -> int64 [B].

    As `torch.multinomial` draws a single sample, but without looking at a value, so that a CUDA graph can hold it.
    """
    p = scores.softmax(-1)
    return p.div_(torch.empty_like(p).exponential_(1)).argmax(-1)


def _among(row: Tensor, top_k: int, rest: Sequence[Any], ids: Tensor) -> Tensor:
    """A token of row [1, V], of those that are not below the k-th largest."""
    least = row.topk(min(top_k, row.shape[1])).values[0, -1]
    candidates = (row[0] >= least).nonzero()[:, 0]
    scores = row[:, candidates]
    for processor in rest:
        scores = processor(ids, scores)
    return candidates[draw(scores)]
