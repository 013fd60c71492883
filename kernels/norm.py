"""RMS and layer normalization of rows, with the sum that comes before it, in one pass over memory."""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import Plan, launch, on_device
from .operands import interpreted

LARGEST_D = 16384  # a row lies in the registers of one program, without spilling


class Config(NamedTuple):
    """A program normalizes BLOCK_M rows of up to BLOCK_D numbers."""

    BLOCK_M: int
    BLOCK_D: int
    num_warps: int


@cache
def config(rows: int, D: int) -> Config:
    """The tile for rows of D numbers; rows: their number, of which only 1, 2, 4, ..., 16 are told apart."""
    BLOCK_D = triton.next_power_of_2(D)
    BLOCK_M = max(1, min(rows, 16, 1024 // BLOCK_D))
    # two loads of 16 bytes a thread: enough in flight, and few enough threads that they are quick to add up
    return Config(BLOCK_M, BLOCK_D, max(1, min(32, BLOCK_M * BLOCK_D // 512)))


@triton.jit
def _half_to_even(x):
    """float32 -> the nearest bfloat16, still in float32."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)


TRUNCATES = tl.constexpr(interpreted(_half_to_even))  # Triton's interpreter does, when it converts to bfloat16


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """float32 -> DTYPE, half to even."""
    if TRUNCATES and DTYPE == tl.bfloat16:
        x = _half_to_even(x)
    return x.to(DTYPE)


@triton.jit
def weighted(h, weight, offs, mask, CAST_FIRST: tl.constexpr, DTYPE: tl.constexpr):
    """h * weight in float32; CAST_FIRST: h, normalized, is rounded to DTYPE before."""
    if CAST_FIRST:
        h = rounded(h, DTYPE).to(tl.float32)
    if weight is not None:
        h *= tl.load(weight + offs, mask=mask, other=0.0).to(tl.float32)
    return h


@triton.jit
def _normalized(
    h, weight, bias, offs, mask,
    D: tl.constexpr, EPS: tl.constexpr, CENTERED: tl.constexpr, CAST_FIRST: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """h float32 [BLOCK_M, BLOCK_D], zeros where mask [1, BLOCK_D] is not -> its rows normalized, in DTYPE."""
    if CENTERED:
        h = tl.where(mask, h - (tl.sum(h, 1) / D)[:, None], 0.0)
    h *= tl.rsqrt(tl.sum(h * h, 1) / D + EPS)[:, None]
    h = weighted(h, weight, offs, mask, CAST_FIRST, DTYPE)
    if bias is not None:
        h += tl.load(bias + offs, mask=mask, other=0.0).to(tl.float32)
    return rounded(h, DTYPE)


# Not specialised on the number of rows: a binary serves every prompt length.
@triton.jit(do_not_specialize=["M"])
def _norm(
    x, residual, weight_a, weight_b, bias, y, total,
    M, stride_xm, stride_rm,
    D: tl.constexpr, EPS_A: tl.constexpr, EPS_B: tl.constexpr, CENTERED: tl.constexpr, CAST_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """total = norm_a(x) + residual, y = norm_b(total). What EPS_A or EPS_B is None for, is left out."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    offs = tl.arange(0, BLOCK_D)[None, :]
    mask_d = offs < D
    mask = (rows < M) & mask_d
    h = tl.load(x + rows * stride_xm + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_D]
    if residual is not None:
        # asked for before the sum over x, not after it
        r = tl.load(residual + rows * stride_rm + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_D]
    if EPS_A is not None:
        h = _normalized(h, weight_a, None, offs, mask_d, D, EPS_A, False, CAST_FIRST, DTYPE).to(tl.float32)
    if residual is not None:
        both = rounded(h + r, DTYPE)
        tl.store(total + rows * D + offs, both, mask=mask)
        h = both.to(tl.float32)
    if EPS_B is not None:
        h = _normalized(h, weight_b, bias, offs, mask_d, D, EPS_B, CENTERED, CAST_FIRST, DTYPE)
        tl.store(y + rows * D + offs, h, mask=mask)


def norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight_a: torch.Tensor | None,
    weight_b: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps_a: float | None,
    eps_b: float | None,
    centered: bool = False,
    cast_first: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(y, total) of x's shape and dtype: total = norm_a(x) + residual, y = norm_b(total), in float32.

    x:         [..., D] float16, bfloat16 or float32, any strides; D up to 16,384
    residual:  like x, or None: y is norm_b(x) then, and total None
    weight_a, weight_b, bias: contiguous [D] of any floating-point type, or None
    eps_a:     None to leave the first norm out; it is an RMS norm
    eps_b:     None to leave the second norm out: y is None
    centered:  the second is a layer norm: the mean is subtracted
    cast_first: normalized numbers are rounded to x's dtype before they are multiplied by the weight

    The result of norm_a, the sum and y are each rounded to x's dtype. ValueError for operands that do not fit.
    """
    _check(x, residual, {"weight_a": weight_a, "weight_b": weight_b, "bias": bias})
    D = x.shape[-1]
    y = None if eps_b is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    total = None if residual is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return y, total
    rows = as_rows(x)
    others = None if residual is None else as_rows(residual)
    tile = config(min(triton.next_power_of_2(len(rows)), 16), D)
    plan = _plan(D, eps_a, eps_b, centered, cast_first, tile)
    pointers = (rows, others, weight_a, weight_b, bias, y, total)
    strides = (rows.stride(0), 0 if others is None else others.stride(0))
    kind = (strides, x.device, *(None if t is None else t.dtype for t in pointers))
    with on_device(x.device):
        launch(_norm, (-(-len(rows) // tile.BLOCK_M), 1, 1), pointers, (len(rows), *strides), plan, kind)
    return y, total


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """[..., D] -> [M, D] with unit inner stride; a copy where strides do not allow a view."""
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _check(x: torch.Tensor, residual: torch.Tensor | None, parameters: dict[str, torch.Tensor | None]) -> None:
    """Raise ValueError unless the operands fit: the kernel would read beyond them."""
    if x.ndim == 0 or x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"x must be float16, bfloat16 or float32 [..., D], got {x.dtype} {list(x.shape)}")
    D = x.shape[-1]
    if D > LARGEST_D:
        raise ValueError(f"rows of {D} numbers: at most {LARGEST_D} fit into a program; normalize in plain torch")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual must be {x.dtype} {list(x.shape)}, as x is; got {residual.dtype} {list(residual.shape)}"
        )
    for name, t in parameters.items():
        if t is not None and (t.shape != (D,) or not t.is_contiguous() or not t.is_floating_point()):
            raise ValueError(f"{name} must be a contiguous floating-point [{D}], got {t.dtype} {list(t.shape)}")
    for name, t in {"residual": residual, **parameters}.items():
        if t is not None and t.device != x.device:
            raise ValueError(f"{name} is on {t.device} and x on {x.device}: move one of them")


@cache
def _plan(D: int, eps_a: float | None, eps_b: float | None, centered: bool, cast_first: bool, tile: Config) -> Plan:
    constants = {
        "D": D,
        "EPS_A": eps_a,
        "EPS_B": eps_b,
        "CENTERED": centered,
        "CAST_FIRST": cast_first,
        "BLOCK_M": tile.BLOCK_M,
        "BLOCK_D": tile.BLOCK_D,
    }
    return Plan(0, 0, constants, {"num_warps": tile.num_warps}, {})
