"""Speculative decoding: drafts of another model, or of the prompt itself, change the speed and never the answer."""

import pytest
import tiny
import torch
from close import assert_equal
from generating import COMMON, Pair, Streamer, greedy, pair, prompt
from transformers import DynamicCache, PreTrainedModel

import fastllm
from fastllm import KVCache
from fastllm.decode.cache import SLACK

NEW = 14


@pytest.fixture(scope="module", params=[None, "int8"], ids=["dense", "int8"])
def llama(request) -> Pair:
    return pair("llama", kv_cache=request.param)


def small() -> PreTrainedModel:
    """A draft that is wrong most of the time."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 64, "head_dim": 16}
    return drafts(tiny.build("llama", seed=3, dtype=torch.float32, **(COMMON | sizes)))


def drafts(model: PreTrainedModel, tokens: int = 5) -> PreTrainedModel:
    """The model, set to draft so many tokens each time, however sure it is."""
    model.generation_config.num_assistant_tokens = tokens
    model.generation_config.num_assistant_tokens_schedule = "constant"
    model.generation_config.assistant_confidence_threshold = 0.0
    return model


def repeating(length: int = 12) -> dict:
    """A prompt that says everything twice, so that its own words are a draft."""
    ids = prompt(1, length)["input_ids"].repeat(1, 2)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Counted:
    """Forward passes of a model, and how many tokens each had."""

    def __init__(self, model: PreTrainedModel):
        self.tokens: list[int] = []
        self.hook = model.model.embed_tokens.register_forward_hook(
            lambda m, args, out: self.tokens.append(out.shape[1])
        )

    def __enter__(self) -> list[int]:
        return self.tokens

    def __exit__(self, *_) -> None:
        self.hook.remove()


def test_the_cache_matters(llama):
    """The premise: int8 answers differ from dense ones somewhere, or comparing with them would prove nothing new."""
    if llama.fast._fastllm.speedups.kv_cache is None:
        pytest.skip("dense")
    dense = [greedy(llama.plain, 30, **prompt(1, 13, seed)) for seed in range(4)]
    int8 = [greedy(llama.fast, 30, **prompt(1, 13, seed)) for seed in range(4)]
    assert not all(map(torch.equal, dense, int8))
    assert all(torch.equal(a[:, :15], b[:, :15]) for a, b in zip(dense, int8, strict=True)), (
        "and much more than they may"
    )


@pytest.mark.parametrize("patched", [False, True], ids=["stock draft", "optimized draft"])
@pytest.mark.parametrize("kind", ["small", "itself"])
def test_a_draft_model(llama, kind, patched):
    want = greedy(llama.fast, NEW, **prompt())
    llama.reasons.clear()
    draft = small() if kind == "small" else drafts(pair("llama").plain)
    if patched:
        fastllm.optimize(draft, None, quiet=True)
    with Counted(llama.fast) as tokens:
        assert_equal(greedy(llama.fast, NEW, **prompt(), assistant_model=draft), want)
    assert llama.reasons == ["assistant_model"]
    assert max(tokens[1:]) == 6, "nothing was drafted"
    if kind == "itself":
        assert len(tokens) < NEW / 2, "good drafts were refused"


def test_a_prompt_that_is_its_own_draft(llama):
    want = greedy(llama.fast, NEW, **repeating())
    llama.reasons.clear()
    with Counted(llama.fast) as tokens:
        said = greedy(llama.fast, NEW, **repeating(), prompt_lookup_num_tokens=4)
    assert_equal(said, want)
    assert tokens[0] > repeating()["input_ids"].shape[1], "nothing was drafted"
    assert llama.reasons == ["prompt_lookup_num_tokens"]
    llama.fast.generation_config.prompt_lookup_num_tokens = 4
    try:
        assert_equal(greedy(llama.fast, NEW, **repeating()), want)
    finally:
        llama.fast.generation_config.prompt_lookup_num_tokens = None
    assert llama.reasons == ["prompt_lookup_num_tokens"]
    assert_equal(greedy(llama.fast, NEW, **repeating()), want)


@pytest.mark.parametrize("way", ["assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit"])
def test_the_cache_is_the_one_asked_for(llama, way):
    """Answers alone would not tell: 14 tokens are the same with either."""
    setting = {way: small() if way == "assistant_model" else 1}
    cache = greedy(llama.fast, 4, **prompt(), **setting, return_dict_in_generate=True).past_key_values
    kind = llama.fast._fastllm.speedups.kv_cache
    assert getattr(getattr(cache, "format", None), "name", None) == kind


def test_an_early_exit_is_a_draft(llama):
    want = greedy(llama.fast, NEW, **prompt())
    assert_equal(greedy(llama.fast, NEW, **prompt(), assistant_early_exit=1), want)


def test_the_end_is_found_inside_a_draft(llama):
    """End tokens, streamers and lengths, in the middle of accepted drafts."""
    plain = greedy(llama.fast, NEW, **prompt())
    draft = drafts(pair("llama").plain)
    for stop in (int(plain[0, 15]), int(plain[0, 20])):
        got, want = Streamer(), Streamer()
        settings = {**prompt(), "eos_token_id": stop}
        expected = greedy(llama.fast, NEW, **settings, streamer=want)
        assert_equal(greedy(llama.fast, NEW, **settings, assistant_model=draft, streamer=got), expected)
        flat = [[t for value in s.got if value is not None for t in value.flatten().tolist()] for s in (got, want)]
        assert flat[0] == flat[1]
    for new in (1, 2, 7):
        assert_equal(greedy(llama.fast, new, **prompt(), assistant_model=draft), plain[:, : 13 + new])


@pytest.mark.parametrize("format", [None, "int8"])
@pytest.mark.parametrize("length", [5, 13, 2 * SLACK + 12])
@pytest.mark.parametrize("family", ["gemma3", pytest.param("gpt-oss", marks=pytest.mark.slow)])
def test_drafts_are_taken_back_from_windows(family, length, format):
    """A user's own cache, over turns, with tokens taken back before and after a window has moved."""
    models, given = pair(family, kv_cache=format), prompt(1, length)
    draft = small()
    want = greedy(models.fast, NEW, **given)
    for model in models[:2] if format is None else models[1:2]:
        cache, own = KVCache(model.config, format), DynamicCache(config=model.config)
        assert_equal(greedy(model, NEW, **given, assistant_model=draft, past_key_values=cache), want)
        greedy(models.plain, NEW, **given, assistant_model=draft, past_key_values=own)
        assert cache.get_seq_length() == own.get_seq_length() == length + NEW - 1
        more = {"input_ids": want, "attention_mask": torch.ones_like(want)}
        assert_equal(greedy(model, 5, **more, past_key_values=cache), greedy(models.fast, NEW + 5, **given))


