"""Calls of `generate` that need more than arguments: details, streamers, sampling, pipelines, what calls what."""

import time

import pytest
import torch
from close import assert_equal
from generating import Pair, Shift, Stop, Streamer, build, greedy, pair, process, prompt, stop, tokenizer
from transformers import GenerationConfig, TextIteratorStreamer, TextStreamer, pipeline
from transformers.generation import MaxTimeCriteria

from fastllm import KVCache

TOKENIZER = tokenizer()


@pytest.fixture(scope="module")
def both() -> Pair:
    return pair("llama")


@pytest.fixture(autouse=True)
def fresh(both) -> None:
    both.reasons.clear()


@pytest.fixture(scope="module")
def said(both) -> torch.Tensor:
    """What the ragged batch is answered: [4, 12]."""
    return greedy(both.plain, **prompt(4))[:, 13:]


def test_details_of_what_was_done(both):
    kwargs = {
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "output_hidden_states": True,
    }
    got, want = (greedy(model, **prompt(4), **kwargs, repetition_penalty=1.5) for model in both[:2])
    assert_equal(got.sequences, want.sequences)
    assert type(got) is type(want) and len(got.hidden_states) == len(want.hidden_states) == 12
    for mine, theirs in zip(got.scores + got.logits, want.scores + want.logits, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert both.reasons == ["return_dict_in_generate"]


def test_attention_weights(both):
    got, want = (
        greedy(model, **prompt(2), return_dict_in_generate=True, output_attentions=True, new=3)
        for model in (both.fast, build("llama", attn_implementation="eager"))
    )
    assert_equal(got.sequences, want.sequences)


def test_no_prompt_and_other_ways_to_give_one(both):
    ids = prompt()["input_ids"]
    settings = {"max_new_tokens": 8, "do_sample": False}
    plain, fast = both[:2]
    assert_equal(fast.generate(**settings, bos_token_id=5), plain.generate(**settings, bos_token_id=5))
    want = plain.generate(ids, **settings)
    assert_equal(fast.generate(ids, **settings), want)
    assert_equal(fast.generate(inputs=ids, **settings), want)
    assert_equal(fast.generate(ids, GenerationConfig(**settings)), want)
    fast.generation_config.max_new_tokens, fast.generation_config.do_sample = 8, False
    try:
        assert_equal(fast.generate(ids), want)
    finally:
        fast.generation_config.max_new_tokens = None
    assert not both.reasons
    embeds = plain.get_input_embeddings()(ids).detach()
    assert_equal(
        fast.generate(ids, inputs_embeds=embeds, **settings), plain.generate(ids, inputs_embeds=embeds, **settings)
    )
    assert both.reasons == ["the inputs inputs_embeds"]


def test_errors_are_those_of_transformers(both):
    for wrong in (
        {"no_such_thing": 1},
        {"max_new_tokens": -1},
        {"num_beams": 2, "streamer": Streamer()},
        {"stop_strings": "a"},
    ):
        complaints = []
        for model in both[:2]:
            with pytest.raises(ValueError) as caught:
                greedy(model, **(prompt() | wrong))
            complaints.append(str(caught.value))
        assert complaints[0] == complaints[1]


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("settings", [{}, {"assistant_early_exit": 1}, {"return_dict_in_generate": True}], ids=str)
def test_streamers_are_given_the_same(both, said, settings, batch):
    """The prompt, each token once and in order, the end; what they keep stays as it was."""
    if "assistant_early_exit" in settings and batch > 1:
        pytest.skip("transformers speculates for one row only")
    got, want = Streamer(), Streamer()
    for model, streamer in zip(both[:2], (want, got), strict=True):
        greedy(model, **prompt(batch), eos_token_id=int(said[0, 6]), streamer=streamer, **settings)
    assert got.lists() == want.lists() and len(set(map(str, want.lists()))) > 4 and got.got[-1] is None


def test_text_streamers(both, capsys):
    said = []
    for model in both[:2]:
        greedy(model, **prompt(), streamer=TextStreamer(TOKENIZER, skip_prompt=True))
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and len(said[0]) > 12
    streamer = TextIteratorStreamer(TOKENIZER, skip_prompt=True, timeout=10)
    greedy(both.fast, **prompt(), streamer=streamer)
    assert "".join(streamer) == said[0].rstrip("\n") and not both.reasons


def test_processors_and_criteria_are_called_as_ever(both):
    seen = []
    for model in both[:2]:
        processor, criterion = Shift(), Stop(18, 18, 18, 18)
        greedy(model, **prompt(4), **process(processor), **stop(criterion))
        assert not any(t.is_inference() for t in processor.scores), "what they keep cannot be changed any more"
        seen.append((processor.calls, criterion.seen, [tuple(t.shape) for t in processor.scores]))
    assert seen[0] == seen[1] and seen[0][0] == 5


def test_time_is_kept(both):
    class Slow(Shift):
        def __call__(self, input_ids, scores):
            time.sleep(0.05)
            return super().__call__(input_ids, scores)

    for limit in ({"max_time": 0.15}, stop(MaxTimeCriteria(0.15))):
        said = greedy(both.fast, 200, **prompt(), **process(Slow()), **limit)
        assert 13 < said.shape[1] <= 13 + 4


@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_k": 0, "temperature": 0.7, "top_p": 0.9}], ids=str)
def test_sampling(both, settings):
    """Seeds reproduce, rows differ; and each word is one that transformers could have drawn."""

    def run(seed: int, **more):
        torch.manual_seed(seed)
        return both.fast.generate(
            **prompt(), max_new_tokens=10, do_sample=True, num_return_sequences=3, **settings, **more
        )

    said = run(0)
    assert said.shape == (3, 23) and len(set(map(tuple, said.tolist()))) == 3
    assert_equal(run(0), said)
    assert not torch.equal(run(1), said) and not both.reasons
    if settings.get("top_k"):
        logits = both.plain(said).logits[:, 12:-1]
        rank = (logits > logits.gather(2, said[:, 13:, None])).sum(-1)
        assert rank.max() == 2, "not all of the top are drawn from, or others are"


def test_beams_of_samples(both):
    runs = []
    for model in both[:2]:
        torch.manual_seed(0)
        runs.append(greedy(model, **prompt(2), do_sample=True, num_beams=3, top_k=20))
    assert_equal(runs[0], runs[1])
    assert both.reasons == ["beam search"]


def test_a_pipeline(both):
    texts = ["ab cd", "Hello there"]
    said = []
    for model in both[:2]:
        generate = pipeline("text-generation", model=model, tokenizer=TOKENIZER)
        said.append(generate(texts, max_new_tokens=9, do_sample=False, batch_size=2))
    assert said[0] == said[1] and len({row[0]["generated_text"] for row in said[0]}) == 2
    assert said[0][0][0]["generated_text"].startswith(texts[0])


def test_training_mode_is_transformers_own(both):
    both.fast.train()
    try:
        assert_equal(greedy(both.fast, **prompt()), greedy(both.plain, **prompt()))
    finally:
        both.fast.eval()
    assert both.reasons == ["training mode"]


def test_transformers_loop_is_not_used_in_secret(both, monkeypatch):
    """Where no reason is noted, neither its loop nor its caches run."""
    monkeypatch.setattr(type(both.fast), "_sample", None)
    monkeypatch.setattr("transformers.cache_utils.DynamicLayer.update", None)
    cache = KVCache(both.fast.config)
    assert greedy(both.fast, **prompt(4), past_key_values=cache).shape == (4, 25)
    assert greedy(both.fast, **prompt(4), do_sample=True).shape == (4, 25)
    with pytest.raises(TypeError):
        greedy(both.fast, **prompt(4), return_dict_in_generate=True)
