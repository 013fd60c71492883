"""Rotary embedding: the operators on this machine, and the kernel, interpreted."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from close import assert_close, assert_equal
from torch import Tensor
from transformers.models.cohere import modeling_cohere as cohere
from transformers.models.gpt_neox import modeling_gpt_neox as neox
from transformers.models.gptj import modeling_gptj as gptj
from transformers.models.llama import modeling_llama as llama

from fastllm.kernels.rotary import heads_of
from fastllm.kernels.rotary import rotary as kernel
from fastllm.ops.rotary import rotary, turn

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# B, Hq, Hk, S, D, R
SIZES = [(1, 4, 1, 1, 64, 64),
         (1, 3, 2, 5, 80, 80), (2, 9, 3, 3, 96, 96), (1, 2, 1, 65, 16, 16), (1, 5, 1, 4, 128, 32),
         (3, 2, 1, 1, 10, 6), (1, 1, 1, 2, 2, 2), (2, 17, 8, 1, 128, 128), (1, 2, 1, 7, 256, 128)]  # fmt: skip


def by_kernel(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    return kernel(q, k, cos, sin, interleaved)


RUNS: dict[str, Callable] = {"op": rotary, "kernel": by_kernel}


def angles(B: int, S: int, R: int, interleaved: bool, device: str) -> tuple[Tensor, Tensor]:
    """cos and sin [B, S, R] as transformers computes them: an angle twice, in both halves or in a row."""
    a = 7 * torch.rand(B, S, R // 2, device=device)
    both = a.repeat_interleave(2, -1) if interleaved else torch.cat((a, a), -1)
    return both.cos(), both.sin()


def merged(B: int, Hq: int, Hk: int, S: int, D: int, device: str) -> tuple[Tensor, Tensor]:
    """q and k as views of the output of one projection, which has v as well."""
    y = torch.randn(B, S, (Hq + 2 * Hk) * D, device=device).view(B, S, -1, D).transpose(1, 2)
    return y[:, :Hq], y[:, Hq : Hq + Hk]


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_close_to_the_definition(size: tuple[int, ...], interleaved: bool, name: str, device: str) -> None:
    B, Hq, Hk, S, D, R = size
    dtype = DTYPES[(SIZES.index(size) + interleaved) % 3]
    q, k = (t.to(dtype) for t in merged(B, Hq, Hk, S, D, device))
    for batch in {1, B}:
        cos, sin = (t.to(dtype) for t in angles(batch, S, R, interleaved, device))
        out = RUNS[name](q, k, cos, sin, interleaved=interleaved)
        for got, x in zip(out, (q, k), strict=True):
            want = turn(x.double(), cos.double(), sin.double(), interleaved)
            assert_close(got, want, dtype=dtype)
            assert_equal(got[..., R:], x[..., R:])


@pytest.mark.parametrize("name", RUNS)
def test_strides(name: str, device: str) -> None:
    """q and k in one tensor, apart, at odd places; broadcast tables."""
    B, Hq, Hk, S, D = 2, 3, 2, 4, 32
    joined = merged(B, Hq, Hk, S, D, device)
    q, k = (t.contiguous() for t in joined)
    cos, sin = angles(B, S, D, False, device)
    want = turn(q.double(), cos.double(), sin.double(), False), turn(k.double(), cos.double(), sin.double(), False)
    odd = torch.cat((q[..., :1], q, q), -1)[..., 1 : D + 1]
    column = q.transpose(2, 3).contiguous().transpose(2, 3)
    backwards = torch.cat((k, q), 1)  # k lies before q, not after it
    pairs = [joined, (q, k), (odd, k), (column, k), (backwards[:, Hk:], backwards[:, :Hk])]
    for a, b in pairs:
        for got, ref in zip(RUNS[name](a, b, cos, sin), want, strict=True):
            assert_close(got, ref, dtype=torch.float32)
    one = RUNS[name](q, k, cos[:1].expand(B, -1, -1), sin[:1])[0] if name == "kernel" else None
    if one is not None:
        assert_close(one, turn(q.double(), cos[:1].double(), sin[:1].double(), False), dtype=torch.float32)
    wide = torch.stack((cos, sin), -1)
    for got, ref in zip(RUNS[name](q, k, wide[..., 0], wide[..., 1]), want, strict=True):
        assert_close(got, ref, dtype=torch.float32)


@pytest.mark.parametrize("Hq, Hk, B, S", [(1, 1, 1, 1), (1, 3, 1, 2), (3, 1, 2, 1), (1, 1, 2, 2)])
def test_heads_that_lie_side_by_side(Hq: int, Hk: int, B: int, S: int, device: str) -> None:
    """On the CPU one call does both, which no wrong stride of a dimension of 1 may spoil."""
    q, k = merged(B, Hq, Hk, S, 8, device)
    cos, sin = angles(B, S, 8, False, device)
    for got, want in zip(rotary(q, k, cos, sin), rotary(q.clone(), k.clone(), cos, sin), strict=True):
        assert_equal(got, want)


THEIRS: dict[str, tuple[bool, Callable]] = {
    "llama": (False, llama.apply_rotary_pos_emb),
    "cohere": (True, cohere.apply_rotary_pos_emb),
    "neox, partial": (False, neox.apply_rotary_pos_emb),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model", THEIRS)
@pytest.mark.parametrize("name", RUNS)
def test_agrees_with_transformers(name: str, model: str, dtype: torch.dtype, device: str) -> None:
    interleaved, theirs = THEIRS[model]
    q, k = (t.to(dtype) for t in merged(2, 4, 2, 6, 64, device))
    cos, sin = (t.to(dtype) for t in angles(2, 6, 16 if "partial" in model else 64, interleaved, device))
    out = RUNS[name](q, k, cos, sin, interleaved=interleaved)
    for got, want in zip(out, theirs(q, k, cos, sin), strict=True):
        assert_close(got, want.double(), *((4e-2, 6e-3) if dtype == torch.bfloat16 else (None, None)), dtype=dtype)


@pytest.mark.parametrize("name", RUNS)
def test_agrees_with_gptj(name: str, device: str) -> None:
    """Which has [B, S, H, D] and one entry for each pair."""
    q, k = merged(2, 4, 4, 6, 64, device)
    a = torch.rand(2, 6, 32, device=device)
    want = gptj.apply_rotary_pos_emb(q.transpose(1, 2), a.sin(), a.cos()).transpose(1, 2)
    cos, sin = (t.repeat_interleave(2, -1) for t in (a.cos(), a.sin()))
    assert_close(RUNS[name](q, k, cos, sin, interleaved=True)[0], want.double(), dtype=torch.float32)


@pytest.mark.parametrize("name", RUNS)
def test_tables_of_another_dtype(name: str, device: str) -> None:
    q, k = (t.half() for t in merged(1, 2, 1, 3, 16, device))
    cos, sin = angles(1, 3, 16, False, device)
    got = RUNS[name](q, k, cos, sin)[0]
    assert_close(got, turn(q.double(), cos.double(), sin.double(), False), dtype=torch.float16)


@pytest.mark.parametrize("name", RUNS)
def test_a_fault_is_seen(name: str, device: str) -> None:
    q, k = merged(1, 2, 1, 3, 16, device)
    cos, sin = angles(1, 3, 16, False, device)
    got = RUNS[name](q, k, cos, sin)[0]
    for c, s, x, other in (
        (cos, -sin, q, False), (cos, sin, q, True), (cos.roll(1, 1), sin, q, False), (cos, sin, q.roll(1, 1), False)
    ):  # fmt: skip
        with pytest.raises(AssertionError, match="worst"):
            assert_close(got, turn(x.double(), c.double(), s.double(), other), dtype=torch.float32)


@pytest.mark.parametrize("name", RUNS)
def test_what_passes_may_be_infinite(name: str, device: str) -> None:
    q, k = merged(1, 2, 1, 3, 16, device)
    q[..., 12] = float("inf")
    cos, sin = angles(1, 3, 8, False, device)
    got = RUNS[name](q, k, cos, sin)[0]
    assert got[..., 12].isinf().all() and got[..., :8].isfinite().all()


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("B, S", [(0, 3), (2, 0)])
def test_nothing_to_do(B: int, S: int, name: str, device: str) -> None:
    q, k = torch.ones(B, 4, S, 16, device=device), torch.ones(B, 2, S, 16, device=device)
    cos, sin = angles(1, S, 16, False, device)
    assert [tuple(t.shape) for t in RUNS[name](q, k, cos, sin)] == [(B, 4, S, 16), (B, 2, S, 16)]


BAD: dict[str, Callable] = {
    "positions": lambda q, k, c, s: (q, k, c[:, :2], s[:, :2]),
    "batch": lambda q, k, c, s: (q[:1], k[:1], c, s),
    "too wide": lambda q, k, c, s: (q[..., :8], k[..., :8], c, s),
    "odd": lambda q, k, c, s: (q, k, c[..., :7], s[..., :7]),
    "keys": lambda q, k, c, s: (q, k[:, :, :2], c, s),
    "dtype": lambda q, k, c, s: (q, k.half(), c, s),
    "rank": lambda q, k, c, s: (q, k, c[0], s[0]),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_what_does_not_fit_is_refused(bad: Callable, device: str) -> None:
    q, k = merged(2, 4, 2, 3, 16, device)
    cos, sin = angles(2, 3, 16, False, device)
    for run in RUNS.values():
        with pytest.raises(ValueError, match=r"(must be|cos must be|k must be)"):
            run(*bad(q, k, cos, sin))
    with pytest.raises(ValueError, match="on meta"):
        by_kernel(q, k, cos.to("meta"), sin)


def test_programs_are_full() -> None:
    assert heads_of(1, 128) == 2 and heads_of(4096, 128) == 8 and heads_of(1, 512) == 1 and heads_of(4096, 80) == 8


@pytest.mark.parametrize("interleaved", [False, True])
def test_compiles_whole_and_differentiates(interleaved: bool, device: str, opaque: None) -> None:
    q, k = merged(2, 4, 2, 3, 16, device)
    cos, sin = angles(2, 3, 16, interleaved, device)
    seen: list[str] = []

    def call(q: Tensor, k: Tensor) -> Tensor:
        return torch.cat(rotary(q, k, cos, sin, interleaved=interleaved), 1)

    def backend(graph: Any, inputs: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    with torch.no_grad():
        assert_equal(torch.compile(call, fullgraph=True, backend=backend)(q, k), call(q, k))
    assert "fastllm.rotary" in " ".join(seen)
    exact = [t.double().requires_grad_() for t in (q, k)]
    torch.cat([turn(t, cos.double(), sin.double(), interleaved) for t in exact], 1).sin().sum().backward()
    for run in (call, torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)):
        leaves = [t.clone().requires_grad_() for t in (q, k)]
        run(*leaves).sin().sum().backward()
        for leaf, want in zip(leaves, exact, strict=True):
            assert_close(leaf.grad, want.grad, dtype=torch.float32)


def test_the_operator_keeps_its_promises(device: str) -> None:
    q, k = merged(2, 4, 2, 3, 16, device)
    cos, sin = angles(2, 3, 16, False, device)
    torch.library.opcheck(torch.ops.fastllm.rotary.default, (q, k, cos, sin, False))
