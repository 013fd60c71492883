"""The op `fastllm::gated_activation`: act(gate) * up, the middle of a gated feed-forward layer."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .library import define_fused, is_traced, is_watched
from .norm import FAST

# on the CPU each is an operator or two of torch, in its own dtype
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "relu2": lambda x: torch.relu(x).square(),
}


def activate(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """The definition: float32 arithmetic, rounded once; float64 stays float64."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (ACTIVATIONS[kind](gate.to(wide)) * up.to(wide)).to(gate.dtype)


def gated_activation(x: Tensor, kind: str) -> Tensor:
    """act(gate) * up for x = gate | up: [..., 2 I] -> [..., I], of x's dtype.

    kind: silu, gelu, gelu_tanh, quick_gelu, sigmoid, relu or relu2, the square of relu
    float32 arithmetic, rounded once; on the CPU act(gate) is rounded as well, as torch's operators do. Differentiable.
    ValueError for an odd last dimension and for other kinds. Source: Shazeer, GLU Variants Improve Transformer (2020).
    """
    if x.ndim == 0 or x.shape[-1] % 2:
        raise ValueError(f"x must be [..., 2 I], gate beside up; got {list(x.shape)}")
    gate, up = x.chunk(2, -1)
    return gated_activation_pair(gate, up, kind)


def gated_activation_pair(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """act(gate) * up [..., I], as `gated_activation`, for tensors that lie apart. ValueError unless they are alike."""
    if is_traced(gate):
        return activate(gate, up, kind)
    if is_watched(gate, up):
        return torch.ops.fastllm.gated_activation(gate, up, kind)
    return _forward(gate, up, kind)


def _forward(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    if kind not in ACTIVATIONS:
        raise ValueError(f"kind must be one of {', '.join(ACTIVATIONS)}; got {kind!r}")
    if up.shape != gate.shape or up.dtype != gate.dtype:
        want, got = f"{gate.dtype} {list(gate.shape)}", f"{up.dtype} {list(up.shape)}"
        raise ValueError(f"up must be {want}, as gate is; got {got}")
    if gate.is_cuda and gate.dtype in FAST:
        from ..kernels.gated_activation import gated_activation  # Triton is imported on first use

        return gated_activation(gate, up, kind)
    return ACTIVATIONS[kind](gate).mul_(up)


def _like_gate(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


define_fused("gated_activation(Tensor gate, Tensor up, str kind) -> Tensor", _forward, activate, _like_gate)
