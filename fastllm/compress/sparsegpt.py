"""SparseGPT: prune column by column, and let the columns still to come make up for it.

Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", 2023. It is GPTQ's
sweep with another way to settle a column: to 0 where the mask says so, and else to itself, or to the nearest code.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..formats import IntFormat
from ..quantizers import codes_and_scales
from ..sparse_formats import SparseFormat, largest
from .patterns import Blocks, Pattern
from .sweep import BLOCK, sweep


class Rounding:
    """Symmetric integers for a weight [N, K], whose scales are those of `w`; `codes` [N, K] once all columns came."""

    def __init__(self, w: Tensor, format: IntFormat, dtype: torch.dtype):
        """dtype: of the scales, [N, G]."""
        method = "hqq" if format.bits == 4 else "rtn"
        self.nearest, self.scale, self.zero = codes_and_scales(w, format, method, dtype)
        self.group, self.highest = format.group_of(w.shape[1]), 2**format.bits - 1
        self._codes = torch.empty(*w.shape[::-1], dtype=torch.uint8, device=w.device)
        self._scales, self._zeros = self.scale.t().contiguous(), self.zero.t().contiguous()

    @property
    def codes(self) -> Tensor:
        return self._codes.t()

    def __call__(self, k: int, column: Tensor, kept: Tensor) -> Tensor:
        """Column k, [N], as it reads back, 0 where it is not kept."""
        s, z = self._scales[k // self.group], self._zeros[k // self.group]
        q = torch.where(kept, (column / s).add_(z).round_().clamp_(0, self.highest), z)
        self._codes[k] = q
        return q.sub_(z).mul_(s)


def sparsegpt(
    w: Tensor, factor: Tensor, pattern: Pattern, mask: Tensor | None = None, rounding: Rounding | None = None
) -> tuple[Tensor, Tensor]:
    """(the pruned weight [N, K], its mask bool [N, K]); with `rounding` it is rounded in the same sweep.

    factor: from `inverse_factor`, [K, K]. Of each stretch those weights go whose loss costs the outputs least, given
    that later columns make up for it: w**2 over the square of the factor's diagonal, for w as it is by then.
    mask:   if that is settled already
    """
    w = w.float()
    look, stretch = None, BLOCK
    if mask is None:
        mask = pattern.largest(w.abs() / factor.diagonal())
        look, stretch = _looker(mask, factor.diagonal(), pattern)
    kept = mask.t().contiguous()

    def choose(k: int, columns: Tensor) -> None:
        if look is not None:
            kept[k : k + len(columns)] = look(k, columns)

    def settle(k: int, column: Tensor) -> Tensor:
        return column.masked_fill(~kept[k], 0) if rounding is None else rounding(k, column, kept[k])

    found = sweep(w, factor, settle, choose, stretch)
    return found, kept.t()


Looker = Callable[[int, Tensor], Tensor]


def _looker(mask: Tensor, pivots: Tensor, pattern: Pattern) -> tuple[Looker | None, int]:
    """(what chooses the mask of a stretch [n, N] again, from its columns as they are by then; how long it is)."""
    if isinstance(pattern, Blocks):
        return None, BLOCK

    def scores(k: int, columns: Tensor) -> Tensor:
        return (columns / pivots[k : k + len(columns), None]).abs().t()  # [N, n]

    if isinstance(pattern, SparseFormat):
        n, m = (2, 4) if pattern.quads else (pattern.kept, 32)
        return lambda k, columns: largest(scores(k, columns), n, m).t(), m

    def as_many(k: int, columns: Tensor) -> Tensor:
        """As many of each row as were to stay here by the weights at the start, so that rows keep their number."""
        count = mask[:, k : k + len(columns)].sum(1, keepdim=True)
        rank = scores(k, columns).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        return (rank < count).t()

    return as_many, BLOCK
