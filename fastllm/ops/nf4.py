"""nf4 weights: the layout at rest, read by look-up and multiplication. It runs anywhere."""

import torch
from torch import Tensor

from ..formats import Format, Nf4Format, QuantizedWeight
from ..nf4_format import level_pairs, nf4_dense
from .layout import Layout, Prepared


class Nf4Rest(Layout):
    """The definition. The place of zero points is taken by the table of levels, which no product has to copy then."""

    name, runs, slow = "nf4", "nf4 look-up + matmul, no faster than dense", True

    def reasons(self, format: Format, N: int, K: int, dtype: torch.dtype, device: torch.device) -> list[str]:
        return [] if isinstance(format, Nf4Format) else [f"it holds nf4, not {format.name}"]

    def pack(self, weight: QuantizedWeight, format: Format, shape: tuple[int, int]) -> Prepared:
        return Prepared(weight.packed, weight.scale, level_pairs(weight.packed.device))

    def unpack(self, w: Tensor, format: Format, shape: tuple[int, int]) -> Tensor:
        return w

    def dense(self, p: Prepared, bits: int, group: int, rows: slice, K: int, dtype: torch.dtype) -> Tensor:
        assert p.zero is not None
        return nf4_dense(p.w[rows], p.scale[rows], p.zero, K, dtype)


NF4_LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (Nf4Rest(),)}
