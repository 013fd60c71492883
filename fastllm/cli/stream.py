"""Printing tokens as they come, and timing them."""

import statistics
import time
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import TextStreamer


class TimedStreamer(TextStreamer):
    """Prints the text as it is generated, and notes when each token came."""

    def __init__(self, tokenizer: Any):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())  # the first value is the prompt
        super().put(value)


@dataclass(frozen=True)
class Generated:
    """`first_s`: seconds from the call to the first token. `tok_s`: 1 / the median time from a token to the next."""

    tokens: list[int]
    first_s: float
    tok_s: float | None  # of one token alone, nothing can be said


def generate(model: Any, tokenizer: Any, ids: Tensor, new_tokens: int) -> Generated:
    """Print `model.generate`'s greedy continuation of ids [1, T] while it comes."""
    streamer = TimedStreamer(tokenizer)
    ids = ids.to(model.device)
    start = time.perf_counter()
    out = model.generate(
        ids,
        attention_mask=ids.new_ones(ids.shape),
        max_new_tokens=new_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=model.generation_config.pad_token_id or tokenizer.eos_token_id,
        streamer=streamer,
    )
    steps = [after - before for before, after in zip(streamer.times[1:], streamer.times[2:], strict=False)]
    rate = 1 / statistics.median(steps) if steps else None
    return Generated(out[0, ids.shape[1] :].tolist(), streamer.times[1] - start, rate)
