"""Sparse weights on a GPU: 32 rows side by side, read by the Triton kernels for the few rows of decoding."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..formats import QuantizedWeight
from ..sparse_formats import BLOCK, SparseFormat, check_sparse, dequantize_sparse
from .layout import Layout, Prepared

if TYPE_CHECKING:
    from ..kernels.sparse_parts import Kept

LANES = 32  # rows side by side
# Rows of x from which expanding the weight and the library's product are taken for faster than the kernel: estimated,
# not timed. For 16 of 32 in bfloat16 the kernel runs 25 instructions a weight for up to 16 rows, in whose time an H100
# reads 2.8 bytes, and as many again for the next 16; to read 1.1 bytes, write two and read them is 5.1 bytes.
CROSSOVER = 17
SCRATCH = 1 << 25  # weights that are dense at any one time: 64 MiB in 16 bits; fewer would leave multiprocessors idle
MOVED = 1 << 22  # values that a change of layout moves at a time


@dataclass(frozen=True)
class SparseLayout(Layout):
    """A layout of the op `sparse_matmul`. format: of the weights, for every method but `pack` and `rest`."""

    format: SparseFormat | None = None

    def rest(self, p: Prepared, format: SparseFormat, shape: tuple[int, int]) -> QuantizedWeight:
        """The inverse of `pack`, exact to the bit. Leaves the operands as they are."""
        raise NotImplementedError

    def unpack(self, w: Tensor, format: Any, shape: tuple[int, int]) -> Tensor:
        raise NotImplementedError("a sparse weight is two tensors: see `rest`")

    @property
    def known(self) -> SparseFormat:
        if self.format is None:
            raise ValueError(f"layout {self.name} was not told the format: SPARSE_LAYOUTS holds it for packing only")
        return self.format


@dataclass(frozen=True)
class SparseRest(SparseLayout):
    """The layout of the checkpoint. Runs anywhere, by expanding and multiplying: the definition of the op."""

    name, runs, slow = "rest", "expand + matmul", True

    def reasons(self, format: Any, N: int, K: int, dtype: torch.dtype, device: torch.device) -> list[str]:
        return []

    def pack(self, weight: QuantizedWeight, format: Any, shape: tuple[int, int]) -> Prepared:
        return Prepared(weight.packed, weight.scale, weight.index)

    def rest(self, p: Prepared, format: SparseFormat, shape: tuple[int, int]) -> QuantizedWeight:
        return QuantizedWeight(p.w, p.scale, None, p.zero)

    def dense(self, p: Prepared, bits: int, group: int, rows: slice, K: int, dtype: torch.dtype) -> Tensor:
        assert p.zero is not None
        some = QuantizedWeight(p.w[rows], p.scale[rows], None, p.zero[rows])
        return dequantize_sparse(some, self.known, (len(some.packed), K), dtype)


@dataclass(frozen=True)
class Lanes(SparseLayout):
    """w: int32 [tiles, K / 32, words, 32], index: int32 [tiles, K / 32, 32] for tiles of 32 rows.

    A word holds neighbouring values of a block of 32 columns, lowest bits first; what is left of a block's last word,
    and rows past N, are 0.
    """

    name, runs = "lanes", "triton sparse matmul"

    def reasons(self, format: Any, N: int, K: int, dtype: torch.dtype, device: torch.device) -> list[str]:
        values = format.values
        return [
            why
            for bad, why in (
                (device.type != "cuda", f"it runs on a CUDA device, not on {device.type}"),
                (find_spec("triton") is None, "triton is not installed"),
                (
                    values is not None and (values.bits, values.group) != (8, None),
                    f"it multiplies floats and int8 with one scale per channel, not {values and values.name}",
                ),
            )
            if bad
        ]

    def pack(self, weight: QuantizedWeight, format: Any, shape: tuple[int, int]) -> Prepared:
        """ValueError for a weight that is damaged, and for values that it cannot hold."""
        check_sparse(weight, format, shape)
        (N, K), bits, index = shape, _bits(format, weight.packed.dtype), weight.index
        assert index is not None
        tiles, blocks = -(-N // LANES), K // BLOCK
        words = -(-format.kept * bits // 32)
        w = weight.packed.new_empty(tiles, blocks, words, LANES, dtype=torch.int32)
        places = index.new_empty(tiles, blocks, LANES)
        for some in _steps(tiles, K):
            rows = slice(some.start * LANES, some.stop * LANES)
            given = weight.packed[rows]
            values = _as(given, _PLAIN[bits]).view(len(given), -1)[:, : blocks * format.kept]
            values = values.unflatten(1, (blocks, format.kept))
            values = pad(values, (0, words * 32 // bits - format.kept, 0, 0, 0, -len(values) % LANES))
            w[some] = _as(values, torch.int32).view(-1, LANES, blocks, words).permute(0, 2, 3, 1)
            places[some] = pad(index[rows], (0, 0, 0, -len(given) % LANES)).view(-1, LANES, blocks).transpose(1, 2)
        return Prepared(w, weight.scale, places)

    def rest(self, p: Prepared, format: SparseFormat, shape: tuple[int, int]) -> QuantizedWeight:
        assert p.zero is not None
        (N, K), dtype = shape, torch.int32 if format.values else p.scale.dtype
        bits, V = _bits(format, dtype), format.kept_of(K)
        tiles, blocks = -(-N // LANES), K // BLOCK
        packed = p.w.new_empty(N, -(-V * bits // 32) if format.values else V, dtype=dtype)
        index = p.zero.new_empty(N, blocks)
        for some in _steps(tiles, K):
            rows = slice(some.start * LANES, min(some.stop * LANES, N))
            n = rows.stop - rows.start
            words = p.w[some].permute(0, 3, 1, 2).flatten(0, 1)[:n]
            values = _as(words, _PLAIN[bits]).view(n, blocks, -1)[..., : format.kept].reshape(n, V)
            packed[rows] = _as(pad(values, (0, -V % 4)) if format.values else values, dtype).view(n, -1)
            index[rows] = p.zero[some].transpose(1, 2).reshape(-1, blocks)[:n]
        return QuantizedWeight(packed, p.scale, None, index)

    def step(self, K: int) -> int:
        return max(256, SCRATCH // K // 256 * 256)

    def kept(self, p: Prepared) -> "Kept":
        """The format, as the kernels are told it."""
        from ..kernels.sparse_parts import Kept  # Triton is imported on first use

        return Kept(self.known.kept, self.known.quads, torch.int8 if self.known.values else p.scale.dtype)

    def dense(self, p: Prepared, bits: int, group: int, rows: slice, K: int, dtype: torch.dtype) -> Tensor:
        """`rows` begin at a multiple of 32."""
        assert p.zero is not None and rows.start % LANES == 0
        some, n = slice(rows.start // LANES, -(-rows.stop // LANES)), rows.stop - rows.start
        part = Prepared(p.w[some], p.scale[rows], p.zero[some])
        if not p.w.is_cuda:
            return dequantize_sparse(self.rest(part, self.known, (n, K)), self.known, (n, K), dtype)
        from ..kernels.sparse_expand import sparse_expand

        return sparse_expand(part.w, p.zero[some], part.scale, n, self.kept(p), dtype)

    def linear(
        self, x: Tensor, p: Prepared, bias: Tensor | None, N: int, bits: int, group: int, batch_invariant: bool
    ) -> Tensor:
        if not x.is_cuda or len(x) >= CROSSOVER and not batch_invariant:
            return super().linear(x, p, bias, N, bits, group, batch_invariant)
        from ..kernels.sparse_matmul import sparse_matmul

        assert p.zero is not None
        return sparse_matmul(x, p.w, p.zero, p.scale, bias, N, self.kept(p))


_PLAIN = {8: torch.uint8, 16: torch.int16, 32: torch.int32}  # bits -> what is moved in their place


def _bits(format: SparseFormat, dtype: torch.dtype) -> int:
    if format.values and format.values.bits != 8:
        raise ValueError(f"lanes hold floats and int8, not {format.values.name}")
    return 8 if format.values else 8 * dtype.itemsize


def _as(t: Tensor, dtype: torch.dtype) -> Tensor:
    """The bits of t as another type, flat: torch refuses to view a dimension of size 1 whose stride is odd."""
    return t.contiguous().as_strided((t.numel(),), (1,)).view(dtype)


def _steps(tiles: int, K: int) -> list[slice]:
    step = max(1, MOVED // (K * LANES))
    return [slice(start, min(start + step, tiles)) for start in range(0, tiles, step)]
