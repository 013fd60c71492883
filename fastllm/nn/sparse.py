"""`SparseLinear`: a linear layer most of whose columns are not stored."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..formats import QuantizedWeight
from ..ops import layouts_of, quant_matmul, sparse_matmul
from ..ops.expanded import ExpandedIntegers
from ..ops.layout import Prepared
from ..sparse_formats import SparseFormat, check_sparse, compress, dequantize_sparse, parse_sparse
from .linear import QuantLinear


class SparseLinear(QuantLinear):
    """y = x @ W.T + bias, where W [out_features, in_features] keeps equally many of each 32 columns of a row.

    x [..., in_features] in float16, bfloat16 or float32; y [..., out_features] in the dtype of x. Differentiable with
    respect to x. On a GPU a kernel reads what is kept; on a CPU the weight lies in memory with its zeros, and a dense
    product runs: `extra_repr`, and reports, say which. in_features is a multiple of 32.

    Parameters, whenever they leave the module: weight_packed, weight_scale and weight_index, as `SparseFormat` says.
    """

    format: Any
    weight_index: Tensor
    _HELD = ("packed", "index")

    def _register(self, weight: QuantizedWeight, bias: Tensor | None) -> None:
        super()._register(weight, bias)
        assert weight.index is not None
        self.weight_index = nn.Parameter(weight.index.detach(), requires_grad=False)

    @staticmethod
    def _check(weight: QuantizedWeight, format: Any, shape: tuple[int, int]) -> None:
        check_sparse(weight, format, shape)

    @classmethod
    def from_linear(  # type: ignore[override]
        cls, linear: Any, pattern: str | SparseFormat = "16:32", mask: Tensor | None = None
    ) -> "SparseLinear":
        """`linear`, an `nn.Linear` or a transformers `Conv1D`, with the weights that `mask` keeps, as they are.

        mask: bool [out_features, in_features] of that pattern; None: the largest weights. The bias is shared.
        `fastllm.sparsify` chooses better ones, and makes the kept weights stand in for the others. Raises ValueError
        for a pattern with integer values, a mask of another pattern, and in_features that 32 does not divide.
        """
        format = parse_sparse(pattern)
        if format.values is not None:
            raise ValueError(f"{format.name}: fastllm.sparsify rounds values to integers; from_linear leaves them")
        weight = linear.weight.detach()
        weight = weight if isinstance(linear, nn.Linear) else weight.t()
        kept = format.largest(weight.abs()) if mask is None else mask
        if kept.shape != weight.shape or kept.dtype != torch.bool:
            raise ValueError(f"the mask must be bool {list(weight.shape)}, got {kept.dtype} {list(kept.shape)}")
        packed = compress(weight, kept, weight.new_empty(len(weight), 0), format)
        own: Any = format
        layer = cls(packed, (weight.shape[0], weight.shape[1]), own, linear.bias)
        layer.transposed = not isinstance(linear, nn.Linear)
        return layer

    @classmethod
    def empty(cls, *args: Any, **kwargs: Any) -> "QuantLinear":
        raise NotImplementedError("a sparse layer is made of a weight: from_linear, or fastllm.load")

    @property
    def nbytes(self) -> int:
        """Bytes that one forward pass reads."""
        index = 0 if self.is_expanded else self.weight_index.nbytes
        return super().nbytes + index

    @property
    def is_expanded(self) -> bool:
        """Whether the zeros lie in memory too, because nothing here multiplies without them."""
        return self.layout.startswith("expanded")

    def prepare(self) -> None:
        """As for any packed layer. ValueError if what was loaded is of another pattern."""
        if not self.layout:
            self._check(self.at_rest(), self.format, self.shape)
        super().prepare()

    def at_rest(self) -> QuantizedWeight:
        """The weight as it is stored."""
        packed, scale, index = (t.detach() for t in (self.weight_packed, self.weight_scale, self.weight_index))
        held = QuantizedWeight(packed, scale, None, index)
        if not self.layout:
            return held
        layout: Any = layouts_of(self.format)[self.layout]
        found = layout.rest(Prepared(held.packed, held.scale, held.index), self.format, self.shape)
        return held._replace(packed=found.packed, index=found.index)

    def _take(self, prepared: Prepared) -> None:
        super()._take(prepared._replace(zero=None))
        assert prepared.zero is not None
        self._parameters["weight_index"] = nn.Parameter(prepared.zero, requires_grad=False)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [out_features, in_features], zeros and all."""
        return dequantize_sparse(self.at_rest(), self.format, self.shape, dtype or self.weight_scale.dtype)

    def product(
        self, x: Tensor, w: Tensor, scale: Tensor | None, zero: Tensor | None, bias: Tensor | None, N: int
    ) -> Tensor:
        """x times the prepared weight."""
        layout = layouts_of(self.format)[self.layout]
        if isinstance(layout, ExpandedIntegers):
            assert scale is not None
            bits, group = self.format.bits, self.format.group_of(self.in_features)
            return quant_matmul(x, w, scale, zero, bias, N, bits, group, layout.inner.name, self.batch_invariant)
        if self.is_expanded:
            same = w if w.dtype == x.dtype else w.to(x.dtype)
            bias = bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype)
            if not self.batch_invariant:
                return linear(x, same, bias)
            rows = x.reshape(-1, x.shape[-1]).split(1)
            return torch.cat([linear(row, same, bias) for row in rows]).view(*x.shape[:-1], N)
        assert scale is not None
        index: Any = self._parameters["weight_index"]
        return sparse_matmul(x, w, scale, index, bias, N, self.format.name, self.layout, self.batch_invariant)
