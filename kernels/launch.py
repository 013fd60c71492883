"""Launching a kernel again, at a fraction of what it costs the first time."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton


class Plan(NamedTuple):
    """What all launches for one shape share.

    constants: what the kernel is compiled for, in the order of its arguments, then options such as num_warps.
    compiled: the kernels that were launched, by the kind of their arguments.
    """

    tiles: int
    steps: Any
    constants: dict[str, Any]
    options: dict[str, Any]
    compiled: dict[tuple, Any]


def on_device(device: torch.device) -> AbstractContextManager:
    """Makes `device` the current one, on which Triton launches, whatever the tensors' is."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    pointers: Sequence[torch.Tensor | None],
    numbers: Sequence[int],
    plan: Plan,
    kind: tuple,
) -> None:
    """kernel[grid](*pointers, *numbers, **plan.constants), on the current device.

    Triton looks at every argument of every launch, to see which compiled kernel it needs: the types of the pointers,
    whether 16 divides them, and the values of numbers that the kernel is specialised on. Where all pointers are
    multiples of 16 the rest is settled by the plan and by `kind`, which says what differs from launch to launch, and
    the kernel that was found the first time is launched again.
    """
    addresses = 0
    for tensor in pointers:
        if tensor is not None:
            addresses |= tensor.data_ptr()
    found = None if addresses % 16 else plan.compiled.get(kind)
    if found is not None:
        found[grid](*pointers, *numbers, *plan.constants.values())
        return
    found = kernel[grid](*pointers, *numbers, **plan.constants, **plan.options)
    if addresses % 16 == 0 and isinstance(kernel, triton.JITFunction):
        plan.compiled[kind] = found
