"""Data-free quantizers: from a dense weight to a `QuantizedWeight`, in row chunks of bounded memory."""

from collections.abc import Callable

import torch
from torch import Tensor

from .formats import Format, Fp8Format, IntFormat, Nf4Format, QuantizedWeight, pack_bits, pack_zero_point

CHUNK = 1 << 20  # weights quantized at a time: the float32 scratch then stays near the caches

Rounder = Callable[[Tensor, Tensor, IntFormat, torch.dtype], tuple[Tensor, Tensor]]


def _round(w: Tensor, scale: Tensor, zero: Tensor, format: IntFormat) -> Tensor:
    """float [n, G, group] -> the nearest representable q, as float."""
    return (w / scale).add_(zero).round_().clamp_(0, 2**format.bits - 1)


def _storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` > 0 as it reads back after rounding to `dtype`; a group of zeros gets a very small one.

    float16 needs its subnormal numbers: small weights have 8-bit scales below 6e-5.
    """
    about = torch.finfo(dtype)
    return scale.clamp(min=about.tiny * (about.eps if dtype == torch.float16 else 1)).to(dtype).float()


def _rtn(w: Tensor, mask: Tensor, format: IntFormat, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round to nearest: the scale spans the group's range. w float [n, G, group] -> scale, zero [n, G, 1]."""
    levels = 2**format.bits - 1
    if format.symmetric:
        # the largest weight becomes 7 or -7
        scale = _storable(w.abs().amax(-1, keepdim=True) / (format.middle - 1), dtype)
        return scale, torch.full_like(scale, format.middle)
    low, high = w.amin(-1, keepdim=True).clamp(max=0), w.amax(-1, keepdim=True).clamp(min=0)
    scale = _storable((high - low) / levels, dtype)
    return scale, (-low / scale).round().clamp(0, levels)


def _signed(w: Tensor, mask: Tensor, format: IntFormat, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of two symmetric scales the one with the smaller squared error: round-to-nearest's, or one whose sign makes the
    largest weight -8, so that all 16 levels are used (as GGML's Q4_0 does) and the steps are an eighth finer.

    Solving for the scale as well, by least squares or half-quadratic steps, has a smaller error yet, and was measured
    to lose far more perplexity: it shrinks the largest weights.
    """
    plain, zero = _rtn(w, mask, format, dtype)
    largest = w.gather(-1, w.abs().argmax(-1, keepdim=True))
    finer = _storable(largest.abs() / format.middle, dtype) * -largest.sign()
    finer = torch.where(largest == 0, plain, finer)
    errors = [_round(w, s, zero, format).sub_(zero).mul_(s).sub_(w).square_().sum(-1, True) for s in (plain, finer)]
    return torch.where(errors[1] < errors[0], finer, plain), zero


def _hqq(w: Tensor, mask: Tensor, format: IntFormat, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Half-quadratic quantization: minimise sum |w - (q - z) s|**p by alternating over a sparse error and (s, z).

    Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023. They solve for a float zero
    point at a fixed scale; zero points are stored as integers here, so the scale is solved for as well, but not in
    large groups, where that was measured to cost perplexity: it shrinks the largest weights for the sake of the many.
    For the same reason the best pair seen, round-to-nearest's among them, is the one with the least sum of errors to
    the fourth power. A symmetric format has no zero point to solve for; see `_signed`.
    """
    if format.symmetric:
        return _signed(w, mask, format, dtype)
    p, beta, steps, small = 0.7, 10.0, 8, w.shape[-1] <= 128
    scale, zero = _rtn(w, mask, format, dtype)
    best_scale, best_zero, best = scale, zero, None
    size = w.abs().mean(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny)
    for _ in range(steps):
        q = _round(w, scale, zero, format)
        error = (w - (q - zero) * scale).mul_(mask)
        loss = error.square().square_().sum(-1, keepdim=True)
        if best is None:
            best = loss
        else:
            better = loss < best
            best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
            best = torch.minimum(loss, best)
        # the proximal step of |e|**p, in units of the group's mean weight so that one beta fits every layer
        magnitude = (error.abs() / size).clamp_(min=1e-8)
        sparse = error.sign() * (magnitude - magnitude.pow(p - 1) / beta).clamp_(min=0) * size
        target = w - sparse
        zero = (q - target / scale).mul_(mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
        zero = zero.round_().clamp_(0, 2**format.bits - 1)
        centred = (q - zero).mul_(mask)
        energy = centred.square().sum(-1, keepdim=True)
        solved = (target * centred).sum(-1, keepdim=True) / energy.clamp(min=1)
        scale = torch.where((energy > 0) & (solved > 0) & small, _storable(solved, dtype), scale)
        beta *= 1.05
    return best_scale, best_zero


QUANTIZERS: dict[str, Rounder] = {"rtn": _rtn, "hqq": _hqq}


def _fp8(w: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """w float [n, K] -> the bytes of the nearest e4m3 numbers, uint8 [n, K], and scale [n, 1]: max |w| / 448."""
    scale = _storable(w.abs().amax(-1, keepdim=True) / 448, dtype)
    # the scale was rounded, and what is beyond 448 would become NaN
    return (w / scale).clamp_(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8), scale


def quantize(w: Tensor, format: Format, method: str = "hqq", dtype: torch.dtype | None = None) -> QuantizedWeight:
    """Quantize w [N, K], any float dtype, to `format`; scales are stored in `dtype` (default: w's own).

    method: "rtn" (round to nearest) or "hqq" (half-quadratic: slower and closer; scales of symmetric formats may be
    negative; not for floats).
    Raises ValueError for a wrong rank or dtype, NaN or infinity, or an unknown method.
    """
    if method not in QUANTIZERS:
        raise ValueError(f"unknown method {method!r}; known: {', '.join(QUANTIZERS)}")
    if isinstance(format, Nf4Format):
        raise ValueError("nf4 is read from bitsandbytes checkpoints, and nothing is quantized to it; use int4")
    if isinstance(format, Fp8Format) and method != "rtn":
        raise ValueError(f"method={method!r} solves for the scales of integers; fp8 weights take method='rtn'")
    if w.ndim != 2 or not w.is_floating_point():
        raise ValueError(f"a weight must be a floating-point matrix [N, K], got {w.dtype} {list(w.shape)}")
    dtype = dtype or w.dtype
    (N, K), G = w.shape, format.groups(w.shape[1])
    words = torch.empty(N, format.words(K), dtype=torch.int32, device=w.device)
    scales = torch.empty(N, G, dtype=dtype, device=w.device)
    zeros = torch.empty(N, G, dtype=torch.uint8, device=w.device)
    rows = max(1, CHUNK // K)
    for start in range(0, N, rows):
        chunk = w[start : start + rows].float()
        bad = chunk.numel() - int(chunk.isfinite().sum())
        if bad:
            raise ValueError(
                f"the weight has {bad} values that are NaN or infinite in rows {start} to {start + len(chunk) - 1}"
            )
        here = slice(start, start + len(chunk))
        if isinstance(format, Fp8Format):
            q, scales[here] = _fp8(chunk, dtype)
        else:
            q, scales[here], zeros[here] = codes_and_scales(chunk, format, method, dtype)
        words[here] = pack_bits(q, format.bits)
    return QuantizedWeight(words, scales, None if format.symmetric else pack_zero_point(zeros, format.bits))


def codes_and_scales(w: Tensor, format: IntFormat, method: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The codes nearest to w [N, K], uint8 [N, K], with the scales and zero points that `method` finds: float [N, G].

    The scales are as they read back from `dtype`.
    """
    N, K = w.shape
    group, G = format.group_of(K), format.groups(K)
    mask = (torch.arange(G * group, device=w.device) < K).float().view(G, group)
    grouped = torch.nn.functional.pad(w.float(), (0, G * group - K)).view(N, G, group)
    scale, zero = QUANTIZERS[method](grouped, mask, format, dtype)
    codes = _round(grouped, scale, zero, format).to(torch.uint8).view(N, G * group)[:, :K]
    return codes, scale[..., 0], zero[..., 0]


def decode(codes: Tensor, scale: Tensor, zero: Tensor, group: int) -> Tensor:
    """(codes - zero) * scale: codes [N, K], scale and zero float [N, G] -> float [N, K]."""
    N, K = codes.shape
    grouped = torch.nn.functional.pad(codes, (0, scale.shape[1] * group - K)).view(N, -1, group)
    return ((grouped - zero[..., None]) * scale[..., None]).view(N, -1)[:, :K]


def packed(codes: Tensor, scale: Tensor, zero: Tensor, format: IntFormat, dtype: torch.dtype) -> QuantizedWeight:
    """codes uint8 [N, K], scale and zero float [N, G] as they are stored, the scales in `dtype`."""
    zeros = None if format.symmetric else pack_zero_point(zero.to(torch.uint8), format.bits)
    return QuantizedWeight(pack_bits(codes, format.bits), scale.to(dtype), zeros)
