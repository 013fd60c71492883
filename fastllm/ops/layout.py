"""What a runtime layout is: a permutation of a weight's bytes that some implementation reads fast, and its inverse."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..formats import Format, QuantizedWeight, scale_groups, unpack_bits, unpack_zero_point

SCRATCH = 1 << 21  # weights that are dense at any one time: a few MB, so that they stay in the cache


class Prepared(NamedTuple):
    """The operands of `quant_matmul`, as one layout wants them. `scale` and `zero` may be the tensors at rest."""

    w: Tensor
    scale: Tensor
    zero: Tensor | None  # of sparse weights, which have no zero points: which columns are kept


class Layout(ABC):
    """How the packed weight lies in memory. Stateless: every method is a pure function of its arguments."""

    name: str
    runs: str  # what runs on it, for the report
    slow = False  # whether dense weights would be as fast, so that the report says why nothing faster runs
    stacks = 0  # weights whose rows are a multiple of this lie one below the other in one tensor; 0: they cannot
    scale_rows = 0  # the dimension of the prepared scale that goes along the rows

    @abstractmethod
    def reasons(self, format: Format, N: int, K: int, dtype: torch.dtype, device: torch.device) -> list[str]:
        """Why it cannot hold such a weight for activations of `dtype`; empty if it can."""

    @abstractmethod
    def pack(self, weight: QuantizedWeight, format: Format, shape: tuple[int, int]) -> Prepared:
        """From rest to this layout. May reuse, and so overwrite, `weight.packed`."""

    @abstractmethod
    def unpack(self, w: Tensor, format: Format, shape: tuple[int, int]) -> Tensor:
        """The inverse: `packed` at rest, exact to the bit. Leaves `w` as it is."""

    @abstractmethod
    def dense(self, p: Prepared, bits: int, group: int, rows: slice, K: int, dtype: torch.dtype) -> Tensor:
        """Rows of the weight, [n, K] of `dtype`: a multiplication away from the stored integers."""

    def step(self, K: int) -> int:
        """Rows to take from `dense` at a time."""
        return max(64, SCRATCH // K // 64 * 64)

    def matmul(self, x: Tensor, p: Prepared, N: int, bits: int, group: int) -> Tensor:
        """x [M, K] -> [M, N] in x's dtype. Here: dense chunks and the library's matmul."""
        # on a CPU, float16 products are slower than float32 ones
        dtype = x.dtype if x.is_cuda or x.dtype == torch.bfloat16 else torch.float32
        return self.by_chunks(x, p, N, bits, group, dtype).to(x.dtype)

    def linear(
        self, x: Tensor, p: Prepared, bias: Tensor | None, N: int, bits: int, group: int, batch_invariant: bool
    ) -> Tensor:
        """x [M, K] -> [M, N] in x's dtype, bias [N] added."""
        y = (self.invariant if batch_invariant else self.matmul)(x, p, N, bits, group)
        return y if bias is None else y + (bias if bias.dtype == y.dtype else bias.to(y.dtype))

    def invariant(self, x: Tensor, p: Prepared, N: int, bits: int, group: int) -> Tensor:
        """As `matmul`, but a row of y has the same bits whatever the other rows of x are. Here: one row at a time."""
        return torch.cat([self.matmul(row, p, N, bits, group) for row in x.split(1)])

    def by_chunks(self, x: Tensor, p: Prepared, N: int, bits: int, group: int, dtype: torch.dtype) -> Tensor:
        """x [M, K] @ dense.T in `dtype`, with a bounded scratch."""
        M, K = x.shape
        step = self.step(K * dtype.itemsize // 2)
        x = x.to(dtype)
        if step >= N:
            return linear(x, self.dense(p, bits, group, slice(0, N), K, dtype))
        y = x.new_empty(M, N)
        for start in range(0, N, step):
            rows = slice(start, min(start + step, N))
            w = self.dense(p, bits, group, rows, K, dtype)
            if x.is_cuda:
                torch.mm(x, w.t(), out=y[:, rows])  # straight into its place
            else:
                y[:, rows] = linear(x, w)
        return y

    def grad_x(self, grad: Tensor, p: Prepared, K: int, bits: int, group: int) -> Tensor:
        """grad [..., N] @ dense [N, K] -> [..., K] in grad's dtype, a few MB of the weight at a time."""
        rows, N, step = grad.reshape(-1, grad.shape[-1]), grad.shape[-1], self.step(K)
        total = torch.zeros(len(rows), K, dtype=torch.float32, device=grad.device)
        for start in range(0, N, step):
            here = slice(start, min(start + step, N))
            total += rows[:, here] @ self.dense(p, bits, group, here, K, grad.dtype)
        return total.to(grad.dtype).view(*grad.shape[:-1], K)


class DynamicLayout(Layout):
    """A layout whose product rounds the activations as well, row by row, to the type that its weights have."""

    activations: str  # "int8" or "fp8"

    @abstractmethod
    def multiply(self, x: Tensor, p: Prepared, bias: Tensor | None, N: int, batch_invariant: bool = False) -> Tensor:
        """x [M, K] -> [M, N] in x's dtype, rounded once."""

    def matmul(self, x: Tensor, p: Prepared, N: int, bits: int, group: int) -> Tensor:
        return self.multiply(x, p, None, N)

    def unfit(self, format: Format) -> list[str]:
        """Why it cannot hold `format` wherever it is."""
        if format.activations == self.activations:
            return []
        if format.activations is None:
            return [f"it rounds activations, which {format.name} leaves as they are"]
        return [f"it multiplies {self.activations}, not {format.activations}"]


def choose(
    layouts: Mapping[str, Layout], format: Any, N: int, K: int, dtype: torch.dtype, device: torch.device
) -> tuple[Layout, dict[str, list[str]]]:
    """The first of `layouts` that can hold the weight, and why those before it cannot: {name: reasons}.

    Raises ValueError with every reason if there is none.
    """
    refused: dict[str, list[str]] = {}
    for name, layout in layouts.items():
        if not (reasons := layout.reasons(format, N, K, dtype, device)):
            return layout, refused
        refused[name] = reasons
    every = "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in refused.items())
    raise ValueError(f"no layout can hold {format.name} [{N}, {K}] for {dtype} on {device}: {every}")


class Rest(Layout):
    """The layout of the checkpoint. Runs anywhere, by dequantising and multiplying: the definition of the op."""

    name, runs = "rest", "dequantise + matmul"
    stacks = 8  # zero points at rest are packed eight rows to a word

    def reasons(self, format: Format, N: int, K: int, dtype: torch.dtype, device: torch.device) -> list[str]:
        return ["it leaves activations as they are"] if format.activations else []

    def pack(self, weight: QuantizedWeight, format: Format, shape: tuple[int, int]) -> Prepared:
        zero = None if weight.zero_point is None else unpack_zero_point(weight.zero_point, format.bits, shape[0])
        return Prepared(weight.packed, weight.scale, zero)

    def unpack(self, w: Tensor, format: Format, shape: tuple[int, int]) -> Tensor:
        return w

    def dense(self, p: Prepared, bits: int, group: int, rows: slice, K: int, dtype: torch.dtype) -> Tensor:
        zero = 2 ** (bits - 1) if p.zero is None else p.zero[rows]
        return scale_groups(unpack_bits(p.w[rows], bits, K), p.scale[rows], zero, group, dtype)
