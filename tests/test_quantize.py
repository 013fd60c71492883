"""`fastllm.quantize` on a trained model: what it costs in perplexity, and what it does to a model."""

import copy

import pytest
import tiny
import torch
from close import assert_close
from trained import WINDOW, calibration, quality, trained

import fastllm
from fastllm.patch.errors import NotSupportedError

ASK = {"length": WINDOW, "lm_head": False, "quiet": True}
DENSE = 3.038  # perplexity per byte on the first forty windows, to check the fixture itself


def perplexity_of(method, weights, samples=32, **settings):
    model = trained()
    if method in ("rtn", "hqq"):
        fastllm.optimize(
            model, weights, method=method, lm_head=False, attention=False, fuse=False, decode=False, quiet=True
        )
    else:
        fastllm.quantize(model, weights, method=method, calib=calibration(samples), **ASK, **settings)
    return quality(model)


def test_the_quality_of_each_method():
    dense = quality(trained())
    assert abs(dense - DENSE) < 0.002
    assert perplexity_of("rtn", "int8") <= 1.002 * dense
    rtn, hqq = (perplexity_of(method, "int4-g64") for method in ("rtn", "hqq"))
    gptq = [perplexity_of("gptq", "int4-g64", samples) for samples in (16, 32, 48)]
    assert rtn <= 1.02 * dense and hqq <= rtn and max(gptq) <= 1.008 * dense
    # one of them depends on the last bit of the statistics: 0 to 0.6 of what rounding to nearest costs
    assert sum(gptq) / 3 - dense <= 0.5 * (rtn - dense)
    assert perplexity_of("awq", "int4-g64") < rtn
    assert perplexity_of("smoothquant", "int8-a8", samples=8) <= 1.01 * dense


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_it_can_be_undone_sped_up_and_saved(method, tmp_path):
    model = trained(torch.bfloat16)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    ids = calibration(1).view(1, -1)
    report = fastllm.quantize(model, "int4-g64", method=method, calib=calibration(4), length=WINDOW, quiet=True)
    assert report.coverage > 0.99 and "int4-g64" in str(report) and report.accuracy.real
    answer = model(ids).logits
    assert fastllm.optimize(model, None, quiet=True) is report and "fused: 9 of 9 norms" in str(report)
    assert_close(model(ids).logits, answer.double(), worst=0.2, rms=0.05, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = fastllm.load(tmp_path, attention=False, fuse=False, decode=False)
    assert torch.equal(loaded(ids).logits, answer)
    fastllm.restore(model)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_without_keeping_there_is_no_way_back():
    model = trained()
    fastllm.quantize(model, "int4", method="awq", calib=calibration(1), keep=False, **ASK)
    assert not model._fastllm.originals and not model._fastllm.changes
    with pytest.raises(NotSupportedError, match="load the model again"):
        fastllm.restore(model)


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"method": "magic"}, ValueError, "'magic'; with data there are gptq, awq, smoothquant"),
        ({"calib": "some text"}, TypeError, "needs the tokenizer"),
        ({"calib": torch.tensor([[300, 4]])}, ValueError, "token 300, outside of 0 to 255"),
        ({"calib": torch.tensor([[-1, 4]])}, ValueError, "token -1"),
        ({"calib": torch.tensor([7])}, ValueError, "has 1 tokens"),
        ({"calib": []}, ValueError, "has 0 tokens"),
        ({"calib": torch.rand(1, 9)}, TypeError, "float32"),
        ({"weights": "fp8"}, ValueError, "not for fp8-a8"),
        ({"weights": "int8", "activations": "int8"}, ValueError, "not for int8-a8"),
        ({"weights": "int4", "method": "smoothquant"}, ValueError, 'is for activations="int8"'),
        ({"weights": {"*.q_proj": "int4"}}, ValueError, "min_coverage"),
        ({"weights": ["int4", "int8"]}, ValueError, "go with max_loss="),
        ({"test": calibration(1)}, ValueError, "test= is what max_loss is measured on"),
        ({"weights": {}, "kv_cache": "fp8"}, ValueError, "beside packed layers"),
    ],
)
def test_refusals_leave_the_model_alone(settings, error, message):
    model = trained()
    before = {name: t.data_ptr() for name, t in model.state_dict().items()}
    with pytest.raises(error, match=message):
        fastllm.quantize(model, **({"calib": calibration(1)} | ASK | settings))
    assert {name: t.data_ptr() for name, t in model.state_dict().items()} == before
    assert "_fastllm" not in model.__dict__


