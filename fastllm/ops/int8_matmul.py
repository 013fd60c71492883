"""The op `fastllm::int8_matmul_dynamic`: weights and activations of 8 bits, products and sums of integers.

y[m, n] = (sum_k q[m, k] w[n, k]) * x_scale[m] * w_scale[n] + bias[n], with q and x_scale from `quantize_rows`: each
row of x gets its own scale when it comes ("per token, dynamic"), so that nothing has to be calibrated.

Its definition is `Int8Rest`. The sums are exact in every implementation; they differ in the last bits of a float32.
"""

from abc import abstractmethod
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..formats import IntFormat, unpack_bits
from .int8 import OUTPUT_SCRATCH, Int8Blocks, Int8Rows
from .layout import Layout, Prepared, Rest
from .quant_matmul import LIBRARY

LARGEST_K = 1 << 17  # 127 * 128 * K stays within an int32
LARGEST_K_UNSIGNED = 1 << 16  # and so does 255 * 128 * K
EXACT_K = 1024  # 127 * 128 * K stays within the 24 bits of a float32
# 1.5 * 2**23 leaves a float32 no room for a fraction, so that adding it rounds, half to even; and the low byte of the
# sum is the integer
ROUND = 12582912.0


def row_scale(x: Tensor) -> Tensor:
    """max |x| / 127 of each row of x [M, K], float32 [M, 1]: NaN for what is not finite, tiny for a row of zeros."""
    scale = x.abs().amax(-1, keepdim=True).float().div_(127).clamp_(min=torch.finfo(torch.float32).tiny)
    return scale.add_(scale - scale)  # infinity - infinity is NaN


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K], floating point -> q int8 [M, K], scale float32 [M]: x / scale, rounded half to even.

    A row with a NaN or an infinity has q = 0 and scale NaN. `fastllm.kernels.int8_matmul` has the same for a GPU.
    """
    scale = row_scale(x)
    q = torch.div(x, scale.nan_to_num(nan=float("inf"))).nan_to_num_()  # what is not finite / inf
    return q.round_().to(torch.int8), scale[:, 0]


class Int8Layout(Layout):
    """A layout whose product rounds the activations as well."""

    @abstractmethod
    def multiply(self, x: Tensor, p: Prepared, bias: Tensor | None, N: int) -> Tensor:
        """x [M, K] -> [M, N] in x's dtype, rounded once."""

    def matmul(self, x: Tensor, p: Prepared, N: int, bits: int, group: int) -> Tensor:
        return self.multiply(x, p, None, N)

    def unfit(self, format: IntFormat, K: int, largest: int) -> list[str]:
        why = [] if format.activations else [f"it rounds activations, which {format.name} leaves as they are"]
        return why if K <= largest else [*why, f"the sums of K={K} products may overflow an int32"]


class Int8Rest(Int8Layout, Rest):
    name, runs = "int8-rest", "integer sums in plain torch"

    def reasons(self, format: IntFormat, N: int, K: int, dtype: torch.dtype, device: torch.device) -> list[str]:
        return self.unfit(format, K, LARGEST_K)

    def multiply(self, x: Tensor, p: Prepared, bias: Tensor | None, N: int) -> Tensor:
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

    def reasons(self, format: IntFormat, N: int, K: int, dtype: torch.dtype, device: torch.device) -> list[str]:
        why = self.unfit(format, K, LARGEST_K_UNSIGNED)
        if device.type != "cpu":
            why.append(f"it runs on the CPU, not on {device.type}")
        if not (torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()):
            why.append("the CPU has no VNNI (without it oneDNN's u8 x s8 saturates)")
        return why

    def multiply(self, x: Tensor, p: Prepared, bias: Tensor | None, N: int) -> Tensor:
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

    def reasons(self, format: IntFormat, N: int, K: int, dtype: torch.dtype, device: torch.device) -> list[str]:
        why = self.unfit(format, K, LARGEST_K)
        if device.type != "cuda":
            why.append(f"it runs on a CUDA device, not on {device.type}")
        if find_spec("triton") is None:
            why.append("triton is not installed")
        return why

    def multiply(self, x: Tensor, p: Prepared, bias: Tensor | None, N: int) -> Tensor:
        from ..kernels.int8_matmul import int8_matmul, quantize_rows  # Triton is imported on first use

        columns = p.w.shape[1]  # a multiple of 16, at which rows are aligned
        if columns != x.shape[1]:
            x = torch.nn.functional.pad(x, (0, columns - x.shape[1]))
        return int8_matmul(*quantize_rows(x), p.w[:N], p.scale[:N], bias, x.dtype)


