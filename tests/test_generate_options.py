"""Whatever `generate` can be asked for: the answer is transformers', and the report says which loop gave it."""

import pytest
import torch
from close import assert_equal
from generating import Pair, Shift, Stop, greedy, pair, process, prompt, stop, tokenizer
from transformers import GenerationConfig
from transformers.generation import EosTokenCriteria, MaxLengthCriteria


@pytest.fixture(scope="module")
def both() -> Pair:
    return pair("llama")


@pytest.fixture(autouse=True)
def fresh(both) -> None:
    both.reasons.clear()


@pytest.fixture(scope="module")
def said(both) -> torch.Tensor:
    """What the ragged batch and the single prompt are answered: [4, 12]."""
    return greedy(both.plain, **prompt(4))[:, 13:]


class Eos(EosTokenCriteria):
    """A user's own kind."""


def words(tokens, *columns: int) -> list[str]:
    """What the first rows say there."""
    return [TOKENIZER.decode(row[c]) for row, c in zip(tokens, columns, strict=False)]


# name -> arguments, made anew for each call, of the tokens [4, 12] that come without them
RUNS = {
    "one eos": lambda t: {"eos_token_id": int(t[0, 4])},
    "an eos for each row": lambda t: {"eos_token_id": [int(t[r, c]) for r, c in enumerate((2, 7, 0, 5))]},
    "an eos of some rows": lambda t: {"eos_token_id": [int(t[1, 3]), int(t[2, 6])], "pad_token_id": 9},
    "no padding token": lambda t: {"eos_token_id": [int(t[1, 3]), int(t[2, 6])], "pad_token_id": None},
    "eos at once": lambda t: {"eos_token_id": t[:, 0].tolist()},
    "max_length": lambda t: {"max_new_tokens": None, "max_length": 18},
    "one token": lambda t: {"max_new_tokens": 1},
    "min_new_tokens": lambda t: {"eos_token_id": t[:, 1].tolist(), "min_new_tokens": 5},
    "min_length": lambda t: {"eos_token_id": t[:, 1].tolist(), "min_length": 17},
    "repetition_penalty": lambda t: {"repetition_penalty": 1.8},
    "no_repeat_ngram_size": lambda t: {"no_repeat_ngram_size": 1},
    "bad_words": lambda t: {"bad_words_ids": [[int(t[0, 0])], [int(t[1, 2]), int(t[1, 3])]]},
    "suppress_tokens": lambda t: {"suppress_tokens": t[0, :4].tolist()},
    "begin_suppress_tokens": lambda t: {"begin_suppress_tokens": t[:, 0].tolist()},
    "forced_eos": lambda t: {"forced_eos_token_id": 7},
    "sequence_bias": lambda t: {"sequence_bias": [[[int(t[0, 0])], -9.0], [[30, 31], 9.0], [[30], 8.0]]},
    "guidance": lambda t: {"guidance_scale": 2.5},
    "prefix_allowed_tokens_fn": lambda t: {"prefix_allowed_tokens_fn": lambda row, ids: [row, int(ids[-1]) // 2 + 5]},
    "a processor": lambda t: process(Shift()),
    "a criterion": lambda t: stop(Stop(15, 20, 18, 16)),
    "a criterion and eos": lambda t: {**stop(Stop(15, 20, 18, 99)), "eos_token_id": int(t[3, 1])},
    "a criterion for all": lambda t: stop(Stop(17, plain=True)),
    "an eos criterion": lambda t: stop(EosTokenCriteria([int(t[1, 3])])),
    "an eos criterion of the user's kind": lambda t: stop(Eos([int(t[1, 3]), int(t[0, 1])])),
    "two eos criteria": lambda t: {**stop(Eos([int(t[1, 3])])), "eos_token_id": int(t[0, 1])},
    "fewer columns than the prompt": lambda t: stop(MaxLengthCriteria(5)),
    "no time": lambda t: {"max_time": 0.0},
    "much time": lambda t: {"max_time": 1e6},
    "stop_strings": lambda t: {"stop_strings": words(t, 3, 4, 5, 3), "tokenizer": TOKENIZER},
    "stop_strings and eos": lambda t: {
        "stop_strings": words(t, 3, 9), "tokenizer": TOKENIZER, "eos_token_id": int(t[1, 1])
    },
    "settings": lambda t: {
        "generation_config": GenerationConfig(max_new_tokens=6, eos_token_id=int(t[1, 3]), pad_token_id=3),
        "max_new_tokens": None, "do_sample": None,
    },
    "things that change nothing": lambda t: {"use_cache": True, "output_scores": True, "logits_to_keep": 2},
    "a dynamic cache by name": lambda t: {"cache_implementation": "dynamic"},
    "no mask": lambda t: {"attention_mask": None},
    "a mask of bools": lambda t: {"attention_mask": prompt(4)["attention_mask"].bool()},
    "a row of padding": lambda t: {"attention_mask": prompt(4)["attention_mask"] * torch.tensor([[1], [1], [0], [1]])},
}  # fmt: skip
TOKENIZER = tokenizer()


@pytest.mark.parametrize("make", RUNS.values(), ids=RUNS)
def test_what_the_loop_does(make, both, said):
    want = greedy(both.plain, **(prompt(4) | make(said)))
    got = greedy(both.fast, **(prompt(4) | make(said)))
    assert_equal(got, want)
    assert not both.reasons and not got.is_inference()


SAME = {
    "much time",
    "things that change nothing",
    "a dynamic cache by name",
    "a mask of bools",
    "no mask",
}


@pytest.mark.parametrize("name", sorted(set(RUNS) - SAME))
def test_what_is_asked_for_shows(name, both, said):
    """The cases above can fail: each changes the answer."""
    want = torch.cat((prompt(4)["input_ids"], said), 1)
    assert not torch.equal(greedy(both.plain, **(prompt(4) | RUNS[name](said))), want)


def positions(t):
    return {"position_ids": torch.arange(13).expand(4, -1) * 3}


def right(t):
    ids = prompt(4)["input_ids"]
    return {"input_ids": ids.flip(1), "attention_mask": (ids.flip(1) != 0).long()}


def hole(t):
    mask = prompt(4)["attention_mask"]
    mask[0, 3:6] = 0
    return {"attention_mask": mask}


def embedded(t):
    embeds = torch.randn(4, 13, 128, generator=torch.Generator().manual_seed(0))
    return {"input_ids": None, "inputs_embeds": embeds}


HANDED_ON = {
    "beam search": lambda t: {"num_beams": 3},
    "beam search ": lambda t: {"num_beams": 3, "num_return_sequences": 2, "eos_token_id": int(t[0, 1])},
    "use_cache=False": lambda t: {"use_cache": False},
    "cache_implementation='static'": lambda t: {"cache_implementation": "static"},
    "prefill_chunk_size": lambda t: {"prefill_chunk_size": 5},
    "a mask of something else than padding on the left": right,
    "a mask of something else than padding on the left ": hole,
    "position_ids": positions,
    "inputs_embeds": embedded,
    "prompt_lookup_num_tokens": lambda t: {**prompt(), "prompt_lookup_num_tokens": 2},
}  # fmt: skip


@pytest.mark.parametrize("name", HANDED_ON)
def test_what_transformers_loop_does(name, both, said):
    want = greedy(both.plain, **(prompt(4) | HANDED_ON[name](said)))
    for _ in range(2):
        assert_equal(greedy(both.fast, **(prompt(4) | HANDED_ON[name](said))), want)
    assert len(both.reasons) == 1 and name.strip() in both.reasons[0]
    assert both.reasons[0] in str(both.report)
