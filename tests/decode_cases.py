"""Problems for `decode_attention`, with NaN wherever nothing may be read, and the rule that results are held to."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastllm.kv_formats import KV_FORMATS
from fastllm.ops.decode_attention import definition, dense, visible


class Case(NamedTuple):
    """ends: length of each row. starts: first key of each, or None. page: keys of a page, 0 for none, when rows have a
    few slots more than the longest needs. features: names in FEATURES."""

    Sq: int = 1
    group: int = 4
    D: int = 64
    Dv: int = 0
    ends: tuple[int, ...] = (100, 37)
    starts: tuple[int, ...] | None = None
    format: str | None = None
    page: int = 0
    Hkv: int = 2
    dtype: torch.dtype = torch.float16
    features: tuple[str, ...] = ()


def own_mask(case: Case, L: int) -> Tensor:
    """Of its own for every row, head and query, longer than need be."""
    return torch.rand(len(case.ends), case.Hkv * case.group, case.Sq, L + 3) < 0.7


FEATURES: dict[str, Callable[[Case, int], dict[str, Any]]] = {
    "scale": lambda c, L: {"scale": 0.3},
    "window": lambda c, L: {"window": 21},
    "softcap": lambda c, L: {"softcap": 1.5},
    "sinks": lambda c, L: {"sinks": torch.randn(c.Hkv * c.group)},
    "alibi": lambda c, L: {"alibi_slopes": torch.rand(c.Hkv * c.group) / 9},
    "mask": lambda c, L: {"mask": own_mask(c, L)},
    "shared mask": lambda c, L: {"mask": torch.rand(1, 1, 1, L) < 0.7},
}


class Problem(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    kv_end: Tensor
    options: dict[str, Any]

    def run(self, op: Callable[..., Tensor], **more: Any) -> Tensor:
        return op(self.q, self.k, self.v, self.kv_end, **{**self.options, **more})


def store(x: Tensor, case: Case, seen: Tensor) -> tuple[Tensor, Tensor | None]:
    """x [B, Hkv, L, D] as a cache has it; slots that no query sees hold NaN, in codes whatever is worst."""
    if case.format is None:
        return torch.where(seen[:, None, :, None], x.to(case.dtype), torch.nan), None
    codes, scale = KV_FORMATS[case.format].quantize(x)
    codes = torch.where(seen[:, None, :, None], codes, 255 if case.format == "int4" else -128)
    hidden = seen[:, None, :].reshape(len(seen), 1, -1, *[1] * (scale.ndim - 3))
    return codes.to(KV_FORMATS[case.format].dtype), torch.where(hidden, scale, torch.nan)


def paged(x: Tensor, table: Tensor, pages: int, size: int) -> Tensor:
    """Rows [B, Hkv, L, ...] put into pages as `table` says; other pages hold NaN, or the worst codes."""
    worst = torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).min or 255
    out = torch.full((pages, x.shape[1], size, *x.shape[3:]), worst, dtype=x.dtype)
    for row, entries in zip(x, table.tolist(), strict=True):
        for i, page in enumerate(entries):
            if 0 <= page < pages:
                out[page] = row[:, i * size : (i + 1) * size]
    return out


def problem(case: Case, device: str = "cpu", seed: int = 0) -> Problem:
    torch.manual_seed(seed)
    B, longest, size = len(case.ends), max(*case.ends, 1), case.page or 1
    L = -(-longest // size) * size + (0 if case.page else 5)
    q = torch.randn(B, case.Sq, case.Hkv * case.group, case.D).to(case.dtype).transpose(1, 2)
    kv_end = torch.tensor(case.ends, dtype=torch.int32)
    options: dict[str, Any] = {"format": case.format} if case.format else {}
    if case.starts is not None:
        options["kv_start"] = torch.tensor(case.starts, dtype=torch.int32)
    for name in case.features:
        options |= FEATURES[name](case, L)
    seen, _ = visible(kv_end, options.get("kv_start"), case.Sq, L, options.get("window"))
    used = seen.flatten(1, 2).any(1)
    caches = [store(torch.randn(B, case.Hkv, L, n), case, used) for n in (case.D, case.Dv or case.D)]
    if case.page:
        count = L // size
        pages = B * count + 3
        places = torch.randperm(pages)[: B * count].view(B, count).int()
        in_use = used.view(B, count, size).any(2)
        table = torch.where(in_use, places, torch.tensor([-1, 2**31 - 1])[torch.randint(2, (B, count))]).int()
        caches = [(paged(x, table, pages, size), s if s is None else paged(s, table, pages, size)) for x, s in caches]
        options["block_table"] = table
    (k, k_scale), (v, v_scale) = caches
    if case.format:
        options |= {"k_scale": k_scale, "v_scale": v_scale}
    here = {n: t.to(device) if isinstance(t, Tensor) else t for n, t in options.items()}
    return Problem(q.to(device), k.to(device), v.to(device), kv_end.to(device), here)


def assert_attends(got: Tensor, p: Problem) -> None:
    """FlashAttention-3's rule: within twice the error that the definition itself has in q's dtype, and two roundings.

    Of a quantized cache the definition sees the dequantised values, so that only the kernel's own error counts.
    """
    dtype = p.q.dtype
    want = p.run(definition, dtype=torch.float64)
    assert got.shape == want.shape and got.dtype == dtype, f"{got.dtype} {list(got.shape)}, want {list(want.shape)}"
    assert want.isfinite().all(), "the reference is not finite"
    assert got.isfinite().all(), f"not finite: {int((~got.isfinite()).sum())} of {got.numel()}"
    rounded = want.to(dtype)
    slack = 2 * (rounded + 0.3 - 0.3 - rounded).abs().max().double()
    low = p.run(definition, dtype=dtype).double()
    allowed = 2 * (low - want).abs().max() + slack
    if dtype == torch.float32:  # where two roundings of the result are less than another order of a sum
        allowed += 16 * torch.finfo(dtype).eps * (1 + want.abs().max())
    worst = (got.double() - want).abs().max()
    assert worst <= allowed, f"off by {worst:.3e}, allowed {allowed:.3e}"
    nothing = want.abs().amax(-1) == 0
    assert (got[nothing] == 0).all(), "rows that see nothing are not 0"


__all__ = ["FEATURES", "Case", "Problem", "assert_attends", "definition", "dense", "problem"]
