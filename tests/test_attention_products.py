"""Attention on a CPU as products of matrices: when it is, and that it is as exact as torch's own."""

import pytest
import torch
from attention_cases import Case, assert_attends, problem
from torch import Tensor

from fastllm.ops import attention_cpu
from fastllm.ops.attention import attention

MANY, REACH = attention_cpu.MANY, attention_cpu.REACH


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The outputs that products were written to, from 20 queries on, whatever the CPU."""
    monkeypatch.setattr(attention_cpu, "MANY", 20)
    monkeypatch.setattr(attention_cpu, "LARGE", 16)
    monkeypatch.setattr(attention_cpu, "_multiplies_bfloat16", lambda: True)
    outputs, run = [], attention_cpu._products

    def watched(q: Tensor, k: Tensor, v: Tensor, f: attention_cpu.Features, out: Tensor) -> None:
        outputs.append(out)
        run(q, k, v, f, out)

    monkeypatch.setattr(attention_cpu, "_products", watched)
    return outputs


FEATURES = [(), ("causal",), ("causal", "window"), ("causal", "softcap"), ("softcap", "scale"), ("causal", "ranges")]


@pytest.mark.parametrize("Sq, Sk", [(20, 20), (300, 300), (113, 203), (203, 113), (128, 129), (257, 256)])
@pytest.mark.parametrize("features", FEATURES, ids="-".join)
@pytest.mark.parametrize("scores", [1, 1 << 21])
def test_sizes_and_features(features, Sq, Sk, scores, used, monkeypatch):
    monkeypatch.setattr(attention_cpu, "SCORES", scores)  # heads one by one, or all at a time
    p = problem(Case(Sq, Sk, features, D=32, Dv=48, group=3, dtype=torch.bfloat16), "cpu")
    y = p.run(attention)
    assert_attends(y, p, 3.0 if "softcap" in features else 2.0)
    assert y.transpose(1, 2).is_contiguous() and used


def test_what_rounding_the_scores_loses_is_kept(used, monkeypatch):
    p = problem(Case(256, 256, ("causal",), D=128, group=4, dtype=torch.bfloat16), "cpu")
    p = p._replace(q=4 * p.q)

    def error() -> float:
        return float((p.run(attention).double() - p.want()).square().mean().sqrt())

    products = error()
    assert len(used) == 1
    monkeypatch.setattr(torch, "baddbmm", lambda *args, out, **kwargs: out.zero_())
    plain = error()
    monkeypatch.undo()
    torches = error()
    assert len(used) == 2 and products < 1.5 * torches and products < 0.4 * plain


@pytest.mark.parametrize(
    "why, change",
    [
        ("few queries", {"Sq": MANY - 1}),
        ("small heads", {"D": 64}),
        ("many keys", {"Sk": REACH + 1}),
        ("another type", {"dtype": torch.float16}),
        ("sinks", {"features": ("causal", "sinks")}),
        ("a mask", {"features": ("causal", "added mask")}),
        ("slopes", {"features": ("causal", "alibi")}),
        ("queries beyond the window", {"features": ("window",)}),
    ],
)
def test_where_torch_s_is_faster_it_runs(why, change, monkeypatch):
    ran = []
    monkeypatch.setattr(attention_cpu, "_products", lambda *args: ran.append(1))
    monkeypatch.setattr(attention_cpu, "_multiplies_bfloat16", lambda: True)
    case = Case(MANY, MANY, ("causal",), D=128, dtype=torch.bfloat16, B=1, Hkv=1)
    problem(case, "cpu").run(attention)
    assert ran == [1]
    problem(case._replace(**change), "cpu").run(attention)
    assert ran == [1], why


def test_a_cpu_without_bfloat16_products_takes_torch_s(monkeypatch):
    features = attention_cpu.Features(True, None, None, None, None, None, None)
    q = torch.zeros(1, 1, MANY, 128, dtype=torch.bfloat16)
    for bf16, amx, want in ((True, False, True), (False, False, False), (True, True, False)):
        attention_cpu._multiplies_bfloat16.cache_clear()
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda bf16=bf16: bf16)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        assert attention_cpu._by_products(q, q, features) == want
    attention_cpu._multiplies_bfloat16.cache_clear()
