"""Sparse weights where nothing reads them as they are: all columns in memory, the zeros too, and a dense product.

A CPU has no operator for weights with holes that would be faster than a dense one, so this is what runs there: files
are small, a layer's memory and time are those of a dense weight. The report says so.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..formats import QuantizedWeight, pack_bits, unpack_bits
from ..sparse_formats import SparseFormat, dense_codes, expand, mask_of
from .layout import Layout, Prepared
from .quant_matmul import LAYOUTS


class Expanded(Layout):
    """Floats, as a dense weight [N, K]. The index stays as it is."""

    name, runs = "expanded", "dense matmul, which multiplies zeros too"

    def reasons(self, format: Any, N: int, K: int, dtype: torch.dtype, device: torch.device) -> list[str]:
        return ["its values are integers"] if format.values else []

    def pack(self, weight: QuantizedWeight, format: Any, shape: tuple[int, int]) -> Prepared:
        return Prepared(expand(weight, format, shape), weight.scale, weight.index)

    def rest(self, p: Prepared, format: SparseFormat, shape: tuple[int, int]) -> QuantizedWeight:
        """The inverse of `pack`, exact to the bit."""
        at_rest = QuantizedWeight(p.w, p.scale, None, p.zero)
        values = p.w[mask_of(at_rest, format, shape)].view(shape[0], format.kept_of(shape[1]))
        return at_rest._replace(packed=values)

    def unpack(self, w: Tensor, format: Any, shape: tuple[int, int]) -> Tensor:
        raise NotImplementedError("which columns are kept is not in w: `rest` takes the index too")

    def dense(self, p: Prepared, bits: int, group: int, rows: slice, K: int, dtype: torch.dtype) -> Tensor:
        return p.w[rows].to(dtype)

    def matmul(self, x: Tensor, p: Prepared, N: int, bits: int, group: int) -> Tensor:
        return linear(x, p.w.to(x.dtype))


class ExpandedIntegers(Expanded):
    """Integers, in a layout of dense weights of the same integers."""

    def __init__(self, inner: Layout):
        self.inner = inner
        self.name, self.runs = f"expanded-{inner.name}", f"{inner.runs}, which reads zeros too"

    def reasons(self, format: Any, N: int, K: int, dtype: torch.dtype, device: torch.device) -> list[str]:
        if format.values is None:
            return ["its values are floats"]
        return self.inner.reasons(format.values, N, K, dtype, device)

    def pack(self, weight: QuantizedWeight, format: Any, shape: tuple[int, int]) -> Prepared:
        codes = dense_codes(weight, format, shape)
        return self.inner.pack(codes, format.values, shape)._replace(zero=weight.index)

    def rest(self, p: Prepared, format: SparseFormat, shape: tuple[int, int]) -> QuantizedWeight:
        assert format.values is not None
        (N, K), bits = shape, format.bits
        at_rest = QuantizedWeight(p.w, p.scale, None, p.zero)
        codes = unpack_bits(self.inner.unpack(p.w, format.values, shape), bits, K)
        kept = codes[mask_of(at_rest, format, shape)].view(N, format.kept_of(K))
        return at_rest._replace(packed=pack_bits(kept, bits))

    def dense(self, p: Prepared, bits: int, group: int, rows: slice, K: int, dtype: torch.dtype) -> Tensor:
        return self.inner.dense(p._replace(zero=None), bits, group, rows, K, dtype)

    def matmul(self, x: Tensor, p: Prepared, N: int, bits: int, group: int) -> Tensor:
        return self.inner.matmul(x, p._replace(zero=None), N, bits, group)


EXPANDED: dict[str, Expanded] = {
    layout.name: layout for layout in (Expanded(), *(ExpandedIntegers(inner) for inner in LAYOUTS.values()))
}
