"""`BlockSparseLinear`: a linear layer that stores and multiplies only those blocks of its weight that are not zero."""

from typing import Any

import torch
from torch import Tensor, nn

from ..bsr_format import BlockFormat, BlockSparseWeight, block_mask_of, check, check_block, order_of, pack_blocks
from ..bsr_format import to_dense as dense_of
from ..ops.block_sparse import block_sparse_matmul, runs_on

PARTS = tuple(f"weight_{part}" for part in BlockSparseWeight._fields)


class BlockSparseLinear(nn.Module):
    """y = x @ W.T + bias, with W [out_features, in_features] stored as a `BlockSparseWeight`.

    x [..., in_features] in float16, bfloat16 or float32; y [..., out_features] in the dtype of x. Differentiable with
    respect to x, so adapters train on top of it; the weight itself does not learn. Fast for x of the dtype of the
    weight, which is converted in every call otherwise. No dense copy is held: where a dense product would be faster,
    `runs` says so, and `to_dense` gives the dense layer back. Blocks cannot be sharded by tensor-parallel plans, which
    cut rows or columns.
    """

    transposed = False  # whether the layer it replaces stores its weight as [in, out]
    batch_invariant = False  # whether a row of y must have the same bits whatever the other rows of x are
    weight_values: Tensor
    weight_columns: Tensor
    weight_rows: Tensor
    bias: Tensor | None
    _order: Tensor | None

    def __init__(self, weight: BlockSparseWeight, shape: tuple[int, int], bias: Tensor | None = None):
        """weight: its tensors are taken over, not copied. shape: (out_features, in_features).

        Raises ValueError if the tensors cannot be such a weight, or the bias not one of it.
        """
        super().__init__()
        self.out_features, self.in_features = shape
        self.format = BlockFormat(weight.values.shape[-1])
        if bias is not None and bias.shape != (shape[0],):
            raise ValueError(f"the bias of {shape[0]} features must be [{shape[0]}], got {list(bias.shape)}")
        for name, tensor in (*zip(PARTS, weight, strict=True), ("bias", bias)):
            held = None if tensor is None else nn.Parameter(tensor.detach().contiguous(), requires_grad=False)
            self.register_parameter(name, held)
        self.register_buffer("_order", None, persistent=False)
        self.prepare()

    @classmethod
    def from_linear(cls, linear: Any, block: int = 64, mask: Tensor | None = None) -> "BlockSparseLinear":
        """The blocks of `linear` (an `nn.Linear`, or a transformers `Conv1D`, whose weight is [in, out]).

        block: 32, 64 or 128, which must divide both sizes of the weight
        mask:  bool [out_features / block, in_features / block], the blocks to keep; None: those that are not all zero,
            which is what a layer has that was trained with a mask
        The bias is shared. Raises ValueError for sizes, dtypes and masks that do not fit.
        """
        weight = linear.weight.detach()
        if not isinstance(linear, nn.Linear):
            weight = weight.t()
        shape = (weight.shape[0], weight.shape[1])
        check_block(*shape, block)
        packed = pack_blocks(weight, block_mask_of(weight, block) if mask is None else mask, block)
        layer = cls(packed, shape, linear.bias)
        layer.transposed = not isinstance(linear, nn.Linear)
        return layer

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        bias: bool,
        block: int = 64,
        count: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "meta",
    ) -> "BlockSparseLinear":
        """A layer whose parameters are still to be loaded: a state dict may have any number of blocks.

        count: blocks, for those who assign the parameters one by one; only on the meta device. Elsewhere W is 0.
        """
        check_block(out_features, in_features, block)
        weight = BlockSparseWeight(
            torch.zeros(count, block, block, dtype=dtype, device=device),
            torch.zeros(count, dtype=torch.int32, device=device),
            torch.zeros(out_features // block + 1, dtype=torch.int32, device=device),
        )
        shape = (out_features, in_features)
        return cls(weight, shape, torch.zeros(out_features, dtype=dtype, device=device) if bias else None)

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def weight(self) -> Tensor:
        """Only the shape, dtype and device of the weight, for code that asks; its values are NaN."""
        return self.weight_values.new_full((1, 1), float("nan")).expand(self.shape)

    @property
    def count(self) -> int:
        """Blocks that are stored."""
        return len(self.weight_values)

    @property
    def density(self) -> float:
        """The share of the weight's elements that is stored."""
        return self.weight_values.numel() / (self.out_features * self.in_features)

    @property
    def nbytes(self) -> int:
        """Bytes that one forward pass reads: blocks, their places, and bias."""
        tensors = (*self.at_rest(), self._order, self.bias)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    @property
    def runs(self) -> str:
        """What multiplies, for reports; and where dense weights would be as fast."""
        values = self.weight_values
        return runs_on(*self.shape, self.format.block, self.count, values.dtype, values.device)

    def at_rest(self) -> BlockSparseWeight:
        """The weight; its tensors are the parameters."""
        return BlockSparseWeight(*(self._parameters[name].detach() for name in PARTS))  # type: ignore[union-attr]

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight [out_features, in_features], exact; named as that of layers that are quantized."""
        return dense_of(self.at_rest(), self.shape, dtype)

    def to_dense(self) -> nn.Linear:
        """The dense layer, with zeros where there was no block. The bias is shared."""
        dense = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        dense.weight = nn.Parameter(self.dequantize(), requires_grad=False)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach(), requires_grad=False)
        return dense.train(self.training)

    def prepare(self) -> None:
        """Check the parameters, and note in which order rows of blocks are started: not on the meta device.

        For who assigns parameters one by one; all else that changes them does it by itself. Raises ValueError.
        """
        self._order, weight = None, self.at_rest()
        check(weight, self.shape)
        if not weight.rows.is_meta:
            self._order = order_of(weight.rows)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features], floating point -> [..., out_features] in x's dtype. ValueError for anything else."""
        if x.shape[-1] != self.in_features or not x.is_floating_point():
            raise ValueError(f"x must be floating point [..., {self.in_features}], got {x.dtype} {list(x.shape)}")
        # straight from the dictionaries, as in QuantLinear: nn.Module.__getattr__ takes its time
        parameters: dict[str, Any] = self._parameters
        values, columns, rows = (parameters[name] for name in PARTS)
        order = self._buffers["_order"]
        if order is None:
            raise ValueError("the layer has no weight yet: load a state dict, or assign its parameters and prepare()")
        return block_sparse_matmul(x, values, columns, rows, order, parameters["bias"], self.batch_invariant)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        runs = self.runs if self._order is not None else "not loaded"
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, {bias=}"
        return f"{sizes}, {self.format.name}, {self.count} blocks ({self.density:.0%}), {runs}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in PARTS[:2]:  # as many blocks as come
            given, own = state_dict.get(prefix + name), self._parameters[name]
            if given is not None and own is not None and len(given) != len(own) and given.shape[1:] == own.shape[1:]:
                self._parameters[name] = nn.Parameter(own.new_empty(given.shape), requires_grad=False)
        super()._load_from_state_dict(state_dict, prefix, *args)
        try:
            self.prepare()
        except ValueError as error:  # all that does not fit is told together
            args[-1].append(f"{prefix[:-1] or type(self).__name__}: {error}")
