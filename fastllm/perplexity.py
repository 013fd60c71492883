"""Perplexity of a causal language model on a text, by one stated protocol."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .decode import KVCache

ROWS = 32  # positions whose logits are in float32 at a time: 32 x 262 144 values are 34 MB


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and what it was measured on."""

    value: float  # exp(nll)
    nll: float  # mean negative log-likelihood of the scored tokens, in nats
    tokens: int  # scored: windows * (window - 1)
    windows: int
    window: int  # tokens


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel,
    text: str | Tensor,
    tokenizer: Any = None,
    *,
    window: int = 512,
    windows: int | None = None,
    bos: int | Literal["auto"] | None = "auto",
    kv_cache: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Perplexity of `model` (any Hugging Face causal language model) on `text`.

    Protocol: the text is tokenized whole, without special tokens, and cut into consecutive windows of `window` tokens
    that do not overlap; a last, shorter one is left out. In each window the first token is replaced by `bos`, where
    there is one, and the other window - 1 tokens are scored, each given all before it in the window. With
    log-probabilities p from a float32 log-softmax, value = exp(-sum p / (windows * (window - 1))). Figures compare
    only at equal text, tokenizer, `window` and `windows`.

    `text` is a string, with its `tokenizer`, or token ids: integers [T]. `windows` limits the count to the first so
    many. `bos` is a token id, None for none, or "auto": the tokenizer's, else (ids without a tokenizer) the model
    configuration's. `kv_cache`: "int8" or "int4": keys and values are rounded as a `fastllm.KVCache` of that format
    keeps them, the token's own included. `progress` is called with (windows done, windows in all). A model that
    yields NaN has a NaN perplexity.

    Raises TypeError for ids that are not integers or a string without tokenizer; ValueError for a text shorter than
    asked for, ids outside the vocabulary, a window beyond the model's positions, and a model in training mode.
    """
    tokens = _tokens(text, tokenizer)
    config = model.config.get_text_config()
    count = _count(len(tokens), window, windows)
    if bos == "auto":
        bos = tokenizer.bos_token_id if tokenizer is not None else getattr(config, "bos_token_id", None)
    _check(model, config, tokens[: count * window], bos, window)
    total = 0.0
    for index in range(count):
        ids = tokens[index * window : (index + 1) * window].to(model.device)
        if bos is not None:
            ids = torch.cat([ids.new_tensor([bos]), ids[1:]])
        cache: dict[str, Any] = {"use_cache": False}
        if kv_cache is not None:
            cache = {"past_key_values": KVCache(model.config, kv_cache), "use_cache": True}
        logits = model(input_ids=ids[None], **cache).logits[0]  # [window, V]
        total += _negative_log_likelihood(logits, ids)
        if progress is not None:
            progress(index + 1, count)
    scored = count * (window - 1)
    nll = total / scored
    return Perplexity(_exp(nll), nll, scored, count, window)


def _negative_log_likelihood(logits: Tensor, ids: Tensor, rows: int = ROWS) -> float:
    """-sum over i >= 1 of log softmax(logits[i - 1])[ids[i]]; `logits` [T, V] of any float type, `ids` [T]."""
    losses: list[Tensor] = []
    for start in range(0, len(ids) - 1, rows):
        targets = ids[start + 1 : start + 1 + rows].to(logits.device)
        scores = logits[start : start + len(targets)].float()
        losses.append(torch.nn.functional.cross_entropy(scores, targets, reduction="none"))
    return torch.cat(losses).cpu().double().sum().item()


def _tokens(text: str | Tensor, tokenizer: Any) -> Tensor:
    if isinstance(text, str):
        if tokenizer is None:
            raise TypeError("a text needs its tokenizer: perplexity(model, text, tokenizer)")
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.long)
    if text.dim() != 1 or text.is_floating_point() or text.is_complex() or text.dtype is torch.bool:
        raise TypeError(f"token ids must be integers of shape [T], not {text.dtype} of shape {list(text.shape)}")
    return text.long()


def _count(length: int, window: int, windows: int | None) -> int:
    """How many windows to read of `length` tokens."""
    if window < 2:
        raise ValueError(f"a window of {window} tokens leaves none to score; at least 2 are needed")
    if windows is not None and windows < 1:
        raise ValueError(f"windows must be at least 1, not {windows}")
    available = length // window
    wanted = 1 if windows is None else windows
    if available < wanted:
        raise ValueError(
            f"{wanted} windows of {window} tokens need {wanted * window} tokens, the text has {length}: "
            "give more text, or a smaller window or fewer windows"
        )
    return available if windows is None else windows


def _check(model: PreTrainedModel, config: Any, tokens: Tensor, bos: int | None, window: int) -> None:
    if model.training:
        raise ValueError("the model is in training mode, so dropout may distort the figure: call model.eval() first")
    low, high = int(tokens.min()), int(tokens.max())
    if bos is not None:
        low, high = min(low, bos), max(high, bos)
    if low < 0 or high >= config.vocab_size:
        raise ValueError(
            f"token ids go from {low} to {high}, the model's vocabulary has {config.vocab_size}: "
            "the tokenizer belongs to another model"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and window > positions:
        raise ValueError(f"a window of {window} tokens exceeds the model's {positions} positions")


def _exp(nll: float) -> float:
    """exp, infinite where a float cannot hold it."""
    return math.exp(nll) if nll < 700 or math.isnan(nll) else math.inf
