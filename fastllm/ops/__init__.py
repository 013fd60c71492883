"""Ops: a definition in plain torch, and the implementations that must agree with it."""

from collections.abc import Mapping

import torch

from ..formats import Format, Fp8Format, Nf4Format
from ..sparse_formats import SparseFormat
from .append_kv import append_kv
from .attention import attention, attention_varlen
from .block_sparse import block_sparse_matmul
from .decode_attention import decode_attention
from .dynamic_matmul import DYNAMIC_LAYOUTS, dynamic_matmul
from .expanded import EXPANDED
from .fp8_matmul import FP8_LAYOUTS
from .gated_activation import gated_activation
from .int8_matmul import INT8_LAYOUTS
from .layout import Layout, choose
from .nf4 import NF4_LAYOUTS
from .norm import layer_norm, norm_add, norm_add_norm, rms_norm
from .quant_matmul import LAYOUTS, choose_layout, quant_matmul
from .rotary import rotary
from .sparse_matmul import SPARSE_LAYOUTS, sparse_matmul

__all__ = [
    "DYNAMIC_LAYOUTS",
    "FP8_LAYOUTS",
    "INT8_LAYOUTS",
    "LAYOUTS",
    "NF4_LAYOUTS",
    "SPARSE",
    "append_kv",
    "attention",
    "attention_varlen",
    "block_sparse_matmul",
    "choose_layout",
    "decode_attention",
    "dynamic_matmul",
    "gated_activation",
    "layer_norm",
    "layout_for",
    "layouts_of",
    "norm_add",
    "norm_add_norm",
    "quant_matmul",
    "rms_norm",
    "rotary",
    "sparse_matmul",
    "what_runs",
]


# what a kernel reads as it is, then what multiplies zeros too
SPARSE: dict[str, Layout] = {"lanes": SPARSE_LAYOUTS["lanes"], **EXPANDED, "rest": SPARSE_LAYOUTS["rest"]}


def layouts_of(format: Format | SparseFormat) -> Mapping[str, Layout]:
    """Those of the op that multiplies by weights of `format`."""
    if isinstance(format, SparseFormat):
        return SPARSE
    if isinstance(format, Fp8Format):
        return FP8_LAYOUTS
    if isinstance(format, Nf4Format):
        return NF4_LAYOUTS
    return INT8_LAYOUTS if format.activations else LAYOUTS


def layout_for(format: Format | SparseFormat, N: int, K: int, dtype: torch.dtype, device: torch.device) -> Layout:
    """The layout of a weight [N, K] of `format` for activations of `dtype`; ValueError, with reasons, if none fits."""
    return choose(layouts_of(format), format, N, K, dtype, device)[0]


def what_runs(format: Format | SparseFormat, N: int, K: int, dtype: torch.dtype, device: torch.device) -> str:
    """What multiplies by a weight [N, K] of `format`, for the report; with reasons where that is slow."""
    layout, refused = choose(layouts_of(format), format, N, K, dtype, device)
    why = "; ".join(", ".join(reasons) for reasons in refused.values())
    return f"{layout.runs} ({why})" if layout.slow and why else layout.runs
