"""(q - zero) * scale of a weight of 4 or 8 bits, in planar words (see quant_matmul.py)."""

import torch
import triton
import triton.language as tl

from .launch import on_device
from .operands import check_operands, interpreted, uses_ptx
from .unpack import subtract, unpack_block


@triton.jit
def _dequantize(
    w, scale, zero, y,
    N, K,
    stride_wn, stride_sn, stride_sg, stride_zn, stride_zg, stride_yn,
    BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """One tile [BLOCK_N, 128] of y, a plane of 32 at a time: 32 divides every group."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    block = tl.program_id(1)
    offs_k = tl.arange(0, 32)
    mask_n = offs_n < N
    rows = tl.minimum(offs_n, N - 1).to(tl.int64)
    w_ptrs = w + rows[:, None] * stride_wn + block * (8 * BITS) + offs_k[None, :]
    p0, p1, p2, p3 = unpack_block(w_ptrs, BITS, tl.float32, PTX)
    for p in tl.static_range(4):
        k = block * 128 + p * 32
        mask_k = offs_k < K - k
        g = tl.minimum(k, K - 1) // GROUP if GROUP else 0
        z = None if zero is None else tl.load(zero + rows * stride_zn + g * stride_zg)[:, None]  # [BLOCK_N, 1]
        q = p0 if p == 0 else p1 if p == 1 else p2 if p == 2 else p3
        s = tl.load(scale + rows * stride_sn + g * stride_sg).to(tl.float32)  # [BLOCK_N]
        value = subtract(q, z, BITS, tl.float32) * s[:, None]
        y_ptrs = y + rows[:, None] * stride_yn + (k + offs_k)[None, :]
        tl.store(y_ptrs, value.to(y.dtype.element_ty), mask=mask_n[:, None] & mask_k[None, :])


def dequantize(
    w: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bits: int,
    group: int,
    K: int,
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """(q - zero) * scale, computed in float32 and rounded once: [N, K] of `dtype`, written into `out` if given.

    Operands as for `quant_matmul`; rows of `w`, `scale` and `zero` may be a slice. `out` has unit inner stride.
    """
    N = len(w)
    y = torch.empty(N, K, dtype=dtype, device=w.device) if out is None else out
    if y.numel() == 0:
        return y
    if y.dtype == torch.bfloat16 and interpreted(_dequantize):  # which truncates when it converts to bfloat16
        return y.copy_(dequantize(w, scale, zero, bits, group, K, torch.float32))
    w, stride_z, GROUP = check_operands(w, scale, zero, bits, group, K)
    with on_device(w.device):
        _dequantize[-(-N // 32), -(-K // 128)](
            w, scale, zero, y,
            N, K,
            w.stride(0), *scale.stride(), *stride_z, y.stride(0),
            BITS=bits, GROUP=GROUP, BLOCK_N=32, PTX=uses_ptx(w),
        )  # fmt: skip
    return y
