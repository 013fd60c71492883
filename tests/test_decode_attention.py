"""The op: its definition against attention written out key by key, the CPU against the definition, and dispatch."""

import math
from typing import Any

import pytest
import torch
from close import assert_close
from decode_cases import FEATURES, Case, Problem, assert_attends, definition, dense, problem
from torch import Tensor

from fastllm.ops.decode_attention import decode_attention, gather

CASES = [
    Case(),
    Case(Sq=3, group=1, D=32, Dv=80, ends=(1, 2, 40)),
    Case(Sq=5, group=8, ends=(33, 64, 0, 5), starts=(4, 63, 0, 5)),
    Case(page=16, ends=(16, 17, 15, 1)),
    Case(page=32, Sq=2, ends=(96, 33), starts=(40, 0), format="int8"),
    Case(format="int8", D=72, Dv=32),
    Case(format="int4", Dv=128, ends=(70, 3)),
    Case(format="int4", page=16, Sq=16, ends=(50, 16)),
    Case(ends=(50, 50), Sq=1, format="int8"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def by_hand(p: Problem, features: dict[str, Any]) -> Tensor:
    """One query, one head, one key at a time, in Python's floats."""
    q, (B, Hq, Sq, D) = p.q.double(), p.q.shape
    format, table = features.get("format"), features.get("block_table")
    k = dense(p.k, features.get("k_scale"), format, table, torch.float64)
    v = dense(p.v, features.get("v_scale"), format, table, torch.float64)
    starts, mask = features.get("kv_start"), features.get("mask")
    out = torch.zeros(B, Hq, Sq, v.shape[3], dtype=torch.float64)
    for b in range(B):
        for h in range(Hq):
            for i in range(Sq):
                position, kv = int(p.kv_end[b]) - Sq + i, h // (Hq // k.shape[1])
                first = 0 if starts is None else int(starts[b])
                logits = {}
                for j in range(max(first, position - features.get("window", 10**9) + 1), position + 1):
                    if mask is not None and not mask[b % len(mask), h % mask.shape[1], i % mask.shape[2], j]:
                        continue
                    s = float(q[b, h, i] @ k[b, kv, j]) * features.get("scale", D**-0.5)
                    if cap := features.get("softcap"):
                        s = cap * math.tanh(s / cap)
                    if "alibi_slopes" in features:
                        s += float(features["alibi_slopes"][h]) * (j - position)
                    logits[j] = s
                total = sum(map(math.exp, logits.values()))
                if "sinks" in features:
                    total += math.exp(float(features["sinks"][h]))
                for j, s in logits.items():
                    out[b, h, i] += math.exp(s) / total * v[b, kv, j]
    return out


@pytest.mark.parametrize("features", [(), ("window",), ("softcap", "scale"), ("sinks", "mask"), ("alibi", "window")])
@pytest.mark.parametrize("case", [CASES[1], CASES[2], CASES[4]], ids=str)
def test_the_definition_is_what_it_says(case: Case, features: tuple[str, ...]) -> None:
    p = problem(case._replace(ends=tuple(min(end, 34) for end in case.ends), group=2, features=features))
    assert_close(p.run(definition, dtype=torch.float64), by_hand(p, p.options), worst=1e-6, rms=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_cpu_agrees(case: Case, dtype: torch.dtype) -> None:
    for i, features in enumerate(((), tuple(FEATURES)[:5], ("window", "shared mask"), ("alibi", "mask"))):
        p = problem(case._replace(dtype=dtype, features=features), seed=i)
        y = p.run(decode_attention)
        assert_attends(y, p)
        assert y.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("feature", FEATURES)
def test_each_feature_counts(feature: str) -> None:
    p = problem(Case(ends=(100, 61), features=(feature,), dtype=torch.float32))
    without = p._replace(options={name: p.options[name] for name in p.options if name not in FEATURES_OPTIONS})
    with pytest.raises(AssertionError, match="off by|not finite"):
        assert_attends(without.run(decode_attention), p)


FEATURES_OPTIONS = {"scale", "window", "softcap", "sinks", "alibi_slopes", "mask"}
WRONG = {
    "doubled": lambda y: 2 * y,
    "one percent": lambda y: 1.01 * y,
    "heads rolled": lambda y: y.roll(1, 1),
    "rows rolled": lambda y: y.roll(1, 0),
    "positions swapped": lambda y: y.flip(2),
    "columns rolled": lambda y: y.roll(1, 3),
    "one number": lambda y: y.index_put((torch.tensor(0),) * 4, torch.tensor(9.0, dtype=y.dtype)),
    "nan": lambda y: y.index_put((torch.tensor(1),) * 4, torch.tensor(math.nan, dtype=y.dtype)),
    "unwritten": lambda y: torch.empty_like(y),
    "float32": lambda y: y.float(),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wrong", WRONG)
def test_the_yardstick_fails(wrong: str, dtype: torch.dtype) -> None:
    p = problem(Case(Sq=2, D=128, ends=(4, 7), dtype=dtype))
    right = p.run(definition, dtype=torch.float64).to(dtype)
    assert_attends(right, p)
    if (wrong, dtype) in {("float32", torch.float32), ("one percent", torch.bfloat16)}:
        return  # no fault, and less than two roundings
    with pytest.raises(AssertionError):
        assert_attends(WRONG[wrong](right), p)


def test_rows_that_see_nothing_are_zero() -> None:
    p = problem(Case(Sq=4, ends=(2, 0, 9), starts=(0, 0, 8), dtype=torch.float32))
    y = p.run(decode_attention)
    assert (y == 0).all(-1).all(1).tolist() == [[True, True, False, False], [True] * 4, [True, True, True, False]]


def test_gathering_follows_the_table() -> None:
    x = torch.arange(4 * 2 * 16 * 3).view(4, 2, 16, 3)
    table = torch.tensor([[3, 0], [1, -5]], dtype=torch.int32)
    rows = gather(x, table)
    assert rows.shape == (2, 2, 32, 3)
    assert rows[0, 1, 5].equal(x[3, 1, 5]) and rows[0, 0, 20].equal(x[0, 0, 4]) and rows[1, 0, 31].equal(x[0, 0, 15])


def test_compiles_in_one_graph(opaque: None) -> None:
    for case in (Case(Sq=2, dtype=torch.float32), Case(format="int4", page=16, features=("sinks",))):
        p = problem(case)
        compiled = torch.compile(lambda p=p: p.run(decode_attention) * 2, fullgraph=True, backend="aot_eager")
        assert compiled().equal(p.run(decode_attention) * 2)


def test_the_registration_is_sound() -> None:
    p = problem(Case(Sq=2, format="int8", features=("sinks",)))
    names = ("kv_start", "k_scale", "v_scale", "format", "block_table", "scale", "window", "softcap", "sinks",
             "alibi_slopes", "mask")  # fmt: skip
    args = (p.q, p.k, p.v, p.kv_end, *(p.options.get(name) for name in names))
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.fastllm.decode_attention.default, args, test_utils=utils)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cpu_agrees_at_length(dtype: torch.dtype) -> None:
    for case in (
        Case(D=256, Hkv=1, ends=(4096, 4096)),
        Case(D=256, format="int8", ends=(4000, 1)),
        Case(Sq=16, D=192, Dv=128, ends=(999,)),
    ):
        p = problem(case._replace(dtype=dtype))
        assert_attends(p.run(decode_attention), p)
