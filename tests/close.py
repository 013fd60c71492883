"""The yardstick: how every test compares a result with its definition."""

from typing import NamedTuple

import torch
from torch import Tensor


class Bounds(NamedTuple):
    """Allowed errors, relative to the RMS of the reference."""

    worst: float
    rms: float


# Rounding a normal variable to `dtype` costs an RMS error of 0.2 eps, and at most 2 eps for values up to 8 RMS.
# `rms` is 0.5 eps: roundings of both operands and of the result (0.4 eps) fit, one per cent (1.3 eps of bfloat16)
# does not. float32 has room for the order of a sum over K of some thousands, but none for TF32 (1e-3).
BOUNDS = {
    torch.float32: Bounds(worst=5e-5, rms=5e-6),
    torch.float16: Bounds(worst=4e-3, rms=5e-4),
    torch.bfloat16: Bounds(worst=3e-2, rms=4e-3),
}
WIDEST = Bounds(worst=0.25, rms=0.05)  # bounds beyond these would prove nothing


def assert_close(
    got: Tensor,
    want: Tensor,
    worst: float | None = None,
    rms: float | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Compare `got` with the reference `want`, of the same shape and computed in higher precision.

    Errors are divided by the RMS of `want` (by 1 if `want` is all zeros); `rms` bounds their RMS, `worst` the largest.
    Both default to `BOUNDS[got.dtype]`. `got` must have `dtype`, by default that of `want`. What is not finite fails.
    A float32 result of float16 arithmetic is held to float16's: `assert_close(got, want, *BOUNDS[torch.float16])`.
    """
    _assert_alike(got, want, dtype or want.dtype)
    default = BOUNDS[got.dtype] if got.dtype in BOUNDS else Bounds(0.0, 0.0)
    bounds = Bounds(default.worst if worst is None else worst, default.rms if rms is None else rms)
    if not (0 < bounds.worst <= WIDEST.worst and 0 < bounds.rms <= WIDEST.rms):
        raise ValueError(f"{bounds}: a comparison that can fail, and pass, needs 0 < bounds <= {WIDEST}")
    if not got.numel():
        return
    got, want = got.detach().cpu().double(), want.detach().cpu().double()
    assert want.isfinite().all(), f"the reference is not finite: {_places(~want.isfinite())}"
    assert got.isfinite().all(), f"not finite: {_places(~got.isfinite())}"
    error = (got - want).abs() / (want.square().mean().sqrt().item() or 1.0)
    at = torch.unravel_index(error.argmax(), error.shape)
    error_rms = error.square().mean().sqrt()
    assert error.max() <= bounds.worst and error_rms <= bounds.rms, (
        f"worst {error.max():.2e} (allowed {bounds.worst:.2e}) at {tuple(map(int, at))}: got {got[at]:.6g}, "
        f"want {want[at]:.6g}; rms {error_rms:.2e} (allowed {bounds.rms:.2e}); "
        f"beyond the worst allowed: {_places(error > bounds.worst)}"
    )


def assert_equal(got: Tensor, want: Tensor) -> None:
    """Same shape, same dtype, equal to the bit: for packings, and for arithmetic whose every step is exact."""
    _assert_alike(got, want, want.dtype)
    got, want = got.detach().cpu(), want.detach().cpu()
    wrong = got != want  # NaN differs from everything, itself included
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        values = f"got {got[at].item()}, want {want[at].item()}"
        raise AssertionError(f"not equal: {_places(wrong)}; first at {at}: {values}")


def _assert_alike(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, want {tuple(want.shape)}"
    assert got.dtype == dtype, f"{got.dtype}, want {dtype}"


def _places(wrong: Tensor) -> str:
    """How many elements are wrong, and the smallest box of indices that holds them all."""
    where = wrong.nonzero()
    box = [f"{low}:{high + 1}" for low, high in zip(where.amin(0), where.amax(0), strict=True)] if len(where) else []
    return f"{len(where)} of {wrong.numel()} elements" + (f" in [{', '.join(box)}]" if box else "")
