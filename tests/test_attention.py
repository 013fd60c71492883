"""The op of attention, its definition, and the yardstick that both are held to, on whatever device is there."""

import importlib
import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import CLASHES, FEATURES, NAN, Case, Problem, assert_attends, excess, problem
from close import assert_close
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fastllm.ops.attention import attention, attention_varlen
from fastllm.ops.attention_cpu import BLOCK
from fastllm.ops.attention_reference import reference, reference_varlen, reference_with_lse

HALF, FULL, BRAIN = torch.float16, torch.float32, torch.bfloat16
SIZES = [(1, 1), (5, 13), (64, 128), (113, 203), (203, 113), (1, 300), (300, 300)]
SETS = [(), *combinations(FEATURES, 1), *combinations(FEATURES, 2)]
SETS = [features for features in SETS if not CLASHES <= {*features}]


def check(c: Case, device: str) -> None:
    p = problem(c, device)
    y = p.run(attention)
    assert_attends(y, p, 8.0 if c.dtype == FULL else 3.0 if "softcap" in c.features else 2.0)
    assert y.transpose(1, 2).is_contiguous()


# --- the definition


def by_hand(p: Problem) -> Tensor:
    """One query at a time, one key at a time."""
    q, k, v = (t.double() for t in p[:3])
    (B, Hq, Sq, D), (Hkv, Sk), f = q.shape, k.shape[1:3], p.features
    y = q.new_zeros(B, Hq, Sq, v.shape[-1])
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in (B, Hq, Sq))).tolist():
        start, end = (int(f[n][b]) if n in f else other for n, other in (("kv_start", 0), ("kv_end", Sk)))
        position, weights, values = i + end - Sq, [], []
        for j in range(start, end):
            s = q[b, h, i] @ k[b, h * Hkv // Hq, j] * f.get("scale", D**-0.5)
            s = f["softcap"] * torch.tanh(s / f["softcap"]) if "softcap" in f else s
            s = s + f["alibi_slopes"].double()[b, h] * (j - position) if "alibi_slopes" in f else s
            mask = f["mask"].expand(B, Hq, Sq, Sk)[b, h, i, j] if "mask" in f else torch.tensor(True)
            hidden = not mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min
            hidden |= "causal" in f and j > position or "window" in f and abs(j - position) >= f["window"]
            if not hidden:
                weights.append(torch.exp(s if mask.dtype == torch.bool else s + mask.double()))
                values.append(v[b, h * Hkv // Hq, j])
        if weights:
            sink = torch.exp(f["sinks"].double()[h]) if "sinks" in f else 0.0
            y[b, h, i] = sum(w * x for w, x in zip(weights, values, strict=True)) / (sum(weights) + sink)
    return y


@pytest.mark.parametrize("features", [(), tuple(n for n in FEATURES if n != "mask"), ("mask", "window"), ("ranges",)])
@pytest.mark.parametrize("Sq, Sk", [(5, 9), (9, 5)])
def test_the_definition_is_what_it_says(Sq: int, Sk: int, features: tuple[str, ...], device: str) -> None:
    p = problem(Case(Sq, Sk, features, D=4, dtype=FULL), device)
    if "window" in features:
        p.features["window"] = 3
    assert_close(p.run(reference), by_hand(p), dtype=FULL)


def test_the_definition_is_torchs_where_torch_has_one(device: str) -> None:
    p = problem(Case(30, 30, dtype=FULL), device)
    want = scaled_dot_product_attention(p.q, p.k, p.v, is_causal=True, enable_gqa=True)
    assert_close(p.run(reference, causal=True), want)
    lse = p.run(reference_with_lse)[1]
    scores = p.q.double() @ p.k.double().repeat_interleave(2, 1).transpose(2, 3) / 8
    assert_close(lse, torch.logsumexp(scores, -1), dtype=FULL)


# --- the yardstick


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "top left": ({"causal": True}, {"causal": False, "mask": torch.ones(40, 61, dtype=torch.bool).tril()}),
    "a window wider by one": ({"causal": True, "window": 8}, {"window": 9}),
    "a window narrower by one": ({"causal": True, "window": 8}, {"window": 7}),
    "no softcap": ({"softcap": 2.0}, {"softcap": None}),
    "no sinks": ({"sinks": torch.full((4,), 3.0)}, {"sinks": None}),
    "another scale": ({}, {"scale": 0.9 * 64**-0.5}),
    "slopes of other heads": ({"alibi_slopes": torch.arange(4.0)}, {"alibi_slopes": torch.arange(4.0).roll(1)}),
    "one more key": ({"kv_end": torch.tensor([50, 50]).int()}, {"kv_end": torch.tensor([51, 50]).int()}),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("dtype", [HALF, BRAIN, FULL])
def test_what_is_wrong_is_seen(wrong: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    right, change = WRONG[wrong]
    p = problem(Case(40, 61, dtype=dtype), "cpu")._replace(features=right)
    assert excess(p.run(reference), p) <= 0 < excess(p.run(reference, **change), p, 3.0)


def test_a_bad_element_is_seen() -> None:
    torch.manual_seed(0)
    p = problem(Case(40, 61, ("mask",), dtype=BRAIN), "cpu")
    y = p.run(reference)
    assert_attends(y, p)
    for bad in (y * 1.05, y.roll(1, 2), y.index_fill(2, torch.tensor([3]), NAN), y[:, [1, 0, 2, 3]]):
        with pytest.raises(AssertionError, match="beyond the bound"):
            assert_attends(bad, p)
    blind = (p.want() == 0).all(-1)
    with pytest.raises(AssertionError, match="must give 0"):
        assert_attends(y.masked_fill(blind[..., None], 1e-4), p)


# --- the op


def test_the_benchmark_checks_what_it_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
    bench = importlib.import_module("bench_attention")
    tiny = ["--device", "cpu", "--widths", "16", "--lengths", "600", "--seconds", "0", "--out", str(tmp_path)]
    bench.main(tiny)
    first, second = json.loads((tmp_path / "attention.json").read_text())["rows"]
    assert {*second["seconds"]} == {"SDPA", "fastllm", "SDPA with a mask"} and not first["wrong"] and first["causal"]
    assert 4 * 4 * 16 * 600 * 601 / 2 == pytest.approx(first["teraflops"]["SDPA"] * 1e12 * first["seconds"]["SDPA"])
    page = (tmp_path / "attention.md").read_text()
    assert "| 1 x 600 | 4/1 x 16 | causal, window 512 | SDPA " in page and "WRONG" not in page
    assert bench.Shape(2, 8, 2, 100, 64, False).operations() == 4 * 2 * 8 * 64 * 100 * 100
    monkeypatch.setattr(bench, "attention", lambda q, *_, **__: q)
    with pytest.raises(SystemExit, match="fastllm is wrong somewhere"):
        bench.main(tiny)
    with pytest.raises(SystemExit, match="itself failed"):
        monkeypatch.setattr(bench, "BOUND", 0.0)
        bench.main(tiny)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [HALF, BRAIN, FULL])
@pytest.mark.parametrize("Sq, Sk", SIZES)
def test_sizes(Sq: int, Sk: int, dtype: torch.dtype, causal: bool, device: str) -> None:
    check(Case(Sq, Sk, ("causal",) if causal else (), dtype=dtype), device)


@pytest.mark.parametrize("Sq", [37, BLOCK + 20])
@pytest.mark.parametrize("features", SETS, ids="+".join)
def test_features_and_their_pairs(features: tuple[str, ...], Sq: int, device: str) -> None:
    check(Case(Sq, Sq + 30, features, D=32, Hkv=1), device)
    if Sq == 37:
        check(Case(Sq, Sq - 9, features, D=32, Hkv=1, dtype=BRAIN), device)


@pytest.mark.parametrize("features", [(), ("causal",), ("sinks", "causal"), ("window",), ("alibi", "sinks")])
@pytest.mark.parametrize("D, Dv", [(72, 72), (80, 80), (192, 128), (256, 256)])
def test_columns(D: int, Dv: int, features: tuple[str, ...], device: str) -> None:
    check(Case(33, 40, features, D=D, Dv=Dv, group=4, Hkv=1), device)


def test_strides(device: str) -> None:
    p = problem(Case(40, 50, ("causal",)), device)
    q, k = p.q.transpose(1, 2).contiguous().transpose(1, 2), p.k.transpose(2, 3).contiguous().transpose(2, 3)
    moved = p._replace(q=q, k=k, v=p.v[:, :1].expand(-1, 2, -1, -1))
    assert_attends(moved.run(attention), moved)


def test_nothing_to_see(device: str) -> None:
    for Sq, Sk, B in ((3, 0, 2), (0, 3, 2), (3, 3, 0)):
        for features in ({}, {"causal": True}, {"window": 2}, {"sinks": torch.zeros(4, device=device)}):
            y = problem(Case(Sq, Sk, B=B), device).run(attention, **features)
            assert y.shape == (B, 4, Sq, 64) and (Sk == 3 or (y == 0).all())


@pytest.mark.parametrize("features", [{}, {"causal": True, "window": 9}, {"softcap": 2.0, "causal": True}], ids=str)
def test_sequences(features: dict[str, Any], device: str) -> None:
    q, k, v = (torch.randn(n, h, 32, device=device).half() for n, h in ((79, 4), (68, 2), (68, 2)))
    cu_q = torch.tensor([0, 5, 5, 45, 46, 79], dtype=torch.int32, device=device)
    cu_k = torch.tensor([0, 9, 16, 56, 56, 68], dtype=torch.int32, device=device)
    for more in ({}, {"sinks": torch.randn(4, device=device), "alibi_slopes": torch.rand(5, 4, device=device)}):
        y = attention_varlen(q, k, v, cu_q, cu_k, 40, **features, **more)
        want = reference_varlen(q.double(), k.double(), v.double(), cu_q, cu_k, **features, **more)
        assert y.is_contiguous() and (y.double() - want).abs().max() < 3e-3 and (y[45] == 0).all()


@pytest.mark.parametrize("features", [f for f in SETS if len(f) < 2], ids="+".join)
def test_gradients(features: tuple[str, ...], device: str) -> None:
    p = problem(Case(12, 12, features, D=8, dtype=torch.float64), device)
    found = []
    for op in (attention, reference):
        names = [n for n in ("sinks", "alibi_slopes") if n in p.features]
        leaves = [t.detach().double().requires_grad_() for t in (*p[:3], *(p.features[n] for n in names))]
        y = op(*leaves[:3], **{**p.features, **dict(zip(names, leaves[3:], strict=True))})
        found.append(torch.autograd.grad(y.sin().sum(), leaves))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, equal_nan="ranges" in features)


def test_only_what_is_differentiable_is_recorded(device: str) -> None:
    p = problem(Case(5, 5, ("causal",)), device)
    assert not p.run(attention).requires_grad
    q = p.q.clone().requires_grad_()
    assert p._replace(q=q).run(attention).requires_grad
    with torch.no_grad():
        assert not p._replace(q=q).run(attention).requires_grad


@pytest.mark.parametrize("features", [("causal",), ("causal", "window", "ranges"), ("mask", "sinks")], ids="+".join)
def test_the_dispatcher_knows_the_op(features: tuple[str, ...], device: str) -> None:
    p = problem(Case(5, 9, features, D=16), device)
    f = {"causal": False, **p.features}
    torch.library.opcheck(torch.ops.fastllm.attention.default, p[:3], f, test_utils=("test_schema", "test_faketensor"))
    cu = torch.tensor([0, 2, 5], dtype=torch.int32, device=device)
    operands = (*(t[0].transpose(0, 1)[:5] for t in p[:3]), cu, cu, 3)
    torch.library.opcheck(
        torch.ops.fastllm.attention_varlen.default, operands, {}, test_utils=("test_schema", "test_faketensor")
    )


def test_it_compiles_whole(device: str) -> None:
    p = problem(Case(20, 30, ("causal", "window"), D=16), device)

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q * 2, k, v, causal=True, window=5).transpose(1, 2).flatten(2) + 1

    compiled: Callable[..., Tensor] = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert (compiled(*p[:3]) == layer(*p[:3])).all()
    leaves = [t.double().requires_grad_() for t in p[:3]]
    got, want = (torch.autograd.grad(f(*leaves).sum(), leaves) for f in (compiled, layer))
    torch.testing.assert_close(got, want)


def test_what_does_not_fit_is_refused(device: str) -> None:
    p = problem(Case(5, 6, D=16), device)
    for change, message in (
        ({"window": 0}, "window must be at least 1"),
        ({"softcap": 0.0}, "softcap must be positive"),
        ({"sinks": torch.ones(3, device=device)}, r"sinks must be a contiguous \[4\]"),
        ({"mask": torch.ones(6, 5, device=device)}, r"mask must be broadcastable to \[2, 4, 5, 6\]"),
        ({"kv_start": torch.zeros(2, device=device)}, r"kv_start must be a contiguous int32 \[2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            p.run(attention, **change)
    with pytest.raises(ValueError, match="k and v do not fit"):
        attention(p.q, p.k, p.v[:, :, :-1])
    with pytest.raises(TypeError):
        attention(p.q, p.k, p.v, dropout=0.1)
