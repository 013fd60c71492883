"""How the layers of a block become sparse: a criterion for the mask, then least squares for what stays."""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..bsr_format import BlockSparseWeight, pack_blocks
from ..formats import IntFormat, QuantizedWeight
from ..quantizers import decode
from ..sparse_formats import SparseFormat, compress
from .calibrate import Layer, Solver
from .gptq import inverse_factor
from .patterns import Blocks, Pattern, fits
from .reconstruct import reconstruct
from .sparsegpt import Rounding, sparsegpt
from .statistics import Statistics, output_error

logger = logging.getLogger("fastllm")

METHODS = ("sparsegpt", "wanda", "magnitude", "zeros")
FEW = 8  # a layer that saw fewer tokens than one for so many inputs is not repaired: they say too little


class Sparse(NamedTuple):
    """A weight [N, K] with zeros: dense float32, which of it stays, and what it is to be rounded to."""

    dense: Tensor
    mask: Tensor
    pattern: Pattern
    rounded: Rounding | None = None
    codes: Tensor | None = None  # uint8 [N, K], of `rounded`

    def stored(self, dtype: torch.dtype) -> "QuantizedWeight | BlockSparseWeight | Tensor":
        """At rest; dense, with zeros, where nothing smaller can hold the pattern."""
        if isinstance(self.pattern, Blocks):
            B = self.pattern.size
            blocks = self.mask[::B, ::B].contiguous()
            return pack_blocks(self.dense.to(dtype), blocks, B)
        if not isinstance(self.pattern, SparseFormat):
            return self.dense.to(dtype).masked_fill(~self.mask, 0)
        if self.rounded is None:
            dense = self.dense.to(dtype)
            return compress(dense, self.mask, dense.new_empty(len(dense), 0), self.pattern)
        assert self.codes is not None
        return compress(self.codes, self.mask, self.rounded.scale.to(dtype), self.pattern)


class Pruning(Solver):
    """Weights whose zeros are chosen by `method`.

    magnitude: the smallest weights go; wanda: those whose product with the size of their inputs is smallest (Sun, Liu,
    Bair, Kolter, "A Simple and Effective Pruning Approach for Large Language Models", 2023); sparsegpt: see
    `sparsegpt`; zeros: the weights have them already, and stay as they are.
    """

    def __init__(self, method: str = "sparsegpt", repair: bool = True, dtype: torch.dtype = torch.float32):
        """dtype: in which the scales of integers will be stored: codes are chosen for them as they read back."""
        super().__init__()
        self.dtype = dtype
        self.method, self.repair = method, repair and method != "zeros"
        self.products = self.repair or method == "sparsegpt"
        self.saw_few: set[int] = set()

    @property
    def label(self) -> str:
        return self.method

    def solve(self, weights: Sequence[Tensor], formats: Sequence[Any], seen: Statistics) -> list[Any]:
        factor = None
        if self.products and any(self._sweeps(pattern) for pattern in formats):
            factor = inverse_factor(seen.hessian, torch.arange(weights[0].shape[1], device=weights[0].device))
        return [self.prune(w, pattern, seen, factor) for w, pattern in zip(weights, formats, strict=True)]

    def _sweeps(self, pattern: Pattern) -> bool:
        rounds = isinstance(pattern, SparseFormat) and pattern.values is not None and pattern.values.bits == 4
        return self.method == "sparsegpt" or rounds

    def prune(self, w: Tensor, pattern: Pattern, seen: Statistics | None, factor: Tensor | None) -> Sparse:
        """w [N, K], float32; seen: None for no data. factor: of the inputs seen, where a sweep is wanted."""
        _refuse_infinite(w, seen)
        values = pattern.values if isinstance(pattern, SparseFormat) else None
        rounding = None
        if self.method == "zeros":
            dense, mask = w, fits(w, pattern)
        elif self.method == "sparsegpt" and factor is not None:
            joint = values is not None and not self.repair
            rounding = Rounding(w, values, self.dtype) if joint and values else None
            dense, mask = sparsegpt(w, factor, pattern, rounding=rounding)
        else:
            if self.method == "sparsegpt":
                logger.warning("the inputs seen do not tell what can be pruned: the smallest weights are")
            mask = pattern.largest(self._scores(w, seen))
            dense = w.masked_fill(~mask, 0)
        if self.repair and seen is not None and self._tells(seen):
            dense = reconstruct(w, dense, mask, seen.hessian)
        if values is None:
            return Sparse(dense, mask, pattern)
        if rounding is None:
            return _rounded(w, dense, mask, pattern, Rounding(dense * mask, values, self.dtype), values, factor, seen)
        return Sparse(dense, mask, pattern, rounding, rounding.codes)

    def _scores(self, w: Tensor, seen: Statistics | None) -> Tensor:
        if self.method == "wanda" and seen is not None:
            return w.abs() * seen.mean_square.sqrt()
        return w.abs()

    def _tells(self, seen: Statistics) -> bool:
        enough = seen.count * FEW >= len(seen.total)
        if not enough and len(seen.total) not in self.saw_few:
            self.saw_few.add(len(seen.total))
            logger.warning(
                "%d calibration tokens for layers of %d inputs, fewer than one for %d: weights that stay are not "
                "adjusted; give more samples", seen.count, len(seen.total), FEW,
            )  # fmt: skip
        return enough

    def stored(self, weight: Sparse, layer: Layer) -> Any:
        return weight.stored(layer.module.weight.dtype)


def _rounded(
    w: Tensor,
    dense: Tensor,
    mask: Tensor,
    pattern: Pattern,
    rounding: Rounding,
    values: IntFormat,
    factor: Tensor | None,
    seen: Statistics | None,
) -> Sparse:
    """What stays, as integers: by a sweep, where the inputs tell how, and no row worse than by rounding to nearest."""
    middle = torch.tensor(values.middle, dtype=torch.uint8, device=w.device)
    nearest = torch.where(mask, rounding.nearest, middle)
    codes = nearest
    if factor is not None and seen is not None and values.bits == 4:
        swept, _ = sparsegpt(dense, factor, pattern, mask, rounding)
        plain = _read(nearest, rounding, values)
        better = output_error(swept - w, seen.hessian) < output_error(plain - w, seen.hessian)
        codes = torch.where(better[:, None], rounding.codes, nearest)
    return Sparse(_read(codes, rounding, values), mask, pattern, rounding, codes)


def _read(codes: Tensor, rounding: Rounding, values: IntFormat) -> Tensor:
    return decode(codes, rounding.scale, rounding.zero, values.group_of(codes.shape[1]))


def _refuse_infinite(w: Tensor, seen: Statistics | None) -> None:
    if not bool(w.isfinite().all()):
        raise ValueError("the weight has values that are NaN or infinite")
    if seen is not None and not bool(seen.total.isfinite().all()):
        raise ValueError("the inputs seen in calibration are not finite: the model answers NaN or infinity")
