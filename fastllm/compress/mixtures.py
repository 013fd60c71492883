"""Calibration of a mixture's experts, each on the tokens that the router sends to it."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..formats import IntFormat, QuantizedWeight
from ..nn.experts import expert_weight, mix
from ..quantizers import quantize
from .blocks import Blocks
from .statistics import Statistics

logger = logging.getLogger("fastllm")

FEW = 8  # an expert with fewer rows than one for so many inputs says too little of itself
Key = tuple[str, int]  # "up" or "down", and the number of the expert
Solve = Callable[[Tensor, IntFormat, Statistics], QuantizedWeight]
Make = Callable[[str, int, Tensor], QuantizedWeight]  # of "up" or "down", the number and the weight


def expert_rounding(
    blocks: Blocks, index: int, name: str, experts: Any, format: IntFormat, products: bool, solve: Solve
) -> Make:
    """How to quantize each projection of each expert of a mixture in a block, by `solve`.

    Experts that too few tokens reach are quantized without data; one warning says how many.
    """
    seen = _observe(blocks, index, experts, products)
    few = sorted({number for (_, number), one in seen.items() if one.count * FEW < len(one.total)})
    if few:
        logger.warning(
            "%s: %d of %d experts get less than one calibration token for %d inputs, and are quantized without data: "
            "%s; give more samples",
            name, len(few), len(experts.down_proj), FEW, ", ".join(map(str, few[:8])) + (", ..." if few[8:] else ""),
        )  # fmt: skip

    def make(which: str, number: int, w: Tensor) -> QuantizedWeight:
        if number in few:
            return quantize(w, format, "hqq" if format.bits == 4 else "rtn")
        weight = solve(w.float(), format, seen.pop((which, number)))
        return weight._replace(scale=weight.scale.to(w.dtype))

    return make


def _observe(blocks: Blocks, index: int, experts: Any, products: bool) -> dict[Key, Statistics]:
    """What each projection of each expert is given, over all batches but for their padding."""
    count = len(experts.down_proj)
    sizes = {which: expert_weight(experts, which, 0)[0].shape[1] for which in ("up", "down")}
    seen = {(which, n): Statistics(K, blocks.device, products) for which, K in sizes.items() for n in range(count)}
    rows: list[Tensor | None] = [None]

    def project(number: int, which: str, x: Tensor) -> Tensor:
        seen[which, number].add(x)
        return linear(x, *expert_weight(experts, which, number))

    def forward(_: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        if rows[0] is not None:  # what is padding goes to no expert
            chosen = torch.where(rows[0].flatten().to(chosen.device)[:, None], chosen, count)
        return mix(experts, project, count, hidden, chosen, weights)

    with blocks.replaced([experts], [forward]):
        for i, batch in enumerate(blocks.batches):
            rows[0] = batch.seen
            with torch.no_grad():
                blocks.answer(index, i)
    return seen