def test_a_failure_on_the_way_puts_everything_back():
    model = trained()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 4] = float("nan")
    before["model.layers.2.mlp.up_proj.weight"] = model.model.layers[2].mlp.up_proj.weight.clone()
    with pytest.raises(ValueError, match="NaN or infinite"):
        fastllm.quantize(model, "int4-g64", method="awq", calib=calibration(1), **ASK)
    assert all(torch.equal(t.nan_to_num(9), before[n].nan_to_num(9)) for n, t in model.state_dict().items())


def test_padding_counts_for_nothing():
    """The same rows with padding behind them give the same codes, whatever the padding is."""
    rows = calibration(2).view(2, WINDOW)[:, :96]
    found = []
    for pad in (0, 77):
        model = trained()
        ids = torch.cat((rows, torch.full((2, 32), pad)), 1)
        mask = torch.cat((torch.ones_like(rows), torch.zeros(2, 32, dtype=torch.int64)), 1)
        batch = {"input_ids": ids, "attention_mask": mask}
        fastllm.quantize(model, "int4-g64", calib=[batch], **ASK)
        found.append(model.state_dict())
    model = trained()
    fastllm.quantize(model, "int4-g64", calib=rows, **ASK)
    found.append(model.state_dict())
    for name, t in found[0].items():
        assert torch.equal(t, found[1][name])
        if name.startswith("model.layers.0") and name.endswith("q_proj.weight_packed"):
            assert torch.equal(t, found[2][name])


FAMILIES = ["gemma3_text", "gpt2", "qwen3", "bert", "gpt_neox"]


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, method):
    """All linear layers in the blocks are reached, and the answer stays close."""
    model = tiny.build(family, dtype=torch.float32)
    ids = torch.randint(1, 60, (2, 24), generator=torch.Generator().manual_seed(1))
    want = model(ids)[0]
    twin = copy.deepcopy(model)
    report = fastllm.quantize(model, "int8-g32", method=method, calib=ids, min_coverage=0, lm_head=False, quiet=True)
    assert len(report.plan.chosen) > 4
    assert_close(model(ids)[0], want.double(), worst=0.2, rms=0.03, dtype=torch.float32)
    fastllm.restore(model)
    assert torch.equal(model(ids)[0], twin(ids)[0])


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_mixtures(family, caplog):
    """Experts are rounded on the tokens that reach them; those without any, without data, and one warning says so."""
    few = {"num_local_experts": 4, "num_experts_per_tok": 2} if family == "gpt_oss" else {}
    model = tiny.build(family, dtype=torch.float32, **few)
    ids = torch.randint(1, 60, (4, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = model(ids).logits
    errors = {}
    for method in ("gptq", None):
        twin = copy.deepcopy(model)
        settings = {"lm_head": False, "min_coverage": 0, "quiet": True}
        if method:
            fastllm.quantize(twin, "int4-g32", calib=ids, **settings)
        else:
            fastllm.optimize(twin, "int4-g32", attention=False, fuse=False, decode=False, **settings)
        errors[method] = float((twin(ids).logits - want).detach().square().mean())
    assert errors["gptq"] < 0.7 * errors[None]
    assert "quantized without data" not in caplog.text
    fastllm.quantize(model, "int4-g32", calib=ids[:1, :3], **settings)
    said = [r for r in caplog.records if "quantized without data" in r.getMessage()]
    assert len(said) == len([d for d in model._fastllm.report.plan.chosen if d.kind == "experts"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(
    "settings",
    [
        {"weights": "int4-g64", "method": "gptq", "kv_cache": "int4"},
        {"weights": "int4-g64", "method": "awq"},
        {"weights": "int8-a8", "method": "smoothquant"},
        {"max_loss": 0.01},
    ],
    ids=["gptq", "awq", "smoothquant", "max_loss"],
)
def test_on_a_gpu_the_quality_is_that_of_the_cpu(settings):
    found = []
    for device in ("cpu", "cuda"):
        model = trained(torch.bfloat16).to(device)
        fastllm.quantize(model, calib=calibration(8), **(ASK | settings))
        found.append(quality(model, 8))
        assert all(t.device.type == device for t in model.state_dict().values())
    assert found[1] == pytest.approx(found[0], rel=0.01)
