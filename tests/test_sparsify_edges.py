"""`fastllm.sparsify` beside all else that is done to a model, and at its edges."""

import json
import logging

import pytest
import torch
from families import build, outputs
from test_sparsify import QUICK, UP, data, state
from torch import nn
from trained import calibration, trained

import fastllm
from fastllm.formats import IntFormat, dequantize
from fastllm.nn import BlockSparseLinear, SparseLinear
from fastllm.patch.errors import CoverageError
from fastllm.quantizers import quantize

INT8 = IntFormat(8)
NO_KERNEL = "no kernel reads {} weights {}: as much memory as without zeros, and no less time"


@pytest.fixture
def ids():
    return calibration(1)[None, :24]


@pytest.mark.parametrize("pattern", ["16:32", "2:4-int8", "block32@0.3", "0.5"])
def test_speedups_come_on_top(pattern, ids):
    model = trained()
    report = fastllm.sparsify(model, pattern, **QUICK)
    want = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert fastllm.optimize(model, None, quiet=True) is report
    assert "fused: 9 of 9 norms" in str(report) and "generate: fastllm's loop" in str(report)
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), want)
    fastllm.restore(model)
    assert torch.equal(model(ids).logits, trained()(ids).logits)


@pytest.mark.parametrize("pattern", ["16:32", "2:4-int8"])
def test_adapters_learn_on_top(pattern, ids):
    pytest.importorskip("peft")
    from adapters import adapt, adapted, gradients

    model = build("llama", torch.float32)
    fastllm.sparsify(model, pattern, **QUICK)
    model = adapt(model)
    assert len(adapted(model)) == 14 and all(g.abs().sum() > 0 for g in gradients(model).values())


def test_adapters_on_blocks():
    pytest.importorskip("peft")
    from adapters import adapt, adapted

    model = build("llama", torch.float32)
    fastllm.sparsify(model, "block64@0.5", include="*.mlp.*", **QUICK)
    assert len(adapted(adapt(model))) == 6


