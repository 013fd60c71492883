"""The prefill kernel against the definition, in the interpreter or on a GPU: features, shapes, strides, refusals."""

from collections.abc import Callable
from itertools import combinations, product
from typing import Any

import pytest
import torch
from attention_cases import CLASHES, FEATURES, NAN, Case, Problem, assert_attends, excess, problem
from torch import Tensor

from fastllm.kernels.attention_config import AMPERE, BLACKWELL, EXACT, HOPPER, WIDEST, Config, columns, config
from fastllm.kernels.flash_attention import flash_attention, flash_attention_varlen
from fastllm.ops.attention_reference import reference, reference_varlen

HALF, FULL, BRAIN = torch.float16, torch.float32, torch.bfloat16
ONE_LOOP, THREE_LOOPS = Config(16, 32, 4, 2, True), Config(32, 16, 4, 2, False)  # small, so that there are many tiles
SIZES = [(1, 1), (5, 13), (64, 128), (113, 203), (203, 113)]


def check(c: Case, device: str, tile: Config | None = None, rtol: float = 2.0) -> None:
    p = problem(c, device)
    got, lse = p.run(flash_attention, return_lse=True, config=tile)
    assert_attends(got, p, rtol)
    want = p.want_lse()
    assert lse.shape == want.shape and lse.dtype == torch.float32
    assert (lse.isinf() == want.isinf()).all()
    assert (lse.double() - want).nan_to_num(0).abs().max() < 1e-4
    assert got.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("Sq, Sk", SIZES)
def test_sizes(Sq: int, Sk: int, causal: bool, device: str) -> None:
    check(Case(Sq, Sk, ("causal",) if causal else (), B=1, Hkv=1), device)


@pytest.mark.slow
@pytest.mark.parametrize("features", [(), ("causal",), ("causal", "window"), ("window",)])
@pytest.mark.parametrize("Sq, Sk", [(1023, 1024), (1024, 1023)])
def test_large_sizes(Sq: int, Sk: int, features: tuple[str, ...], device: str) -> None:
    check(Case(Sq, Sk, features, D=128, B=1, Hkv=1), device)


SETS = [(), *combinations(FEATURES, 1), *combinations(FEATURES, 2)]
TILED = [*((f, t) for f in SETS[:10] for t in (0, 1)), *((f, i % 2) for i, f in enumerate(SETS[10:]))]


@pytest.mark.parametrize("features, loops", [pair for pair in TILED if not CLASHES <= {*pair[0]}])
def test_features_and_their_pairs(features: tuple[str, ...], loops: int, device: str) -> None:
    case = Case(20, 44, features, D=16, B=2 if len(features) < 2 else 1, Hkv=1)
    check(case, device, (ONE_LOOP, THREE_LOOPS)[loops], rtol=3.0 if "softcap" in features else 2.0)


@pytest.mark.slow
@pytest.mark.parametrize("features", [*combinations(FEATURES, 3)], ids="+".join)
def test_features_by_threes(features: tuple[str, ...], device: str) -> None:
    if not CLASHES <= {*features}:
        check(Case(37, 61, features, D=16, Hkv=1), device, ONE_LOOP, rtol=3.0)


WIDTHS = [(8, 8), (32, 32), (59, 111), (72, 72), (80, 80), (96, 96), (112, 112), (128, 128), (192, 128), (256, 256)]


@pytest.mark.parametrize("D, Dv", WIDTHS)
def test_columns(D: int, Dv: int, device: str) -> None:
    check(Case(33, 70, ("causal",), D=D, Dv=Dv, B=1, Hkv=1, group=1), device)


@pytest.mark.parametrize("values", [16, 64], ids="values in halves of {}".format)
def test_values_in_halves(values: int, device: str) -> None:
    assert columns(32, values)[1] == (16 if values == 16 else 0)
    check(Case(30, 40, ("causal",), D=32, B=1, Hkv=1), device, THREE_LOOPS._replace(VALUES=values))


@pytest.mark.parametrize("group, dtype", [(1, BRAIN), (2, FULL), (4, HALF), (8, BRAIN), (3, FULL)])
def test_groups_of_heads(group: int, dtype: torch.dtype, device: str) -> None:
    tile = EXACT if dtype == FULL else None
    case = Case(20, 30, ("causal", "ranges"), D=16, group=group, dtype=dtype)
    check(case, device, tile, rtol=4.0 if dtype == FULL else 2.0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [1, 16, 45, 1000])
def test_windows(window: int, causal: bool, device: str) -> None:
    for Sq, Sk in ((45, 45), (20, 45), (45, 20)):
        p = problem(Case(Sq, Sk, D=16, B=1, Hkv=1, group=1), device)._replace(
            features={"window": window, "causal": causal}
        )
        for tile in (ONE_LOOP, THREE_LOOPS):
            assert_attends(p.run(flash_attention, config=tile), p)


