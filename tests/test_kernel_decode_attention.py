"""The kernel of `decode_attention`, in the interpreter where there is no GPU: every tile, split, format and feature.

Whatever nothing may read holds NaN in every problem (see decode_cases.py).
"""

import itertools
from typing import Any

import pytest
import torch
from close import assert_equal
from decode_cases import FEATURES, Case, Problem, assert_attends, problem
from torch import Tensor

from fastllm.kernels.decode_attention import decode_attention
from fastllm.kernels.decode_config import (
    FASTEST,
    MOST_SPLITS,
    ROWS,
    SHARE_OF_L2,
    SMALL,
    START,
    TOGETHER,
    Config,
    config,
    splits,
)
from fastllm.kernels.tickets import take_tickets

SQS, GROUPS, DS = (1, 2, 5, 16), (1, 2, 4, 8, 7), (32, 64, 72, 80, 96, 128, 192, 256)
LENGTHS = ((1, 33), (100, 37), (64, 16), (129, 0), (15, 65), (200, 3))
PAGES, SPLITS = (0, 0, 16, 128, 32), (1, 2, 3, 7, None)
FORMATS = (None, "int8", "int4")
half, brain, single = torch.float16, torch.bfloat16, torch.float32


def nth(i: int) -> tuple[Case, int | None]:
    """Axes of coprime lengths, so that combinations do not repeat soon; large tiles have few rows."""
    format, Sq, group = FORMATS[i % 3], SQS[(i + i // 4) % 4], GROUPS[i % 5]
    D = (64, 128, 192, 256)[i // 3 % 4] if format == "int4" else DS[(i + i // 8) % 8]
    Dv = {192: 128, 64: 128}.get(D, 0) if i % 2 else 0
    dtype = (half, brain, half, single)[i // 3 % 4]
    ends, page = LENGTHS[(i + i // 6) % 6], PAGES[(i // 3 + i // 15) % 5]
    small = dtype == single or Sq * group * D > 8192 or format == "int4" and D > 64  # these take the longest
    if small:
        group, ends = min(group, 2), ends[:1]
    starts = None if i % 4 else (2, 0)[: len(ends)]
    case = Case(Sq, group, D, Dv, ends, starts, format, page, 1 if small else 1 + i % 2, dtype)
    return case, SPLITS[i // 2 % 5]


GRID = [nth(i) for i in range(120)]
FAST = 22


def check(case: Case, device: str, num_splits: int | None = None, **more: Any) -> None:
    p = problem(case, device)
    y = p.run(decode_attention, num_splits=num_splits, **more)
    assert_attends(y, p)
    assert y.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("case, num_splits", GRID[:FAST], ids=str)
def test_the_grid(case: Case, num_splits: int | None, device: str) -> None:
    check(case, device, num_splits)


@pytest.mark.slow
@pytest.mark.parametrize("case, num_splits", GRID[FAST:], ids=str)
def test_the_rest_of_the_grid(case: Case, num_splits: int | None, device: str) -> None:
    check(case, device, num_splits)


def test_the_grid_meets_every_value() -> None:
    cases = [case for case, _ in GRID[:FAST]]
    assert {case.Sq for case in cases} == set(SQS) and {case.group for case in cases} == set(GROUPS)
    assert {case.D for case in cases} == set(DS) and {case.ends for case in cases} >= set(LENGTHS)
    assert {case.page for case in cases} == set(PAGES) and {n for _, n in GRID[:FAST]} == set(SPLITS)
    assert {(case.format, case.page > 0) for case in cases} == set(itertools.product(FORMATS, (True, False)))
    assert {(case.format, case.dtype) for case in cases} >= set(itertools.product(FORMATS, (half, brain, single)))


@pytest.mark.parametrize("features", [*itertools.combinations(FEATURES, 1), *itertools.combinations(FEATURES, 2)])
def test_features_and_pairs_of_them(features: tuple[str, ...], device: str) -> None:
    i = sum(map(len, features))
    case = Case((1, 3)[i % 2], 2, 64, 0, (70, 9), None, FORMATS[i % 3], (0, 16)[i % 2], 1, half, features)
    check(case, device, 1 + i % 3)


@pytest.mark.parametrize("format", FORMATS)
def test_all_features_at_once(format: str | None, device: str) -> None:
    check(Case(3, 4, 64, 0, (90, 140), (7, 80), format, 16, 1, half, tuple(FEATURES)[:6]), device, 3)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("num_splits", [1, 3, 7])
def test_the_same_bits_at_every_run(num_splits: int, format: str | None, device: str) -> None:
    p = problem(Case(2, 4, 64, 0, (300,), None, format, Hkv=1, features=("sinks",)), device)
    y = p.run(decode_attention, num_splits=num_splits)
    assert_attends(y, p)
    assert_equal(p.run(decode_attention, num_splits=num_splits), y)


@pytest.mark.parametrize("format", FORMATS)
def test_pages_in_any_order_give_the_same_bits(format: str | None, device: str) -> None:
    p = problem(Case(1, 4, 64, 0, (200, 40), None, format, 32, 1), device)
    table = p.options["block_table"]
    pages = len(p.k)
    order = torch.randperm(pages, device=device)
    place = torch.argsort(order).int()
    there = torch.where((table >= 0) & (table < pages), place[table.clamp(0, pages - 1).long()], table)
    names = [name for name in ("k_scale", "v_scale") if name in p.options]
    moved = p._replace(
        k=p.k[order],
        v=p.v[order],
        options={**p.options, "block_table": there, **{name: p.options[name][order] for name in names}},
    )
    assert not moved.k.equal(p.k)
    assert_equal(moved.run(decode_attention, num_splits=3), p.run(decode_attention, num_splits=3))


def test_tickets_go_back_to_zero(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Tensor] = []

    def take(tiles: int, device: torch.device) -> Tensor:
        given.append(take_tickets(tiles, device))
        return given[-1]

    monkeypatch.setattr("fastllm.kernels.decode_attention.take_tickets", take)
    check(Case(ends=(300, 0, 5)), device, 4)
    assert len(given) == 1 and len(given[0]) >= 6 and not given[0].any()


VIEWS = {
    "keys by position": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "part of a longer cache": lambda x: torch.cat((x, x[:, :, :7]), 2)[:, :, : x.shape[2]],
    "part of wider rows": lambda x: torch.cat((x, x), 3)[..., : x.shape[3]],
    "one head among others": lambda x: torch.stack((x, x), 2).flatten(1, 2)[:, ::2],
    "one row for all": lambda x: x[:1].expand(len(x), *x.shape[1:]),
}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("view", VIEWS)
def test_strides(view: str, format: str | None, device: str) -> None:
    p = problem(Case(1, 2, 64, 128, (70, 70), None, format), device)
    k, v = VIEWS[view](p.k), VIEWS[view](p.v)
    options = p.options
    if view == "one row for all":
        names = [name for name in ("k_scale", "v_scale") if name in options]
        options = {**options, **{name: options[name][:1].repeat(2, *[1] * (options[name].ndim - 1)) for name in names}}
    q = torch.stack((p.q, p.q + 1), -1)[..., 0]
    assert not k.is_contiguous() and q.stride(3) == 2
    moved = p._replace(q=q, k=k, v=v, options=options)
    assert_attends(moved.run(decode_attention, num_splits=2), moved)


TILES = sorted({row.tile for rows in ROWS.values() for row in rows} | {*SMALL})


@pytest.mark.parametrize("tile", TILES, ids=lambda t: "-".join(map(str, t)))
def test_every_tile(tile: Config, device: str) -> None:
    formats = [None if bits == 16 else f"int{bits}" for bits in ROWS if tile in [row.tile for row in ROWS[bits]]]
    for i, format in enumerate(formats or [None]):
        case = Case(3, 7, 64, 0, (2 * tile.BLOCK_N + 1,), (tile.BLOCK_N - 1,), format, 16 << i, 1)
        check(case, device, 2, tile=tile)


def test_far_too_large_numbers_stay_where_they_are(device: str) -> None:
    """A NaN in one query; and scores so large that only one key counts."""
    p = problem(Case(2, 2, 64, 0, (70, 9), dtype=half), device)
    clean = p.run(decode_attention)
    p.q[0, 1, 1, 5] = torch.nan
    y = p.run(decode_attention)
    assert y.isnan().any(-1).nonzero().tolist() == [[0, 1, 1]] and y[0, 1, 1].isnan().all()
    assert_equal(y[1], clean[1])
    p = problem(Case(2, 2, 64, 0, (70, 9), dtype=half), device)
    assert_attends(p.run(decode_attention, scale=300.0), p._replace(options={"scale": 300.0}))


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_small_and_large_caches(format: str, device: str) -> None:
    """Values far from 1, rows of zeros, and queries that are large: the tile's float16 has room for them."""
    p = problem(Case(1, 4, 64, 0, (70, 9), format=format, dtype=half), device)
    for factor in (2.0**-5, 2.0**9):
        scaled = {name: p.options[name] * factor for name in ("k_scale", "v_scale")}
        moved = p._replace(q=p.q / factor, options={**p.options, **scaled})
        assert_attends(moved.run(decode_attention), moved)
    empty = {name: torch.zeros_like(p.options[name]) for name in ("k_scale", "v_scale")}
    assert (p._replace(options={**p.options, **empty}).run(decode_attention) == 0).all()


def bad(p: Problem, **changes: Any) -> Problem:
    options = {name: value for name, value in changes.items() if name not in Problem._fields}
    return p._replace(**{n: v for n, v in changes.items() if n in Problem._fields}, options={**p.options, **options})


def refusals() -> list[tuple[Problem, str]]:
    p, c8 = problem(Case()), problem(Case(format="int8"))
    c4, paged = problem(Case(format="int4")), problem(Case(page=16))
    return [
        (bad(p, format="int3"), "format may be None, 'int8' or 'int4', not 'int3'"),
        (bad(p, q=p.q[0]), "must have four dimensions"),
        (bad(p, q=p.q.double()), "q must be float16, bfloat16 or float32, got torch.float64"),
        (bad(p, q=p.q.expand(-1, -1, 17, -1)), "1 to 16 positions, got 17"),
        (bad(p, q=p.q[:, :3]), "3 query heads are not a multiple of 2"),
        (bad(p, q=p.q[..., :60]), r"k must be float16 \[2, 2, 105, 60\]"),
        (bad(p, k=p.k.float()), r"k must be float16 .* got torch.float32"),
        (bad(p, v=p.v[:, :, :9]), r"v must be float16 \[2, 2, 105, 64\] on cpu, got torch.float16 \[2, 2, 9, 64\]"),
        (bad(p, k=p.k.mT.contiguous().mT), "k must have unit inner stride"),
        (bad(p, kv_end=p.kv_end.long()), r"kv_end must be int32 \[2\]"),
        (bad(p, kv_start=p.kv_end[:1]), r"kv_start must be int32 \[2\] .* \[1\]"),
        (bad(p, sinks=torch.ones(3)), r"sinks must be float16 or bfloat16 or float32 \[8\]"),
        (bad(p, alibi_slopes=torch.ones(8, dtype=torch.int32)), "alibi_slopes must be float16"),
        (bad(p, mask=torch.ones(2, 8, 1, 104, dtype=torch.bool)), r"mask must be bool .* at least 105"),
        (bad(p, mask=torch.ones(2, 8, 1, 105)), "mask must be bool"),
        (bad(p, window=0), "window must be 1 at least, got 0"),
        (bad(p, softcap=0.0), "softcap must be positive, got 0.0"),
        (bad(p, k_scale=torch.ones(2, 2, 105)), "k_scale is for a quantized cache"),
        (bad(c8, v_scale=None), "v_scale is missing"),
        (bad(c8, k_scale=c8.options["k_scale"].half()), "k_scale must be float32"),
        (bad(c4, k_scale=c4.options["k_scale"].mT.contiguous().mT), "contiguous in its last two dimensions"),
        (bad(c4, q=torch.ones(2, 8, 1, 96).half()), "D may be a multiple of 64 up to 256"),
        (bad(paged, block_table=paged.options["block_table"].long()), "block_table must be int32"),
        (bad(paged, k=paged.k[:, :, :12], v=paged.v[:, :, :12]), "a power of two keys, 16 at least, got 12"),
    ]


def test_operands_that_do_not_fit_are_refused() -> None:
    for wrong, message in refusals():
        with pytest.raises(ValueError, match=message):
            wrong.run(decode_attention)
    p = problem(Case(format="int8"))
    with pytest.raises(ValueError, match="begin at a multiple of 2 bytes"):
        odd = torch.zeros(p.k.numel() + 1, dtype=torch.int8)[1:].view(p.k.shape)
        bad(p, k=odd).run(decode_attention)


@pytest.mark.parametrize("B, Hkv", [(0, 2), (2, 2)])
def test_nothing_to_do(B: int, Hkv: int, device: str) -> None:
    q, k = torch.ones(B, 4, 1, 32, device=device), torch.ones(B, Hkv, 40, 32, device=device)
    y = decode_attention(q, k, k, torch.zeros(B, dtype=torch.int32, device=device))
    assert y.shape == q.shape and (y == 0).all()


def cost(B: int, Hkv: int, L: int, rows: int, D: int, bits: int, processors: int) -> tuple[float, int]:
    """Bytes that each multiprocessor's share of the memory could have delivered meanwhile, and the splits: the model
    of `splits`, told again."""
    tile, key_bytes = config(rows, D, bits), 2 * D * bits // 8
    sums, blocks, tiles = 4 * min(rows, tile.BLOCK_M) * D, -(-L // tile.BLOCK_N), -(-rows // tile.BLOCK_M) * B * Hkv
    count = splits(tiles, L, tile, key_bytes, sums, processors)
    kept = sums if count > 1 else 0
    program = -(-blocks // count) * tile.BLOCK_N * key_bytes + START + kept
    full, rest = divmod(tiles * count, TOGETHER * processors)
    last = max(rest / processors, -(-rest // processors) / FASTEST, float(full == 0))
    return (TOGETHER * full + last) * program + kept * count / SHARE_OF_L2, count


@pytest.mark.parametrize("processors", [108, 132, 148])
@pytest.mark.parametrize("Hkv, rows, D", [(8, 4, 128), (1, 4, 256), (2, 16, 256), (8, 32, 128), (4, 7, 64)])
def test_no_batch_size_is_a_cliff(Hkv: int, rows: int, D: int, processors: int) -> None:
    """Caches of 256 MB and more: one row more changes the time for a byte by 15 % at most, and 85 % of it is reading,
    or 75 % where the sums of many query heads are as large as what is read for them."""
    for bits, L in itertools.product((16, 8, 4), (2048, 4096, 8192, 32768)):
        each = Hkv * L * 2 * D * bits // 8
        before = None
        for B in range(1, 130):
            time, count = cost(B, Hkv, L, rows, D, bits, processors)
            per_row = time / B
            if B * each >= 256 << 20 and rows <= config(rows, D, bits).BLOCK_M:
                assert each / processors / per_row > (0.85 if rows * D <= 1024 else 0.75), (bits, L, B, count)
                assert before is None or 1 / 1.15 < per_row / before < 1.15, (bits, L, B, count)
                before = per_row


def test_splits_fill_the_multiprocessors() -> None:
    tile = config(4, 128, 16)
    chosen = {B: splits(8 * B, 32768, tile, 512, 2048, 132) for B in (1, 2, 4, 16, 17, 64)}
    assert 96 <= 8 * chosen[1] <= 264 and 96 <= 16 * chosen[2] <= 264
    assert splits(8, 1, tile, 512, 2048, 132) == 1  # a block is not shared
    assert splits(1, 1 << 20, tile, 512, 2048, 132) <= MOST_SPLITS
    assert splits(0, 0, tile, 512, 2048, 132) == 1
