"""The ways to choose the numbers of a quantized weight, by name."""

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..formats import Format, IntFormat, QuantizedWeight
from ..quantizers import quantize
from . import awq
from .blocks import Blocks
from .calibrate import Group, Layer, Solver
from .fold import Change, find_folds
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

    def __init__(self) -> None:
        self.changes: list[Change] = []  # all parameters that were exchanged, as they were

    def fold(
        self, blocks: Blocks, index: int, layers: Mapping[str, Layer], found: list[tuple[Group, Statistics]]
    ) -> None:
        folds = find_folds(blocks, index, layers, [group for group, _ in found])
        for group, seen in reversed(found):  # what a layer feeds comes before what feeds it
            if (fold := folds.get(group.names)) is not None:
                own = [layers[name] for name in group.names]
                scale = self.scale([layer.weight for layer in own], [layer.format for layer in own], seen)
                scale, changes = fold.apply(scale)
                seen.divide(scale)
                self.changes += changes

    @abstractmethod
    def scale(self, weights: Sequence[Tensor], formats: Sequence[Format], seen: Statistics) -> Tensor:
        """By what the input of layers is to be divided, [K]."""


class AWQ(Folding):
    """`awq.search`, then `awq.clip`."""

    def scale(self, weights: Sequence[Tensor], formats: Sequence[Format], seen: Statistics) -> Tensor:
        return awq.search(weights, formats, seen.mean, seen.hessian)

    def solve(self, weights: Sequence[Tensor], formats: Sequence[Format], seen: Statistics) -> list[QuantizedWeight]:
        found = []
        for w, format in zip(weights, formats, strict=True):
            assert isinstance(format, IntFormat)
            found.append(quantize(awq.clip(w, format, seen.hessian), format, awq.rounder(format)))
        return found


class SmoothQuant(Folding):
    """Inputs with large channels hand some of their size to the weights, so that both can be rounded to 8 bits.

    Xiao, Lin, Seznec, Wu, Demouth, Han, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
    Language Models", 2022.
    """

    products = False

    def __init__(self, alpha: float = 0.85):
        """alpha: from 0, nothing, to 1, all of the inputs' size."""
        super().__init__()
        self.alpha = alpha

    def scale(self, weights: Sequence[Tensor], formats: Sequence[Format], seen: Statistics) -> Tensor:
        largest = torch.stack([w.abs().amax(0) for w in weights]).amax(0)
        scale = seen.largest**self.alpha / largest.clamp(min=1e-5) ** (1 - self.alpha)
        return torch.where(seen.largest > 0, scale, 1.0).clamp(min=1e-5)

    def solve(self, weights: Sequence[Tensor], formats: Sequence[Format], seen: Statistics) -> list[QuantizedWeight]:
        return [quantize(w, format, "rtn") for w, format in zip(weights, formats, strict=True)]


class Plain(Solver):
    """Without data, as `fastllm.quantizers` does."""

    def __init__(self, method: str):
        self.method = method

    def solve(self, weights: Sequence[Tensor], formats: Sequence[Format], seen: Statistics) -> list[QuantizedWeight]:
        return [quantize(w, format, self.method) for w, format in zip(weights, formats, strict=True)]
