"""y = x @ dequantize(w).T + bias, for weights of 4 or 8 bits that stay packed in memory.

Weights are planar: a row is cut into blocks of 128 values. 4 bits: 32 int16 halves a block, and bits 4p..4p+3 of half
j hold value 32p + j. 8 bits: twice 32 halves, whose two bytes hold values j and 32 + j of 64. See unpack.py.
"""

from functools import cache
from math import gcd

import torch
import triton
import triton.language as tl

from .launch import Plan, launch, on_device
from .operands import check_operands, device_of, interpreted, uses_ptx
from .quant_config import Config, config, options_of
from .tickets import take_tickets
from .unpack import subtract, unpack_block

PRESCALED = (torch.bfloat16,)  # in float16 a small scale would lose bits
INVARIANT_ROWS = 512  # rows of x at a time when results must not depend on how many there are: bounds the partial sums


@triton.jit
def _columns(p0, p1, p2, p3, p: tl.constexpr, RUN: tl.constexpr):
    """Planes p, p + 1, ... side by side: [R, RUN]."""
    if RUN == 32:
        return p0 if p == 0 else p1 if p == 1 else p2 if p == 2 else p3
    elif RUN == 64:
        two = tl.join(p0 if p == 0 else p2, p1 if p == 0 else p3)  # [R, 32, 2]
        return two.permute(0, 2, 1).reshape(p0.shape[0], 64)
    else:
        four = tl.join(tl.join(p0, p2), tl.join(p1, p3))  # [R, 32, p // 2, p % 2]
        return four.permute(0, 2, 3, 1).reshape(p0.shape[0], 128)


