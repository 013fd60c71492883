"""The step that GPTQ and SparseGPT share: settle a weight column by column, and let the others make up for it."""

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 128  # columns after which the rest of the weight is brought up to date


def sweep(
    w: Tensor,
    factor: Tensor,
    settle: Callable[[int, Tensor], Tensor],
    look: Callable[[int, Tensor], None] | None = None,
    stretch: int = BLOCK,
    block: int = BLOCK,
) -> Tensor:
    """w [N, K] with its columns settled from the first to the last, [N, K].

    factor: upper triangular [K, K], from `inverse_factor`, of columns in this order
    settle: (k, column k as it is by then, [N]) -> what becomes of it, [N], which may be the memory that it was given
    look:   called before each `stretch` columns with the number of the first, and them as they are by then, [n, N]
    block:  columns after which those beyond are updated; a multiple of `stretch`
    """
    N, K = w.shape
    rest = w.t().clone(memory_format=torch.contiguous_format)  # [K, N]: a column of w is a row in memory
    pivots = factor.diagonal().tolist()
    for start in range(0, K, block):
        stop = min(start + block, K)
        part, errors = rest[start:stop], rest.new_empty(stop - start, N)
        for j in range(stop - start):
            if look is not None and j % stretch == 0:
                look(start + j, part[j : j + stretch])
            value = settle(start + j, part[j])
            torch.sub(part[j], value, out=errors[j]).div_(pivots[start + j])
            part[j] = value
            part[j + 1 :].addr_(factor[start + j, start + j + 1 : stop], errors[j], alpha=-1)
        rest[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    return rest.t()
