"""Rotary position embedding: pairs of numbers of a head are turned by an angle that grows with the position."""

from functools import cache

import torch
import triton
import triton.language as tl

from .launch import Plan, launch, on_device
from .norm import rounded

HALF, PAIRS = 0, 1  # which number a number is turned with: the one half of R away, or its neighbour


@triton.jit
def pairs(D: tl.constexpr, R: tl.constexpr, PAIRED: tl.constexpr, BLOCK: tl.constexpr):
    """The numbers of a head, its two halves side by side [1, 2, BLOCK]: their places, those of the numbers they are
    turned with, whether the latter count negative, and whether there is such a number. BLOCK is at least D / 2."""
    half = tl.arange(0, 2)[None, :, None]
    j = tl.arange(0, BLOCK)[None, None, :]
    d = half * (D // 2) + j
    if PAIRED == 1:
        partner, minus = d ^ 1, d % 2 == 0
    elif R == D:
        partner, minus = (1 - half) * (D // 2) + j, half == 0  # whole runs, which loads of 16 bytes can fetch
    else:
        partner, minus = tl.where(d < R // 2, d + R // 2, d - R // 2), d < R // 2
    return d, tl.where(d < R, partner, d) if R < D else partner, minus, j < D // 2


@triton.jit
def turned(x, partner, cos, sin, d, minus, mask, D: tl.constexpr, R: tl.constexpr):
    """x cos + partner sin in float32, for the first R numbers; the others pass. cos, sin: the row of a token."""
    mask = mask & (d < R)
    c = tl.load(cos + d, mask=mask, other=1.0).to(tl.float32)  # [1, 2, BLOCK]
    s = tl.load(sin + d, mask=mask, other=0.0).to(tl.float32)
    y = x * c + tl.where(minus, -partner, partner) * s
    return tl.where(d < R, y, x) if R < D else y


@triton.jit
def _turn_heads(
    x, y, cos, sin, b, s, first, S, heads, stride_xb, stride_xh, stride_xs,
    D: tl.constexpr, R: tl.constexpr, PAIRED: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Heads `first` and on of one token; y is contiguous."""
    h = (first + tl.arange(0, HEADS))[:, None, None]
    d, partner, minus, mask_d = pairs(D, R, PAIRED, BLOCK)
    mask = (h < heads) & mask_d
    row = x + b * stride_xb + s * stride_xs + h.to(tl.int64) * stride_xh  # [HEADS, 1, 1]
    xs = tl.load(row + d, mask=mask, other=0.0).to(tl.float32)  # [HEADS, 2, BLOCK]
    others = tl.load(row + partner, mask=mask, other=0.0).to(tl.float32)
    out = turned(xs, others, cos, sin, d, minus, mask_d, D, R)
    tl.store(y + ((b * heads + h) * S + s) * D + d, rounded(out, y.dtype.element_ty), mask=mask)


# Not specialised on the number of tokens: a binary serves every prompt length.
@triton.jit(do_not_specialize=["S", "Hq", "Hk"])
def _rotary(
    q, k, cos, sin, q_out, k_out,
    S, Hq, Hk,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_cb, stride_cs, stride_sb, stride_ss,
    D: tl.constexpr, R: tl.constexpr, PAIRED: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """HEADS heads of one token, of q or of k."""
    token = tl.program_id(0).to(tl.int64)
    b, s = token // S, token % S
    cos += b * stride_cb + s * stride_cs
    sin += b * stride_sb + s * stride_ss
    block, blocks_q = tl.program_id(1), tl.cdiv(Hq, HEADS)
    if block < blocks_q:
        _turn_heads(q, q_out, cos, sin, b, s, block * HEADS, S, Hq, stride_qb, stride_qh, stride_qs,
                    D, R, PAIRED, HEADS, BLOCK)  # fmt: skip
    else:
        _turn_heads(k, k_out, cos, sin, b, s, (block - blocks_q) * HEADS, S, Hk, stride_kb, stride_kh, stride_ks,
                    D, R, PAIRED, HEADS, BLOCK)  # fmt: skip


def rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, paired: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(q, k) turned, contiguous, of their dtypes; float32 inside, rounded once.

    q, k:     [B, Hq, S, D] and [B, Hk, S, D], float16, bfloat16 or float32, any strides but an inner one of 1
    cos, sin: [B or 1, S, R], any floating-point type, unit inner stride, R <= D; numbers from R on pass
    paired:   number d turns with d ^ 1, not with the one R / 2 away

    ValueError for operands that do not fit.
    """
    (B, Hq, S, D), Hk = q.shape, k.shape[1]
    check(q, cos, sin)
    if k.shape != (B, Hk, S, D) or k.dtype != q.dtype or k.device != q.device:
        raise ValueError(
            f"k must be {q.dtype} {[B, Hk, S, D]} on {q.device}; got {k.dtype} {list(k.shape)}, {k.device}"
        )
    q, k, cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, cos, sin))
    q_out, k_out = q.new_empty(B, Hq, S, D), k.new_empty(B, Hk, S, D)
    if B * S == 0:
        return q_out, k_out
    plan = _plan(D, cos.shape[-1], paired, heads_of(B * S, D))
    HEADS = plan.constants["HEADS"]
    pointers = (q, k, cos, sin, q_out, k_out)
    strides = (*q.stride()[:3], *k.stride()[:3], *row_strides(cos), *row_strides(sin))
    kind = (strides, q.device, q.dtype, cos.dtype, sin.dtype)
    with on_device(q.device):
        launch(_rotary, (B * S, -(-Hq // HEADS) + -(-Hk // HEADS), 1), pointers, (S, Hq, Hk, *strides), plan, kind)
    return q_out, k_out


def row_strides(cos: torch.Tensor) -> tuple[int, int]:
    """Of batch and position of cos [B or 1, S, R]; 0 where all sequences share it."""
    return (cos.stride(0) if cos.shape[0] > 1 else 0), cos.stride(1)


def heads_of(tokens: int, D: int) -> int:
    """Heads that a program takes: few where there are few tokens, which then spread over the multiprocessors."""
    BLOCK = triton.next_power_of_2(D // 2)
    return max(1, (256 if tokens <= 64 else 1024) // (2 * BLOCK))


def check(q: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Raise ValueError unless heads of q can be turned by cos and sin."""
    B, _, S, D = q.shape
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32) or D % 2 or not D:
        raise ValueError(f"q must be float16, bfloat16 or float32 with an even D, got {q.dtype} {list(q.shape)}")
    R = cos.shape[-1]
    for name, t in (("cos", cos), ("sin", sin)):
        if t.ndim != 3 or t.shape[0] not in (1, B) or t.shape[1:] != (S, R) or not 0 < R <= D or R % 2:
            raise ValueError(
                f"{name} must be [{B} or 1, {S}, R] with an even R up to {D}, one entry for each number that turns; "
                f"got {list(t.shape)}"
            )
        if t.device != q.device:
            raise ValueError(f"{name} is on {t.device} and q on {q.device}: move one of them")


@cache
def _plan(D: int, R: int, paired: bool, HEADS: int) -> Plan:
    BLOCK = triton.next_power_of_2(D // 2)
    constants = {"D": D, "R": R, "PAIRED": PAIRS if paired else HALF, "HEADS": HEADS, "BLOCK": BLOCK}
    return Plan(0, 0, constants, {"num_warps": warps_of(HEADS, BLOCK)}, {})


def warps_of(HEADS: int, BLOCK: int) -> int:
    """A load of 16 bytes a thread."""
    return max(1, min(4, HEADS * 2 * BLOCK // 256))
