"""Modules: parameters and one call."""

from .block_sparse import BlockSparseLinear
from .build import PackedLinear, build_layer
from .experts import QuantExperts
from .linear import QuantLinear
from .sparse import SparseLinear

__all__ = ["BlockSparseLinear", "PackedLinear", "QuantExperts", "QuantLinear", "SparseLinear", "build_layer"]
