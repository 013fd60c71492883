"""The products of a mixture of experts in one launch: each row of x with the weights of the expert it was sent to."""

import torch
import triton
import triton.language as tl

from .launch import on_device
from .operands import device_of, interpreted
from .quant_config import SMALL, Config, Row, rows_of, tile_of
from .quant_matmul import _launch, _quant_matmul, aligned


@triton.jit
def _plan_experts(
    index, slots, experts, S, count, tiles,
    COUNT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program e writes the tiles of expert e, in the order of slots; the last one marks the tiles that are left over.

    A sort by counting: every program counts all slots, for it must know where the experts before it end.
    """
    expert = tl.program_id(0)
    offs_e, offs = tl.arange(0, COUNT), tl.arange(0, BLOCK)
    counts = tl.zeros((COUNT,), tl.int32)
    for start in range(0, S, BLOCK):
        e = tl.load(index + start + offs, mask=start + offs < S, other=-1).to(tl.int32)
        counts += tl.sum((e[:, None] == offs_e[None, :]).to(tl.int32), 0)  # a slot without an expert: none of them
    counts = tl.where(offs_e < count, counts, 0)
    each = tl.cdiv(counts, BLOCK_M)
    first = tl.sum(tl.where(offs_e < expert, each, 0), 0)
    own = tl.sum(tl.where(offs_e == expert, each, 0), 0)
    if expert == count:
        for tile in range(first, tiles):
            tl.store(experts + tile, -1)
    else:
        for tile in range(first, first + own):
            tl.store(experts + tile, expert)
        at = first * BLOCK_M
        for start in range(0, S, BLOCK):
            e = tl.load(index + start + offs, mask=start + offs < S, other=-1).to(tl.int32)
            mine = (e == expert).to(tl.int32)
            tl.store(slots + at + tl.cumsum(mine, 0) - 1, start + offs, mask=mine > 0)
            at += tl.sum(mine, 0)
        end = (first + own) * BLOCK_M
        rest = at + tl.arange(0, BLOCK_M)
        tl.store(slots + rest, -1, mask=rest < end)


def plan_experts(index: torch.Tensor, count: int, BLOCK_M: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots by expert, in tiles of BLOCK_M: (slots int32 [T * BLOCK_M], experts int32 [T]).

    index: int [S], the expert of each slot, `count` for none. Tile t holds slots[t * BLOCK_M:][:BLOCK_M], -1 where
    there are no more, all of experts[t]; -1 for tiles that are not needed, whose slots are not written. T is the most
    that S slots can take, so that nothing has to wait for the device.
    """
    S = len(index)
    tiles = min(S, count) + S // BLOCK_M
    slots = index.new_empty(tiles * BLOCK_M, dtype=torch.int32)
    experts = index.new_empty(tiles, dtype=torch.int32)
    known = tl.constexpr if interpreted(_plan_experts) else int  # NumPy 2.4 refuses a tensor as a loop's bound
    with on_device(index.device):
        _plan_experts[(count + 1,)](
            index, slots, experts, known(S), count, known(tiles),
            COUNT=triton.next_power_of_2(count), BLOCK_M=BLOCK_M, BLOCK=128,
        )  # fmt: skip
    return slots, experts


def _rows(device: torch.device) -> tuple[Row, ...]:
    return rows_of(device_of(device.index)[0] if device.type == "cuda" else 90)


def block_m(rows: int, device: torch.device) -> int:
    """How many slots a tile should have, for experts with `rows` rows each on average."""
    return next(row.tile.BLOCK_M for row in _rows(device) if rows <= row.rows)


def expert_tile(BLOCK_M: int, K: int, bits: int, dtype: torch.dtype, device: torch.device) -> Config:
    """The tile of BLOCK_M rows; K is not shared, for there are programs enough."""
    if dtype == torch.float32 or K % 16:
        return SMALL.tile._replace(BLOCK_M=BLOCK_M)
    return tile_of(next(row for row in _rows(device) if row.tile.BLOCK_M == BLOCK_M), bits)


def expert_matmul(
    x: torch.Tensor,
    slots: torch.Tensor,
    experts: torch.Tensor,
    w: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    N: int,
    bits: int,
    group: int,
    per_token: int,
    tile: Config | None = None,
) -> torch.Tensor:
    """y[s] = x[s // per_token] @ dequantize(weights of its expert).T + bias: [S, N] of x's dtype, S = M * per_token.

    x: [M, K]. slots, experts: from `plan_experts`. w, scale, zero, bias: as for
    `quant_matmul`, those of all experts one below the other: [E * N, ...]. Rows of slots without an expert are not
    written. Raises ValueError for operands that do not fit.
    """
    if len(x) == 0:
        return x.new_empty(0, N)
    if x.dtype == torch.bfloat16 and interpreted(_quant_matmul):  # see quant_matmul
        y = expert_matmul(x.float(), slots, experts, w, scale, zero, bias, N, bits, group, per_token, tile)
        return y.to(x.dtype)
    if tile is None:
        tile = expert_tile(len(slots) // len(experts), x.shape[1], bits, x.dtype, x.device)
    tile = tile._replace(SPLIT_K=1)
    if len(slots) != len(experts) * tile.BLOCK_M or len(w) % N:
        raise ValueError(f"{len(slots)} slots are not {len(experts)} tiles of {tile.BLOCK_M}, or {len(w)} % {N} > 0")
    y = x.new_empty(len(x) * per_token, N)
    _launch(aligned(x), w, scale, zero, bias, y, bits, group, tile, slots, experts, per_token)
    return y
