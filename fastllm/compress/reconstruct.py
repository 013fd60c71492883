"""What the weights that stay can do for those that went: least squares on the outputs, by conjugate gradients.

It does not care how the mask was found, and costs a matrix product for each step. Meng et al., "ALPS: Improved
Optimization for Highly Sparse One-Shot Pruning for Large Language Models", 2024, end with the same step.
"""

import torch
from torch import Tensor

from .statistics import output_error

STEPS = 20
DAMPING = 1e-3  # of the mean of the diagonal: inputs seen too rarely leave the weights near what they were


def reconstruct(w: Tensor, start: Tensor, mask: Tensor, hessian: Tensor, steps: int = STEPS) -> Tensor:
    """The weight [N, K], 0 where `mask` is not, whose outputs are nearest to those of w [N, K]; float32.

    Minimises the mean of |(w - q) x|**2, and a little of |w - q|**2, over the inputs x of which `hessian` [K, K] is
    the mean of x x.T, from q = `start`, all rows at once, preconditioned by the diagonal. No row gets worse.
    """
    w, kept = w.float(), mask.float()
    first = start.float() * kept
    diagonal = hessian.diagonal()
    damping = DAMPING * float(diagonal.mean())
    if damping <= 0:
        return first
    scale = 1 / (diagonal + damping)
    q = first.clone()
    residual = _times(w - q, hessian, damping).mul_(kept)
    step = residual * scale
    energy = (residual * step).sum(1, keepdim=True)
    for _ in range(steps):
        image = _times(step, hessian, damping).mul_(kept)
        curvature = (step * image).sum(1, keepdim=True)
        length = torch.where(curvature > 0, energy / curvature, 0.0)  # 0: the row is solved
        q.addcmul_(length, step)
        residual.addcmul_(length, image, value=-1)
        before, energy = energy, (residual * residual * scale).sum(1, keepdim=True)
        step.mul_(torch.where(before > 0, energy / before, 0.0)).addcmul_(residual, scale)
    better = output_error(q - w, hessian) < output_error(first - w, hessian)
    return torch.where(better[:, None], q, first)


def _times(step: Tensor, hessian: Tensor, damping: float) -> Tensor:
    return torch.addmm(step, step, hessian, beta=damping)