@triton.jit
def _prefetch(pointers):
    """Ask for what will be read soon. Where there is no PTX, nobody needs to ask."""
    tl.inline_asm_elementwise("prefetch.global.L1 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], tl.int32, False, 1)


@triton.jit
def _arrive(part_ptrs, acc, mask, ticket):
    """Store a part of the sums; return how many parts of the tile had been stored before."""
    tl.store(part_ptrs, acc, mask=mask)
    tl.debug_barrier()  # all threads have written before one of them says so
    return tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu")


@triton.jit
def _sum_parts(part_ptrs, size, mask, SPLIT_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """In the order of K, by whoever finishes last: the same bits at every run, and no memory to clear."""
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for split in range(0, SPLIT_K):
        acc += tl.load(part_ptrs + split * size, mask=mask, other=0.0, cache_modifier=".cg")
    return acc


# Not specialised on the number of rows or of steps: a binary serves every prompt length.
@triton.jit(do_not_specialize=["M", "steps", "per_token"])
def _quant_matmul(
    x, w, scale, zero, bias, y, partial, tickets, slots, experts,
    M, N, K, steps, per_token,
    stride_xm, stride_wn, stride_sn, stride_sg, stride_zn, stride_zg,
    BITS: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr, RUN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCKS: tl.constexpr, SPLIT_K: tl.constexpr,
    PRESCALE: tl.constexpr, EVEN: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """One tile of y; with SPLIT_K > 1, the part of it that a stretch of K gives, and the last to finish adds them up.

    GROUP is 0 when a row has one scale. A scale holds for SPAN values, which divides 128 and GROUP; a product takes
    RUN of them, which divides SPAN. A step is BLOCKS blocks of 128. EVEN: the programs of a tile share K without rest.
    PRESCALE: scales are applied to the weights, in x's dtype, and all products add to the same sums; otherwise each
    SPAN has sums of its own, scaled in float32. Not for sm_90: there sums that carry on leave products in flight, and
    assemblers before CUDA 13.3 overwrite the registers that these have yet to read.

    slots, experts: for a mixture. The weights of all experts lie one below the other, and rows are not in order: tile
    m has rows slots[m] (-1: none) of y, which belong to rows slots[m] // per_token of x, and weights of experts[m].
    """
    # Weights are the left operand: few rows of x then make a narrow tile, not a mostly empty one, and unpacked
    # weights go from registers to the tensor cores. Programs that share weights are neighbours.
    tile = tl.program_id(0)
    tiles_m = tl.num_programs(0) // tl.cdiv(N, BLOCK_N)
    pid_n, pid_m, pid_k = tile // tiles_m, tile % tiles_m, tl.program_id(1)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    rows_n = tl.minimum(offs_n, N - 1).to(tl.int64)  # rows past N repeat the last one, cheaper than a mask
    if slots is None:
        offs_m = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask_m, rows_x = offs_m < M, offs_m
    else:
        expert = tl.load(experts + pid_m)
        if expert < 0:
            return
        rows_n += expert.to(tl.int64) * N
        offs_m = tl.load(slots + pid_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask_m, rows_x = offs_m >= 0, offs_m // per_token
    offs_k = tl.arange(0, RUN)
    x_ptrs = x + rows_x[None, :] * stride_xm + offs_k[:, None]
    w_ptrs = w + rows_n[:, None] * stride_wn + tl.arange(0, 32)[None, :]
    scale_ptrs = scale + rows_n * stride_sn
    if zero is not None:
        zero_ptrs = zero + rows_n * stride_zn
    last_block, last_group = tl.cdiv(K, 128) - 1, tl.cdiv(K, GROUP if GROUP else K) - 1
    dtype: tl.constexpr = x.dtype.element_ty

    if GROUP == 0:
        s = tl.load(scale_ptrs).to(dtype if PRESCALE else tl.float32)  # [BLOCK_N]
    elif PTX and BLOCK_M <= 16:
        # on their way beside the first weights, not after them; a sector holds the scales of 16 groups
        first = tl.minimum(pid_k * steps * BLOCKS * 128 // GROUP, last_group)
        _prefetch(scale_ptrs + first * stride_sg)
        if zero is not None:
            _prefetch(zero_ptrs + first * stride_zg)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(0, steps):
        for b in tl.static_range(BLOCKS):
            block = (pid_k * steps + step) * BLOCKS + b  # the last program may run past the last, where x reads as 0
            w_block = w_ptrs + (block if EVEN else tl.minimum(block, last_block)) * (8 * BITS)
            p0, p1, p2, p3 = unpack_block(w_block, BITS, dtype, PTX)
            for p in tl.static_range(128 // RUN):
                k = block * 128 + p * RUN
                if p * RUN % SPAN == 0:
                    g = 0 if GROUP == 0 else k // GROUP if EVEN else tl.minimum(k // GROUP, last_group)
                    z = None if zero is None else tl.load(zero_ptrs + g * stride_zg)[:, None]  # [BLOCK_N, 1]
                    if GROUP:
                        s = tl.load(scale_ptrs + g * stride_sg).to(dtype if PRESCALE else tl.float32)  # [BLOCK_N]
                mask_x = mask_m[None, :] if EVEN else (offs_k < K - k)[:, None] & mask_m[None, :]
                xs = tl.load(x_ptrs + k, mask=mask_x, other=0.0)  # [RUN, BLOCK_M]
                ws = subtract(_columns(p0, p1, p2, p3, p * RUN // 32, RUN), z, BITS, dtype)
                if PRESCALE:
                    acc = tl.dot(ws * s[:, None], xs, acc, input_precision="ieee")
                else:
                    if p * RUN % SPAN == 0:
                        part = tl.dot(ws, xs, input_precision="ieee")
                    else:
                        part = tl.dot(ws, xs, part, input_precision="ieee")
                    if (p + 1) * RUN % SPAN == 0:
                        acc += part * s[:, None]

    mask = mask_n[:, None] & mask_m[None, :]
    if SPLIT_K > 1:
        part_ptrs, size = partial + offs_m[None, :] * N + offs_n[:, None], M.to(tl.int64) * N
        if _arrive(part_ptrs + pid_k * size, acc, mask, tickets + tile) < SPLIT_K - 1:
            return
        acc = _sum_parts(part_ptrs, size, mask, SPLIT_K, BLOCK_N, BLOCK_M)
        tl.store(tickets + tile, 0)
    if bias is not None:
        acc += tl.load(bias + rows_n).to(tl.float32)[:, None]
    tl.store(y + offs_m[None, :] * N + offs_n[:, None], acc.to(y.dtype.element_ty), mask=mask)


def quant_matmul(
    x: torch.Tensor,
    w: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    group: int,
    batch_invariant: bool = False,
    tile: Config | None = None,
) -> torch.Tensor:
    """y = x @ ((q - zero) * scale).T + bias, accumulated in float32; y [M, N] of x's dtype.

    x:     [M, K] float16, bfloat16 or float32, any strides
    w:     int32 [N, KW], planar, unit inner stride; KW = 4 * bits * ceil(K / 128)
    scale: [N, ceil(K / group)], any floating-point type and strides
    zero:  uint8 like scale, or None for 2**(bits - 1)
    bias:  [N] contiguous or None
    group: a multiple of 32, or at least K for one scale a row
    batch_invariant: a row of y has the same bits whatever the other rows of x are, and however many
    tile:  in place of `config`'s; for measurements

    The same call gives the same bits every time. Raises ValueError for operands that do not fit.
    """
    if x.dtype == torch.bfloat16 and interpreted(_quant_matmul):
        # the interpreter multiplies the bits of bfloat16 as integers, and truncates when it converts to it
        return quant_matmul(x.float(), w, scale, zero, bias, bits, group, batch_invariant, tile).to(x.dtype)
    (M, K), N = x.shape, len(w)
    y = x.new_empty(M, N)
    if y.numel() == 0:
        return y
    if tile is None:
        about = device_of(x.device.index) if x.is_cuda else ()
        tile = config(M, N, K, bits, x.dtype == torch.float32, batch_invariant, *about)
    if M <= INVARIANT_ROWS or not batch_invariant:
        _launch(aligned(x), w, scale, zero, bias, y, bits, group, tile)
    else:
        for rows, out in zip(x.split(INVARIANT_ROWS), y.split(INVARIANT_ROWS), strict=True):
            _launch(aligned(rows), w, scale, zero, bias, out, bits, group, tile)
    return y


def aligned(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy of it, with rows that can be read 16 bytes at a time if K allows that."""
    if x.stride(1) != 1 or x.shape[1] % 16 == 0 and (x.stride(0) % 16 or x.data_ptr() % 16):
        return x.clone(memory_format=torch.contiguous_format)
    return x


def _launch(
    x: torch.Tensor,
    w: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    bits: int,
    group: int,
    tile: Config,
    slots: torch.Tensor | None = None,
    experts: torch.Tensor | None = None,
    per_token: int = 1,
) -> None:
    """With experts: operands of all of them, one below the other, and M is the number of slots."""
    if tile.PRESCALE and x.is_cuda and device_of(x.device.index)[0] // 10 == 9:
        raise ValueError(f"{tile}: PRESCALE gives wrong sums on sm_90 (see the kernel); use a tile without it")
    (M, N), K = y.shape, x.shape[1]
    w, stride_z, GROUP = check_operands(w, scale, zero, bits, group, K)
    plan = _plan(M, N, K, bits, GROUP, x.dtype, tile, uses_ptx(x))
    tiles, partial, tickets = plan.tiles, None, None
    if experts is not None:
        tiles = -(-N // tile.BLOCK_N) * len(experts)
    elif tile.SPLIT_K > 1:
        partial = x.new_empty(tile.SPLIT_K, M, N, dtype=torch.float32)
        tickets = take_tickets(tiles, x.device)
    pointers = (x, w, scale, zero, bias, y, partial, tickets, slots, experts)
    strides = (x.stride(0), w.stride(0), *scale.stride(), *stride_z)
    numbers = (M, N, K, plan.steps, per_token, *strides)
    bias_dtype = None if bias is None else bias.dtype
    kind = (x.dtype, scale.dtype, bias_dtype, zero is None, slots is None, strides, x.device)
    with on_device(x.device):
        launch(_quant_matmul, (tiles, tile.SPLIT_K, 1), pointers, numbers, plan, kind)


@cache
def _plan(M: int, N: int, K: int, bits: int, GROUP: int, dtype: torch.dtype, tile: Config, PTX: bool) -> Plan:
    """Cached: to work it out anew would double the cost of a launch."""
    steps = -(-K // (128 * tile.BLOCKS * tile.SPLIT_K))
    span, even = gcd(GROUP, 128), K == steps * tile.SPLIT_K * tile.BLOCKS * 128
    constants = {
        "BITS": bits,
        "GROUP": GROUP,
        "SPAN": span,
        "RUN": min(span, tile.RUN),
        "BLOCK_N": tile.BLOCK_N,
        "BLOCK_M": tile.BLOCK_M,
        "BLOCKS": tile.BLOCKS,
        "SPLIT_K": tile.SPLIT_K,
        "PRESCALE": tile.PRESCALE and dtype in PRESCALED,
        "EVEN": even,
        "PTX": PTX,
    }
    tiles = -(-N // tile.BLOCK_N) * -(-M // tile.BLOCK_M)
    if interpreted(_quant_matmul):
        steps = tl.constexpr(steps)  # NumPy 2.4 refuses a tensor as a loop's bound
    return Plan(tiles, steps, constants, options_of(tile, bits, GROUP, even), {})
