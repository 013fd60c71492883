"""GPTQ: round a weight column by column, and let the columns still to come make up for the error.

Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", 2022. The groups keep their columns and their scales, which are those of the weight as it was, while the
columns are taken in the order of how large their inputs are ("static groups"): so no layer has to permute its input.
"""

import torch
from torch import Tensor

from ..formats import IntFormat, QuantizedWeight
from ..quantizers import codes_and_scales, decode, packed
from .statistics import output_error
from .sweep import BLOCK
from .sweep import sweep as sweep_columns

DAMPING = (0.01, 0.03, 0.1, 0.3, 1.0)  # of the mean of the diagonal: the first with which the factorisation succeeds


def gptq(
    w: Tensor,
    hessian: Tensor,
    format: IntFormat,
    dtype: torch.dtype,
    *,
    method: str = "hqq",
    act_order: bool = True,
    block: int = BLOCK,
) -> tuple[QuantizedWeight, str]:
    """(w [N, K] in `format`, why it is not GPTQ's but round-to-nearest's, or "").

    Minimises the mean of |(w - q) x|**2 over the inputs x of which `hessian` [K, K] is the mean of x x.T, greedily.
    dtype: of the scales, which `method` chooses as in `fastllm.quantizers`. No row gets worse than by rounding to
    nearest with the same scales. Raises ValueError for a hessian with NaN or infinity.
    """
    if not bool(hessian.isfinite().all()):
        raise ValueError("the inputs seen in calibration are not finite: the model answers NaN or infinity")
    w = w.float()
    nearest, scale, zero = codes_and_scales(w, format, method, dtype)  # [N, K], [N, G], [N, G]
    diagonal = hessian.diagonal()
    order = diagonal.argsort(descending=True, stable=True) if act_order else torch.arange(w.shape[1], device=w.device)
    factor = inverse_factor(hessian, order)
    if factor is None:
        return packed(nearest, scale, zero, format, dtype), "its inputs do not tell it how to round"
    group = (torch.arange(w.shape[1], device=w.device) // format.group_of(w.shape[1]))[order]
    codes = torch.empty_like(nearest)
    codes[:, order] = sweep(w[:, order], factor, scale, zero, group, 2**format.bits - 1, block)
    found, plain = (
        output_error(decode(q, scale, zero, format.group_of(w.shape[1])) - w, hessian) for q in (codes, nearest)
    )
    codes = torch.where((found < plain)[:, None], codes, nearest)
    return packed(codes, scale, zero, format, dtype), ""


def inverse_factor(hessian: Tensor, order: Tensor) -> Tensor | None:
    """Upper triangular U [K, K] with U.T @ U the inverse of the damped `hessian`, whose rows and columns are taken in
    `order` [K]; None if no damping suffices.
    """
    return next((factor for damping in DAMPING if (factor := _factor(hessian, order, damping)) is not None), None)


def _factor(hessian: Tensor, order: Tensor, damping: float) -> Tensor | None:
    """With one damping; inputs that were always 0 tell nothing: they are taken as independent of all others.

    With J the exchange of first and last, J H J = L @ L.T gives U = J L**-1 J: no inverse of H is made, and there are
    never more than two matrices [K, K] beside it in memory.
    """
    backwards = order.flip(0)
    work = hessian[backwards[:, None], backwards]
    mean = float(work.diagonal().mean())
    if mean <= 0:
        return None
    work.diagonal().masked_fill_(work.diagonal() == 0, mean).add_(damping * mean)
    work, failed = torch.linalg.cholesky_ex(work)
    if int(failed):
        return None
    inverse = torch.eye(len(order), dtype=work.dtype, device=work.device).mT  # as LAPACK wants it: column by column
    torch.linalg.solve_triangular(work, inverse, upper=False, out=inverse)
    del work
    return inverse.flip(0, 1) if bool(inverse.diagonal().isfinite().all()) else None


def sweep(
    w: Tensor, factor: Tensor, scale: Tensor, zero: Tensor, group: Tensor, highest: int, block: int = BLOCK
) -> Tensor:
    """The codes, uint8 [N, K], of w [N, K], whose columns are rounded from the first to the last.

    factor: from `inverse_factor`. scale, zero: [N, G]. group: of each column, int64 [K].
    """
    scales, zeros = scale.to(w.dtype).t().contiguous(), zero.to(w.dtype).t().contiguous()
    codes = torch.empty(*w.shape[::-1], dtype=torch.uint8, device=w.device)
    groups = group.tolist()

    def settle(k: int, column: Tensor) -> Tensor:
        s, z = scales[groups[k]], zeros[groups[k]]
        q = (column / s).add_(z).round_().clamp_(0, highest)
        codes[k] = q
        return q.sub_(z).mul_(s)

    sweep_columns(w, factor, settle, block=block)
    return codes.t()
