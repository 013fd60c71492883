"""The step between the projections and attention: the operators on this machine, and the kernel, interpreted.

Caches are full of NaN (codes: of 77) before: what should not be written must still be there, to the bit.
"""

from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from close import assert_close, assert_equal
from torch import Tensor

from fastllm.kernels import append_kv as module
from fastllm.kv_formats import KV_FORMATS
from fastllm.ops.append_kv import append_kv
from fastllm.ops.norm import rms
from fastllm.ops.rotary import turn

# bounds for numbers that were rounded twice or thrice, and how many codes of them may be one apart
LOOSE = {torch.float32: (None, None), torch.float16: (6e-3, 8e-4), torch.bfloat16: (4e-2, 6e-3)}
APART = {torch.float32: 0.01, torch.float16: 0.06, torch.bfloat16: 0.2}


def by_kernel(*operands: Any, **o: Any) -> Tensor:
    *new, k_cache, v_cache, slots = operands
    bits = KV_FORMATS[o["format"]].bits if "format" in o else 16
    place, first = (slots, 0) if isinstance(slots, Tensor) else (None, slots)
    scales = (o.get("k_scale"), o.get("v_scale"))
    store = module.Store(k_cache, v_cache, *scales, place, first, o.get("block_table"), bits)
    options = (o.get("eps", 1e-6), o.get("cast_first", False), o.get("interleaved", False))
    return module.append_kv(*new, o.get("q_weight"), o.get("k_weight"), store, *options)


RUNS: dict[str, Callable] = {"op": append_kv, "kernel": by_kernel}


class Case(NamedTuple):
    """A problem; R: numbers that turn; pages: of 4 slots, in a shuffled table, in place of rows."""

    B: int = 1
    Hq: int = 4
    Hk: int = 2
    S: int = 1
    D: int = 64
    Dv: int = 64
    R: int = 64
    dtype: torch.dtype = torch.float32
    format: str | None = None
    normed: bool = False
    cast_first: bool = False
    interleaved: bool = False
    pages: bool = False
    slots: str = "first"  # or "row", "rows", "negative"


LENGTH, PAGE = 12, 4


