"""`fastllm.prune` on a trained model: what is removed is what can be spared, and what is left makes up for it."""

import json
import statistics
import time

import pytest
import torch
from pruning_cases import cached_and_not
from trained import WINDOW, calibration, quality, text, trained
from transformers import AutoModelForCausalLM

import fastllm
from fastllm.compress import prune_repair
from fastllm.compress.prune_layers import Judge
from fastllm.compress.samples import batches

SAMPLES = 10
FLOPS = {"linears": 4 * (4 * 192 * 192 + 3 * 192 * 512), "head": 192 * 256}


def pruned(**asked):
    model = trained()
    return model, fastllm.prune(model, calib=calibration(SAMPLES), quiet=True, **asked)


def perplexity(model) -> float:
    return quality(model, 10)


@pytest.fixture(scope="module")
def dense() -> float:
    return perplexity(trained())


@pytest.fixture(scope="module")
def repaired():
    return pruned(ffn=0.25)


def test_neurons_go_where_they_are_missed_least(dense, repaired, monkeypatch) -> None:
    """A quarter of them: repair beats the score, which beats the norms of the weights, which beat a draw."""
    scores = prune_repair.scores
    found = [perplexity(repaired[0]), perplexity(pruned(ffn=0.25, repair=False)[0])]
    for other in (
        lambda w, H, units: scores(w, torch.eye(len(H)), units),
        lambda w, H, units: torch.rand(units, generator=torch.Generator().manual_seed(0)),
    ):
        monkeypatch.setattr(prune_repair, "scores", other)
        found.append(perplexity(pruned(ffn=0.25, repair=False)[0]))
    assert found[0] <= 1.06 * dense, found
    assert dense < found[0] < found[1] < found[2] < found[3], found
    assert found[0] - dense < 0.9 * (found[1] - dense), found


def test_the_report_has_the_figures(repaired) -> None:
    model, report = repaired
    before, after = report.before, report.after
    assert before.parameters == sum(p.numel() for p in trained().parameters())
    assert after.parameters == sum(p.numel() for p in model.parameters()) == before.parameters - 4 * 3 * 128 * 192
    assert before.bytes == 4 * before.parameters and after.bytes == 4 * after.parameters
    assert before.flops_per_token == 2 * sum(FLOPS.values())
    assert before.flops_per_token - after.flops_per_token == 2 * 4 * 3 * 128 * 192
    assert report.settings == {"intermediate_size": (512, 384)} and report.tokens == report.scored == SAMPLES * WINDOW
    assert [n.layer for n in report.ffn] == [0, 1, 2, 3] and not report.layers and not report.heads
    for narrowed in report.ffn:
        gone = [narrowed.scores[i] for i in narrowed.removed]
        assert len(gone) == 128 and len(narrowed.scores) == 512
        assert max(gone) <= min(s for i, s in enumerate(narrowed.scores) if i not in narrowed.removed)
        assert 0 < narrowed.error < 0.7 * narrowed.without_repair < 0.1
    assert report.predicts and before.loss < after.loss < 1.1 * before.loss
    shown = str(report)
    for word in ("512 -> 384", "removed 128 of 512 neurons in each of 4 layers", "perplexity", "save:", "parameters"):
        assert word in shown, shown
    assert len(shown.splitlines()) < 25 and max(map(len, shown.splitlines())) < 160
    assert json.loads(json.dumps(report.to_dict()))["after"]["loss"] == after.loss


def test_the_loss_is_that_of_the_next_token(repaired) -> None:
    data = calibration(SAMPLES).view(SAMPLES, WINDOW)
    for model, loss in ((trained(), repaired[1].before.loss), (repaired[0], repaired[1].after.loss)):
        with torch.no_grad():
            logits = model(data).logits.double().log_softmax(-1)
        want = -logits[:, :-1].gather(2, data[:, 1:, None]).mean()
        assert loss == pytest.approx(float(want), rel=1e-5)


def test_stock_transformers_loads_it(repaired, tmp_path) -> None:
    model = repaired[0]
    model.save_pretrained(tmp_path)
    loaded, ids = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval(), text("validation", 64)[None]
    assert loaded.config.intermediate_size == 384 and type(loaded) is type(model)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-5)


def test_the_layer_that_is_missed_least_goes() -> None:
    """Of the two inner layers the one with the lower loss, which is also what the perplexity of other text says."""
    model, report = pruned(layers=1)
    (removed,) = report.layers
    losses = {}
    for index in (1, 2):
        other, told = pruned(layers=[index])
        losses[index] = told.layers[0].loss
        assert told.after.loss == pytest.approx(told.layers[0].loss, rel=1e-4)
        if index == removed.layer:
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
        else:
            assert perplexity(model) < perplexity(other)
            assert removed.others == {index: pytest.approx((told.layers[0].influence, losses[index]))}
    assert removed.layer == min(losses, key=losses.__getitem__) and removed.loss == pytest.approx(
        losses[removed.layer]
    )
    assert f"removed layer {removed.layer}" in str(report) and "num_hidden_layers        4 -> 3" in str(report)


