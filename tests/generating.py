"""What the tests of `generate` share: pairs of models whose answers depend on every token of the prompt."""

import copy
import string
from typing import Any, NamedTuple

import tiny
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
)

import fastllm
from fastllm.patch.report import Report

V, WINDOW = 512, 8
SLIDES: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
GEMMA = SLIDES | {"query_pre_attn_scalar": 32}
COMMON: dict[str, Any] = {"vocab_size": V, "pad_token_id": 0, "eos_token_id": None, "initializer_range": 0.15}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen3": ("qwen3", {}),
    "gemma3": ("gemma3_text", GEMMA | {"initializer_range": 0.3}),
    "gemma2": ("gemma2", GEMMA | {"attn_logit_softcapping": 5.0, "attn_implementation": "eager"}),
    "gpt-oss": ("gpt_oss", SLIDES | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt2": ("gpt2", {"bos_token_id": 1}),
    "mixtral": ("mixtral", {"num_experts_per_tok": 2}),
    "qwen3-moe": ("qwen3_moe", {}),
}
SLIDING = ["gemma3", "gemma2", "gpt-oss"]
STARTS = [0, 5, 1, 12]  # of a ragged batch


def build(family: str, **settings: Any) -> PreTrainedModel:
    kind, own = FAMILIES[family]
    return tiny.build(kind, dtype=torch.float32, **(COMMON | own | settings))


class Pair(NamedTuple):
    """A model, the same one optimized, and the report."""

    plain: PreTrainedModel
    fast: PreTrainedModel
    report: Report

    @property
    def reasons(self) -> list[str]:
        """Why transformers' loop ran."""
        return self.report.speedups.loop.reasons


def pair(family: str, *, kv_cache: str | None = None, fuse: bool = True, **settings: Any) -> Pair:
    plain = build(family, **settings)
    fast = copy.deepcopy(plain)
    report = fastllm.optimize(fast, None, kv_cache=kv_cache, fuse=fuse, quiet=True)
    assert report.speedups.loop is not None, report.speedups.refused
    return Pair(plain, fast, report)


def prompt(batch: int = 1, length: int = 13, seed: int = 1) -> dict[str, Tensor]:
    """input_ids and attention_mask; in a batch, rows begin with padding."""
    ids = torch.randint(1, V, (batch, length), generator=torch.Generator().manual_seed(seed))
    starts = torch.tensor((STARTS if batch > 1 else [0])[:batch])
    mask = (torch.arange(length) >= starts[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def greedy(model: PreTrainedModel, new: int = 12, **kwargs: Any) -> Any:
    return model.generate(**({"max_new_tokens": new, "do_sample": False} | kwargs))


class Streamer:
    """Keeps what it is given, as it is given it."""

    def __init__(self) -> None:
        self.got: list[Tensor | None] = []

    def put(self, value: Tensor) -> None:
        self.got.append(value)

    def end(self) -> None:
        self.got.append(None)

    def lists(self) -> list[Any]:
        return [None if value is None else (value.tolist(), value.is_inference()) for value in self.got]


def tokenizer() -> PreTrainedTokenizerFast:
    """Letters, digits and "Ġ", a space; then two-letter words up to V tokens."""
    letters = [*string.ascii_letters, *string.digits, "Ġ"]
    words = ["<pad>", "<eos>", *letters, *(a + b for a in letters for b in letters)][:V]
    model = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="<eos>", padding_side="left")


class Shift(LogitsProcessor):
    """Depends on the tokens so far, on how often it was called, and on every row."""

    def __init__(self) -> None:
        self.calls, self.scores = 0, []

    def __call__(self, input_ids, scores):
        self.calls += 1
        self.scores.append(scores)
        scores = scores.clone()
        scores[torch.arange(len(scores)), (input_ids.sum(1) + self.calls) % 512] += 3
        return scores


class Stop(StoppingCriteria):
    """At a length of its own for each row; `plain`: at one for all, told as a Python bool."""

    def __init__(self, *lengths: int, plain: bool = False):
        self.lengths, self.plain, self.seen = lengths, plain, []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(tuple(input_ids.shape))
        if self.plain:
            return input_ids.shape[1] >= self.lengths[0]
        return torch.tensor([input_ids.shape[1] >= n for n in self.lengths])


def stop(*criteria) -> dict:
    return {"stopping_criteria": StoppingCriteriaList(criteria)}


def process(*processors) -> dict:
    return {"logits_processor": LogitsProcessorList(processors)}