class Problem:
    """Tensors of a case; `run` appends to new caches like `caches`."""

    def __init__(self, c: Case, device: str):
        self.case, self.device = c, device
        y = torch.randn(c.B, c.S, (c.Hq + c.Hk) * c.D + c.Hk * c.Dv, device=device).to(c.dtype)
        parts, heads = y.split([c.Hq * c.D, c.Hk * c.D, c.Hk * c.Dv], -1), (c.Hq, c.Hk, c.Hk)
        split = (t.unflatten(-1, (h, -1)).transpose(1, 2) for t, h in zip(parts, heads, strict=True))
        self.q, self.k, self.v = split
        a = 5 * torch.rand(c.B, c.S, c.R // 2, device=device)
        a = a.repeat_interleave(2, -1) if c.interleaved else torch.cat((a, a), -1)
        self.cos, self.sin = (a.cos().to(c.dtype), a.sin().to(c.dtype)) if c.R else (None, None)
        w = [torch.rand(c.D, device=device).to(c.dtype).float() + 0.5 for _ in range(2)]
        self.weights = [t.to(c.dtype) if c.cast_first else t for t in w] if c.normed else [None, None]
        self.places = self._places()
        self.table = None
        if c.pages:
            pages = torch.randperm(c.B * LENGTH // PAGE + 2, device=device)[: c.B * LENGTH // PAGE]
            self.table = pages.int().view(c.B, -1)
        self.caches = [self._cache(D) for D in (c.D, c.Dv)]

    def _places(self) -> Tensor:  # [B, S]
        c = self.case
        row = torch.arange(2, 2 + c.S, device=self.device)
        if c.slots in ("rows", "negative"):
            places = torch.stack([torch.randperm(LENGTH, device=self.device)[: c.S] for _ in range(c.B)])
            return (
                places if c.slots == "rows" else torch.where(torch.rand(c.B, c.S) < 0.4, -1, places.cpu()).to(places)
            )
        return (row.flip(0) if c.slots == "row" else row).expand(c.B, c.S)

    def _cache(self, D: int) -> list[Tensor]:
        """Values, or codes and scales; strided, as a view of a larger tensor."""
        c = self.case
        rows = (c.B * LENGTH // PAGE + 2, c.Hk, PAGE) if c.pages else (c.B, c.Hk, LENGTH)
        if c.format is None:
            return [torch.full((*rows, 2 * D), float("nan"), device=self.device, dtype=c.dtype)[..., :D]]
        f = KV_FORMATS[c.format]
        by_head = (rows[1], rows[0], rows[2], f.width(D))
        codes = torch.full(by_head, 77, device=self.device, dtype=f.dtype).transpose(0, 1)
        scale = torch.full((*rows, *f.scale_shape(D)), float("nan"), device=self.device, dtype=f.scale_dtype)
        return [codes, scale]

    def run(self, name: str) -> tuple[Tensor, list[list[Tensor]]]:
        c, caches = self.case, [self._cache(D) for D in (self.case.D, self.case.Dv)]
        given = {"first": 2, "row": self.places[0].int()}.get(c.slots, self.places)
        scales = {} if c.format is None else {"k_scale": caches[0][1], "v_scale": caches[1][1], "format": c.format}
        out = RUNS[name](
            self.q, self.k, self.v, self.cos, self.sin, caches[0][0], caches[1][0], given,
            q_weight=self.weights[0], k_weight=self.weights[1], eps=1e-5, cast_first=c.cast_first,
            interleaved=c.interleaved, block_table=self.table, **scales,
        )  # fmt: skip
        return out, caches

    def turned(self, x: Tensor, weight: Tensor | None) -> Tensor:
        """By the definitions, in float64."""
        x = x.double() if weight is None else rms(x.double(), weight.double(), 1e-5, False)
        return x if self.cos is None else turn(x, self.cos.double(), self.sin.double(), self.case.interleaved)

    def place_of(self, b: int, s: int) -> tuple[int, int] | None:
        """Row and position in the cache, or None."""
        at = int(self.places[b, s])
        row = b if self.table is None else int(self.table[b, at // PAGE])
        return None if at < 0 else (row, at if self.table is None else at % PAGE)


def check(p: Problem, name: str) -> None:
    """The result, what was written, and that nothing else was."""
    c = p.case
    out, caches = p.run(name)
    assert out.is_contiguous()
    loose = LOOSE[c.dtype]
    assert_close(out, p.turned(p.q, p.weights[0]), *loose, dtype=c.dtype)
    wide = p.turned(p.k, p.weights[1])
    untouched = torch.ones(caches[0][0].shape[0], caches[0][0].shape[2], dtype=torch.bool)
    for cache, old, x, exact in zip(caches, p.caches, (wide, p.v), (not c.R and not c.normed, True), strict=True):
        for b, s in product(range(c.B), range(c.S)):
            at = p.place_of(b, s)
            if at is None:
                continue
            untouched[at] = False
            got, row = [t[at[0], :, at[1]] for t in cache], x[b, :, s]
            if c.format is None:
                assert_close(got[0], row, *((1e-12, 1e-12) if exact else loose), dtype=c.dtype)
            elif exact:
                for part, want in zip(got, KV_FORMATS[c.format].quantize(row.to(c.dtype)), strict=True):
                    assert_equal(part, want)
            else:
                near(c, got, row.to(c.dtype))
        for t, before in zip(cache, old, strict=True):
            kept, was = t.transpose(1, 2)[untouched], before.transpose(1, 2)[untouched]
            assert_equal(kept.nan_to_num(7.5), was.nan_to_num(7.5))


def near(c: Case, got: list[Tensor], row: Tensor) -> None:
    """Codes are at most one apart: a last bit can push a number over an edge; bfloat16's is half a code of 8 bits."""
    assert c.format is not None
    f = KV_FORMATS[c.format]
    codes, scale = f.quantize(row)
    assert_close(got[1].float(), scale.float(), *((1e-3, 5e-4) if c.dtype == torch.float32 else LOOSE[c.dtype]))
    split = [t if f.bits == 8 else torch.cat((t & 15, t >> 4), -1) for t in (got[0], codes)]
    apart = (split[0].int() - split[1].int()).abs()
    most = 2 if f.bits == 8 and c.dtype == torch.bfloat16 else 1
    assert apart.max() <= most and (apart > 0).float().mean() < APART[c.dtype]


CASES = [
    Case(),
    Case(Hq=32, Hk=8, D=128, Dv=128, R=128, dtype=torch.bfloat16),
    Case(B=2, S=5, slots="row", dtype=torch.float16),
    Case(B=3, S=4, slots="rows", normed=True),
    Case(B=3, S=6, slots="negative", normed=True, cast_first=True, dtype=torch.bfloat16),
    Case(B=2, S=3, D=80, Dv=48, R=80, slots="first"),
    Case(B=2, S=3, D=128, Dv=64, R=32, interleaved=True, slots="rows"),
    Case(R=0, S=2, dtype=torch.bfloat16),
    Case(R=0, normed=True, Hq=3, Hk=1, D=256, Dv=256, dtype=torch.float16),
    Case(B=2, S=5, pages=True, slots="negative"),
    Case(B=2, S=3, pages=True, slots="first", dtype=torch.bfloat16, normed=True),
    Case(format="int8", R=0),
    Case(format="int8", B=2, S=3, D=96, Dv=80, R=96, normed=True, slots="rows"),
    Case(format="int8", B=2, S=4, pages=True, slots="negative", dtype=torch.bfloat16, R=0),
    Case(format="int8", R=16, interleaved=True, dtype=torch.float16, slots="row"),
    Case(format="int4", R=0, S=3),
    Case(format="int4", B=2, S=3, D=128, Dv=192, R=128, normed=True, slots="rows"),
    Case(format="int4", B=2, S=4, pages=True, slots="negative", dtype=torch.bfloat16, R=0),
    Case(format="int4", R=32, Hq=5, Hk=3, dtype=torch.bfloat16, slots="row", normed=True, cast_first=True),
]  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("case", CASES, ids=[str(i) for i in range(len(CASES))])
def test_appends(case: Case, name: str, device: str) -> None:
    check(Problem(case, device), name)


@pytest.mark.slow
@pytest.mark.parametrize("format", [None, "int8", "int4"])
@pytest.mark.parametrize("dtype", APART)
def test_appends_at_every_size(dtype: torch.dtype, format: str | None, device: str) -> None:
    for (D, Dv), part, S, pages in product(((192, 128), (320, 64)), (0.5, 1), (3, 7), (False, True)):
        slots, R = {3: "rows", 7: "negative"}[S], int(part * D)
        case = Case(2, 6, 3, S, D, Dv, R, dtype, format, S == 3, part == 0.5, S == 7, pages, slots)
        check(Problem(case, device), "kernel")


FAULTS: dict[str, Callable[[Problem], Tensor]] = {
    "k": lambda p: p.k.roll(1, -1),
    "v": lambda p: p.v.roll(1, 1),
    "q": lambda p: -p.q,
    "sin": lambda p: -p.sin,
    "places": lambda p: (p.places + 1) % LENGTH,
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(fault: str, name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    p = Problem(Case(B=2, S=3, slots="rows"), device)
    done = p.run(name)
    monkeypatch.setattr(p, "run", lambda _: done)
    check(p, name)
    setattr(p, fault, FAULTS[fault](p))
    with pytest.raises(AssertionError):
        check(p, name)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("format", KV_FORMATS)
def test_rows_that_have_no_scale(format: str, name: str, device: str) -> None:
    """Zeros and equal numbers come back as they are; what is not finite comes back as NaN, whole groups of it."""
    p = Problem(Case(R=0, format=format, Hk=4), device)
    p.v[0, 0], p.v[0, 1], p.v[0, 2, :, 5], p.v[0, 3, :, 5] = 0.0, 3.0, float("nan"), float("inf")
    _, (_, (codes, scale)) = p.run(name)
    back = KV_FORMATS[format].dequantize(codes, scale, torch.float32)[0, :, 2]
    assert_equal(back[0], p.v[0, 0, 0])
    assert_close(back[1], p.v[0, 1, 0], 1e-6, 1e-6)
    assert back[2, :32].isnan().all() and (format == "int4" or back[3].isnan().all())


def test_slots_beyond_the_end(device: str) -> None:
    """The kernel writes nothing; where the host can look it says so."""
    p = Problem(Case(S=2, slots="rows"), device)
    p.places = torch.tensor([[3, LENGTH]], device=device)
    _, (keys, _) = p.run("kernel")
    assert keys[0].isfinite().any(-1).sum() == 2  # of both heads, slot 3
    one = Problem(Case(R=0), device)
    one.places, one.case = torch.tensor([[12]]), one.case._replace(slots="rows")
    for beyond in (p, one):
        with pytest.raises(ValueError, match="slot 12 is beyond the 12"):
            beyond.run("op")
    paged = Problem(Case(S=2, slots="rows", pages=True), device)
    assert paged.table is not None
    paged.table[0, 1] = 99  # no such page
    paged.places = torch.tensor([[3, 4]], device=device)
    _, (keys, _) = paged.run("kernel")
    assert keys[0].isfinite().any(-1).sum() == 2


BAD: dict[str, Callable[[Problem], dict[str, Any]]] = {
    "eps must be positive": lambda p: {"eps": 0.0},
    "weights and bias must be": lambda p: {"q_weight": p.q.new_ones(3)},
    "k_scale is given, but no format": lambda p: {"k_scale": p.q},
    "format must be None or one of int8, int4; got 'fp8'": lambda p: {"format": "fp8"},
    "k_cache must be torch.int8": lambda p: {"format": "int8"},
    r"block_table must be int32 \[1, max_pages\]": lambda p: {"block_table": p.places},
    "2 tokens from slot 11 on do not fit into 12 slots": lambda p: {"slots": 11},
    r"slots must be int32 or int64 \[2\]": lambda p: {"slots": p.places[0, :1]},
    "cos and sin go together": lambda p: {"sin": None},
    "even are wanted": lambda p: {"v": p.v[:, :1]},
    "of one dtype": lambda p: {"v": p.v.half()},
    "differ in length": lambda p: {"v_cache": p.caches[1][0][:, :, 1:]},
    r"v_cache must be torch.float32 \[1, 2, L, 64\]": lambda p: {"v_cache": p.caches[1][0][..., 1:]},
}


@pytest.mark.parametrize("message", BAD)
def test_what_does_not_fit_is_refused(message: str, device: str) -> None:
    p = Problem(Case(S=2), device)
    good = {"q": p.q, "k": p.k, "v": p.v, "cos": p.cos, "sin": p.sin, "k_cache": p.caches[0][0],
            "v_cache": p.caches[1][0], "slots": 0}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        append_kv(**{**good, **BAD[message](p)})
    assert p.caches[0][0].isnan().all()


@pytest.mark.parametrize("format", [None, "int8"])
def test_compiles_whole_and_differentiates(format: str | None, device: str, monkeypatch: Any, opaque: None) -> None:
    torch._dynamo.reset()
    p = Problem(Case(S=2, normed=True, format=format, slots="row"), device)
    monkeypatch.setitem(RUNS, "compiled", torch.compile(append_kv, fullgraph=True, backend="aot_eager"))
    with torch.no_grad():
        (got, found), (want, caches) = p.run("compiled"), p.run("op")
    assert_equal(got, want)
    for new, old in zip(sum(found, []), sum(caches, []), strict=True):
        assert_equal(new.nan_to_num(7.5), old.nan_to_num(7.5))
    p.q = p.q.detach().requires_grad_()
    p.run("op")[0].sin().sum().backward()
    exact = p.q.detach().double().requires_grad_()
    p.turned(exact, p.weights[0]).sin().sum().backward()
    assert_close(p.q.grad, exact.grad, dtype=torch.float32)
