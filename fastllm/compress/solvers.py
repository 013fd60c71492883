"""The ways to choose the numbers of a quantized weight, by name."""

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..formats import Format, IntFormat, QuantizedWeight
from ..quantizers import quantize
from . import awq, smooth
from .blocks import Blocks
from .calibrate import Group, Layer, Solver
from .fold import Share, find_folds, same
from .gptq import gptq
from .statistics import Statistics

logger = logging.getLogger("fastllm")


class GPTQ(Solver):
    """`gptq`, one layer after the other, each on what the quantized ones before it have made."""

    def solve(self, weights: Sequence[Tensor], formats: Sequence[Format], seen: Statistics) -> list[QuantizedWeight]:
        found = []
        for w, format in zip(weights, formats, strict=True):
            assert isinstance(format, IntFormat)
            weight, why = gptq(w, seen.hessian, format, torch.float32)
            if why:
                logger.warning("%s: rounded to nearest", why)
            found.append(weight)
        return found


class Folding(Solver):
    """Scales channels of the inputs of layers, where what makes these inputs can take the inverse; see `fold`."""

    sequential = False

    def fold(
        self, blocks: Blocks, index: int, layers: Mapping[str, Layer], found: list[tuple[Group, Statistics]]
    ) -> None:
        folds = find_folds(blocks, index, layers, [group for group, _ in found])
        for group, seen in reversed(found):  # what a layer feeds comes before what feeds it
            if (fold := folds.get(group.names)) is not None:
                own = [layers[name] for name in group.names]
                scale = self.scale([layer.weight for layer in own], [layer.format for layer in own], seen, fold.share)
                scale, changes = fold.apply(scale)
                seen.divide(scale)
                self.changes += changes

    @abstractmethod
    def scale(
        self, weights: Sequence[Tensor], formats: Sequence[Format], seen: Statistics, share: Share = same
    ) -> Tensor:
        """By what the input of layers is to be divided, [K]. share: makes it equal where it has to be."""


class AWQ(Folding):
    """`awq.search`, then `awq.clip`."""

    def scale(
        self, weights: Sequence[Tensor], formats: Sequence[Format], seen: Statistics, share: Share = same
    ) -> Tensor:
        return awq.search(weights, formats, seen.mean, seen.hessian, share)

    def solve(self, weights: Sequence[Tensor], formats: Sequence[Format], seen: Statistics) -> list[QuantizedWeight]:
        found = []
        for w, format in zip(weights, formats, strict=True):
            assert isinstance(format, IntFormat)
            found.append(quantize(awq.clip(w, format, seen.hessian), format, awq.rounder(format)))
        return found


class SmoothQuant(Folding):
    """Inputs with large channels hand some of their size to the weights, so that both can be rounded to 8 bits.

    By how much is searched for, with `smooth.search`; alpha: from 0, nothing, to 1, all of the inputs' size, is the
    formula of the paper instead, in the largest values of channels.
    """

    products = False

    def __init__(self, alpha: float | None = None):
        super().__init__()
        self.alpha = alpha

    def scale(
        self, weights: Sequence[Tensor], formats: Sequence[Format], seen: Statistics, share: Share = same
    ) -> Tensor:
        if self.alpha is None:
            return smooth.search(weights, seen.sample, share)
        largest = share(torch.stack([w.abs().amax(0) for w in weights]).amax(0))
        size = share(seen.largest)
        scale = size**self.alpha / largest.clamp(min=1e-5) ** (1 - self.alpha)
        return torch.where(size > 0, scale, 1.0).clamp(min=1e-5)

    def solve(self, weights: Sequence[Tensor], formats: Sequence[Format], seen: Statistics) -> list[QuantizedWeight]:
        return [quantize(w, format, "rtn") for w, format in zip(weights, formats, strict=True)]


class Plain(Solver):
    """Without data, as `fastllm.quantizers` does."""

    def __init__(self, method: str):
        super().__init__()
        self.method = method

    def solve(self, weights: Sequence[Tensor], formats: Sequence[Format], seen: Statistics) -> list[QuantizedWeight]:
        return [quantize(w, format, self.method) for w, format in zip(weights, formats, strict=True)]
