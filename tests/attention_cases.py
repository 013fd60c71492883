"""Problems for attention, with NaN where nothing may be read, and FlashAttention-3's rule that results are held to."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastllm.ops.attention_reference import reference, reference_with_lse

NAN = float("nan")


class Case(NamedTuple):
    """features: names in FEATURES."""

    Sq: int
    Sk: int
    features: tuple[str, ...] = ()
    D: int = 64
    Dv: int = 0  # 0: as D
    group: int = 2
    dtype: torch.dtype = torch.float16
    B: int = 2
    Hkv: int = 2


def hidden_rows(c: Case) -> Tensor:
    """A mask of its own for every sequence, head and query, of which one query sees nothing."""
    mask = torch.rand(c.B, c.group * c.Hkv, c.Sq, c.Sk) < 0.6
    mask[0, 0, c.Sq // 2] = False
    return mask


def added(c: Case) -> Tensor:
    """For all sequences and heads; some keys hidden by -inf, some by the most negative number."""
    mask = torch.randn(c.Sq, c.Sk).to(c.dtype)
    mask[torch.rand(c.Sq, c.Sk) < 0.2] = -torch.inf
    return mask.masked_fill(torch.rand(c.Sq, c.Sk) < 0.2, torch.finfo(c.dtype).min)


def ranges(c: Case) -> dict[str, Tensor]:
    """Keys of the first sequence begin and end inside; the second has fewer than there are queries, or none."""
    start = torch.tensor([c.Sk // 5, c.Sk // 2] * c.B, dtype=torch.int32)[: c.B]
    end = torch.tensor([c.Sk - c.Sk // 7, c.Sk - c.Sk // 3] * c.B, dtype=torch.int32)[: c.B]
    return {"kv_start": start, "kv_end": end}


FEATURES: dict[str, Callable[[Case], dict[str, Any]]] = {
    "causal": lambda c: {"causal": True},
    "scale": lambda c: {"scale": 0.3},
    "window": lambda c: {"window": 21},
    "softcap": lambda c: {"softcap": 1.5},
    "sinks": lambda c: {"sinks": torch.randn(c.Hkv * c.group).to(c.dtype)},
    "alibi": lambda c: {"alibi_slopes": torch.rand(c.B, c.Hkv * c.group) / 9},
    "mask": lambda c: {"mask": hidden_rows(c)},
    "added mask": lambda c: {"mask": added(c)},
    "ranges": ranges,
}
CLASHES = {"mask", "added mask"}  # an argument can be given once


class Problem(NamedTuple):
    q: Tensor  # [B, Hq, Sq, D]
    k: Tensor  # [B, Hkv, Sk, D]
    v: Tensor  # [B, Hkv, Sk, Dv]
    features: dict[str, Any]

    def run(self, op: Callable[..., Any], **more: Any) -> Any:
        return op(self.q, self.k, self.v, **{**self.features, **more})

    def to(self, dtype: torch.dtype) -> "Problem":
        return self._replace(q=self.q.to(dtype), k=self.k.to(dtype), v=self.v.to(dtype))

    def want(self) -> Tensor:
        return self.to(torch.float64).run(reference)

    def want_lse(self) -> Tensor:
        return self.to(torch.float64).run(reference_with_lse)[1]


def problem(c: Case, device: str) -> Problem:
    """Random operands; keys and values outside of kv_start and kv_end are NaN."""
    Hq, Dv = c.Hkv * c.group, c.Dv or c.D
    q, k = torch.randn(c.B, Hq, c.Sq, c.D), torch.randn(c.B, c.Hkv, c.Sk, c.D)
    v = torch.randn(c.B, c.Hkv, c.Sk, Dv)
    features: dict[str, Any] = {}
    for name in c.features:
        features |= FEATURES[name](c)
    if "kv_end" in features:
        j = torch.arange(c.Sk)
        outside = (j < features["kv_start"][:, None]) | (j >= features["kv_end"][:, None])
        k, v = (t.masked_fill(outside[:, None, :, None], NAN) for t in (k, v))
    features = {name: f.to(device) if isinstance(f, Tensor) else f for name, f in features.items()}
    return Problem(*(t.to(c.dtype).to(device) for t in (q, k, v)), features)


def simple(p: Problem) -> Tensor:
    """The definition with its products and weights rounded to q's dtype: what low precision costs anyone."""
    q, k, v = p.q, p.k.nan_to_num(0), p.v.nan_to_num(0)
    rounded = reference_with_lse(q, k, v, **p.features)[1]
    eye = torch.eye(k.shape[2], dtype=q.dtype, device=q.device).expand(*k.shape[:2], -1, -1)
    weights = reference(q, k, eye, **p.features)  # [B, Hq, Sq, Sk], rounded
    assert rounded.shape == weights.shape[:3]
    groups = weights.unflatten(1, (k.shape[1], -1))
    return (groups @ v[:, :, None]).flatten(1, 2)


def excess(got: Tensor, p: Problem, rtol: float = 2.0) -> float:
    """By how much `got` misses FlashAttention-3's bound on the largest error; at most 0 is right, NaN is infinite.

    |got - want| <= rtol * max |low - want| + 2 * max |want + 0.3 - 0.3 - want|, the last in the low precision.
    """
    want = p.want()
    assert got.shape == want.shape and got.dtype == p.q.dtype, (
        f"{got.dtype} {list(got.shape)}, want {list(want.shape)}"
    )
    if not got.numel():
        return 0.0
    low = want.to(p.q.dtype)
    atol = 2 * (low + 0.3 - 0.3 - low).abs().max().item()
    bound = rtol * (simple(p).double() - want).abs().max().item() + atol
    error = (got.double() - want).abs().max().item()
    return error - bound if got.isfinite().all() else float("inf")


def assert_attends(got: Tensor, p: Problem, rtol: float = 2.0) -> None:
    """Within the bound, and exactly 0 where a query sees no key."""
    over = excess(got, p, rtol)
    assert over <= 0, f"the largest error is {over:.2e} beyond the bound"
    blind = (p.want() == 0).all(-1)
    assert (got[blind] == 0).all(), "a query that sees no key must give 0"
