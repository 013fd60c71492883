"""The product as one would first write it, right and slow: what the gates on compiled kernels must refuse."""

import triton
import triton.language as tl


@triton.jit
def _bad_matmul(
    x, w, scale, y, N, K, steps, stride_xm, stride_wn, stride_sn,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """int4 with neighbours in one byte, weights as the right operand: they go through shared memory."""
    offs_n, offs_m = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    w_ptrs = w + offs_n.to(tl.int64)[:, None] * stride_wn + tl.arange(0, 32)[None, :]
    x_ptrs = x + offs_m.to(tl.int64)[:, None] * stride_xm + tl.arange(0, 128)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, steps):
        halves = tl.load(w_ptrs + step * 32)
        low = tl.join((halves & 15).to(tl.bfloat16), ((halves >> 4) & 15).to(tl.bfloat16))
        high = tl.join(((halves >> 8) & 15).to(tl.bfloat16), ((halves >> 12) & 15).to(tl.bfloat16))
        q = tl.join(low, high).permute(0, 1, 3, 2).reshape(BLOCK_N, 128) - 8.0
        s = tl.load(scale + offs_n.to(tl.int64) * stride_sn + step)
        acc = tl.dot(tl.load(x_ptrs + step * 128), tl.trans((q * s[:, None]).to(tl.bfloat16)), acc)
    tl.store(y + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :], acc.to(tl.bfloat16))
