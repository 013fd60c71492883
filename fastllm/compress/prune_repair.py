"""Which units of a block go, and how the layer that takes in the rest makes up for them.

Both from H, the mean of x x.T over the inputs x of that layer, each divided by the size of what the layer answers to
it: what counts is by what share of itself an answer is off, for norms make all of them alike afterwards, and a few
tokens answer a thousand times as loud as others. With W its weight, K the channels kept and R those removed, the
least-squares answer to what the whole layer answers is W_K + W_R H_RK (H_KK + damping)**-1: with much damping, it is
the weight as it was.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from .blocks import Blocks
from .statistics import Statistics, output_error

DAMPING, LITTLE = 0.01, 1.0  # of the mean of the diagonal; and where there are fewer rows than channels are kept
FAILED = 10.0  # by what the damping grows while the factorisation fails
QUIET = 0.1  # of the median answer: those that are smaller count no more than this


class Inputs(NamedTuple):
    """Of the rows x that a layer was given, where each counts the more the smaller its answer is: the mean of x x.T
    [K, K], that of x [K] if it was wanted, with the weight that it has in the products, and the number of rows."""

    products: Tensor
    mean: Tensor | None
    rows: int
    weight: float = 1.0


def observe(blocks: Blocks, index: int, name: str, w: Tensor, bias: Tensor | None) -> Inputs:
    """What a layer of a block is given, over all batches: that of weight w [N, K], whose mean is wanted with a bias.

    ValueError if that is not finite, or nothing.
    """
    K, mean = w.shape[1], bias is not None
    statistics = Statistics(K + mean, blocks.device)

    def seen(name: str, x: Tensor, rows: Tensor | None) -> bool:
        x = (x if rows is None else x[rows]).reshape(-1, K).float()
        size = linear(x, w, None if bias is None else bias.float()).norm(dim=1, keepdim=True)
        if len(x):
            loud = size.clamp(min=QUIET * float(size.median()))
            x = torch.cat((x, x.new_ones(len(x), 1)), 1) if mean else x
            statistics.add(x / torch.where(loud > 0, loud, 1.0))
        return True

    blocks.watch(index, {name: blocks.layers[index].get_submodule(name)}, seen)
    H = statistics.hessian
    if not bool(H.isfinite().all()):
        raise ValueError(f"{blocks.name(index)}.{name}: what goes in is not finite; the model answers NaN or infinity")
    if not statistics.count:
        raise ValueError(f"{blocks.name(index)}.{name} did not run on the calibration data")
    if not mean:
        return Inputs(H, None, statistics.count)
    return Inputs(H[:K, :K].contiguous(), H[:K, K] / H[K, K], statistics.count, float(H[K, K]))


def scores(w: Tensor, H: Tensor, units: int) -> Tensor:
    """The root mean square, over inputs, of what each unit adds to the output: |w_u x_u|, [units].

    w [N, K], H [K, K] the mean of x x.T; a unit has K / units channels. Of one channel that is |w_c| times the root
    mean square of x_c.
    """
    width = w.shape[1] // units
    if width == 1:
        return (w.square().sum(0) * H.diagonal()).sqrt()
    own = [
        output_error(w[:, s : s + width], H[s : s + width, s : s + width]).sum() for s in range(0, w.shape[1], width)
    ]
    return torch.stack(own).clamp(min=0).sqrt()


def strongest(score: Tensor, count: int) -> list[int]:
    """The units of the highest scores, in their order; of equal ones the first."""
    return sorted(score.argsort(descending=True, stable=True)[:count].tolist())


class Repaired(NamedTuple):
    """A layer for the channels that are kept: weight [N, kept], bias [N] or None, and by what share of itself its
    output is off (a mean square over a mean square) without repair and with it."""

    weight: Tensor
    bias: Tensor | None
    without: float
    error: float


def repair(w: Tensor, bias: Tensor | None, seen: Inputs, kept: Tensor, wanted: bool = True) -> Repaired:
    """w [N, K] float32 for the channels `kept` (sorted int64) only. wanted: whether it is to make up for the others.

    With a bias, which takes in the mean of what is lost, the products are those of inputs without their mean.
    """
    H, mean = seen.products, seen.mean
    kept = kept.to(w.device)
    gone = torch.ones(w.shape[1], dtype=torch.bool, device=w.device).index_fill_(0, kept, False).nonzero()[:, 0]
    whole = float(output_error(w, H).sum())
    lost = w[:, gone]
    without = float(output_error(lost, H[gone[:, None], gone]).sum())
    plain = w[:, kept]
    if not wanted or whole <= 0:
        return Repaired(plain, bias, without / max(whole, 1e-30), without / max(whole, 1e-30))
    C = H if mean is None else H - seen.weight * mean[:, None] * mean
    delta = _solve(C[kept[:, None], kept], C[kept[:, None], gone] @ lost.t(), seen.rows).t()
    difference = torch.zeros_like(w).index_copy_(1, kept, delta).index_copy_(1, gone, -lost)
    error = float(output_error(difference, C).sum())
    if bias is not None and mean is not None:
        bias = bias.float() + lost @ mean[gone] - delta @ mean[kept]
    return Repaired(plain + delta, bias, without / whole, error / whole)


def _solve(H: Tensor, right: Tensor, count: int) -> Tensor:
    """(H + damping)**-1 right, for H [K, K] that may be singular; the damping grows until that can be done."""
    mean = float(H.diagonal().mean())
    damping = DAMPING if count >= len(H) else LITTLE
    while mean > 0 and damping < 1e4:
        work = H.clone()
        work.diagonal().add_(damping * mean)
        factor, failed = torch.linalg.cholesky_ex(work)
        if not int(failed):
            answer = torch.cholesky_solve(right, factor)
            if bool(answer.isfinite().all()):
                return answer
        damping *= FAILED
    return torch.zeros_like(right)


def shortage(counts: Sequence[int], kept: int) -> str:
    """What to say if there are fewer rows than channels kept."""
    if min(counts) >= kept:
        return ""
    return (
        f"{min(counts)} tokens of calibration data for {kept} channels to repair from: give at least {kept}, better "
        f"some times as many; the repair is damped by {LITTLE} in place of {DAMPING}"
    )
