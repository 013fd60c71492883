"""y = x @ W.T + bias for weights of which whole blocks are zero: only the others are stored, read and multiplied.

Blocks of B x B, row of blocks by row of blocks (BSR), each with its columns (K) first: values[j, k, n].
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import Plan, launch, on_device
from .operands import device_of, interpreted
from .quant_matmul import aligned
from .tickets import take_tickets

SIZES = (32, 64, 128)  # of a block
MULTIPROCESSORS = 132  # of an H100 or H200; an A100 has 108
MOST_SPLITS = 8
SHARED_X = 24 << 20  # bytes of x that programs which run at the same time may read from the L2 cache


class Config(NamedTuple):
    """A program computes BLOCK_M rows x B columns of y, BLOCK_K values of K a step.

    SWAP: the weights are the left operand of the product. SPLIT_K programs share the blocks of one row of blocks.
    GROUP_M: tiles of rows of x that share a pass over the weights.
    """

    BLOCK_M: int
    BLOCK_K: int
    SWAP: bool
    num_warps: int
    num_stages: int
    SPLIT_K: int = 1
    GROUP_M: int = 1


# (B, compute capability) -> tiles, the largest first. With B = 64 each byte of x serves 64 columns only, so that tiles
# wait for the L2 cache, and not for the tensor cores: a wide tile reads the weights less often, and steps of 32 leave
# room for two programs on a multiprocessor, one of which multiplies while the other starts or stores. On sm_90 weights
# of 64 rows are the left operand, so that the right one may be 256 wide, or as narrow as there are rows of x; on sm_80
# a left operand whose columns come first would go through registers on its way to shared memory.
TILES: dict[tuple[int, int], tuple[Config, ...]] = {
    (128, 90): (
        Config(256, 64, True, 8, 4), Config(128, 64, True, 8, 3), Config(64, 64, True, 4, 4),
        Config(32, 64, True, 4, 4), Config(16, 64, True, 4, 4),
    ),
    (64, 90): (
        Config(256, 32, True, 8, 5), Config(128, 64, True, 4, 4), Config(64, 64, True, 4, 4),
        Config(32, 64, True, 4, 5), Config(16, 64, True, 4, 5),
    ),
    (32, 90): (Config(128, 32, False, 4, 5), Config(64, 32, False, 4, 5), Config(16, 32, False, 2, 5)),
    (128, 80): (
        Config(128, 32, False, 8, 4), Config(64, 32, False, 4, 4), Config(32, 64, False, 4, 3),
        Config(16, 64, False, 4, 4),
    ),
    (64, 80): (
        Config(128, 32, False, 4, 4), Config(64, 64, False, 4, 3), Config(32, 64, False, 4, 4),
        Config(16, 64, False, 4, 4),
    ),
    (32, 80): (Config(128, 32, False, 4, 4), Config(64, 32, False, 4, 4), Config(16, 32, False, 2, 4)),
}  # fmt: skip
# float32 is not for tensor cores, which would round it: tiles small enough for plain registers
FLOAT32 = (Config(32, 32, False, 4, 2), Config(16, 32, False, 4, 2))


@cache
def config(
    M: int,
    N: int,
    K: int,
    B: int,
    count: int,
    fp32: bool = False,
    batch_invariant: bool = False,
    capability: int = 90,
    multiprocessors: int = MULTIPROCESSORS,
) -> Config:
    """The tile for x [M, K] and `count` blocks of B x B of w [N, K]: a pure function, nothing is tuned at run time.

    fp32: x is float32. batch_invariant: the same tile and the same split whatever M is.
    """
    tiles = FLOAT32 if fp32 else TILES[B, 90 if capability >= 90 else 80]
    rows = 64 if batch_invariant else M
    # the largest that is not mostly empty and gives every multiprocessor two programs, or the smallest that holds all
    enough = 2 * multiprocessors * B // N
    fitting = [t for t in tiles if t.BLOCK_M < 2 * rows and (t.BLOCK_M <= 64 or -(-rows // t.BLOCK_M) >= enough)]
    tile = fitting[0] if fitting else tiles[-1]
    # As many programs as to have four on each multiprocessor, with two blocks or more for each, while M is small:
    # and no more sums of parts, written and read, than there are bytes of weights.
    programs, split = N // B * -(-rows // tile.BLOCK_M), 1
    if rows <= 64:
        most = min(count * B // (2 * N), count * B * B // (4 * rows * N), MOST_SPLITS)
        split = max(1, min(-(-4 * multiprocessors // programs), most))
    return tile._replace(SPLIT_K=split, GROUP_M=max(1, SHARED_X // (2 * K * tile.BLOCK_M)))


# Not specialised on the number of rows of x: a binary serves every prompt length.
@triton.jit(do_not_specialize=["M"])
def _block_sparse_matmul(
    x, values, columns, rows, order, bias, y, partial, tickets,
    M, N,
    stride_xm,
    B: tl.constexpr, SWAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    """One tile of y; with SPLIT_K > 1, the part of it that a stretch of its blocks gives, and the last one adds up."""
    tile, pid_k = tl.program_id(0), tl.program_id(1)
    # Rows with many blocks come first, so that no program starts late and runs long. Programs that run at the same
    # time share rows of x, and neighbours share weights.
    tiles_m, rows_n = tl.cdiv(M, BLOCK_M), N // B
    first_m = tile // (GROUP_M * rows_n) * GROUP_M
    group_m = tl.minimum(tiles_m - first_m, GROUP_M)
    pid_m = first_m + tile % (GROUP_M * rows_n) % group_m
    row = tl.load(order + tile % (GROUP_M * rows_n) // group_m)

    PARTS: tl.constexpr = B // BLOCK_K  # of a block
    first, last = tl.load(rows + row) * PARTS, tl.load(rows + row + 1) * PARTS
    if SPLIT_K > 1:
        each = tl.cdiv(last - first, SPLIT_K)
        first += pid_k * each
        last = tl.minimum(first + each, last)

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = row * B + tl.arange(0, B)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < M
    rows_m = tl.minimum(offs_m, M - 1).to(tl.int64)  # rows past the last one repeat it, cheaper than a mask
    x_ptrs = x + rows_m[:, None] * stride_xm + offs_k[None, :]
    w_ptrs = values + (first.to(tl.int64) * BLOCK_K + offs_k[:, None]) * B + tl.arange(0, B)[None, :]
    acc = tl.zeros((B, BLOCK_M) if SWAP else (BLOCK_M, B), tl.float32)
    # a step ahead, for loads of x wait for it
    column = tl.load(columns + first // PARTS, mask=first < last, other=0)
    for step in range(first, last):
        k = column * B + step % PARTS * BLOCK_K
        column = tl.load(columns + (step + 1) // PARTS, mask=step + 1 < last, other=0)
        xs = tl.load(x_ptrs + k)  # [BLOCK_M, BLOCK_K]
        ws = tl.load(w_ptrs)  # [BLOCK_K, B]
        w_ptrs += BLOCK_K * B
        if SWAP:
            acc = tl.dot(tl.trans(ws), tl.trans(xs), acc, input_precision="ieee")
        else:
            acc = tl.dot(xs, ws, acc, input_precision="ieee")

    if SPLIT_K > 1:
        if SWAP:
            acc = tl.trans(acc)
        part_ptrs, size = partial + rows_m[:, None] * N + offs_n[None, :], M.to(tl.int64) * N
        tl.store(part_ptrs + pid_k * size, acc, mask=mask_m[:, None])
        tl.debug_barrier()  # all threads have written before one of them says so
        if tl.atomic_add(tickets + tile, 1, sem="acq_rel", scope="gpu") < SPLIT_K - 1:
            return
        # in the order of K, by whoever finishes last: the same bits at every run
        acc = tl.zeros((BLOCK_M, B), tl.float32)
        for split in range(0, SPLIT_K):
            acc += tl.load(part_ptrs + split * size, mask=mask_m[:, None], other=0.0, cache_modifier=".cg")
        tl.store(tickets + tile, 0)
    if bias is not None:
        b = tl.load(bias + offs_n).to(tl.float32)
        acc += b[:, None] if SWAP and SPLIT_K == 1 else b[None, :]
    out = acc.to(y.dtype.element_ty)
    if SWAP and SPLIT_K == 1:
        out = tl.trans(out)
    tl.store(y + rows_m[:, None] * N + offs_n[None, :], out, mask=mask_m[:, None])


def _check(
    x: torch.Tensor,
    values: torch.Tensor,
    columns: torch.Tensor,
    rows: torch.Tensor,
    order: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    """Raise ValueError unless the operands fit: the kernel would read beyond them."""
    if values.ndim != 3 or values.shape[1:] not in [(B, B) for B in SIZES] or not values.is_contiguous():
        raise ValueError(f"values must be a contiguous [nnz, B, B], B one of {SIZES}; got {list(values.shape)}")
    B, nb = values.shape[1], len(rows) - 1
    if x.ndim != 2 or x.dtype != values.dtype or x.shape[1] % B:
        raise ValueError(
            f"x must be {values.dtype} [M, K] like the values, with K a multiple of {B}; got {x.dtype} {list(x.shape)}"
        )
    for name, t, length in (("columns", columns, len(values)), ("rows", rows, nb + 1), ("order", order, nb)):
        if t.dtype != torch.int32 or t.shape != (length,) or not t.is_contiguous():
            raise ValueError(f"{name} must be a contiguous int32 [{length}]; got {t.dtype} {list(t.shape)}")
    if bias is not None and (bias.shape != (nb * B,) or not bias.is_contiguous()):
        raise ValueError(f"bias must be a contiguous [{nb * B}], got {list(bias.shape)}")
    for name, other in (("values", values), ("columns", columns), ("rows", rows), ("order", order), ("bias", bias)):
        if other is not None and other.device != x.device:
            raise ValueError(f"{name} is on {other.device}, x is on {x.device}: move one of them")


def block_sparse_matmul(
    x: torch.Tensor,
    values: torch.Tensor,
    columns: torch.Tensor,
    rows: torch.Tensor,
    order: torch.Tensor,
    bias: torch.Tensor | None = None,
    batch_invariant: bool = False,
    tile: Config | None = None,
) -> torch.Tensor:
    """y[m, rB + n] = sum over blocks j of row r, and k, of x[m, columns[j] B + k] values[j, k, n] + bias[rB + n].

    x:       [M, K] float16, bfloat16 or float32, any strides
    values:  [nnz, B, B] of x's dtype, B 32, 64 or 128; those of one row of blocks lie together
    columns: int32 [nnz], each below K / B
    rows:    int32 [N / B + 1]: row r has blocks rows[r] to rows[r + 1] - 1, which may be none
    order:   int32 [N / B]: a permutation, in which rows are started; those with many blocks should come first
    bias:    [N] or None
    batch_invariant: a row of y has the same bits whatever the other rows of x are, and however many
    tile:    in place of `config`'s; for measurements

    y is [M, N] of x's dtype, summed in float32; the same call gives the same bits every time. Raises ValueError for
    operands that do not fit; what columns, rows and order contain is not looked at.
    """
    _check(x, values, columns, rows, order, bias)
    if x.dtype == torch.bfloat16 and interpreted(_block_sparse_matmul):
        # the interpreter multiplies the bits of bfloat16 as integers, and truncates when it converts to it
        operands = (x.float(), values.float(), columns, rows, order, bias)
        return block_sparse_matmul(*operands, batch_invariant, tile).to(x.dtype)
    (M, K), (count, B, _) = x.shape, values.shape
    N = (len(rows) - 1) * B
    y = x.new_empty(M, N)
    if y.numel() == 0:
        return y
    if count == 0:
        return y.zero_() if bias is None else y.copy_(bias.expand(M, N))
    x = aligned(x)
    if tile is None:
        about = device_of(x.device.index) if x.is_cuda else ()
        tile = config(M, N, K, B, count, x.dtype == torch.float32, batch_invariant, *about)
    plan = _plan(M, N, B, tile)
    partial = tickets = None
    if tile.SPLIT_K > 1:
        partial = x.new_empty(tile.SPLIT_K, M, N, dtype=torch.float32)
        tickets = take_tickets(plan.tiles, x.device)
    pointers = (x, values, columns, rows, order, bias, y, partial, tickets)
    kind = (x.dtype, None if bias is None else bias.dtype, x.stride(0), x.device)
    with on_device(x.device):
        grid = (plan.tiles, tile.SPLIT_K, 1)
        launch(_block_sparse_matmul, grid, pointers, (M, N, x.stride(0)), plan, kind)
    return y


@cache
def _plan(M: int, N: int, B: int, tile: Config) -> Plan:
    """Cached: to work it out anew would cost much of a launch."""
    names = ("SWAP", "BLOCK_M", "BLOCK_K", "SPLIT_K", "GROUP_M")
    constants = {"B": B, **{name: getattr(tile, name) for name in names}}
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return Plan(N // B * -(-M // tile.BLOCK_M), None, constants, options, {})
