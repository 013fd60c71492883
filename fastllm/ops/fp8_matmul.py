"""Weights and activations of float8 (e4m3): layouts of the op `dynamic_matmul`.

Micikevicius et al., "FP8 formats for deep learning", 2022: a sign, four bits of exponent, three of fraction; the
largest number is 448, and there is a NaN but no infinity.
"""

from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from ..formats import Format, QuantizedWeight, from_fp8, to_fp8
from .int8_matmul import quantize_rows
from .layout import DynamicLayout, Prepared, Rest

FP8 = torch.float8_e4m3fn
ALIGNMENT = 16  # bytes that rows are read by, and what `torch._scaled_mm` wants N and K to be multiples of
OLDEST = (8, 9)  # compute capability with tensor cores for float8
# Rows of x from which `torch._scaled_mm` is taken: ours shares K among programs up to 128 rows, which is where that
# helps. An estimate that no measurement has confirmed yet.
LIBRARY_ROWS = 129


class Fp8Layout(DynamicLayout):
    activations = "fp8"


class Fp8Rest(Fp8Layout, Rest):
    name, runs, slow = "fp8-rest", "dequantise + matmul, no faster than dense", True

    def reasons(self, format: Format, N: int, K: int, dtype: torch.dtype, device: torch.device) -> list[str]:
        return self.unfit(format)

    def dense(self, p: Prepared, bits: int, group: int, rows: slice, K: int, dtype: torch.dtype) -> Tensor:
        return to_fp8(p.w[rows], K).to(dtype) * p.scale[rows].to(dtype)

    def multiply(self, x: Tensor, p: Prepared, bias: Tensor | None, N: int, batch_invariant: bool = False) -> Tensor:
        if batch_invariant and len(x) > 1:
            return torch.cat([self.multiply(row, p, bias, N) for row in x.split(1)])
        (q, x_scale), K = quantize_rows(x, FP8), x.shape[1]
        xs, y = q.float(), x_scale.new_empty(len(x), N)
        for start in range(0, N, self.step(K)):
            rows = slice(start, start + self.step(K))
            y[:, rows] = linear(xs, to_fp8(p.w[rows], K).float())
        y.mul_(x_scale[:, None]).mul_(p.scale.flatten())
        return (y if bias is None else y.add_(bias)).to(x.dtype)


class Fp8Cuda(Fp8Layout):
    name, runs = "fp8-cuda", "triton fp8 x fp8 / scaled_mm"

    def reasons(self, format: Format, N: int, K: int, dtype: torch.dtype, device: torch.device) -> list[str]:
        why = self.unfit(format)
        if device.type != "cuda" or torch.version.hip is not None:
            where = device.type if device.type != "cuda" else "an AMD GPU"
            why.append(f"it runs on a CUDA device, not on {where}")
        elif (capability := torch.cuda.get_device_capability(device)) < OLDEST:
            why.append(
                f"float8 needs compute capability 8.9 or newer, and this GPU has {'.'.join(map(str, capability))}"
            )
        if find_spec("triton") is None:
            why.append("triton is not installed")
        return why

    def pack(self, weight: QuantizedWeight, format: Format, shape: tuple[int, int]) -> Prepared:
        w = weight.packed.flatten().view(torch.uint8).view(shape[0], -1)
        if w.shape[1] % ALIGNMENT:
            w = pad(w, (0, -w.shape[1] % ALIGNMENT))
        return Prepared(w, weight.scale.flatten().float(), None)  # bytes: what casts floats leaves them alone

    def unpack(self, w: Tensor, format: Format, shape: tuple[int, int]) -> Tensor:
        return from_fp8(w[:, : 4 * format.words(shape[1])].view(FP8))

    def dense(self, p: Prepared, bits: int, group: int, rows: slice, K: int, dtype: torch.dtype) -> Tensor:
        return p.w[rows, :K].view(FP8).to(dtype) * p.scale[rows, None].to(dtype)

    def multiply(self, x: Tensor, p: Prepared, bias: Tensor | None, N: int, batch_invariant: bool = False) -> Tensor:
        from ..kernels.scaled_matmul import quantize_rows, scaled_matmul  # Triton is imported on first use

        if p.w.shape[1] != x.shape[1]:
            x = pad(x, (0, p.w.shape[1] - x.shape[1]))
        q, x_scale = quantize_rows(x, FP8)
        if x.is_cuda and not batch_invariant and library_takes(len(x), N, x.dtype, bias):
            return by_library(q, x_scale, p, bias)
        return scaled_matmul(q, x_scale, p.w.view(FP8), p.scale, bias, x.dtype, batch_invariant)


def library_takes(M: int, N: int, dtype: torch.dtype, bias: Tensor | None) -> bool:
    """Whether `torch._scaled_mm` with scales by row is for M rows: it writes bfloat16 in every release."""
    right = bias is None or bias.dtype == torch.bfloat16
    return M >= LIBRARY_ROWS and N % ALIGNMENT == 0 and dtype == torch.bfloat16 and right


def by_library(q: Tensor, x_scale: Tensor, p: Prepared, bias: Tensor | None) -> Tensor:
    """As `scaled_matmul` to bfloat16. q row by row, w column by column, scales float32 [M, 1] and [1, N]."""
    scales = x_scale[:, None], p.scale[None]
    # use_fast_accum would leave sums to the 14 bits or so of the tensor cores
    return torch._scaled_mm(q, p.w.view(FP8).t(), *scales, bias, out_dtype=torch.bfloat16, use_fast_accum=False)


FP8_LAYOUTS: dict[str, Fp8Layout] = {layout.name: layout for layout in (Fp8Cuda(), Fp8Rest())}
