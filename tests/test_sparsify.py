"""`fastllm.sparsify` on a trained model: what it costs in perplexity, what it does to a model, and what it refuses."""

import json

import pytest
import tiny
import torch
from close import assert_equal
from families import build
from torch import nn
from trained import WINDOW, calibration, quality, trained

import fastllm
from fastllm.nn import BlockSparseLinear, QuantLinear, SparseLinear
from fastllm.patch.errors import NotSupportedError

QUICK = {"method": "magnitude", "repair": False, "quiet": True}  # without data
UP = "model.layers.1.mlp.up_proj"


def data(samples: int = 2) -> dict:
    return {"calib": calibration(samples), "length": WINDOW, "quiet": True}


def sparse(pattern: str, samples: int = 8, **settings):
    model = trained()
    fastllm.sparsify(model, pattern, **data(samples), **settings)
    return model


def state(model) -> dict:
    return {name: t.clone() for name, t in model.state_dict().items()}


def assert_as_before(model, before) -> None:
    now = model.state_dict()
    assert list(now) == list(before) and "_fastllm" not in model.__dict__
    assert all(torch.equal(t.nan_to_num(9), before[name].nan_to_num(9)) for name, t in now.items())


@pytest.fixture(scope="module")
def half():
    """(a model by the defaults, its report, the tokens and logits of it and of the dense one): not to be changed."""
    model, ids = trained(), calibration(1)[None, :64]
    before = model(ids).logits.detach()
    report = fastllm.sparsify(model, **data(8))
    return model, report, ids, before, model(ids).logits.detach()


def test_the_quality_of_each_method(half):
    """The criteria of one-shot pruning: SparseGPT before the others, and 16:32 as good as half of each row."""
    dense = quality(trained(), 10)
    plain = {m: quality(sparse("0.5", 8, method=m, repair=False), 10) for m in ("magnitude", "wanda", "sparsegpt")}
    assert plain["sparsegpt"] < min(plain["wanda"], plain["magnitude"]) and plain["sparsegpt"] <= 1.08 * dense
    unstructured, quads, found = quality(sparse("0.5"), 10), quality(sparse("2:4"), 10), quality(half[0], 10)
    assert dense < found <= 1.01 * unstructured and found <= quads <= 1.12 * dense
    assert unstructured <= 1.005 * plain["sparsegpt"]  # masks that differ a little differ by as much


