"""`fastllm.quantize(max_loss=...)`: what is foreseen, what is chosen, and that it is measured."""

import json
import math

import pytest
import tiny
import torch
from torch import nn
from trained import WINDOW, calibration, linears, quality, text, trained

import fastllm
from fastllm.compress.blocks import Blocks
from fastllm.compress.budget import Point, Step, formats_after, formats_of, path, search
from fastllm.compress.samples import batches
from fastllm.compress.sensitivity import foresee, head_loss, texts
from fastllm.compress.solvers import GPTQ
from fastllm.compress.units import Unit, candidates, without_calibration
from fastllm.formats import parse_format

EIGHT, FOUR, WIDE = (parse_format(name) for name in ("int8", "int4-g32", "int4-g128"))
ASK = {"calib": calibration(8), "length": WINDOW, "quiet": True}


def unit(name: str, *options: tuple[object, int, float]) -> Unit:
    found = Unit((name,), [])
    found.bytes = {None: 1000} | {format: size for format, size, _ in options}
    found.loss = {None: 0.0} | {format: loss for format, _, loss in options}
    return found


def test_the_path_takes_what_saves_most_for_its_loss() -> None:
    units = [
        unit("a", (EIGHT, 500, 0.001), (FOUR, 280, 0.02), (WIDE, 260, 0.05)),
        unit("b", (EIGHT, 500, 0.004), (FOUR, 280, 0.0032), (WIDE, 260, 0.0031)),
        unit("c", (EIGHT, 500, -0.001), (FOUR, 280, 9.0), (WIDE, 260, 8.0)),
    ]
    steps = path(units)
    # c's int8 gains, b goes to its smallest at once, and c leaves out a format that costs more and saves less
    assert [("abc"[step.unit], step.format) for step in steps] == [
        ("c", EIGHT), ("a", EIGHT), ("b", WIDE), ("a", FOUR), ("a", WIDE), ("c", WIDE)
    ]  # fmt: skip
    assert formats_after(steps[:4], 3) == [FOUR, WIDE, EIGHT]
    assert [step.saved for step in steps] == [500, 500, 740, 220, 20, 240]
    slopes = [step.lost / step.saved for step in steps]
    assert slopes == sorted(slopes)