INT8_LAYOUTS: dict[str, Int8Layout] = {layout.name: layout for layout in (Int8Triton(), Int8OneDnn(), Int8Rest())}

LIBRARY.define(
    "int8_matmul_dynamic(Tensor x, Tensor w, Tensor scale, Tensor? zero, Tensor? bias, int N, str layout) -> Tensor"
)
LIBRARY.define(
    "int8_matmul_dynamic_grad_x(Tensor grad, Tensor w, Tensor scale, Tensor? zero, int K, str layout) -> Tensor"
)


def int8_matmul_dynamic(
    x: Tensor, w: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, N: int, layout: str
) -> Tensor:
    """x [..., K], rounded to int8 row by row, @ dequantize(w) [N, K].T + bias [N] -> [..., N] in x's dtype.

    w, scale, zero: the operands that `fastllm.ops.INT8_LAYOUTS[layout].pack` returned; that they fit is not checked
    here. A row of x with a NaN or an infinity gives a row of NaN. Differentiable with respect to x and bias, straight
    through the rounding of x: dx = dy @ dequantize(w). Source of the format: compressed-tensors, `int-quantized`.
    """
    if torch.compiler.is_compiling() or type(x) is not Tensor or torch._C._len_torch_dispatch_stack():
        return torch.ops.fastllm.int8_matmul_dynamic(x, w, scale, zero, bias, N, layout)
    if torch.is_grad_enabled() and (x.requires_grad or bias is not None and bias.requires_grad):
        return torch.ops.fastllm.int8_matmul_dynamic(x, w, scale, zero, bias, N, layout)
    return _forward(x, w, scale, zero, bias, N, layout)  # without the dispatcher, whose 8 us a small layer would feel


def _forward(
    x: Tensor, w: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, N: int, layout: str
) -> Tensor:
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    if not len(rows):
        return x.new_empty(*x.shape[:-1], N)
    y = INT8_LAYOUTS[layout].multiply(rows, Prepared(w, scale, zero), bias, N)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], N)


def _grad_x(grad: Tensor, w: Tensor, scale: Tensor, zero: Tensor | None, K: int, layout: str) -> Tensor:
    return INT8_LAYOUTS[layout].grad_x(grad, Prepared(w, scale, zero), K, 8, K)


def _save_for_backward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, w, scale, zero, bias, _, layout = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(w, scale, zero)
    ctx.K, ctx.layout = x.shape[-1], layout


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    w, scale, zero = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.fastllm.int8_matmul_dynamic_grad_x(grad, w, scale, zero, ctx.K, ctx.layout)
    if ctx.needs_input_grad[4]:
        grad_bias = grad.flatten(0, -2).sum(0).to(ctx.bias_dtype)
    return grad_x, None, None, None, grad_bias, None, None


for name, implementation in (("int8_matmul_dynamic", _forward), ("int8_matmul_dynamic_grad_x", _grad_x)):
    for key in ("CPU", "CUDA", "MkldnnCPU"):  # the last: oneDNN's blocks are opaque tensors with a key of their own
        LIBRARY.impl(name, implementation, key)

torch.library.register_autograd(
    "fastllm::int8_matmul_dynamic", _backward, setup_context=_save_for_backward, lib=LIBRARY
)


@torch.library.register_fake("fastllm::int8_matmul_dynamic", lib=LIBRARY)
def _(x: Tensor, w: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, N: int, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], N)


@torch.library.register_fake("fastllm::int8_matmul_dynamic_grad_x", lib=LIBRARY)
def _(grad: Tensor, w: Tensor, scale: Tensor, zero: Tensor | None, K: int, *_: Any) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], K)