@pytest.mark.slow
@pytest.mark.parametrize("pattern, most", [("0.5", 1.08), ("2:4", 1.15), ("16:32", 1.08)])
def test_the_quality_of_all(pattern, most):
    """With and without repair; and integers cost little beside what sparsity costs."""
    dense, found = quality(trained()), {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        for repair in (False, True):
            model = sparse(pattern, 32, method=method, repair=repair)
            found[method, repair] = quality(model)
        assert found[method, True] < 1.005 * found[method, False]
    assert found["sparsegpt", False] < min(found["wanda", False], found["magnitude", False])
    assert found["sparsegpt", False] <= most * dense
    repaired = [found[method, True] for method in ("sparsegpt", "wanda", "magnitude")]
    assert max(repaired) <= 1.02 * min(repaired) and repaired[0] <= 1.01 * min(repaired)
    if pattern != "0.5":
        assert quality(sparse(pattern, 32, values="int4-g64")) <= 1.03 * repaired[0]
        fastllm.sparsify(fastllm.to_dense(model), pattern, method="zeros", values="int8", quiet=True)
        assert quality(model) <= 1.002 * repaired[0]


def test_what_it_did_is_in_the_report(half):
    model, report, ids, before, after = half
    layers = [m for m in model.modules() if isinstance(m, SparseLinear)]
    assert len(layers) == 28 and {m.format.name for m in layers} == {"16:32"}
    text, table = str(report), json.loads(json.dumps(report.to_dict()))
    for line in ("97.2% of it sparse", "16:32 by sparsegpt, repaired: stored in 53.1% of the bytes that they had",
                 "dense matmul, which multiplies zeros too", "as much memory as without zeros, and no less time",
                 "undo: fastllm.restore(model)"):  # fmt: skip
        assert line in text
    assert table["notes"] == report.notes and len(report.notes) == 2 and table["accuracy"]["real"]
    assert {d["format"] for d in table["decisions"] if d["name"].endswith("_proj")} == {"16:32"}
    assert report.accuracy.kl == pytest.approx(divergence(before, after), rel=0.02)
    with pytest.raises(NotSupportedError, match="optimized already"):
        fastllm.sparsify(model)


def divergence(before, after) -> float:
    p, q = before[0].double().log_softmax(-1), after[0].double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("pattern", ["2:4", "16:32-int8", "block32@0.3", "0.5"])
def test_it_can_be_undone_to_the_bit(pattern):
    model = trained(torch.bfloat16)
    before, modules = state(model), dict(model.named_modules())
    weight, tokens = model.get_submodule(UP).weight, calibration(1)[None, :40]
    report = fastllm.sparsify(model, pattern, **QUICK)
    with torch.no_grad():
        answer = model(tokens).logits
    weights = model.get_submodule(UP)
    kind = {"b": BlockSparseLinear, "0": nn.Linear}.get(pattern[0], SparseLinear)
    assert type(weights) is kind and report.coverage > 0.97 and report.keep
    if pattern == "0.5":  # in place, nothing smaller, and said so
        assert weights is modules[UP] and weights.weight is not weight and (weights.weight != 0).float().mean() == 0.5
        assert "no kernel reads 0.5 weights anywhere" in str(report) and report.plan.after == report.plan.before
    assert fastllm.restore(model) is model
    assert_as_before(model, before)
    assert all(module is modules[name] for name, module in model.named_modules())
    assert model.get_submodule(UP).weight is weight and not torch.equal(model(tokens).logits, answer)
    fastllm.sparsify(model, pattern, **QUICK)
    assert torch.equal(model(tokens).logits, answer)


@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
def test_without_keeping_there_is_no_way_back(pattern):
    model = trained()
    report = fastllm.sparsify(model, pattern, keep=False, **QUICK)
    assert not model._fastllm.originals and not model._fastllm.changes and "keep=False" in str(report)
    with pytest.raises(NotSupportedError, match="load the model again"):
        fastllm.restore(model)


@pytest.mark.parametrize("settings", [QUICK, {"method": "zeros"}, data(1)], ids=["magnitude", "zeros", "sparsegpt"])
@pytest.mark.parametrize("pattern", ["16:32-int8", "0.5", "block32@0.5"])
def test_a_failure_on_the_way_puts_everything_back(pattern, settings, caplog):
    model = trained()
    with torch.no_grad():
        model.get_submodule(UP).weight[3, 4] = float("nan")
    before = state(model)
    with pytest.raises(ValueError, match="NaN or infinite|not zero where|not finite"):
        fastllm.sparsify(model, pattern, **({"quiet": True} | settings))
    assert_as_before(model, before)


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"pattern": "4:8"}, ValueError, "unknown pattern '4:8'"),
        ({"pattern": "block64"}, ValueError, 'how many blocks go.*block64@0.7.*method="zeros"'),
        ({"pattern": "block128@0.5"}, ValueError, r"no layer can be block128@0.5: .*\[192, 512\] cannot be cut"),
        ({"method": "wonder"}, ValueError, "unknown method 'wonder'; known: sparsegpt, wanda, magnitude, zeros"),
        ({"ratios": "odd"}, ValueError, "unknown ratios 'odd'; known: uniform, owl"),
        ({"ratios": "owl", "pattern": "2:4"}, ValueError, "2:4 keeps as much everywhere"),
        ({"ratios": "owl", "method": "zeros"}, ValueError, "they are gone"),
        ({"values": "fp8"}, ValueError, "sparse values cannot be fp8-a8"),
        ({"values": "int8-a8"}, ValueError, "cannot be int8-a8"),
        ({"values": "int4-asym"}, ValueError, "cannot be int4-g128-asym"),
        ({"lm_head": "int7"}, ValueError, "unknown weight format 'int7'"),
        ({"include": "*.nothing"}, ValueError, "no layer can be 16:32: .*does not match include"),
        ({"method": "zeros"}, ValueError, r"\d+ of \d+ weights are not zero where 16:32 keeps none"),
        ({"calib": "some text"}, TypeError, "needs the tokenizer"),
        ({"calib": torch.tensor([[300, 4]])}, ValueError, "token 300, outside of 0 to 255"),
        ({"calib": torch.tensor([7])}, ValueError, "has 1 tokens"),
    ],
)
def test_refusals_leave_the_model_alone(settings, error, message):
    model = trained()
    before = {name: t.data_ptr() for name, t in model.state_dict().items()}
    with pytest.raises(error, match=message):
        fastllm.sparsify(model, **({"pattern": "16:32"} | data(1) | settings))
    assert {name: t.data_ptr() for name, t in model.state_dict().items()} == before
    assert "_fastllm" not in model.__dict__ and "hf_quantizer" not in model.__dict__


