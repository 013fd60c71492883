"""Weights on a GPU: planar words, read by the Triton kernel."""

from importlib.util import find_spec

import torch
from torch import Tensor

from ..formats import IntFormat, QuantizedWeight, scale_groups
from .layout import Layout, Prepared, Rest
from .planar import from_planar, to_planar, unpack_planar


class Planar(Layout):
    name, runs = "planar", "triton dequant-matmul"

    def reasons(self, format: IntFormat, N: int, K: int, dtype: torch.dtype, device: torch.device) -> list[str]:
        return [
            why
            for bad, why in (
                (device.type != "cuda", f"it runs on a CUDA device, not on {device.type}"),
                (find_spec("triton") is None, "triton is not installed"),
            )
            if bad
        ]

    def pack(self, weight: QuantizedWeight, format: IntFormat, shape: tuple[int, int]) -> Prepared:
        prepared = Rest().pack(weight, format, shape)
        return prepared._replace(w=to_planar(weight.packed, shape[1], format.bits))

    def unpack(self, w: Tensor, format: IntFormat, shape: tuple[int, int]) -> Tensor:
        return from_planar(w.clone(), shape[1], format.bits)

    def dense(self, p: Prepared, bits: int, group: int, rows: slice, K: int, dtype: torch.dtype) -> Tensor:
        zero = 2 ** (bits - 1) if p.zero is None else p.zero[rows]
        return scale_groups(unpack_planar(p.w[rows], K, bits), p.scale[rows], zero, group, dtype)

    def matmul(self, x: Tensor, p: Prepared, N: int, bits: int, group: int) -> Tensor:
        if not x.is_cuda:
            return super().matmul(x, p, N, bits, group)
        from ..kernels.quant_matmul import quant_matmul  # Triton is imported on first use

        return quant_matmul(x, p.w, p.scale, p.zero, None, bits, group)
