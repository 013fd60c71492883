"""Weights and activations of 8 bits, products and sums of integers: layouts of the op `dynamic_matmul`."""

from importlib.util import find_spec

import torch
from torch import Tensor

from ..formats import Format, unpack_bits
from .int8 import OUTPUT_SCRATCH, Int8Blocks, Int8Rows
from .layout import DynamicLayout, Prepared, Rest

LARGEST_K = 1 << 17  # 127 * 128 * K stays within an int32
LARGEST_K_UNSIGNED = 1 << 16  # and so does 255 * 128 * K
EXACT_K = 1024  # 127 * 128 * K stays within the 24 bits of a float32
# 1.5 * 2**23 leaves a float32 no room for a fraction, so that adding it rounds, half to even; and the low byte of the
# sum is the integer
ROUND = 12582912.0


def row_scale(x: Tensor, largest: float = 127) -> Tensor:
    """max |x| / largest of each row of x [M, K], float32 [M, 1]: NaN for what is not finite, tiny for zeros."""
    scale = x.abs().amax(-1, keepdim=True).float().div_(largest).clamp_(min=torch.finfo(torch.float32).tiny)
    return scale.add_(scale - scale)  # infinity - infinity is NaN


def quantize_rows(x: Tensor, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """x [M, K], floating point -> q [M, K] of `dtype`, scale float32 [M]: x / scale, rounded half to even.

    dtype: int8, or float8_e4m3fn, whose largest number is 448. A row with a NaN or an infinity has q = 0 and scale
    NaN. `fastllm.kernels.scaled_matmul` has the same for a GPU.
    """
    integers = dtype == torch.int8
    scale = row_scale(x, 127 if integers else 448)
    q = torch.div(x, scale.nan_to_num(nan=float("inf"))).nan_to_num_()  # what is not finite / inf
    return (q.round_() if integers else q).to(dtype), scale[:, 0]


class Int8Layout(DynamicLayout):
    activations = "int8"

    def fits(self, format: Format, K: int, largest: int) -> list[str]:
        """Why it cannot hold rows of K in `format`."""
        why = self.unfit(format)
        return why if K <= largest else [*why, f"the sums of K={K} products may overflow an int32"]


class Int8Rest(Int8Layout, Rest):
    name, runs = "int8-rest", "integer sums in plain torch"

    def reasons(self, format: Format, N: int, K: int, dtype: torch.dtype, device: torch.device) -> list[str]:
        return self.fits(format, K, LARGEST_K)

    def multiply(self, x: Tensor, p: Prepared, bias: Tensor | None, N: int, batch_invariant: bool = False) -> Tensor:
        q, x_scale = quantize_rows(x)
        w, K = unpack_bits(p.w, 8, x.shape[1]).to(torch.int16) - 128, x.shape[1]
        total = torch.zeros(len(x), N, dtype=torch.int32, device=x.device)
        for k in range(0, K, EXACT_K):  # products of floats, which every device has, over as many as are exact
            here = slice(k, k + EXACT_K)
            total += (q[:, here].float() @ w[:, here].float().t()).to(torch.int32)
        y = total.float() * x_scale[:, None] * p.scale.flatten().float()
        return (y if bias is None else y + bias.float()).to(x.dtype)


class Int8OneDnn(Int8Layout, Int8Blocks):
    name, runs = "int8-onednn", "oneDNN u8 x s8, int8 activations"

    def reasons(self, format: Format, N: int, K: int, dtype: torch.dtype, device: torch.device) -> list[str]:
        why = self.fits(format, K, LARGEST_K_UNSIGNED)
        if device.type != "cpu":
            why.append(f"it runs on the CPU, not on {device.type}")
        if not (torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()):
            why.append("the CPU has no VNNI (without it oneDNN's u8 x s8 saturates)")
        return why

    def multiply(self, x: Tensor, p: Prepared, bias: Tensor | None, N: int, batch_invariant: bool = False) -> Tensor:
        rows = max(1, OUTPUT_SCRATCH // N)
        if len(x) > rows:
            return torch.cat([self.multiply(part, p, bias, N) for part in x.split(rows)])
        scale = row_scale(x)
        # the operator wants unsigned numbers, and takes 128 off each
        q = torch.div(x, scale).add_(ROUND + 128).view(torch.int32).to(torch.uint8)
        if q.shape[1] != p.w.shape[0]:
            q = torch.nn.functional.pad(q, (0, p.w.shape[0] - q.shape[1]), value=128)
        y = torch.ops.onednn.qlinear_pointwise(
            q, 1.0, 128, p.w, p.scale, p.zero, None, 1.0, 0, torch.float32, "none", [], ""
        ).mul_(scale)
        return (y if bias is None else y.add_(bias)).to(x.dtype)


class Int8Triton(Int8Layout, Int8Rows):
    name, runs = "int8-triton", "triton int8 x int8"

    def reasons(self, format: Format, N: int, K: int, dtype: torch.dtype, device: torch.device) -> list[str]:
        why = self.fits(format, K, LARGEST_K)
        if device.type != "cuda":
            why.append(f"it runs on a CUDA device, not on {device.type}")
        if find_spec("triton") is None:
            why.append("triton is not installed")
        return why

    def multiply(self, x: Tensor, p: Prepared, bias: Tensor | None, N: int, batch_invariant: bool = False) -> Tensor:
        from ..kernels.scaled_matmul import quantize_rows, scaled_matmul  # Triton is imported on first use

        columns = p.w.shape[1]  # a multiple of 16, at which rows are aligned
        if columns != x.shape[1]:
            x = torch.nn.functional.pad(x, (0, columns - x.shape[1]))
        return scaled_matmul(*quantize_rows(x), p.w[:N], p.scale[:N], bias, x.dtype)


INT8_LAYOUTS: dict[str, Int8Layout] = {layout.name: layout for layout in (Int8Triton(), Int8OneDnn(), Int8Rest())}
