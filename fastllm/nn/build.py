"""From a stored weight to the layer that holds it."""

from typing import Any

from torch import Tensor

from ..bsr_format import BlockSparseWeight
from ..formats import QuantizedWeight
from ..sparse_formats import SparseFormat
from .block_sparse import BlockSparseLinear
from .linear import QuantLinear
from .sparse import SparseLinear

PackedLinear = QuantLinear | BlockSparseLinear  # a `SparseLinear` is one of the first


def build_layer(
    weight: QuantizedWeight | BlockSparseWeight, shape: tuple[int, int], format: Any, bias: Tensor | None = None
) -> PackedLinear:
    """The layer of a weight of `shape` (out_features, in_features) at rest in `format`; its tensors are taken over."""
    if isinstance(weight, BlockSparseWeight):
        return BlockSparseLinear(weight, shape, bias)
    return (SparseLinear if isinstance(format, SparseFormat) else QuantLinear)(weight, shape, format, bias)