@pytest.mark.parametrize("tokens", [17, pytest.param(SLACK - 1, marks=pytest.mark.slow), SLACK + 40])
def test_long_drafts(tokens):
    """More than the decoding kernel takes at once, and more than a window's memory has to spare."""
    models = pair("gemma3")
    draft, given = drafts(small(), tokens), prompt(1, 2 * SLACK)
    given["eos_token_id"] = int(greedy(models.plain, 4, **given)[0, -1])  # drafts are long and wrong
    want = greedy(models.plain, 2 * tokens, **given)
    with Counted(models.fast) as counts:
        cache = KVCache(models.fast.config)
        assert_equal(greedy(models.fast, 2 * tokens, **given, assistant_model=draft, past_key_values=cache), want)
    assert tokens + 1 in counts[1:]


def test_memory_after_drafts():
    """What is kept so that drafts can be taken back goes when no more are made."""
    models, given = pair("gemma3"), prompt()
    cache = KVCache(models.fast.config)
    said = greedy(models.fast, 6, **given, assistant_model=small(), past_key_values=cache)
    longer = torch.cat((said, prompt(1, 400)["input_ids"]), 1)
    want = greedy(models.plain, 5, input_ids=longer)
    assert_equal(greedy(models.fast, 5, input_ids=longer, past_key_values=cache), want)
    assert cache.layers[0].keys.shape[2] <= 4 * SLACK


def test_sampling_with_drafts(llama):
    """Runs, reproduces, and takes likely words only."""

    def run() -> torch.Tensor:
        torch.manual_seed(0)
        return greedy(
            llama.fast, NEW, **prompt(), do_sample=True, top_k=3, assistant_model=drafts(pair("llama").plain)
        )

    said = run()
    assert_equal(run(), said)
    logits = llama.plain(said).logits[:, 12:-1]
    rank = (logits > logits.gather(2, said[:, 13:, None])).sum(-1)
    assert rank.max() <= (2 if llama.fast._fastllm.speedups.kv_cache is None else 3) and rank.max() > 0
