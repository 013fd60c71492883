"""y = x @ dequantize(w).T + bias, for weights of 4 or 8 bits that stay packed in memory.

Weights are planar. 4 bits: a row is cut into blocks of 128 values, 16 int32 words each; a block is 4 planes of 32, and
bits 4p..4p+3 of the low and the high half of word i hold values 2i and 2i+1 of plane p. One shift and one mask thus
give two neighbours in the two halves of a register, which is what the tensor cores take. 8 bits: plain bytes.
"""

from math import gcd
from typing import NamedTuple

import torch
import triton
import triton.language as tl

# About four for each of the 132 multiprocessors of an H100 or H200: enough loads in flight to fill the memory bus.
PROGRAMS = 512


class Config(NamedTuple):
    """A program computes BLOCK_N columns x BLOCK_M rows of y; SPLIT_K programs share the K of one tile."""

    BLOCK_N: int
    BLOCK_M: int
    SPLIT_K: int
    num_warps: int
    num_stages: int


def config(M: int, N: int, K: int, bits: int, group: int, fp32: bool = False) -> Config:
    """The tile for a problem: a pure function, so that nothing is tuned while a user waits.

    `fp32` says that x is float32, which tensor cores do not multiply at full precision. It gets a tile small enough
    for plain registers, and so does a K whose rows start at odd addresses and must be read value by value.
    """
    if fp32 or K % 16:
        BLOCK_N, BLOCK_M, num_warps, num_stages = 32, 16, 4, 2
    elif M <= 16:
        BLOCK_N, BLOCK_M, num_warps, num_stages = 64, 16, 4, 4
    elif M <= 32:
        BLOCK_N, BLOCK_M, num_warps, num_stages = 64, 32, 4, 4
    elif M <= 64:
        BLOCK_N, BLOCK_M, num_warps, num_stages = 64, 64, 4, 3
    else:
        BLOCK_N, BLOCK_M, num_warps, num_stages = 128, 64, 8, 3
    blocks = triton.cdiv(K, 128)
    tiles = triton.cdiv(N, BLOCK_N) * triton.cdiv(M, BLOCK_M)
    # Under four blocks a split never fills its pipeline; above eight splits the partial sums cost more than they gain.
    split = max(1, min(PROGRAMS // tiles, blocks // 4, 8))
    return Config(BLOCK_N, BLOCK_M, triton.cdiv(blocks, triton.cdiv(blocks, split)), num_warps, num_stages)


@triton.jit
def _subtract(q, zero, dtype: tl.constexpr, NARROW: tl.constexpr):
    """q - zero in `dtype`, exactly: q or-ed into the mantissa of 2^m reads 2^m + q, cheaper than a conversion.

    NARROW: q has been or-ed into 16-bit floats already.
    """
    if NARROW:
        return q.to(dtype, bitcast=True) - (zero + (1024 if dtype == tl.float16 else 128)).to(dtype)
    return ((q.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - (zero + 8388608).to(tl.float32)).to(dtype)


@triton.jit
def _plane(words, p: tl.constexpr, zero, dtype: tl.constexpr):
    """Plane p of int32 words [R, 16], minus zero: [R, 32]."""
    pair = (words >> (4 * p)) & 0x000F000F
    if dtype == tl.float16:
        pair |= 0x64006400
    elif dtype == tl.bfloat16:
        pair |= 0x43004300
    q = tl.join(pair.to(tl.int16), (pair >> 16).to(tl.int16)).reshape(words.shape[0], 32)
    return _subtract(q, zero, dtype, dtype != tl.float32)


@triton.jit
def _planes(words, p: tl.constexpr, RUN: tl.constexpr, zero, dtype: tl.constexpr):
    """Planes p, p+1, ... of int32 words [R, 16], minus zero: [R, RUN]."""
    if RUN == 32:
        return _plane(words, p, zero, dtype)
    elif RUN == 64:
        two = tl.join(_plane(words, p, zero, dtype), _plane(words, p + 1, zero, dtype))  # [R, 32, 2]
        return two.permute(0, 2, 1).reshape(words.shape[0], 64)
    else:
        even = tl.join(_plane(words, 0, zero, dtype), _plane(words, 2, zero, dtype))
        odd = tl.join(_plane(words, 1, zero, dtype), _plane(words, 3, zero, dtype))
        return tl.join(even, odd).permute(0, 2, 3, 1).reshape(words.shape[0], 128)  # from [R, 32, p // 2, p % 2]


@triton.jit
def _bytes(q, zero, dtype: tl.constexpr):
    """uint8 [R, RUN], minus zero."""
    if dtype == tl.float16:
        return _subtract(q.to(tl.int16) | 0x6400, zero, dtype, True)
    return _subtract(q, zero, dtype, False)  # the mantissa of bfloat16 has 7 bits


# Not specialised on the number of rows or of steps: a binary serves every prompt length.
@triton.jit(do_not_specialize=["M", "steps"])
def _quant_matmul(
    x, w, scale, zero, bias, y,
    M, N, K, steps,
    stride_xm, stride_wn, stride_sn, stride_sg, stride_zn, stride_zg,
    BITS: tl.constexpr, GROUP: tl.constexpr, RUN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One tile of y, or with several programs along axis 1 their partial sums y[program, M, N].

    GROUP is 0 when a row has one scale. RUN divides 128 and GROUP, so that RUN values never straddle two groups.
    """
    # Weights are the left operand: few rows of x then make a narrow tile, not a mostly empty one, and unpacked
    # weights go from registers to the tensor cores. Programs that share weights are neighbours.
    tiles_m = tl.cdiv(M, BLOCK_M)
    pid_n, pid_m, pid_k = tl.program_id(0) // tiles_m, tl.program_id(0) % tiles_m, tl.program_id(1)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, RUN)
    mask_n, mask_m = offs_n < N, offs_m < M
    rows_n = tl.minimum(offs_n, N - 1).to(tl.int64)  # rows past N repeat the last one, cheaper than a mask
    rows_m = offs_m.to(tl.int64)
    x_ptrs = x + rows_m[None, :] * stride_xm + offs_k[:, None]
    w_ptrs = w + rows_n[:, None] * stride_wn + (tl.arange(0, 16) if BITS == 4 else offs_k)[None, :]
    scale_ptrs = scale + rows_n * stride_sn
    if zero is not None:
        zero_ptrs = zero + rows_n * stride_zn
    last_block, last_group = tl.cdiv(K, 128) - 1, tl.cdiv(K, GROUP if GROUP else K) - 1

    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(0, steps):
        block = pid_k * steps + step
        if BITS == 4:  # the last program may run past the last block, where x reads as 0
            w_block = w_ptrs + tl.minimum(block, last_block) * 16
            words = tl.load(w_block, eviction_policy="evict_first")  # [BLOCK_N, 16]
        for p in tl.static_range(128 // RUN):
            k = block * 128 + p * RUN
            mask_k = offs_k < K - k
            g = tl.minimum(k // GROUP, last_group) if GROUP else 0
            xs = tl.load(x_ptrs + k, mask=mask_k[:, None] & mask_m[None, :], other=0.0)  # [RUN, BLOCK_M]
            z = 1 << (BITS - 1)
            if zero is not None:
                z = tl.load(zero_ptrs + g * stride_zg).to(tl.int32)[:, None]  # [BLOCK_N, 1]
            if BITS == 4:
                ws = _planes(words, p * RUN // 32, RUN, z, x.dtype.element_ty)
            else:
                q = tl.load(w_ptrs + k, mask=mask_k[None, :], other=0, eviction_policy="evict_first")
                ws = _bytes(q, z, x.dtype.element_ty)
            if GROUP:
                s = tl.load(scale_ptrs + g * stride_sg).to(tl.float32)  # [BLOCK_N]
                acc += tl.dot(ws, xs, input_precision="ieee") * s[:, None]
            else:
                acc = tl.dot(ws, xs, acc, input_precision="ieee")

    if GROUP == 0:
        acc *= tl.load(scale_ptrs).to(tl.float32)[:, None]
    if bias is not None:
        acc += tl.load(bias + rows_n).to(tl.float32)[:, None]
    y_ptrs = y + (pid_k.to(tl.int64) * M + rows_m)[None, :] * N + offs_n[:, None]
    tl.store(y_ptrs, acc.to(y.dtype.element_ty), mask=mask_n[:, None] & mask_m[None, :])


@triton.jit(do_not_specialize=["size"])
def _sum_splits(partial, bias, y, size, N, SPLIT_K: tl.constexpr, BLOCK: tl.constexpr):
    """y = partial.sum(0) + bias, in one fixed order: the same bits at every run, which atomic adds do not give."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    acc = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLIT_K):
        acc += tl.load(partial + split * size.to(tl.int64) + offs, mask=mask, other=0.0)
    if bias is not None:
        acc += tl.load(bias + offs % N, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + offs, acc.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _dequantize(
    w, scale, zero, y,
    N, K,
    stride_wn, stride_sn, stride_sg, stride_zn, stride_zg, stride_yn,
    BITS: tl.constexpr, GROUP: tl.constexpr, RUN: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile [BLOCK_N, 128] of y = (q - zero) * scale."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    block = tl.program_id(1)
    offs_k = tl.arange(0, RUN)
    mask_n = offs_n < N
    rows = tl.minimum(offs_n, N - 1).to(tl.int64)
    if BITS == 4:
        words = tl.load(w + rows[:, None] * stride_wn + block * 16 + tl.arange(0, 16)[None, :])  # [BLOCK_N, 16]
    for p in tl.static_range(128 // RUN):
        k = block * 128 + p * RUN
        mask_k = offs_k < K - k
        g = tl.minimum(k, K - 1) // GROUP if GROUP else 0
        z = 1 << (BITS - 1)
        if zero is not None:
            z = tl.load(zero + rows * stride_zn + g * stride_zg).to(tl.int32)[:, None]  # [BLOCK_N, 1]
        if BITS == 4:
            ws = _planes(words, p * RUN // 32, RUN, z, tl.float32)
        else:
            q = tl.load(w + rows[:, None] * stride_wn + (k + offs_k)[None, :], mask=mask_k[None, :], other=0)
            ws = _bytes(q, z, tl.float32)
        s = tl.load(scale + rows * stride_sn + g * stride_sg).to(tl.float32)  # [BLOCK_N]
        y_ptrs = y + rows[:, None] * stride_yn + (k + offs_k)[None, :]
        tl.store(y_ptrs, (ws * s[:, None]).to(y.dtype.element_ty), mask=mask_n[:, None] & mask_k[None, :])


def _interpreted() -> bool:
    return not isinstance(_quant_matmul, triton.JITFunction)


def _operands(w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int, group: int, K: int) -> tuple:
    """What both launchers pass on: the words or bytes of w, the strides of zero, GROUP and RUN."""
    words, groups = 16 * (-(-K // 128)) if bits == 4 else -(-K // 4), -(-K // group)
    # the kernels would read beyond what does not fit
    if w.dtype != torch.int32 or w.shape[1] != words or w.stride(1) != 1:
        raise ValueError(f"w must be int32 [N, {words}] for K={K}, bits={bits}; got {w.dtype} {list(w.shape)}")
    for name, t in (("scale", scale), ("zero", zero)):
        if t is not None and t.shape != (len(w), groups):
            raise ValueError(f"{name} must be [{len(w)}, {groups}] for K={K}, group={group}; got {list(t.shape)}")
    group = 0 if group >= K else group
    return w if bits == 4 else w.view(torch.uint8), (0, 0) if zero is None else zero.stride(), group, gcd(group, 128)


def quant_matmul(
    x: torch.Tensor,
    w: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    group: int,
) -> torch.Tensor:
    """y = x @ ((q - zero) * scale).T + bias, accumulated in float32; y [M, N] of x's dtype.

    x:     [M, K] float16, bfloat16 or float32, any strides
    w:     int32 [N, KW], planar, unit inner stride; KW = 16 * ceil(K / 128) for 4 bits, ceil(K / 4) for 8
    scale: [N, ceil(K / group)], any floating-point type and strides
    zero:  uint8 like scale, or None for 2**(bits - 1)
    bias:  [N] contiguous or None
    group: a multiple of 32, or at least K for one scale a row. ValueError for operands that do not fit.
    """
    if x.dtype == torch.bfloat16 and _interpreted():
        # the interpreter multiplies the bits of bfloat16 as integers, and truncates when it converts to it
        return quant_matmul(x.float(), w, scale, zero, bias, bits, group).to(x.dtype)
    (M, K), N = x.shape, len(w)
    y = x.new_empty(M, N)
    if y.numel() == 0:
        return y
    if x.stride(1) != 1 or K % 16 == 0 and (x.stride(0) % 16 or x.data_ptr() % 16):  # rows are read 16 bytes at a time
        x = x.clone(memory_format=torch.contiguous_format)
    fp32 = x.dtype == torch.float32
    tile = config(M, N, K, bits, group, fp32)
    w, stride_z, GROUP, RUN = _operands(w, scale, zero, bits, group, K)
    split = tile.SPLIT_K > 1
    out = x.new_empty(tile.SPLIT_K, M, N, dtype=torch.float32) if split else y
    steps = triton.cdiv(triton.cdiv(K, 128), tile.SPLIT_K)
    with torch.cuda.device_of(x):  # Triton launches on the current device, whatever the tensors' is
        _quant_matmul[triton.cdiv(N, tile.BLOCK_N) * triton.cdiv(M, tile.BLOCK_M), tile.SPLIT_K](
            x, w, scale, zero, None if split else bias, out,
            M, N, K, tl.constexpr(steps) if _interpreted() else steps,  # NumPy 2.4 refuses a tensor as a loop's bound
            x.stride(0), w.stride(0), *scale.stride(), *stride_z,
            BITS=bits, GROUP=GROUP, RUN=32 if fp32 or K % 16 else RUN, BLOCK_N=tile.BLOCK_N, BLOCK_M=tile.BLOCK_M,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        if split:
            _sum_splits[(triton.cdiv(M * N, 1024),)](out, bias, y, M * N, N, SPLIT_K=tile.SPLIT_K, BLOCK=1024)
    return y


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
    if y.dtype == torch.bfloat16 and _interpreted():  # see quant_matmul
        return y.copy_(dequantize(w, scale, zero, bits, group, K, torch.float32))
    w, stride_z, GROUP, RUN = _operands(w, scale, zero, bits, group, K)
    with torch.cuda.device_of(w):
        _dequantize[triton.cdiv(N, 32), triton.cdiv(K, 128)](
            w, scale, zero, y,
            N, K,
            w.stride(0), *scale.stride(), *stride_z, y.stride(0),
            BITS=bits, GROUP=GROUP, RUN=RUN, BLOCK_N=32,
        )  # fmt: skip
    return y
