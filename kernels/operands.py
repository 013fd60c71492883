"""What launchers check and look up before a launch."""

from functools import cache
from typing import Any

import torch
import triton


def interpreted(kernel: Any) -> bool:
    """Whether Triton's interpreter runs `kernel`, on the CPU."""
    return not isinstance(kernel, triton.JITFunction)


@cache
def device_of(index: int) -> tuple[int, int]:
    """Compute capability (90 for 9.0) and number of multiprocessors of a CUDA device; AMD's count as 80."""
    about = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return 80, about.multi_processor_count
    return 10 * about.major + about.minor, about.multi_processor_count


def uses_ptx(tensor: torch.Tensor) -> bool:
    """Whether a kernel on this tensor's device may contain PTX."""
    return tensor.is_cuda and torch.version.hip is None


def check_operands(
    w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int, group: int, K: int
) -> tuple[torch.Tensor, tuple[int, ...], int]:
    """The halves of w, the strides of zero, and GROUP: 0 for one scale a row.

    Raises ValueError for what the kernels would read beyond.
    """
    words, groups = 4 * bits * -(-K // 128), -(-K // group)
    if w.dtype != torch.int32 or w.shape[1] != words or w.stride(1) != 1:
        raise ValueError(f"w must be int32 [N, {words}] for K={K}, bits={bits}; got {w.dtype} {list(w.shape)}")
    for name, t in (("scale", scale), ("zero", zero)):
        if t is not None and t.shape != (len(w), groups):
            raise ValueError(f"{name} must be [{len(w)}, {groups}] for K={K}, group={group}; got {list(t.shape)}")
    if zero is not None and zero.dtype != torch.uint8:
        raise ValueError(f"zero must be uint8, got {zero.dtype}")
    if group < K and group % 32:
        raise ValueError(f"a group must be a multiple of 32, or at least K={K}; got {group}")
    return w.view(torch.int16), (0, 0) if zero is None else zero.stride(), 0 if group >= K else group
