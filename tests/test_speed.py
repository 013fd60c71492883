"""The figures that `diagnose.speed` reports: that they count what they say."""

import copy
import statistics
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, LlamaConfig, PreTrainedModel

from fastllm import optimize
from fastllm.diagnose import anonymous_rss, bytes_per_token, measure, measure_alternating, peak_rss
from fastllm.diagnose import speed as speed_module

PROMPT = torch.arange(1, 21)[None]


@pytest.fixture
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def test_a_measurement_counts_what_it_says(model: PreTrainedModel) -> None:
    seen: list[int] = []
    forward = model.forward
    model.forward = lambda **kwargs: seen.append(kwargs["input_ids"].shape[1]) or forward(**kwargs)  # type: ignore
    found = measure(model, PROMPT, new_tokens=5, repeats=3)
    warm_up = 1 + speed_module.WARM_UP
    assert seen[warm_up:] == [20, 1, 1, 1, 1, 1] * 3
    assert (found.prefill_tokens, found.new_tokens, found.repeats, len(found.tokens)) == (20, 5, 3, 6)
    assert found.prefill_s > 0 and 0 < found.step_s[0] <= found.step_s[1] <= found.step_s[2]
    assert found.decode_tok_s == pytest.approx(1 / found.step_s[1])
    assert found.fastest_quarter_tok_s >= found.decode_tok_s


def test_the_tokens_are_those_of_greedy_generation(model: PreTrainedModel) -> None:
    mask = torch.ones_like(PROMPT)
    want = model.generate(PROMPT, attention_mask=mask, min_new_tokens=9, max_new_tokens=9, do_sample=False)
    assert list(measure(model, PROMPT, new_tokens=8, repeats=1).tokens) == want[0, PROMPT.shape[1] :].tolist()


def test_times_are_those_that_pass(model: PreTrainedModel) -> None:
    forward = model.forward

    def slow(**kwargs: Any) -> Any:
        time.sleep(0.02 if kwargs["input_ids"].shape[1] == 1 else 0.06)
        return forward(**kwargs)

    model.forward = slow  # type: ignore
    found = measure(model, PROMPT, new_tokens=4, repeats=1)
    assert found.prefill_s >= 0.06 and found.step_s[0] >= 0.02
    assert found.decode_tok_s <= 50


def test_models_take_turns(model: PreTrainedModel) -> None:
    order: list[str] = []
    second = copy.deepcopy(model)

    def named(name: str, model: PreTrainedModel) -> PreTrainedModel:
        forward = model.forward

        def noted(**kwargs: Any) -> Any:
            if kwargs["input_ids"].shape == PROMPT.shape:
                order.append(name)
            return forward(**kwargs)

        model.forward = noted  # type: ignore
        return model

    found = measure_alternating({"a": named("a", model), "b": named("b", second)}, PROMPT, new_tokens=2, repeats=3)
    assert order == ["a", "b"] * 3
    assert found["a"].tokens == found["b"].tokens


def test_rows_count(model: PreTrainedModel) -> None:
    found = measure(model, PROMPT.expand(3, -1), new_tokens=3, repeats=1)
    assert found.rows == 3 and found.decode_tok_s == pytest.approx(3 / found.step_s[1])
    assert found.fastest_quarter_tok_s == pytest.approx(3 / found.step_s[0])


def test_an_end_token_does_not_end_it(model: PreTrainedModel) -> None:
    tokens = measure(model, PROMPT, new_tokens=6, repeats=1).tokens
    model.generation_config.eos_token_id = tokens[2]
    assert measure(model, PROMPT, new_tokens=6, repeats=1).tokens == tokens
    optimize(model, None, quiet=True)
    assert len(measure(model, PROMPT, new_tokens=6, repeats=1).tokens) == 7


def test_medians_and_quartiles() -> None:
    turns = [speed_module.Turn(prefill, [1.0, 2.0, 3.0, 10.0], (1,)) for prefill in (5.0, 4.0, 9.0)]
    ids = torch.ones(1, 7, dtype=torch.long)
    found = speed_module._summary(turns, ids)
    assert found.prefill_s == 5.0 and found.decode_tok_s == 1 / 2.5 and found.prefill_tokens == 7
    assert list(found.step_s) == statistics.quantiles([1.0, 2.0, 3.0, 10.0] * 3, n=4, method="inclusive")
    assert speed_module._summary([replace(turns[0], steps_s=[4.0])], ids).step_s == (4.0, 4.0, 4.0)


@pytest.mark.parametrize(
    ("prompt", "counts", "message"),
    [
        (torch.ones(4, dtype=torch.long), {}, r"\[B, T\]"),
        (torch.ones(1, 0, dtype=torch.long), {}, r"\[B, T\]"),
        (PROMPT, {"new_tokens": 0}, "new_tokens=0"),
        (PROMPT, {"repeats": 0}, "repeats=0"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    model: PreTrainedModel, prompt: torch.Tensor, counts: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        measure(model, prompt, **counts)


def test_a_model_in_training_or_that_does_not_generate_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="training mode"):
        measure(model.train(), PROMPT)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
    bert = AutoModel.from_config(BertConfig(**sizes, num_attention_heads=2)).eval()
    with pytest.raises(ValueError, match="BertModel does not generate"):
        measure(bert, PROMPT)


def test_bytes_per_token_of_a_dense_and_a_patched_model(model: PreTrainedModel) -> None:
    tables = model.get_input_embeddings().weight
    every = sum(p.numel() * p.element_size() for p in model.parameters())
    assert bytes_per_token(model) == every - tables.numel() * 2 + 64 * 2  # of the embedding, one row
    report = optimize(model, "int8", quiet=True)
    assert bytes_per_token(model) == pytest.approx(report.bytes_per_token, rel=0.02)
    assert bytes_per_token(model) < 0.6 * report.plan.before


def test_memory_grows_with_what_is_held() -> None:
    before, peak = anonymous_rss(), peak_rss()
    if before is None or peak is None:
        pytest.skip("needs /proc/self/status")
    held = torch.ones(64 << 20, dtype=torch.uint8)
    after = anonymous_rss()
    assert after is not None and 60 << 20 < after - before < 80 << 20
    assert (peak_rss() or 0) >= after
    del held
    assert (anonymous_rss() or 0) < after - (60 << 20) <= (peak_rss() or 0)


def test_memory_is_none_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_module.Path, "is_file", lambda self: False)
    assert peak_rss() is None and anonymous_rss() is None
