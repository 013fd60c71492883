"""Weights on a GPU: planar words, read by the Triton kernels."""

from importlib.util import find_spec

import torch
from torch import Tensor

from ..formats import Format, QuantizedWeight, scale_groups
from .layout import Layout, Prepared, Rest
from .planar import from_planar, to_planar, unpack_planar

# Rows of x from which dequantising and the library's product are taken for faster than the kernel: an estimate from
# the bytes and operations of each, which `bench/tune_quant_matmul.py` measures.
CROSSOVER = 512
SCRATCH = 1 << 25  # weights that are dense at any one time: 64 MiB in 16 bits; fewer would leave multiprocessors idle


class Planar(Layout):
    name, runs = "planar", "triton dequant-matmul"
    stacks = 1

    def reasons(self, format: Format, N: int, K: int, dtype: torch.dtype, device: torch.device) -> list[str]:
        return [
            why
            for bad, why in (
                (device.type != "cuda", f"it runs on a CUDA device, not on {device.type}"),
                (find_spec("triton") is None, "triton is not installed"),
            )
            if bad
        ]

    def pack(self, weight: QuantizedWeight, format: Format, shape: tuple[int, int]) -> Prepared:
        prepared = Rest().pack(weight, format, shape)
        return prepared._replace(w=to_planar(weight.packed, shape[1], format.bits))

    def unpack(self, w: Tensor, format: Format, shape: tuple[int, int]) -> Tensor:
        return from_planar(w.clone(), shape[1], format.bits)

    def step(self, K: int) -> int:
        return max(256, SCRATCH // K // 256 * 256)

    def dense(self, p: Prepared, bits: int, group: int, rows: slice, K: int, dtype: torch.dtype) -> Tensor:
        if p.w.is_cuda:
            from ..kernels.dequantize import dequantize  # Triton is imported on first use

            zero = None if p.zero is None else p.zero[rows]
            return dequantize(p.w[rows], p.scale[rows], zero, bits, group, K, dtype)
        middle = 2 ** (bits - 1) if p.zero is None else p.zero[rows]
        return scale_groups(unpack_planar(p.w[rows], K, bits), p.scale[rows], middle, group, dtype)

    def matmul(self, x: Tensor, p: Prepared, N: int, bits: int, group: int) -> Tensor:
        if x.is_cuda and len(x) < CROSSOVER:
            return self.linear(x, p, None, N, bits, group, False)
        return super().matmul(x, p, N, bits, group)

    def linear(
        self, x: Tensor, p: Prepared, bias: Tensor | None, N: int, bits: int, group: int, batch_invariant: bool
    ) -> Tensor:
        if not x.is_cuda or len(x) >= CROSSOVER and not batch_invariant:
            return super().linear(x, p, bias, N, bits, group, batch_invariant)
        from ..kernels.quant_matmul import quant_matmul

        return quant_matmul(x, p.w, p.scale, p.zero, bias, bits, group, batch_invariant)
