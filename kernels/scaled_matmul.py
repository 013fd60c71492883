"""y = (q @ w.T) * x_scale * w_scale + bias for q and w of 8 bits, and the quantization of the rows of x to such a q.

Both factors are int8 or both float8_e4m3fn, which tensor cores multiply at twice the rate of 16-bit floats, int8 with
exact sums; the scales, one for each row of x and one for each row of w, leave the sum and are applied once at the end.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import on_device
from .operands import device_of, interpreted

MULTIPROCESSORS = 132  # of an H100 or H200; four programs on each keep enough loads in flight to fill the memory bus
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
# Hopper's tensor cores keep some 14 bits of a sum of float8 products; every so many of them it joins a float32.
PRECISE_K = 128
GROUP_M = 8  # tiles of rows of x that share a pass over the weights
LARGEST_K = 1 << 17  # of int8: 127 * 128 * K stays within an int32


class Config(NamedTuple):
    """A program computes BLOCK_M rows x BLOCK_N columns of y; SPLIT_K programs share the K of one tile.

    SWAP: the weights are the left operand of the product, whose tiles are then as narrow as there are rows of x.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    SPLIT_K: int
    SWAP: bool
    num_warps: int
    num_stages: int


@cache
def config(M: int, N: int, K: int, capability: int = 90, floats: bool = False) -> Config:
    """The tile for a problem: a pure function, so that nothing is tuned while a user waits.

    capability: of the device, 90 for sm_90. floats: float8, whose sums take twice the registers (see `PRECISE_K`).
    K that is no multiple of 16 is read byte by byte, in a tile that bears it.
    """
    SWAP = M <= 64 or K % 16 > 0
    if K % 16:
        BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages = 16 if M <= 16 else 32, 64, 64, 4, 2
    elif M <= 16:
        BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages = 16, 64, 256, 4, 4
    elif M <= 32:
        BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages = 32, 64, 256, 4, 4
    elif M <= 64:
        BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages = 64, 64, 256, 4, 3
    elif M <= 128 or M * N < 128 * 256 * MULTIPROCESSORS:  # larger tiles would leave some of them without one
        BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages = 64, 128, 128, 4, 4
    elif capability >= 90 and not floats:
        BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages = 128, 256, 128, 8, 4
    else:
        BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages = 128, 128, 128, 8, 3
    blocks = -(-K // BLOCK_K)
    tiles = -(-N // BLOCK_N) * -(-M // BLOCK_M)
    # Under four blocks a split never fills its pipeline; above eight splits the partial sums cost more than they gain.
    split = max(1, min(4 * MULTIPROCESSORS // tiles, blocks // 4, 8)) if M <= 128 else 1
    each = -(-blocks // split)
    SPLIT_K = -(-blocks // each)
    return Config(BLOCK_M, BLOCK_N, BLOCK_K, SPLIT_K, SWAP, num_warps, num_stages)


@triton.jit
def _to_e4m3(x):
    """float32 of at most 448 and a rounding error -> float8e4nv, half to even.

    Rounded in float32, so that the conversion has nothing left to do: Triton's interpreter has its own way of it.
    """
    # three bits follow the leading one, of which 2**-6 is the least; 1.5 * 2**20 times it has no room for a fourth
    power = tl.maximum(x.to(tl.int32, bitcast=True) & 0x7F800000, 0x3C800000)
    magic = power.to(tl.float32, bitcast=True) * 1572864.0
    return ((x + magic) - magic).to(tl.float8e4nv)


@triton.jit
def _quantize_rows(x, q, scale, K, stride_xm, stride_xk, LARGEST: tl.constexpr, BLOCK_K: tl.constexpr):
    """One row: scale = max |x| / LARGEST, q = x / scale, half to even. Once over it for the maximum, once for q."""
    row = tl.program_id(0).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    x_row = x + row * stride_xm
    largest = tl.zeros((BLOCK_K,), tl.int32)
    for k in range(0, K, BLOCK_K):
        offs = (k + offs_k).to(tl.int64)
        xs = tl.load(x_row + offs * stride_xk, mask=offs < K, other=0.0).to(tl.float32)  # [BLOCK_K]
        # the bits of a positive float are in its order, with infinity above all numbers and NaN above infinity, while
        # a maximum of floats would lose a NaN
        largest = tl.maximum(largest, xs.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    bits = tl.max(largest, 0)
    finite = bits < 0x7F800000
    # the bound, the smallest normal number, is for rows of zeros
    step = tl.maximum(tl.div_rn(bits.to(tl.float32, bitcast=True), LARGEST), 1.1754943508222875e-38)
    tl.store(scale + row, tl.where(finite, step, float("nan")))
    for k in range(0, K, BLOCK_K):
        offs = (k + offs_k).to(tl.int64)
        xs = tl.load(x_row + offs * stride_xk, mask=offs < K, other=0.0).to(tl.float32)  # [BLOCK_K]
        # |x| / scale is at most LARGEST and a rounding error, so nothing is left to clamp
        xs = tl.where(finite, tl.div_rn(xs, tl.where(finite, step, 1.0) + tl.zeros_like(xs)), 0.0)
        if q.dtype.element_ty == tl.int8:
            # 1.5 * 2**23 leaves no room for a fraction, and the low byte of the sum is the integer
            rounded = (xs + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
        else:
            rounded = _to_e4m3(xs)
        tl.store(q + row * K + offs, rounded, mask=offs < K)


@triton.jit
def _scaled(acc, x_scale, w_scale, bias, rows_m, rows_n):
    """Sums [BLOCK_M, BLOCK_N] -> acc * x_scale * w_scale + bias in float32."""
    y = acc.to(tl.float32) * tl.load(x_scale + rows_m).to(tl.float32)[:, None]
    y *= tl.load(w_scale + rows_n).to(tl.float32)[None, :]
    if bias is not None:
        y += tl.load(bias + rows_n).to(tl.float32)[None, :]
    return y


# Not specialised on the number of rows or of steps: a binary serves every prompt length.
@triton.jit(do_not_specialize=["M", "steps"])
def _scaled_matmul(
    q, x_scale, w, w_scale, bias, y,
    M, N, K, steps,
    stride_qm, stride_wn,
    WHOLE: tl.constexpr, SPLIT: tl.constexpr, PRECISE_K: tl.constexpr, GROUP_M: tl.constexpr, SWAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of y or, with SPLIT, its part of the sums y[program, M, N]. WHOLE: no block straddles K.

    PRECISE_K: products of floats after which their sum joins a float32; None for integers, whose sums are exact.
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    # programs that run at the same time share rows of x and of w, which then come from the cache
    pid, pid_k = tl.program_id(0), tl.program_id(1)
    first_m = pid // (GROUP_M * tiles_n) * GROUP_M
    group_m = tl.minimum(tiles_m - first_m, GROUP_M)
    pid_m = first_m + pid % (GROUP_M * tiles_n) % group_m
    pid_n = pid % (GROUP_M * tiles_n) // group_m
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    rows_m = tl.minimum(offs_m, M - 1).to(tl.int64)  # rows past the last one repeat it, cheaper than a mask
    rows_n = tl.minimum(offs_n, N - 1).to(tl.int64)
    q_ptrs = q + rows_m[:, None] * stride_qm + offs_k[None, :]
    w_ptrs = w + rows_n[:, None] * stride_wn + offs_k[None, :]

    SUM: tl.constexpr = tl.int32 if PRECISE_K is None else tl.float32
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), SUM)
    for step in range(0, steps):
        k = (pid_k * steps + step) * BLOCK_K
        if WHOLE:
            qs = tl.load(q_ptrs + k)  # [BLOCK_M, BLOCK_K]
            ws = tl.load(w_ptrs + k)  # [BLOCK_N, BLOCK_K]
        else:  # the last program may run past K, where all reads as 0
            mask_k = offs_k[None, :] < K - k
            qs = tl.load(q_ptrs + k, mask=mask_k, other=0.0)
            ws = tl.load(w_ptrs + k, mask=mask_k, other=0.0)
        if SWAP:
            acc = tl.dot(ws, tl.trans(qs), acc, max_num_imprecise_acc=PRECISE_K, out_dtype=SUM)
        else:
            acc = tl.dot(qs, tl.trans(ws), acc, max_num_imprecise_acc=PRECISE_K, out_dtype=SUM)
    if SWAP:
        acc = tl.trans(acc)

    y_ptrs = y + (pid_k.to(tl.int64) * M + rows_m)[:, None] * N + offs_n[None, :]
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    if SPLIT:
        tl.store(y_ptrs, acc, mask=mask)
    else:
        tl.store(y_ptrs, _scaled(acc, x_scale, w_scale, bias, rows_m, rows_n).to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def _sum_splits(
    partial, x_scale, w_scale, bias, y, M, N, SPLIT_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """A tile of y, from the sums partial [SPLIT_K, M, N], always added in the same order."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_m, rows_n = tl.minimum(offs_m, M - 1).to(tl.int64), tl.minimum(offs_n, N - 1).to(tl.int64)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    offs = rows_m[:, None] * N + rows_n[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), partial.dtype.element_ty)
    for split in tl.static_range(SPLIT_K):
        acc += tl.load(partial + split * M.to(tl.int64) * N + offs)  # [BLOCK_M, BLOCK_N]
    tl.store(y + offs, _scaled(acc, x_scale, w_scale, bias, rows_m, rows_n).to(y.dtype.element_ty), mask=mask)


def quantize_rows(x: torch.Tensor, dtype: torch.dtype = torch.int8) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] float16, bfloat16 or float32, any strides -> q [M, K] of `dtype` contiguous, scale float32 [M].

    scale = max |x| / 127 of the row (/ 448 for float8_e4m3fn), q = x / scale rounded half to even: x is q * scale to
    half a step. A row of zeros has the smallest normal scale; a row with a NaN or an infinity has q = 0 and scale NaN,
    so that no product of it is finite. ValueError for anything but a matrix of floats, and for another dtype.
    """
    if dtype not in LARGEST:
        raise ValueError(f"q may have {' or '.join(map(str, LARGEST))}, not {dtype}")
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"x must be a floating-point [M, K], got {x.dtype} {list(x.shape)}")
    (M, K), q = x.shape, torch.empty(x.shape, dtype=dtype, device=x.device)
    scale = torch.empty(M, dtype=torch.float32, device=x.device)
    if not M:
        return q, scale
    if x.dtype == torch.bfloat16 and interpreted(_scaled_matmul):
        x = x.float()  # the interpreter takes the bits of bfloat16 for integers
    BLOCK_K = min(4096, triton.next_power_of_2(K))
    known = tl.constexpr if interpreted(_quantize_rows) else int  # NumPy 2.4 refuses a tensor as a loop's bound
    with on_device(x.device):
        _quantize_rows[(M,)](
            x, q, scale,
            known(K), *x.stride(),
            LARGEST=LARGEST[dtype], BLOCK_K=BLOCK_K, num_warps=8 if BLOCK_K > 2048 else 4,
        )  # fmt: skip
    return q, scale


def _check(
    q: torch.Tensor, x_scale: torch.Tensor, w: torch.Tensor, w_scale: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """Raise ValueError unless the operands fit: the kernel would read beyond them."""
    for name, m in (("q", q), ("w", w)):
        if m.dtype not in LARGEST or m.ndim != 2 or m.stride(1) != 1 and m.shape[1] > 1:
            raise ValueError(
                f"{name} must be an int8 or float8_e4m3fn matrix with unit inner stride, got {m.dtype} {list(m.shape)}"
            )
    if q.dtype != w.dtype:
        raise ValueError(f"q and w must have the same dtype, got {q.dtype} and {w.dtype}")
    M, K, N = *q.shape, len(w)
    if w.shape[1] < K or not 0 < K or K > LARGEST_K and q.dtype == torch.int8:
        raise ValueError(
            f"w must be [{N}, {K}] for q {list(q.shape)}, with K from 1, of int8 to {LARGEST_K}; got {list(w.shape)}"
        )
    for name, t, length in (("x_scale", x_scale, M), ("w_scale", w_scale, N), ("bias", bias, N)):
        if t is not None and (t.shape != (length,) or not t.is_contiguous()):
            raise ValueError(f"{name} must be a contiguous [{length}], got {list(t.shape)}")


def scaled_matmul(
    q: torch.Tensor,
    x_scale: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """y[m, n] = (sum_k q[m, k] w[n, k]) * x_scale[m] * w_scale[n] + bias[n]: [M, N] of `dtype`, rounded once.

    q:       int8 or float8_e4m3fn [M, K], x_scale: float32 [M], as `quantize_rows` gives them
    w:       as q, [N, at least K], unit inner stride; what is beyond K is not read. w_scale: [N], any float type
    bias:    [N] or None
    dtype:   float16, bfloat16 or float32
    batch_invariant: a row of y has the same bits however many rows q has; sums of integers always have them

    Sums of int8 are int32, exact for K up to 131,072; those of float8, which needs sm_89 or newer, are float32.
    ValueError for operands that do not fit.
    """
    _check(q, x_scale, w, w_scale, bias)
    if dtype == torch.bfloat16 and interpreted(_scaled_matmul):
        # the interpreter truncates when it converts to bfloat16, and takes its bits for integers
        w_scale, bias = w_scale.float(), None if bias is None else bias.float()
        return scaled_matmul(q, x_scale, w, w_scale, bias, torch.float32, batch_invariant).to(dtype)
    (M, K), N = q.shape, len(w)
    y = q.new_empty(M, N, dtype=dtype)
    if y.numel() == 0:
        return y
    capability = device_of(q.device.index)[0] // 10 * 10 if q.is_cuda else 90
    floats = q.dtype != torch.int8
    tile = config(1 if floats and batch_invariant else M, N, K, capability, floats)
    if K % 16 == 0 and (q.stride(0) % 16 or q.data_ptr() % 16):  # rows are read 16 bytes at a time
        q = q.clone(memory_format=torch.contiguous_format)
    split = tile.SPLIT_K > 1
    out = q.new_empty(tile.SPLIT_K, M, N, dtype=torch.float32 if floats else torch.int32) if split else y
    steps = -(-K // (tile.BLOCK_K * tile.SPLIT_K))
    with on_device(q.device):
        _scaled_matmul[-(-M // tile.BLOCK_M) * -(-N // tile.BLOCK_N), tile.SPLIT_K](
            q, x_scale, w, w_scale, bias, out,
            M, N, K, tl.constexpr(steps) if interpreted(_scaled_matmul) else steps,
            q.stride(0), w.stride(0),
            WHOLE=K == steps * tile.SPLIT_K * tile.BLOCK_K, SPLIT=split,
            PRECISE_K=min(PRECISE_K, tile.BLOCK_K) if floats else None, GROUP_M=GROUP_M, SWAP=tile.SWAP,
            BLOCK_M=tile.BLOCK_M, BLOCK_N=tile.BLOCK_N, BLOCK_K=tile.BLOCK_K,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        if split:
            _sum_splits[-(-M // 4), -(-N // 256)](
                out, x_scale, w_scale, bias, y, M, N, SPLIT_K=tile.SPLIT_K, BLOCK_M=4, BLOCK_N=256
            )
    return y