def test_models_in_another_state_are_refused():
    with pytest.raises(NotSupportedError, match="training mode"):
        fastllm.sparsify(trained().train(), **QUICK)
    model = trained()
    fastllm.optimize(model, "int8", quiet=True)
    with pytest.raises(NotSupportedError, match="optimized already; fastllm.restore"):
        fastllm.sparsify(model, **QUICK)
    with torch.device("meta"):
        empty = build("llama")
    with pytest.raises(NotSupportedError, match="meta device"):
        fastllm.sparsify(empty, **QUICK)
    packed = nn.Sequential(QuantLinear.from_linear(nn.Linear(64, 64), "int8")).eval()
    with pytest.raises(ValueError, match="already quantized by fastllm"):
        fastllm.sparsify(packed, **QUICK)


def test_weights_that_were_trained_with_zeros():
    """They stay to the bit, in what stores them; no data is asked for."""
    for pattern, kind in (("2:4", SparseLinear), ("block32", BlockSparseLinear), ("0.5", nn.Linear)):
        model, ids = trained(), calibration(1)[None, :32]
        fastllm.sparsify(model, pattern + ("@0.3" if "block" in pattern else ""), **QUICK)
        fastllm.to_dense(model) if pattern != "0.5" else model.__dict__.pop("_fastllm")
        want, weights = model(ids).logits, state(model)
        report = fastllm.sparsify(model, pattern, method="zeros", quiet=True)
        assert type(model.get_submodule(UP)) is kind and f"{pattern} by zeros: stored in" in str(report)
        torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-4)
        fastllm.restore(model) if pattern == "0.5" else fastllm.to_dense(model)
        assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())


def test_what_was_chosen_and_what_was_not():
    model = tiny.build("llama", dtype=torch.float32, intermediate_size=200)
    settings = {**QUICK, "include": ["*.mlp.*", "*.q_proj", "lm_head"], "exclude": "*.1.*"}
    report = fastllm.sparsify(model, "16:32", lm_head="int8", min_coverage=0, **settings)
    chosen = {d.name for d in report.plan.chosen}
    assert chosen == {f"model.layers.0.{n}" for n in ("mlp.gate_proj", "mlp.up_proj", "self_attn.q_proj")} | {
        "lm_head"
    }
    why = {d.name: d.reason for d in report.plan.skipped}
    assert why["model.layers.0.mlp.down_proj"] == "200 inputs are not a multiple of 32"
    assert "does not match include" in why["model.layers.0.self_attn.k_proj"]
    assert "matches exclude" in why["model.layers.1.mlp.up_proj"]
    assert type(model.lm_head) is QuantLinear and model.lm_head.format.name == "int8"
    assert type(model.model.layers[1].mlp.up_proj) is nn.Linear


def test_a_tied_head_gets_a_copy_and_the_embedding_stays():
    model = build("llama-tied", torch.float32)
    before = model.model.embed_tokens.weight
    want = before.clone()
    fastllm.sparsify(model, "2:4", lm_head="int8", **QUICK)
    assert type(model.lm_head) is QuantLinear and model.model.embed_tokens.weight is before
    fastllm.restore(model)
    assert model.lm_head.weight is before
    assert_equal(before.detach(), want)


@pytest.mark.parametrize("family", ["gpt2", "bert", "mixtral", "gemma3"])
def test_families(family):
    """All linear layers in blocks; experts of a mixture stay, with the reason."""
    model = build(family, torch.float32)
    ids = torch.randint(1, 500, (4, 48), generator=torch.Generator().manual_seed(1))
    before, want = state(model), model(ids)[0]
    report = fastllm.sparsify(model, "16:32", calib=ids, min_coverage=0, quiet=True)
    inside = [d for d in report.plan.chosen if d.kind in ("linear", "conv1d")]
    assert len(inside) == {"gpt2": 8, "bert": 12, "mixtral": 8, "gemma3": 14}[family]
    error = (model(ids)[0] - want).square().mean().sqrt() / want.std()
    assert 0 < error < 0.6
    experts = {d.name: d for d in report.plan.skipped if d.kind == "experts"}
    assert len(experts) == (2 if family == "mixtral" else 0)
    assert all(d.reason == "experts of a mixture are not made sparse" for d in experts.values())
    fastllm.restore(model)
    assert_as_before(model, before)