@pytest.mark.parametrize("factor", [0.05, 0.5, 1.0, 3.0, 40.0])
@pytest.mark.parametrize("count", [0, 1, 7, 300])
def test_the_search_finds_the_longest_way_that_is_allowed(factor: float, count: int) -> None:
    units = [unit(str(i), (EIGHT, 500, 1e-4 * 1.02**i)) for i in range(count)]
    steps = path(units)
    lost = [0.0]
    for step in steps:
        lost.append(lost[-1] + step.lost)
    asked = []

    def measure(made: list[Step]) -> float:
        asked.append(tuple(step.unit for step in made))
        return factor * sum(step.lost for step in made) ** 1.2

    for allowed in (-1.0, 0.0, 0.004, 0.02, 100.0):
        asked.clear()
        found = search(steps, measure, allowed, 1000 * max(count, 1))
        assert len(asked) <= 10 and len(asked) == len(set(asked))
        best = max([k for k in range(count + 1) if factor * lost[k] ** 1.2 <= allowed], default=0)
        assert not found or measure(found) <= allowed
        assert best - len(found) <= max(min(2, count // 4), 0.02 * count), (allowed, len(found), best, asked)


def test_the_search_goes_on_behind_a_step_that_is_too_much() -> None:
    units = [unit(str(i), (EIGHT, 500, 1e-4 * 1.02**i)) for i in range(100)]
    units.append(unit("head", (EIGHT, 500, 1e-6), (FOUR, -40_000, 0.02)))
    steps = path(units)
    whole = next(i for i, step in enumerate(steps) if step.format == FOUR)
    assert 40 < whole < 60 and sum(step.lost for step in steps[:whole]) < 0.012
    made = search(steps, lambda made: sum(step.lost for step in made), 0.02, 100_000)
    assert all(step.format == EIGHT for step in made) and len(made) > whole + 10
    assert 0.018 < sum(step.lost for step in made) <= 0.02


def test_what_is_foreseen_comes_true(tmp_path) -> None:
    """The loss of single units, and of all together, is that by which the answers then diverge."""
    model = trained()
    data = batches(calibration(16), None, 256, 16, WINDOW)
    layers = {name: layer.module for name, layer in linears(model, "int8").items()}
    share = dict.fromkeys(layers, 1.0)
    units = candidates(Blocks(model, data), layers, share, [WIDE, FOUR], GPTQ(), tmp_path, True)
    assert [len(unit.names) for unit in units] == [3, 1, 2, 1] * 4
    ids = texts(data, 16)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    foresee(model, units, ids, True)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert all(p.grad is None for p in model.parameters())

    def divergence(formats: dict[int, object]) -> float:
        with torch.no_grad():
            want = [model(t).logits[0].log_softmax(-1) for t in ids]
            for u, format in formats.items():
                for name in units[u].names:
                    model.set_submodule(name, units[u].build(name, format))
            got = [model(t).logits[0].log_softmax(-1) for t in ids]
        for name, module in layers.items():
            model.set_submodule(name, module)
        lost = [float((p.exp() * (p - q)).sum(-1).mean()) for p, q in zip(want, got, strict=True)]
        return sum(lost) / len(lost)

    for u in (2, 5, 7, 10, 14):
        assert divergence({u: WIDE}) == pytest.approx(units[u].loss[WIDE], rel=0.6)
    for format in (WIDE, FOUR):
        every = sum(unit.loss[format] for unit in units)
        assert divergence(dict.fromkeys(range(len(units)), format)) == pytest.approx(every, rel=0.4)
    head = without_calibration("lm_head", model.lm_head, [EIGHT, FOUR])
    costs = [head_loss(model, head, format, ids[:4]) for format in (EIGHT, FOUR)]
    assert 0 < 20 * costs[0] < costs[1] < 0.01 and type(model.lm_head) is nn.Linear


def test_it_stays_within_the_budget() -> None:
    tests, found = text("validation", 16 * WINDOW), {}
    dense = quality(trained(torch.bfloat16), 16)
    for max_loss in (0.0005, 0.01):
        model = trained(torch.bfloat16)
        before = {name: t.clone() for name, t in model.state_dict().items()}
        report = fastllm.quantize(model, max_loss=max_loss, test=tests, **ASK)
        budget = report.budget
        assert budget.before.perplexity == pytest.approx(dense, rel=1e-3)
        assert budget.chosen.perplexity == pytest.approx(quality(model, 16), rel=1e-3)
        assert budget.loss <= max_loss and 16 * WINDOW == 4096 and "4096 tokens" in budget.measured_on
        assert any(p.what == "int8 everywhere" for p in budget.points)
        assert set(budget.formats) == {
            n for n, m in model.named_modules() if type(m).__name__ in ("Linear", "QuantLinear")
        }
        for name, format in budget.formats.items():
            layer = model.get_submodule(name)
            assert format == (layer.format.name if hasattr(layer, "format") else "dense")
        found[max_loss] = budget.chosen.bytes
        fastllm.restore(model)
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    eight = next(p.bytes for p in budget.points if p.what == "int8 everywhere")
    assert found[0.01] < 0.75 * eight and found[0.01] < found[0.0005]


def test_it_says_what_it_did_and_can_be_saved(tmp_path) -> None:
    model = trained(torch.bfloat16)
    report = fastllm.quantize(model, ["int8", "int4-g64"], max_loss=0.003, keep=False, **ASK)
    assert "1 samples of calibration data held out" in report.budget.measured_on
    told = json.loads(json.dumps(report.to_dict()))["budget"]
    assert told["chosen"]["perplexity"] <= 1.003 * told["before"]["perplexity"]
    table = str(report.budget)
    assert "model.layers.3.self_attn.q_proj k_proj v_proj" in table and "int4-g64" in table and "measured:" in table
    assert report.budget.summary() in str(report)
    report.budget.draw(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"
    ids = calibration(1).view(1, -1)
    model.save_pretrained(tmp_path / "out")
    loaded = fastllm.load(tmp_path / "out", attention=False, fuse=False, decode=False)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("family", ["mixtral", "gpt2"])
def test_families(family: str) -> None:
    model = tiny.build(family, dtype=torch.float32)
    ids = torch.randint(1, 60, (16, 40), generator=torch.Generator().manual_seed(1))
    want = model(ids)[0]
    report = fastllm.quantize(model, ["int8", "int4-g32"], max_loss=0.02, calib=ids, quiet=True)
    assert report.budget.loss <= 0.02
    chosen = set(report.budget.formats.values())
    assert chosen & {"int8", "int4-g32"} and report.budget.chosen.bytes < 0.6 * report.budget.before.bytes
    fastllm.restore(model)
    assert torch.equal(model(ids)[0], want)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"max_loss": -0.1}, "max_loss=-0.1"),
        ({"max_loss": math.nan}, "max_loss=nan"),
        ({"max_loss": 0.1, "method": "awq"}, "not among what awq does"),
        ({"max_loss": 0.1, "weights": "fp8"}, "not fp8-a8"),
        ({"max_loss": 0.1, "weights": {"*": "int8"}}, "formats to choose from"),
        ({"max_loss": 0.1, "calib": calibration(3)}, "3 samples: too few"),
        ({"max_loss": 0.1, "kv_cache": "int4"}, "without max_loss"),
        ({"max_loss": 0.1, "group_size": 64}, "group_size= is chosen by max_loss"),
        ({"max_loss": 0.1, "lm_head": "int8"}, "lm_head= is chosen by max_loss"),
        ({"max_loss": 0.1, "test": torch.tensor([[5], [6]])}, "no two tokens in a row"),
        ({"max_loss": 0.1, "test": torch.tensor([5])}, "has 1 tokens"),
    ],
)
def test_refusals(settings, message) -> None:
    model = trained()
    with pytest.raises(ValueError, match=message):
        fastllm.quantize(model, **(ASK | settings))
    assert "_fastllm" not in model.__dict__
    with pytest.raises(ValueError, match="does not predict the next token"):
        fastllm.quantize(tiny.build("bert"), max_loss=0.1, calib=calibration(8) % 60, length=16)


def test_formats_to_choose_from() -> None:
    assert [f.name for f in formats_of(None)] == ["int8", "int4-g32", "int4-g64", "int4-g128"]
    assert formats_of("int8") == [EIGHT] and formats_of([FOUR, "int8"]) == [FOUR, EIGHT]
    assert Point(3, 1.0) < Point(4, 0.5)
