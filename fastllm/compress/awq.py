"""AWQ: scale up the channels with large inputs before rounding, so that their weights lose less.

Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan, Han, "AWQ: Activation-aware Weight Quantization for LLM Compression
and Acceleration", 2023. The error of a layer's output is not measured by running it but computed from the mean of
x x.T, which says the same for every sample at once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..formats import Format, IntFormat
from ..quantizers import QUANTIZERS, codes_and_scales, decode
from .fold import Share, same
from .statistics import output_error

STEPS = 20  # powers of the inputs' size that are tried, from 0 (nothing) to nearly 1
ROWS = 512  # of each weight, evenly spread, on which they are
SHRINKS = tuple(1 - 0.05 * i for i in range(11))  # of a group's range, from all of it to half


def rounder(format: IntFormat) -> str:
    """What rounds the weights: for symmetric ones the way that uses all levels, which costs nothing."""
    return "hqq" if format.symmetric else "rtn"


def search(
    weights: Sequence[Tensor], formats: Sequence[Format], mean: Tensor, hessian: Tensor, share: Share = same
) -> Tensor:
    """The scale [K] of the channels with which rounding `weights` [N, K] loses least of their outputs.

    mean: of |x|, [K]; hessian: of x x.T, [K, K]; share: makes a vector [K] equal where channels are to have equal
    scales. Among those tried is 1.
    """
    size = torch.stack([w.abs().sum(0) for w in weights]).sum(0) / sum(len(w) for w in weights)
    some = [w[:: max(1, len(w) // ROWS)] for w in weights]
    a, b = share(mean).clamp(min=1e-8), share(size).clamp(min=1e-8)
    best, least = torch.ones_like(a), float("inf")
    tried = [a ** (step / STEPS) for step in range(STEPS)]
    tried += [a ** (step / STEPS) / b ** (1 - step / STEPS) for step in range(STEPS)]
    for raw in tried:
        scale = raw.clamp(min=1e-4)
        scale = scale / (scale.max() * scale.min()).sqrt()
        error = sum(
            float(output_error(_loss(w * scale, f) / scale, hessian).sum()) for w, f in zip(some, formats, strict=True)
        )
        if error < least:
            best, least = scale, error
    return best


def _loss(w: Tensor, format: Format) -> Tensor:
    """What w [N, K] loses by rounding."""
    assert isinstance(format, IntFormat)
    codes, scale, zero = codes_and_scales(w, format, rounder(format), torch.float32)
    return decode(codes, scale, zero, format.group_of(w.shape[1])) - w


def clip(w: Tensor, format: IntFormat, hessian: Tensor) -> Tensor:
    """w [N, K], each group cut to the range with which rounding it loses least of the output.

    Groups are taken one by one, as if the inputs of others were independent.
    """
    (N, K), group, G = w.shape, format.group_of(w.shape[1]), format.groups(w.shape[1])
    pad = G * group - K
    grouped = torch.nn.functional.pad(w, (0, pad)).view(N, G, group)
    padded = torch.nn.functional.pad(hessian, (0, pad, 0, pad)).view(G, group, G, group)
    own = torch.stack([padded[g, :, g] for g in range(G)])  # [G, group, group]
    mask = torch.ones(G, group, device=w.device)
    low, high = grouped.amin(-1, keepdim=True).clamp(max=0), grouped.amax(-1, keepdim=True).clamp(min=0)
    best, least = grouped, torch.full((N, G), float("inf"), device=w.device)
    for shrink in SHRINKS:
        cut = torch.maximum(torch.minimum(grouped, high * shrink), low * shrink)
        scale, zero = QUANTIZERS[rounder(format)](cut, mask, format, torch.float32)
        q = (cut / scale).add_(zero).round_().clamp_(0, 2**format.bits - 1)
        lost = q.sub_(zero).mul_(scale).sub_(grouped)  # [N, G, group]
        error = torch.einsum("ngi,gij,ngj->ng", lost, own, lost)
        better = error < least
        best, least = torch.where(better[..., None], cut, best), torch.where(better, error, least)
    return best.reshape(N, G * group)[:, :K].contiguous()
