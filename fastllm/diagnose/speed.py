"""How fast a causal language model answers: seconds to read a prompt, tokens per second after it."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..patch.plan import as_it_is

WARM_UP = 2  # decode steps before the clock counts: first calls allocate, and let libraries choose their kernels


@dataclass(frozen=True)
class Speed:
    """Of `model.generate`, greedy. Times are wall-clock seconds.

    prefill_s:    median over the repeats of the time to the first token, after a prompt of `prefill_tokens` tokens
    decode_tok_s: rows / the median step, where a step reads one token of each row and yields the next
    step_s:       the quartiles of all steps; the first tells what the machine does when nothing disturbs it
    tokens:       the tokens chosen after the prompt, in the first row; of the last repeat, as of all
    """

    prefill_s: float
    prefill_tokens: int
    decode_tok_s: float
    step_s: tuple[float, float, float]
    new_tokens: int
    repeats: int
    tokens: tuple[int, ...]
    rows: int = 1

    @property
    def fastest_quarter_tok_s(self) -> float:
        """Tokens per second that a quarter of the steps reach or exceed."""
        return self.rows / self.step_s[0]


def measure(model: PreTrainedModel, prompt_ids: Tensor, new_tokens: int = 32, repeats: int = 3) -> Speed:
    """The speed of `model` after the prompt [B, T]: `repeats` prefills, each followed by `new_tokens` timed steps.

    The end-of-sequence token does not end it, so every model does the same work. Raises ValueError for a prompt that
    is no matrix of ids, counts below 1, a model in training mode, or a model that does not generate.
    """
    return measure_alternating({"": model}, prompt_ids, new_tokens, repeats)[""]


def measure_alternating(
    models: Mapping[str, PreTrainedModel],
    prompt_ids: Tensor,
    new_tokens: int = 32,
    repeats: int = 3,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Speed]:
    """`measure` for several models that take turns: A B, A B, ...; what disturbs the machine disturbs all of them.

    settings: {name: further arguments of that model's `generate`}. Only ratios between the results of one call are
    worth quoting.
    """
    settings = settings or {}
    if prompt_ids.ndim != 2 or not prompt_ids.numel():
        raise ValueError(f"prompt_ids must be token ids [B, T], got {list(prompt_ids.shape)}")
    if min(new_tokens, repeats) < 1:
        raise ValueError(f"new_tokens={new_tokens} and repeats={repeats} must be at least 1")
    for name, model in models.items():
        if model.training:
            raise ValueError("the model is in training mode: call model.eval() first")
        if not hasattr(model, "generate"):
            raise ValueError(f"{type(model).__name__} does not generate: only causal language models are measured")
        _turn(model, prompt_ids[:, -8:], WARM_UP, settings.get(name, {}))
    turns: dict[str, list[Turn]] = {name: [] for name in models}
    for _ in range(repeats):
        for name, model in models.items():
            turns[name].append(_turn(model, prompt_ids, new_tokens, settings.get(name, {})))
    return {name: _summary(found, prompt_ids) for name, found in turns.items()}


@dataclass(frozen=True)
class Turn:
    prefill_s: float
    steps_s: list[float]
    tokens: tuple[int, ...]


class Clock:
    """A streamer that notes when tokens come."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())  # the first value is the prompt

    def end(self) -> None:
        pass


def _turn(model: Any, prompt_ids: Tensor, new_tokens: int, settings: Mapping[str, Any]) -> Turn:
    """One `generate`. Tokens are fetched after each step, as for a user who reads along."""
    ids, clock = prompt_ids.to(model.device), Clock()
    start = time.perf_counter()
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens + 1,
        eos_token_id=None,
        pad_token_id=0,
        do_sample=False,
        temperature=None,
        top_k=None,
        top_p=None,
        streamer=clock,
        **settings,
    )
    steps = [after - before for before, after in zip(clock.times[1:], clock.times[2:], strict=False)]
    return Turn(clock.times[1] - start, steps, tuple(out[0, ids.shape[1] :].tolist()))


def _summary(turns: list[Turn], prompt_ids: Tensor) -> Speed:
    steps = sorted(step for turn in turns for step in turn.steps_s)
    quartiles = statistics.quantiles(steps, n=4, method="inclusive") if len(steps) > 1 else steps * 3
    return Speed(
        prefill_s=statistics.median(turn.prefill_s for turn in turns),
        prefill_tokens=prompt_ids.shape[1],
        decode_tok_s=len(prompt_ids) / quartiles[1],
        step_s=(quartiles[0], quartiles[1], quartiles[2]),
        new_tokens=len(turns[0].steps_s),
        repeats=len(turns),
        tokens=turns[-1].tokens,
        rows=len(prompt_ids),
    )


def bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes of weights that one decode step reads: every layer once, of an embedding one row, of experts those used.

    Works for dense and for patched models. Times the tokens per second, this is the bandwidth that decoding reaches.
    """
    return as_it_is(model).before


def peak_rss() -> int | None:
    """The most memory that this process has held so far, in bytes, with mapped files; None where unknown."""
    return _status("VmHWM")


def anonymous_rss() -> int | None:
    """The memory that this process holds now, in bytes, without mapped files; None where unknown."""
    return _status("RssAnon")


def _status(field: str) -> int | None:
    """One field of Linux's /proc/self/status, which counts in kB."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    values = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    return int(values[field].split()[0]) * 1024 if field in values else None