def test_influence_is_the_angle_that_a_layer_turns_by() -> None:
    model, ids = trained(), calibration(2)
    judge = Judge(model, list(model.model.layers), batches(ids, None, 256, 2, WINDOW))
    with torch.no_grad():
        states = model(ids.view(2, WINDOW), output_hidden_states=True).hidden_states
    found = judge.influences()
    for index in range(3):  # of the last layer, the state is told behind the norm
        cos = torch.nn.functional.cosine_similarity(states[index].double(), states[index + 1].double(), dim=-1)
        assert found[index] == pytest.approx(float(1 - cos.mean()), abs=1e-5)
    assert set(judge.influences([1])) == {0, 2, 3} and "forward" not in vars(model.model.layers[1])


@pytest.mark.parametrize(
    "asked", [{"layers": 0.25}, {"heads": 0.34}, {"layers": 1, "heads": 0.34, "ffn": 0.5}], ids=str
)
def test_a_cache_changes_nothing(asked, tmp_path) -> None:
    model, report = pruned(**asked)
    cached, whole = cached_and_not(model, text("validation", 32)[None])
    torch.testing.assert_close(cached, whole, rtol=0, atol=1e-4)
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == list(range(len(model.model.layers)))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    torch.testing.assert_close(cached_and_not(loaded, text("validation", 32)[None])[0], cached, rtol=0, atol=1e-5)
    if "heads" in asked:
        assert (
            model.config.num_attention_heads == model.config.num_key_value_heads == 2 and model.config.head_dim == 64
        )
        assert all(n.error < 0.8 * n.without_repair for n in report.heads)


def test_heads_go_where_they_are_missed_least(monkeypatch) -> None:
    found = [perplexity(pruned(heads=0.34, repair=repair)[0]) for repair in (True, False)]
    scores = prune_repair.scores
    monkeypatch.setattr(prune_repair, "scores", lambda w, H, units: -scores(w, H, units))
    found.append(perplexity(pruned(heads=0.34, repair=False)[0]))
    assert found[0] < found[1] < found[2], found


def test_few_tokens_are_told_of_and_do_no_harm(dense, caplog) -> None:
    def few(repair: bool):
        model = trained()
        return model, fastllm.prune(model, ffn=0.25, calib=calibration(1)[:200], repair=repair, quiet=True)

    model, report = few(True)
    (warning,) = report.warnings
    assert (
        "200 tokens of calibration data for 384 channels" in warning
        and warning in caplog.text
        and warning in str(report)
    )
    plain, quiet = few(False)
    assert perplexity(model) < perplexity(plain) and not quiet.warnings


def test_it_composes_with_the_rest(repaired, tmp_path) -> None:
    model, _ = pruned(ffn=0.25, layers=1, heads=0.34)
    before = perplexity(model)
    report = fastllm.quantize(model, "int8", calib=calibration(4), length=WINDOW, quiet=True, min_coverage=0)
    assert report.coverage > 0.5 and perplexity(model) == pytest.approx(before, rel=0.02)
    model.save_pretrained(tmp_path)
    assert perplexity(fastllm.load(tmp_path, attention=False, fuse=False, decode=False)) == pytest.approx(
        before, rel=0.02
    )


@pytest.mark.slow
@pytest.mark.parametrize("asked", [{"layers": 0.5}, {"ffn": 0.5}], ids=str)
def test_time_falls_with_the_arithmetic(asked) -> None:
    """Calls in turns, with enough tokens that arithmetic takes the time; attention over the context is counted."""
    models = [trained(), trained()]
    report = fastllm.prune(models[1], calib=calibration(4), quiet=True, **asked)
    ids = text("validation", 8 * WINDOW).view(8, WINDOW)
    context = 2 * 192 * WINDOW * 2  # of attention, for a token and layer
    told = [report.before.flops_per_token, report.after.flops_per_token]
    counts = [flops + context * len(m.model.layers) for flops, m in zip(told, models, strict=True)]
    times: list[list[float]] = [[], []]
    with torch.no_grad():
        for _ in range(12):
            for model, own in zip(models, times, strict=True):
                start = time.perf_counter()
                model(ids)
                own.append(time.perf_counter() - start)
    before, after = (statistics.median(own[2:]) for own in times)
    assert 1 - after / before >= 0.8 * (1 - counts[1] / counts[0]), (before, after, counts)