def test_to_dense_beneath_adapters_is_refused_or_merges():
    pytest.importorskip("peft")
    from adapters import adapt, answer

    model = build("llama", torch.float32)
    fastllm.sparsify(model, "16:32", **QUICK)
    adapted = adapt(model)
    want = answer(adapted)
    try:
        fastllm.to_dense(model)
    except ValueError as error:
        assert "adapters" in str(error)
    else:
        torch.testing.assert_close(answer(adapted.merge_and_unload()), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pattern", ["2:4", "block32@0.3"])
def test_a_model_that_moved_comes_back_in_its_new_type(pattern):
    model = trained()
    fastllm.sparsify(model, pattern, **QUICK)
    fastllm.restore(model.to(torch.bfloat16))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_so_does_one_whose_weights_were_changed_in_place():
    model = trained()
    fastllm.sparsify(model, "0.5", **QUICK)
    fastllm.restore(model.to(torch.bfloat16))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_warnings(caplog):
    with caplog.at_level(logging.WARNING):
        for pattern, said in (
            ("16:32", NO_KERNEL.format("16:32", "here")),
            ("0.5", NO_KERNEL.format("0.5", "anywhere")),
            ("block32@0.3", "blocks that are pruned in one shot ruin most models; block32@0.3"),
        ):
            caplog.clear()
            fastllm.sparsify(trained(), pattern, **QUICK)
            assert [r.getMessage()[: len(said)] for r in caplog.records] == [said]
        caplog.clear()
        fastllm.sparsify(trained(), "16:32", **(data() | {"calib": calibration(1)[:10]}))
        said = [r.getMessage() for r in caplog.records if "weights that stay are not adjusted" in r.getMessage()]
        assert [s[:22] for s in said] == ["10 calibration tokens "] * 2  # inputs of 192 and of 512


def test_owl(caplog):
    """Blocks differ, in all they keep no more, and the files know each of them."""
    model = trained()
    report = fastllm.sparsify(model, "16:32", method="wanda", repair=False, ratios="owl", **data())
    layers = [m for m in model.modules() if isinstance(m, SparseLinear)]
    kept = [m.format.kept for m in layers]
    assert len(set(kept)) > 1 and sum(kept) <= 16 * 28
    assert all(len({m.format for m in layers[i : i + 7]}) == 1 for i in range(0, 28, 7))
    assert {d["format"] for d in report.to_dict()["decisions"] if d["format"]} == {f"{k}:32" for k in kept}
    unstructured = trained()
    fastllm.sparsify(unstructured, "0.5", method="wanda", repair=False, ratios="owl", **data())
    weights = [m.weight for n, m in unstructured.named_modules() if n.endswith("_proj")]
    shares = [float((w != 0).float().mean()) for w in weights]
    assert max(shares) - min(shares) > 0.05
    assert sum(float((w != 0).sum()) for w in weights) <= 0.505 * sum(w.numel() for w in weights)


def test_owl_looks_at_data_whatever_the_method():
    model = trained()
    fastllm.sparsify(model, "16:32", method="magnitude", repair=False, ratios="owl", **data())
    assert len({m.format for m in model.modules() if isinstance(m, SparseLinear)}) > 1


def test_integers_and_the_head():
    model = trained(torch.bfloat16)
    report = fastllm.sparsify(model, "16:32", values="int4-g64", lm_head="int8", **QUICK)
    assert model.get_submodule(UP).format.name == "16:32-int4-g64" and model.lm_head.format.name == "int8"
    assert report.coverage > 0.99 and "16:32-int4-g64 by magnitude: stored in 20.3%" in str(report)
    json.dumps(report.to_dict())


def test_integers_of_small_weights_in_half_precision():
    """float16 has few digits for scales of 1e-6, and the codes have to know."""
    model = build("llama", torch.float16)
    weight = model.get_submodule(UP).weight.data.mul_(1e-2)
    fastllm.sparsify(model, "32:32-int8", **QUICK)
    dense = dequantize(quantize(weight, INT8, "rtn"), INT8, (256, 128), torch.float32)
    found = model.get_submodule(UP).dequantize(torch.float32), dense
    sparse, plain = (float((w - weight.float()).square().mean().sqrt()) for w in found)
    assert sparse <= 1.1 * plain


def with_spare():
    model = trained()
    model.model.layers[1].spare = nn.Linear(192, 192)
    return model


def test_a_layer_that_does_not_run_stays_dense(caplog):
    model = with_spare()
    fastllm.sparsify(model, "16:32", method="wanda", repair=False, **data())
    assert type(model.model.layers[1].spare) is nn.Linear
    assert "model.layers.1.spare did not run on the calibration data, and stays dense" in caplog.text


def test_the_report_knows_what_stayed_dense():
    model = with_spare()
    report = fastllm.sparsify(model, "16:32", method="wanda", repair=False, **data())
    spare = next(d for d in report.plan.decisions if d.name == "model.layers.1.spare")
    assert spare.format is None and "did not run" in spare.reason and spare.after == spare.before


def test_little_of_a_mixture_is_an_error():
    with pytest.raises(CoverageError, match="experts"):
        fastllm.sparsify(build("mixtral", torch.float32), "16:32", **QUICK)


def test_nothing_is_left_of_a_layer():
    model = build("llama", torch.float32)
    try:
        fastllm.sparsify(model, "0.999", **QUICK)
    except ValueError as error:
        assert "0.999" in str(error)
    else:
        assert all(p.any() for p in model.parameters() if p.ndim == 2)


def test_a_compiled_model_is_the_model_within():
    model = build("llama", torch.float32)
    compiled, before = torch.compile(model, backend="eager"), state(model)
    fastllm.sparsify(compiled, "16:32", **QUICK)
    assert "_fastllm" in model.__dict__ and "hf_quantizer" in model.__dict__
    fastllm.restore(compiled)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("pattern", ["16:32", "16:32-int8", "block32@0.5"])
def test_to_dense(family, pattern):
    """Plain layers of the model's own kind, with the weights that the packed ones stood for."""
    model = build(family, torch.float32)
    kinds = {name: type(module) for name, module in model.named_modules()}
    fastllm.sparsify(model, pattern, **QUICK)
    want = {n: m.dequantize() for n, m in model.named_modules() if isinstance(m, (SparseLinear, BlockSparseLinear))}
    answer = outputs(model)
    assert (
        fastllm.to_dense(model) is model and "_fastllm" not in model.__dict__ and "hf_quantizer" not in model.__dict__
    )
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    for name, weight in want.items():
        found = model.get_submodule(name)
        assert torch.equal(found.weight if isinstance(found, nn.Linear) else found.weight.t(), weight)
    torch.testing.assert_close(outputs(model), answer, rtol=0.02, atol=0.02)
    fastllm.sparsify(model, pattern, **QUICK)  # and it can be done again


def test_to_dense_of_a_model_that_was_loaded_quantized(tmp_path):
    build("gpt2", torch.float32).save_pretrained(tmp_path)
    model = fastllm.load(tmp_path, weights="int8", quiet=True)
    want = outputs(model)
    torch.testing.assert_close(outputs(fastllm.to_dense(model)), want, rtol=0.02, atol=0.02)
