"""Perplexity is exp of the mean negative log-likelihood, by the protocol that its docstring states."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fastllm.data import sample_text
from fastllm.perplexity import Perplexity, _exp, _negative_log_likelihood, perplexity

VOCABULARY, BOS = 101, 7


def tiny_model(**changes: Any) -> LlamaForCausalLM:
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.5,  # far from uniform, so that every error shows
        "bos_token_id": BOS,
        "eos_token_id": 8,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


def some_tokens(count: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(1))


def by_hand(model: LlamaForCausalLM, tokens: Tensor, window: int, windows: int, bos: int | None) -> tuple[float, int]:
    """(mean negative log-likelihood, tokens scored) in NumPy and float64, one token at a time."""
    total, scored = 0.0, 0
    for start in range(0, windows * window, window):
        ids = tokens[start : start + window].clone()
        if bos is not None:
            ids[0] = bos
        with torch.no_grad():
            logits = model(ids[None]).logits[0].double().numpy()
        for position in range(1, window):
            row = logits[position - 1]
            total -= row[ids[position]] - row.max() - np.log(np.exp(row - row.max()).sum())
            scored += 1
    return total / scored, scored


@pytest.mark.parametrize("bos", [BOS, 0, None])
@pytest.mark.parametrize(("window", "windows", "length"), [(16, None, 70), (16, 2, 70), (2, 5, 10), (64, None, 64)])
def test_against_a_computation_by_hand(window: int, windows: int | None, length: int, bos: int | None) -> None:
    model, tokens = tiny_model(), some_tokens(length)
    count = length // window if windows is None else windows
    nll, scored = by_hand(model, tokens, window, count, bos)
    result = perplexity(model, tokens, window=window, windows=windows, bos=bos)
    assert result.nll == pytest.approx(nll, rel=1e-6)
    assert result.value == pytest.approx(math.exp(nll), rel=1e-5)
    assert (result.tokens, result.windows, result.window) == (scored, count, window)
    assert count * (window - 1) == scored


def test_the_protocol_is_told_apart() -> None:
    """The comparison above is not blind: another bos, window, count or order gives another figure."""
    model, tokens = tiny_model(), some_tokens(64)
    reference = perplexity(model, tokens, window=16, bos=BOS).value
    others = [
        perplexity(model, tokens, window=16, bos=None),
        perplexity(model, tokens, window=32, bos=BOS),
        perplexity(model, tokens, window=16, windows=3, bos=BOS),
        perplexity(model, tokens.roll(1), window=16, bos=BOS),
        perplexity(model, tokens.flip(0), window=16, bos=BOS),
    ]
    assert all(abs(other.value / reference - 1) > 1e-3 for other in others)


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary() -> None:
    model = tiny_model(vocab_size=128)
    torch.nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, some_tokens(64), window=16).value == pytest.approx(128, rel=1e-6)


def test_a_certain_model_has_perplexity_one() -> None:
    """Logits that put everything on the next token: each token names its successor."""
    model = tiny_model(hidden_size=VOCABULARY * 8, num_hidden_layers=0, tie_word_embeddings=False)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(VOCABULARY, VOCABULARY * 8))
        model.lm_head.weight.copy_(100 * torch.eye(VOCABULARY, VOCABULARY * 8).roll(1, 0))
    tokens = torch.arange(64) % VOCABULARY
    assert perplexity(model, tokens, window=16, bos=None).value == pytest.approx(1, abs=1e-6)
    assert perplexity(model, tokens.flip(0), window=16, bos=None).value > 1e6


@pytest.mark.parametrize("rows", [1, 5, 15, 16, 1000])
def test_chunks_do_not_change_the_value(rows: int) -> None:
    logits, ids = torch.randn(16, VOCABULARY, generator=torch.Generator().manual_seed(2)), some_tokens(16)
    whole = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum").item()
    assert _negative_log_likelihood(logits, ids, rows) == pytest.approx(whole, rel=1e-6)


def test_half_precision_logits_are_scored_in_float32() -> None:
    logits, ids = torch.randn(16, 5000, generator=torch.Generator().manual_seed(2)) * 3, torch.arange(16)
    half = logits.bfloat16()
    exact = torch.nn.functional.cross_entropy(half[:-1].double(), ids[1:], reduction="sum").item()
    assert _negative_log_likelihood(half, ids) == pytest.approx(exact, rel=1e-6)
    coarse = torch.nn.functional.cross_entropy(half[:-1], ids[1:], reduction="sum").item()
    assert coarse != pytest.approx(exact, rel=1e-6)  # so the line above has told the two apart


class Letters:
    """A tokenizer of letters; 0 stands in front where special tokens are asked for."""

    bos_token_id: int | None = 3

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [0] * add_special_tokens + [ord(letter) - ord("a") for letter in text]}


def test_a_text_with_its_tokenizer() -> None:
    model, text = tiny_model(), "thequickbrownfoxjumpsoverthelazydog"
    ids = torch.tensor([ord(letter) - ord("a") for letter in text])
    assert perplexity(model, text, Letters(), window=8) == perplexity(model, ids, window=8, bos=3)
    assert perplexity(model, text, Letters(), window=8, bos=5) == perplexity(model, ids, window=8, bos=5)


def test_where_the_bos_comes_from() -> None:
    model, text = tiny_model(), "thequickbrownfox"
    ids = torch.tensor([ord(letter) - ord("a") for letter in text])
    assert perplexity(model, ids, window=8) == perplexity(model, ids, window=8, bos=BOS)
    without = Letters()
    without.bos_token_id = None  # the tokenizer knows best: some configurations name a token that it never adds
    assert perplexity(model, text, without, window=8) == perplexity(model, ids, window=8, bos=None)
    assert perplexity(tiny_model(bos_token_id=None), ids, window=8) == perplexity(model, ids, window=8, bos=None)


def test_the_caller_s_tokens_and_model_stay_as_they_are() -> None:
    model, tokens = tiny_model(), some_tokens(32)
    before = tokens.clone()
    perplexity(model, tokens, window=16)
    assert torch.equal(tokens, before) and not model.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_progress() -> None:
    seen: list[tuple[int, int]] = []
    perplexity(tiny_model(), some_tokens(50), window=16, progress=lambda done, of: seen.append((done, of)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_other_integers(dtype: torch.dtype) -> None:
    model, tokens = tiny_model(), some_tokens(32)
    assert perplexity(model, tokens.to(dtype), window=16) == perplexity(model, tokens, window=16)


def test_nan_and_infinity_are_not_hidden() -> None:
    model, tokens = tiny_model(), some_tokens(32)
    torch.nn.init.constant_(model.lm_head.weight, math.nan)
    assert math.isnan(perplexity(model, tokens, window=16).value)
    assert _exp(1000.0) == math.inf and _exp(1.0) == math.e


ERRORS = {
    "too short": ((40, {"window": 64}), r"1 windows of 64 tokens need 64 tokens, the text has 40"),
    "too few windows": ((40, {"window": 16, "windows": 3}), r"3 windows of 16 tokens need 48 tokens, the text has 40"),
    "nothing to score": ((40, {"window": 1}), "window of 1 tokens"),
    "no windows": ((40, {"window": 16, "windows": 0}), "at least 1, not 0"),
    "beyond the positions": ((200, {"window": 65}), "window of 65 tokens exceeds the model's 64 positions"),
    "bos beyond": ((40, {"window": 16, "bos": 101}), "go from 0 to 101, the model's vocabulary has 101"),
    "bos negative": ((40, {"window": 16, "bos": -1}), "go from -1"),
}


@pytest.mark.parametrize(("call", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(call: tuple[int, dict[str, Any]], message: str) -> None:
    length, options = call
    tokens = some_tokens(length)
    tokens[:3] = 0
    with pytest.raises(ValueError, match=message):
        perplexity(tiny_model(), tokens, **options)


def test_another_model_s_tokens() -> None:
    tokens = some_tokens(40)
    tokens[20] = 5000
    with pytest.raises(ValueError, match="to 5000, the model's vocabulary has 101: the tokenizer belongs to another"):
        perplexity(tiny_model(), tokens, window=16)
    tokens[20], tokens[39] = 0, 5000  # in what is left over, it does no harm
    assert perplexity(tiny_model(), tokens, window=16).windows == 2


def test_a_model_in_training_mode() -> None:
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        perplexity(tiny_model().train(), some_tokens(32), window=16)


def test_what_is_not_token_ids() -> None:
    with pytest.raises(TypeError, match="needs its tokenizer"):
        perplexity(tiny_model(), "a text")
    for tokens in (torch.rand(32), torch.zeros(1, 32, dtype=torch.long), torch.zeros(32, dtype=torch.bool)):
        with pytest.raises(TypeError, match=r"integers of shape \[T\]"):
            perplexity(tiny_model(), tokens)


def test_the_result_is_a_plain_value() -> None:
    result = perplexity(tiny_model(), some_tokens(32), window=16)
    assert isinstance(result, Perplexity) and all(isinstance(x, int | float) for x in vars(result).values())
    with pytest.raises(AttributeError):
        result.value = 1.0  # type: ignore[misc]


def test_the_sample_text() -> None:
    text = sample_text()
    assert text.startswith(" \n = Homarus gammarus = \n \n") and text.endswith(" \n")
    assert 29_000 < len(text.encode()) < 32_000 and "\r" not in text
