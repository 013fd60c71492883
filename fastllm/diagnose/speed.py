"""How fast a causal language model answers: seconds to read a prompt, tokens per second after it."""

import inspect
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..patch.plan import Planner

WARM_UP = 2  # decode steps before the clock counts: first calls allocate, and let libraries choose their kernels


@dataclass(frozen=True)
class Speed:
    """Batch 1, greedy. Times are wall-clock seconds.

    prefill_s:    median over the repeats of reading `prefill_tokens` tokens, up to the logits of the last one
    decode_tok_s: 1 / the median step, where a step reads one token, the others being in the cache, and yields the next
    step_s:       the quartiles of all steps; the first tells what the machine does when nothing disturbs it
    tokens:       the tokens chosen after the prompt; the same in each repeat, of which the last counts
    """

    prefill_s: float
    prefill_tokens: int
    decode_tok_s: float
    step_s: tuple[float, float, float]
    new_tokens: int
    repeats: int
    tokens: tuple[int, ...]

    @property
    def fastest_quarter_tok_s(self) -> float:
        """Tokens per second that a quarter of the steps reach or exceed."""
        return 1 / self.step_s[0]


def measure(model: PreTrainedModel, prompt_ids: Tensor, new_tokens: int = 32, repeats: int = 3) -> Speed:
    """The speed of `model` after the prompt [1, T]: `repeats` prefills, each followed by `new_tokens` timed steps.

    The end-of-sequence token does not end it, so every model does the same work. Raises ValueError for a prompt that
    is not one row of ids, counts below 1, a model in training mode, or a model that keeps no cache.
    """
    return measure_alternating({"": model}, prompt_ids, new_tokens, repeats)[""]


def measure_alternating(
    models: Mapping[str, PreTrainedModel], prompt_ids: Tensor, new_tokens: int = 32, repeats: int = 3
) -> dict[str, Speed]:
    """`measure` for several models that take turns: A B, A B, ...; what disturbs the machine disturbs all of them.

    Only ratios between the results of one call are worth quoting.
    """
    if prompt_ids.ndim != 2 or len(prompt_ids) != 1 or not prompt_ids.numel():
        raise ValueError(f"prompt_ids must be one row of token ids [1, T], got {list(prompt_ids.shape)}")
    if min(new_tokens, repeats) < 1:
        raise ValueError(f"new_tokens={new_tokens} and repeats={repeats} must be at least 1")
    for model in models.values():
        if model.training:
            raise ValueError("the model is in training mode: call model.eval() first")
        _turn(model, prompt_ids[:, -8:], WARM_UP)
    turns: dict[str, list[Turn]] = {name: [] for name in models}
    for _ in range(repeats):
        for name, model in models.items():
            turns[name].append(_turn(model, prompt_ids, new_tokens))
    return {name: _summary(found, prompt_ids.shape[1]) for name, found in turns.items()}


@dataclass(frozen=True)
class Turn:
    prefill_s: float
    steps_s: list[float]
    tokens: tuple[int, ...]


@torch.inference_mode()
def _turn(model: PreTrainedModel, prompt_ids: Tensor, new_tokens: int) -> Turn:
    """One prefill and `new_tokens` steps. The token is fetched after each, as a loop that prints or stops must do."""
    known = inspect.signature(model.forward).parameters
    only_last = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    ids = prompt_ids.to(model.device)
    start = time.perf_counter()
    out = model(input_ids=ids, use_cache=True, **only_last)
    tokens = [_greedy(out)]
    prefill = time.perf_counter() - start
    cache = getattr(out, "past_key_values", None)
    if cache is None:
        raise ValueError(f"{type(model).__name__} keeps no cache of keys and values, so it cannot decode step by step")
    steps: list[float] = []
    for _ in range(new_tokens):
        start = time.perf_counter()
        out = model(input_ids=ids.new_tensor([[tokens[-1]]]), past_key_values=cache, use_cache=True)
        tokens.append(_greedy(out))
        steps.append(time.perf_counter() - start)
        cache = out.past_key_values
    return Turn(prefill, steps, tuple(tokens))


def _greedy(out: Any) -> int:
    return int(out.logits[0, -1].argmax())  # waits for the device


def _summary(turns: list[Turn], prefill_tokens: int) -> Speed:
    steps = sorted(step for turn in turns for step in turn.steps_s)
    quartiles = statistics.quantiles(steps, n=4, method="inclusive") if len(steps) > 1 else steps * 3
    return Speed(
        prefill_s=statistics.median(turn.prefill_s for turn in turns),
        prefill_tokens=prefill_tokens,
        decode_tok_s=1 / quartiles[1],
        step_s=(quartiles[0], quartiles[1], quartiles[2]),
        new_tokens=len(turns[0].steps_s),
        repeats=len(turns),
        tokens=turns[-1].tokens,
    )


def bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes of weights that one decode step reads: every layer once, of an embedding one row, of experts those used.

    Works for dense and for patched models. Times the tokens per second, this is the bandwidth that decoding reaches.
    """
    return Planner({}, None, False, "*", ()).plan(model).before


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
