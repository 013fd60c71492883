"""The op `fastllm::expert_matmul`: each row of x times the quantized weights of the expert it was sent to."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from .layout import Prepared
from .library import LIBRARY
from .quant_matmul import LAYOUTS

INVARIANT = 64  # rows of an expert to choose the tile for when results must not depend on how many there are

LIBRARY.define("plan_experts(Tensor index, int count, int BLOCK_M) -> (Tensor, Tensor)")
LIBRARY.define(
    "expert_matmul(Tensor x, Tensor slots, Tensor experts, Tensor w, Tensor scale, Tensor? zero, Tensor? bias, "
    "int N, int bits, int group, int per_token) -> Tensor"
)


def block_m(rows: int, device: torch.device) -> int:
    """How many slots a tile should have, for experts with `rows` rows each on average."""
    if device.type != "cuda":
        return 16
    from ..kernels.expert_matmul import block_m

    return block_m(rows, device)


def plan_experts(index: Tensor, count: int, BLOCK_M: int) -> tuple[Tensor, Tensor]:
    """Slots by expert, in tiles of BLOCK_M: (slots int32 [T * BLOCK_M], experts int32 [T]).

    index: int [S], the expert of each slot, `count` for none. Tile t holds slots[t * BLOCK_M:][:BLOCK_M], -1 where
    there are no more, all of experts[t]; -1 for tiles that are not needed. T depends on the shapes alone.
    """
    return torch.ops.fastllm.plan_experts(index, count, BLOCK_M)


def expert_matmul(
    x: Tensor,
    slots: Tensor,
    experts: Tensor,
    w: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    N: int,
    bits: int,
    group: int,
    per_token: int,
) -> Tensor:
    """y[s] = x[s // per_token] @ dequantize(weights of its expert).T + bias: [S, N], S = M * per_token.

    x: [M, K] float16, bfloat16 or float32. slots, experts: from `plan_experts`. w, scale, zero, bias: operands in the
    planar layout, those of all experts one below the other: [E * N, ...]. Slots without an expert give rows of any
    content. Not differentiable.
    """
    return torch.ops.fastllm.expert_matmul(x, slots, experts, w, scale, zero, bias, N, bits, group, per_token)


def _plan(index: Tensor, count: int, BLOCK_M: int) -> tuple[Tensor, Tensor]:
    slots, experts = _plan_like(index, count, BLOCK_M)
    slots.fill_(-1)
    experts.fill_(-1)
    tile = 0
    for expert in range(count):
        for part in torch.where(index == expert)[0].split(BLOCK_M):
            if len(part):
                slots[tile * BLOCK_M : tile * BLOCK_M + len(part)] = part.int()
                experts[tile] = expert
                tile += 1
    return slots, experts


def _plan_cuda(index: Tensor, count: int, BLOCK_M: int) -> tuple[Tensor, Tensor]:
    from ..kernels.expert_matmul import plan_experts

    return plan_experts(index, count, BLOCK_M)


def _matmul(
    x: Tensor,
    slots: Tensor,
    experts: Tensor,
    w: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    N: int,
    bits: int,
    group: int,
    per_token: int,
) -> Tensor:
    """The definition: tile by tile, dequantised."""
    y, layout = x.new_zeros(len(x) * per_token, N), LAYOUTS["planar"]
    for expert, tile in zip(experts.tolist(), slots.view(len(experts), -1), strict=True):
        if expert < 0:
            continue
        rows, here = tile[tile >= 0].long(), slice(expert * N, (expert + 1) * N)
        dense = layout.dense(Prepared(w, scale, zero), bits, group, here, x.shape[1], torch.float32)
        own = None if bias is None else bias[here].float()
        y[rows] = linear(x[rows // per_token].float(), dense, own).to(x.dtype)
    return y


def _matmul_cuda(x: Tensor, slots: Tensor, experts: Tensor, w: Tensor, scale: Tensor, *rest: Any) -> Tensor:
    from ..kernels.expert_matmul import expert_matmul

    return expert_matmul(x, slots, experts, w, scale, *rest)


LIBRARY.impl("plan_experts", _plan, "CPU")
LIBRARY.impl("plan_experts", _plan_cuda, "CUDA")
LIBRARY.impl("expert_matmul", _matmul, "CPU")
LIBRARY.impl("expert_matmul", _matmul_cuda, "CUDA")


@torch.library.register_fake("fastllm::plan_experts", lib=LIBRARY)
def _plan_like(index: Tensor, count: int, BLOCK_M: int) -> tuple[Tensor, Tensor]:
    S = index.shape[0]
    tiles = min(S, count) + S // BLOCK_M
    return index.new_empty(tiles * BLOCK_M, dtype=torch.int32), index.new_empty(tiles, dtype=torch.int32)


@torch.library.register_fake("fastllm::expert_matmul", lib=LIBRARY)
def _(x: Tensor, slots: Tensor, experts: Tensor, w: Tensor, scale: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0] * rest[-1], rest[2])
