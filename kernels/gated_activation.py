"""y = act(gate) * up, the middle of a gated feed-forward layer, in one pass over memory."""

from functools import cache

import torch
import triton
import triton.language as tl

from .launch import Plan, launch, on_device
from .norm import as_rows, rounded

KINDS = ("silu", "gelu", "gelu_tanh", "quick_gelu", "sigmoid", "relu", "relu2")


@triton.jit
def activated(x, KIND: tl.constexpr):
    """act(x), in float32."""
    if KIND == "silu":
        return x * tl.sigmoid(x)
    elif KIND == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        # (1 + tanh(u)) / 2 = sigmoid(2 u), with u = sqrt(2 / pi) (x + 0.044715 x^3)
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif KIND == "quick_gelu":
        return x * tl.sigmoid(1.702 * x)
    elif KIND == "sigmoid":
        return tl.sigmoid(x)
    else:
        x = tl.where(x < 0, 0.0, x)  # keeps a NaN, which a maximum would lose
        return x * x if KIND == "relu2" else x


@triton.jit(do_not_specialize=["M"])
def _gated_activation(gate, up, y, M, width, stride_gm, stride_um, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK numbers of one row."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < width
    g = tl.load(gate + row * stride_gm + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
    u = tl.load(up + row * stride_um + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row * width + offs, rounded(activated(g, KIND) * u, y.dtype.element_ty), mask=mask)


def gated_activation(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    """act(gate) * up [..., I], contiguous, of gate's dtype; float32 inside, rounded once.

    gate, up: [..., I] float16, bfloat16 or float32, of one dtype, any strides. kind: one of KINDS.
    ValueError for operands that do not fit.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    if gate.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"gate must be float16, bfloat16 or float32, got {gate.dtype}")
    if up.shape != gate.shape or up.dtype != gate.dtype or up.device != gate.device:
        want, got = f"{gate.dtype} {list(gate.shape)} on {gate.device}", f"{up.dtype} {list(up.shape)} on {up.device}"
        raise ValueError(f"up must be {want}, as gate is; got {got}")
    y = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if y.numel() == 0:
        return y
    width = gate.shape[-1]
    gates, ups = as_rows(gate), as_rows(up)
    plan = _plan(kind, 256 if len(gates) * width <= 1 << 16 else 1024)  # few numbers: over more multiprocessors
    strides = (gates.stride(0), ups.stride(0))
    kind_of = (width, strides, gate.dtype, gate.device)
    with on_device(gate.device):
        grid = (len(gates), -(-width // plan.constants["BLOCK"]), 1)
        launch(_gated_activation, grid, (gates, ups, y), (len(gates), width, *strides), plan, kind_of)
    return y


@cache
def _plan(kind: str, BLOCK: int) -> Plan:
    return Plan(0, 0, {"KIND": kind, "BLOCK": BLOCK}, {"num_warps": BLOCK // 256}, {})
