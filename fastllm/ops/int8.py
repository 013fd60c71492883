"""int8 weights on a CPU, one scale per output channel: plain rows for small layers, oneDNN's blocks for large ones.

Rows:   `aten._weight_int8pack_mm` for a few rows of x, above that an exact cast to bfloat16 and a GEMM.
oneDNN: each activation row becomes a 15-bit fixed-point number, written as two 8-bit digits; one u8 x s8 product of
        twice the rows then gives both halves with exact int32 sums. The weights are read as int8 and nothing is
        dequantised. The step is 2**-13 of the row's largest power of two: finer than bfloat16's own 2**-8 for the
        values that matter in a sum, and exact for integers.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from ..formats import Format, QuantizedWeight
from .layout import Layout, Prepared

TILE = 16  # `aten._weight_int8pack_mm` reads past the end of a weight whose sides are no multiples of it
OUTPUT_SCRATCH = 1 << 24  # float32 sums held at a time
EXPONENT_BITS, EXPONENT_OF_2_13 = 0x7F800000, (2 * 127 + 13) << 23


def _why_not(format: Format, device: torch.device) -> list[str]:
    return [
        why
        for bad, why in (
            (device.type != "cpu", f"it runs on the CPU, not on {device.type}"),
            (format.bits != 8, f"it holds 8-bit weights, not {format.bits}-bit"),
            (format.group is not None, "it takes one scale per channel, not groups"),
            (not format.symmetric, "it takes symmetric weights"),
            (format.activations is not None, "it leaves activations as they are"),
        )
        if bad
    ]


def _signed(packed: Tensor) -> Tensor:
    """int32 words at rest (q + 128) -> int8 [N, K rounded up to 4], in place."""
    return packed.view(torch.uint8).bitwise_xor_(128).view(torch.int8)


def _at_rest(q: Tensor) -> Tensor:
    """int8 [N, K rounded up to 4] -> int32 words at rest, in new memory."""
    stored = torch.bitwise_xor(q.contiguous().view(torch.uint8), 128)
    # flat, because torch refuses to view a dimension of size 1 whose stride is odd
    return stored.flatten().view(torch.int32).view(len(q), -1)


def _widen(x: Tensor, K: int) -> Tensor:
    return pad(x, (0, K - x.shape[1])) if x.shape[1] != K else x


class Int8Rows(Layout):
    name, runs = "int8rows", "aten int8pack / bf16 GEMM"
    stacks = TILE
    direct_rows = 10  # rows of x up to which the operator beats a cast and a GEMM

    def reasons(self, format: Format, N: int, K: int, dtype: torch.dtype, device: torch.device) -> list[str]:
        return _why_not(format, device)

    def pack(self, weight: QuantizedWeight, format: Format, shape: tuple[int, int]) -> Prepared:
        q = _signed(weight.packed)
        rows, cols = -len(q) % TILE, -q.shape[1] % TILE
        if rows or cols:
            q = pad(q, (0, cols, 0, rows))
        return Prepared(q, pad(weight.scale.flatten(), (0, rows)), None)

    def unpack(self, w: Tensor, format: Format, shape: tuple[int, int]) -> Tensor:
        return _at_rest(w[: shape[0], : 4 * format.words(shape[1])])

    def dense(self, p: Prepared, bits: int, group: int, rows: slice, K: int, dtype: torch.dtype) -> Tensor:
        return p.w[rows, :K].to(dtype) * p.scale[rows, None].to(dtype)

    def matmul(self, x: Tensor, p: Prepared, N: int, bits: int, group: int) -> Tensor:
        rows = p.w.shape[0]
        xs = _widen(x.to(torch.bfloat16), p.w.shape[1]).contiguous()
        if x.shape[0] > self.direct_rows:
            # an int8 is exact in bfloat16; the scale goes on the output, which is smaller than the weight
            parts = [linear(xs, w.to(xs.dtype)) for w in p.w.split(self.step(xs.shape[1]))]
            y = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        elif p.scale.dtype == xs.dtype:
            y = torch.ops.aten._weight_int8pack_mm(xs, p.w, p.scale)
            return (y if rows == N else y[:, :N].contiguous()).to(x.dtype)
        else:  # rounding the scale to the operator's dtype would cost as much as the quantization does
            y = torch.ops.aten._weight_int8pack_mm(xs, p.w, xs.new_ones(rows))
        # sums of up to 127 times x overflow float16, and a float32 scale would lose bits in bfloat16
        y = y.mul_(p.scale) if p.scale.dtype == y.dtype == x.dtype else y.float().mul_(p.scale).to(x.dtype)
        return y if rows == N else y[:, :N].contiguous()


class Int8Blocks(Layout):
    name, runs = "int8blocks", "oneDNN u8 x s8"
    smallest = 1 << 22  # weights from which oneDNN's faster reading pays for making the digits

    def reasons(self, format: Format, N: int, K: int, dtype: torch.dtype, device: torch.device) -> list[str]:
        why = _why_not(format, device)
        if not (torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()):
            why.append("the CPU has no VNNI (without it oneDNN's u8 x s8 saturates)")
        if N * K < self.smallest:
            why.append(f"{N} x {K} is below {self.smallest:,} weights, where plain rows are faster")
        return why

    def pack(self, weight: QuantizedWeight, format: Format, shape: tuple[int, int]) -> Prepared:
        w = torch.ops.onednn.qlinear_prepack(_signed(weight.packed), None)
        return Prepared(w, weight.scale.flatten().float(), torch.zeros(shape[0], dtype=torch.int32, device="cpu"))

    def unpack(self, w: Tensor, format: Format, shape: tuple[int, int]) -> Tensor:
        return _at_rest(w.to_dense().t())

    def step(self, K: int) -> int:
        return 1 << 30  # oneDNN undoes its blocks for the whole weight or not at all

    def dense(self, p: Prepared, bits: int, group: int, rows: slice, K: int, dtype: torch.dtype) -> Tensor:
        return (p.w.to_dense()[:K].to(dtype) * p.scale.to(dtype)).t()[rows]

    def matmul(self, x: Tensor, p: Prepared, N: int, bits: int, group: int) -> Tensor:
        rows = max(1, OUTPUT_SCRATCH // (2 * N))
        if len(x) > rows:
            return torch.cat([self.matmul(part, p, N, bits, group) for part in x.split(rows)])
        digits, inverse = _digits(_widen(x, p.w.shape[0]))
        y = torch.ops.onednn.qlinear_pointwise(
            digits, 1.0, 128, p.w, p.scale, p.zero, None, 1.0, 0, torch.float32, "none", [], ""
        )
        high, low = y.view(2, len(x), N)
        return low.add_(high, alpha=256).div_(inverse).to(x.dtype)


def _digits(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] -> uint8 [2M, K], inverse [M, 1]: (256 (high - 128) + (low - 128)) / inverse is x, rounded.

    `inverse` is 2**13 over the largest power of two in the row, read off the exponent bits, so multiplying is exact.
    """
    largest = x.abs().amax(-1, keepdim=True).float().clamp_(min=1e-30)  # vector_norm takes ten times as long
    inverse = (EXPONENT_OF_2_13 - (largest.view(torch.int32) & EXPONENT_BITS)).view(torch.float32)
    inverse.masked_fill_(largest.isfinite().logical_not_(), float("nan"))  # such a row stays NaN
    fixed = torch.mul(x, inverse).add_(256 * 128 + 128 + 0.5).to(torch.int32)
    digits = torch.empty(2, *x.shape, dtype=torch.uint8, device=x.device)
    digits[0].copy_(fixed >> 8)
    digits[1].copy_(fixed)  # the conversion keeps the lowest 8 bits
    return digits.view(-1, x.shape[1]), inverse
