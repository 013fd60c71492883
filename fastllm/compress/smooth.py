"""The scale of input channels with which W8A8 loses least: both sides of a product are rounded to 8 bits.

After Xiao, Lin, Seznec, Wu, Demouth, Han, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
Language Models", 2022, who take one formula for all layers. Here the layer's own outputs decide, each row relative to
its size, so that the few huge rows that some models have (that of the first token, above all) count like any other.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .fold import Share, same

OUTPUTS = 512  # of each weight, evenly spread, on which scales are tried
POWERS = tuple(i / 10 for i in range(11))  # of the inputs' size that are tried, from 0 (nothing) to 1 (all of it)
SMALL = 1e-2  # of the mean size: channels are taken to be no smaller, as other rows may have more in them
STEPS, RATE = 30, 0.1  # of the descent, on log(scale)
LEVELS = 127


def search(weights: Sequence[Tensor], rows: Tensor, share: Share = same) -> Tensor:
    """The scale [K], near 1 in the mean of its logarithm, by which inputs are to be divided and `weights` multiplied.

    weights: [N, K] of layers with one input, of which `rows` [R, K] are a sample. share: makes a vector [K] equal
    where channels are to have equal scales. Powers of the channels' size are tried first, 1 among them; from the best,
    log(scale) descends on what rounding is expected to lose. Of all these, the one that loses least on `rows` wins.
    """
    with torch.inference_mode(False), torch.enable_grad():
        x = rows.detach().float().clone()
        some = [w.detach()[:: max(1, len(w) // OUTPUTS)].float().clone() for w in weights]
        want = [x @ w.t() for w in some]
        size = share(_sizes(x))
        tried = [size**power for power in POWERS]
        lost = [output_loss(x, some, want, scale) for scale in tried]
        best = min(range(len(tried)), key=lost.__getitem__)
        found = _descend(x, some, want, tried[best], share)
        scale = found if output_loss(x, some, want, found) < lost[best] else tried[best]
        return scale / scale.log().mean().exp()


def output_loss(x: Tensor, weights: Sequence[Tensor], want: Sequence[Tensor], scale: Tensor) -> float:
    """What rounding x / scale [R, K] and each w * scale [N, K] loses of `want`, x @ w.T [R, N].

    The mean over rows and weights of |got - want|**2 / |want|**2.
    """
    q = _rounded(x / scale)
    lost = [
        ((q @ _rounded(w * scale).t() - y).square().sum(1) * share).sum()
        for w, y, share in zip(weights, want, _shares(want), strict=True)
    ]
    return float(sum(lost) / len(lost))


def _shares(want: Sequence[Tensor]) -> list[Tensor]:
    """By what the squared error of each row counts, [R] for each weight. Rows that are next to nothing count less."""
    energies = [y.square().sum(1) for y in want]
    return [1 / (e.clamp(min=1e-3 * float(e.median()) + 1e-30) * max(1, len(e))) for e in energies]


def _rounded(x: Tensor) -> Tensor:
    """x [R, K] as 8 bits with one scale a row say it."""
    step = x.abs().amax(1, keepdim=True).clamp(min=1e-30) / LEVELS
    return (x / step).round_().mul_(step)


def _sizes(x: Tensor) -> Tensor:
    """Of the channels, [K], relative to the largest value of each row x [R, K], on which the row's rounding hangs."""
    relative = x / x.abs().amax(1, keepdim=True).clamp(min=1e-30)
    size = relative.square().mean(0).sqrt()
    return size.clamp(min=SMALL * float(size.mean()) + 1e-30)


def _descend(x: Tensor, weights: Sequence[Tensor], want: Sequence[Tensor], scale: Tensor, share: Share) -> Tensor:
    """A scale near `scale` [K] with a smaller `_expected`; each step moves a channel by a tenth at most."""
    size, columns = x.abs(), [w.square().sum(0) for w in weights]
    shares = _shares(want)
    log = scale.log().requires_grad_()
    optimizer = torch.optim.Adam([log], lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        _expected(size, weights, columns, shares, share(log).exp()).backward()
        optimizer.step()
        schedule.step()
    return share(log.detach()).exp()


def _expected(
    size: Tensor, weights: Sequence[Tensor], columns: Sequence[Tensor], shares: Sequence[Tensor], scale: Tensor
) -> Tensor:
    """About `output_loss`, as if roundings were independent of each other: smooth but for the maxima.

    size: |x| [R, K]; columns: the sums of w**2 over N, [K]. A value u, in steps, loses u**2 by rounding if it is
    small, and 1/12 in the mean if it is large.
    """
    inputs = size / scale
    step = inputs.amax(1, keepdim=True).clamp(min=1e-30) / LEVELS  # [R, 1]
    steps = (inputs / step).square()
    lost = step.square() * steps / (1 + 12 * steps)  # [R, K]
    energy = inputs.square().sum(1)  # [R]
    total = torch.zeros((), device=size.device)
    for w, column, share in zip(weights, columns, shares, strict=True):
        own = ((w * scale).abs().amax(1) / LEVELS).square().sum() / 12
        total = total + ((lost @ (column * scale.square()) + energy * own) * share).sum()
    return total
