"""Ops: a definition in plain torch, and the implementations that must agree with it."""

from collections.abc import Mapping

import torch

from ..formats import IntFormat
from .int8_matmul import INT8_LAYOUTS, int8_matmul_dynamic
from .layout import Layout, choose
from .quant_matmul import LAYOUTS, choose_layout, quant_matmul

__all__ = [
    "INT8_LAYOUTS",
    "LAYOUTS",
    "choose_layout",
    "int8_matmul_dynamic",
    "layout_for",
    "layouts_of",
    "quant_matmul",
]


def layouts_of(format: IntFormat) -> Mapping[str, Layout]:
    """Those of the op that multiplies by weights of `format`."""
    return INT8_LAYOUTS if format.activations else LAYOUTS


def layout_for(format: IntFormat, N: int, K: int, dtype: torch.dtype, device: torch.device) -> Layout:
    """The layout of a weight [N, K] of `format` for activations of `dtype`; ValueError, with reasons, if none fits."""
    return choose(layouts_of(format), format, N, K, dtype, device)[0]