@pytest.mark.parametrize("pairs", [1, 4, 99])
def test_sections_of_heads(pairs: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs are grouped by what fits in the cache; of six pairs of a sequence and a head, so many at a time."""
    case = Case(20, 12, ("causal",), D=16, group=1, B=3)
    monkeypatch.setattr("fastllm.kernels.flash_attention.NEAR", pairs * 12 * 32 * 2)
    check(case, device, ONE_LOOP)


STRIDED: dict[str, Callable[[Tensor], Tensor]] = {
    "heads after rows": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "rows apart": lambda t: torch.stack((t, t + NAN), 3).flatten(2, 3)[:, :, ::2],
    "columns apart": lambda t: torch.stack((t, t + NAN), 4).flatten(3)[..., ::2],
    "columns first": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "at an odd address": lambda t: torch.cat((t[..., :1] + NAN, t), 3)[..., 1:],
    "expanded": lambda t: t[:1].expand(len(t), -1, -1, -1),
}


@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED)
def test_strides(view: Callable[[Tensor], Tensor], device: str) -> None:
    p = problem(Case(20, 40, ("causal",), D=16, group=1), device)
    q, k, v = (view(t) for t in p[:3])
    assert not (q.is_contiguous() and k.is_contiguous() and v.is_contiguous())
    moved = p._replace(q=q, k=k, v=v)
    assert_attends(moved.run(flash_attention), moved)


MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "one for all": lambda m: m[0, 0],
    "of keys": lambda m: m[:, :1, :1],
    "of queries": lambda m: m[:1, :, :, :1],
    "transposed": lambda m: m.transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.mark.parametrize("view", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("name", ["mask", "added mask"])
def test_masks_are_broadcast(name: str, view: Callable[[Tensor], Tensor], device: str) -> None:
    p = problem(Case(29, 43, (name,), D=16, group=1), device)
    mask = p.features["mask"].expand(2, 2, 29, 43)
    p = p._replace(features={"mask": view(mask)})
    assert_attends(p.run(flash_attention, config=ONE_LOOP), p)


@pytest.mark.parametrize("scale", [-0.5, 0.0, 3.0])
def test_any_scale(scale: float, device: str) -> None:
    p = problem(Case(20, 30, ("causal",), D=16), device)._replace(features={"causal": True, "scale": scale})
    assert_attends(p.run(flash_attention), p)


def test_nothing_to_see(device: str) -> None:
    for Sq, Sk, B in ((3, 0, 2), (0, 3, 2), (3, 3, 0)):
        p = problem(Case(Sq, Sk, D=16, B=B), device)
        y, lse = p.run(flash_attention, return_lse=True)
        assert y.shape == (B, 4, Sq, 16) and (y == 0).all() or Sk == 3
        assert lse.shape == (B, 4, Sq) and (lse == -torch.inf).all()
    none = torch.tensor([50, 20], dtype=torch.int32, device=device)
    p = problem(Case(3, 50, D=16), device)._replace(features={"kv_start": none, "kv_end": none})
    y = p.run(flash_attention, sinks=torch.ones(4, device=device))
    assert (y == 0).all()


# --- sequences that lie one after another


def lines(lengths: list[int], device: str) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)


@pytest.mark.parametrize(
    "tile, features",
    [
        (None, {"causal": True, "window": 9}),
        (ONE_LOOP, {"causal": True}),
        (THREE_LOOPS, {"causal": True, "window": 9}),
        (ONE_LOOP, {"softcap": 2.0}),
    ],
)
def test_sequences(tile: Config | None, features: dict[str, Any], device: str) -> None:
    queries, keys = [5, 0, 20, 1, 17], [9, 7, 20, 0, 6]
    q, k, v = (torch.randn(sum(n), h, 32, device=device).half() for n, h in ((queries, 4), (keys, 2), (keys, 2)))
    cu = lines(queries, device), lines(keys, device)
    more = {"alibi_slopes": torch.rand(5, 4, device=device), "sinks": torch.randn(4, device=device)}
    for extra in ({}, more):
        y, lse = flash_attention_varlen(q, k, v, *cu, 21, **features, **extra, return_lse=True, config=tile)
        want = reference_varlen(q.double(), k.double(), v.double(), *cu, **features, **extra)
        assert y.shape == want.shape and y.is_contiguous() and lse.shape == (4, sum(queries))
        assert (y.double() - want).abs().max() < 3e-3
        assert (y[25] == 0).all()  # the sequence without keys


def test_no_sequences(device: str) -> None:
    q = torch.randn(0, 4, 32, device=device).half()
    assert flash_attention_varlen(q, q, q, lines([], device), lines([], device), 0).shape == (0, 4, 32)
    assert flash_attention_varlen(q, q, q, lines([0], device), lines([0], device), 7).shape == (0, 4, 32)


# --- what is refused


REFUSED: dict[str, Callable[[Problem], Any]] = {
    r"k must have 4 dimensions.*torch.float32": lambda p: p._replace(k=p.k.float()).run(flash_attention),
    r"q must have 4 dimensions": lambda p: p._replace(q=p.q[0]).run(flash_attention),
    r"must be float16, bfloat16 or float32, got torch.float64": lambda p: p.to(torch.float64).run(flash_attention),
    r"k and v do not fit q \[2, 4, 5, 16\]: \[2, 2, 6, 8\]": lambda p: p._replace(k=p.k[..., :8]).run(flash_attention),
    r"do not fit": lambda p: p._replace(v=p.v[:, :, :5]).run(flash_attention),
    r"a multiple of heads of keys, got 3 and 2": lambda p: p._replace(q=p.q[:, :3]).run(flash_attention),
    r"1 to 256 columns, got 16 and, of values, 272": lambda p: p._replace(v=p.v.repeat(1, 1, 1, 17)).run(
        flash_attention
    ),
    r"window must be at least 1.*got 0": lambda p: p.run(flash_attention, window=0),
    r"softcap must be positive.*got -1": lambda p: p.run(flash_attention, softcap=-1.0),
    r"sinks must be a contiguous \[4\]": lambda p: p.run(flash_attention, sinks=torch.ones(2)),
    r"alibi_slopes must be \[4\] or \[2, 4\], got \[3\]": lambda p: p.run(flash_attention, alibi_slopes=torch.ones(3)),
    r"mask must be bool.*int64": lambda p: p.run(flash_attention, mask=torch.ones(5, 6, dtype=torch.long)),
    r"broadcastable to \[2, 4, 5, 6\], got \[5, 7\]": lambda p: p.run(flash_attention, mask=torch.ones(5, 7)),
    r"kv_end must be a contiguous int32 \[2\]": lambda p: p.run(flash_attention, kv_end=torch.ones(2)),
    r"cu_seqlens_k must be a contiguous int32 \[2\]": lambda p: flash_attention_varlen(
        *(t[0].transpose(0, 1) for t in p[:3]), torch.zeros(2, dtype=torch.int32), torch.zeros(3), 4
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_is_refused(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        REFUSED[message](problem(Case(5, 6, D=16), "cpu"))


# --- tiles


@pytest.mark.parametrize("capability", [80, 86, 90, 100, 120])
def test_there_is_a_tile_for_everything(capability: int) -> None:
    for D, Sq, plain in product((1, 16, 64, 72, 96, 128, 129, 192, 256), (1, 64, 65, 4096), (True, False)):
        tile = config(D, 16, True, Sq, False, capability, plain)
        assert tile.BLOCK_M == (64 if Sq <= 64 else 128) and (not tile.OVERLAP or capability == 90)
        assert config(D, 16, True, Sq, True, capability, plain) == EXACT
    assert config(16, 256, True, 99) == config(256, 16, True, 99) == HOPPER[256][0]
    assert {*HOPPER} | {*BLACKWELL} | {*AMPERE} == {64, 128, 192, 256}


def test_columns_are_powers_of_two_that_suffice() -> None:
    for D in range(1, WIDEST + 1):
        first, second = columns(D)
        assert D <= first + second <= max(16, 2 * D - 1) and first + second < D + max(16, D / 2)
        assert all(n == 0 or n >= 16 and n & (n - 1) == 0 for n in (first, second))
    assert [columns(D) for D in (72, 80, 96, 112, 128, 192)] == [
        (64, 16), (64, 16), (64, 32), (128, 0), (128, 0), (128, 64)
    ]  # fmt: skip
    assert columns(256, 128) == (128, 128) and columns(128, 64) == (64, 64) and columns(192, 128) == (128, 64)


@pytest.mark.gpu  # NumPy, and so the interpreter, widens a product that would overflow
def test_offsets_beyond_32_bits(device: str) -> None:
    p = problem(Case(2, 2, D=16, B=2, Hkv=1), device)
    far = torch.zeros(2**31 + 64, dtype=HALF, device=device)
    k = far.as_strided(p.k.shape, (2**31, 32, 16, 1)).copy_(p.k)
    assert_attends(p._replace(k=k).run(flash_attention), p)
    assert excess(p._replace(k=k.roll(1, 0)).run(flash_attention), p) > 0
    assert p.run(reference).shape == p.q.shape
