"""int4 weights on a CPU: the layout of `torch.ops.aten._weight_int4pack_mm_for_cpu`.

The operator is the fastest way to read an int4 weight once; from about 50 rows on it loses to a dense product, so
larger products dequantise a few MB at a time and multiply in bfloat16 (bench/results has the measurements).
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..formats import IntFormat, QuantizedWeight, pack_bits, unpack_bits, unpack_zero_point
from .layout import Layout, Prepared

TILE = 64  # rows of a block in the widest variant of the layout; N is padded to a multiple of it
NATIVE_GROUPS = (256, 128, 64, 32)


def native_group(group: int, K: int) -> int:
    """The largest group that the operator knows and that never straddles two of ours."""
    return next(g for g in NATIVE_GROUPS if group % g == 0 or (group == K and K % g == 0) or g == 32)


@lru_cache(maxsize=1)
def _tile() -> tuple[int, Tensor | None]:
    """(bytes per k in a block, order): the layout depends on the CPU, so it is read off a packed example.

    For each k of a block come its bytes; low nibbles first and high ones after, nibble i is row order[i] of the block.
    None stands for 0, 1, 2, ...
    """
    n = torch.arange(TILE, dtype=torch.int32)[:, None].expand(TILE, 32)
    k = (torch.arange(32, dtype=torch.int32) % 16).expand(TILE, 32)
    convert = torch.ops.aten._convert_weight_to_int4pack_for_cpu
    low, high, ks = (convert(v.contiguous(), 1).flatten() for v in (n & 15, n >> 4, k))
    per_k = int((ks != ks[0]).nonzero()[0])
    low, high = low[:per_k], high[:per_k]
    order = torch.cat(((low & 15) + ((high & 15) << 4), (low >> 4) + ((high >> 4) << 4))).long()
    return per_k, None if torch.equal(order, torch.arange(2 * per_k)) else order.argsort()


class Int4Pack(Layout):
    name, runs = "int4pack", "aten int4pack / bf16 GEMM"
    direct_rows = 48  # rows of x up to which the operator beats dequantising and a GEMM

    def reasons(self, format: IntFormat, N: int, K: int, dtype: torch.dtype, device: torch.device) -> list[str]:
        return [
            why
            for bad, why in (
                (device.type != "cpu", f"it runs on the CPU, not on {device.type}"),
                (format.bits != 4, f"it holds 4-bit weights, not {format.bits}-bit"),
                (
                    not torch.backends.cpu.get_cpu_capability().startswith("AVX"),
                    "the CPU has neither AVX2 nor AVX-512",
                ),
                (format.group is None and K % 32 != 0, f"per channel, K={K} is not a multiple of 32"),
            )
            if bad
        ]

    def pack(self, weight: QuantizedWeight, format: IntFormat, shape: tuple[int, int]) -> Prepared:
        (N, K), group = shape, format.group_of(shape[1])
        g = native_group(group, K)
        rows, cols = -(-N // TILE) * TILE, -(-K // g) * g
        w = torch.empty(rows, cols // 2, dtype=torch.uint8)
        for start in range(0, N, self.step(K)):
            q = unpack_bits(weight.packed[start : start + self.step(K)], 4, K).to(torch.int32)
            q = pad(q, (0, cols - K, 0, -len(q) % TILE), value=8)
            w[start : start + len(q)] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
        owner = torch.arange(cols // g) * g // group  # the scale of each native group
        scale = weight.scale[:, owner]
        zero = torch.zeros_like(scale)
        if weight.zero_point is not None:
            # the operator computes (q - 8) * scale + zero
            zero = scale * (8 - unpack_zero_point(weight.zero_point, 4, N)[:, owner].to(scale.dtype))
        pairs = torch.stack((scale, zero), -1).transpose(0, 1)
        # the zero points are in `pairs`; passing them on tells that there are some
        return Prepared(w, pad(pairs, (0, 0, 0, rows - N)).to(torch.bfloat16).contiguous(), weight.zero_point)

    def unpack(self, w: Tensor, format: IntFormat, shape: tuple[int, int]) -> Tensor:
        N, K = shape
        packed = torch.empty(N, format.words(K), dtype=torch.int32)
        for rows in self._chunks(N, K):
            q = _natural(*_halves(w, rows))  # [cols, n]
            packed[rows] = pack_bits(q[:K, : rows.stop - rows.start].t().contiguous(), 4)
        return packed

    def _chunks(self, N: int, K: int) -> list[slice]:
        return [slice(start, min(start + self.step(K), N)) for start in range(0, N, self.step(K))]

    def _scaled(self, p: Prepared, rows: slice, dtype: torch.dtype) -> Tensor:
        """[2, cols, n / 2]: the weights of whole blocks that cover `rows`, in the order of `_halves`."""
        q = _halves(p.w, rows).view(torch.int8).sub_(8)
        _, cols, half = q.shape
        pairs = p.scale[:, rows.start : rows.start + 2 * half].to(dtype)
        wt = q.to(dtype).view(2, len(pairs), -1, half)
        wt *= _apart(pairs[..., 0])
        if p.zero is not None:
            wt += _apart(pairs[..., 1])
        return wt.view(2, cols, half)

    def dense(self, p: Prepared, bits: int, group: int, rows: slice, K: int, dtype: torch.dtype) -> Tensor:
        return _natural(*self._scaled(p, rows, dtype))[:K, : rows.stop - rows.start].t()

    def matmul(self, x: Tensor, p: Prepared, N: int, bits: int, group: int) -> Tensor:
        (M, K), cols = x.shape, 2 * p.w.shape[1]
        xs = x.to(torch.bfloat16)
        xs = xs.contiguous() if cols == K else pad(xs, (0, cols - K))
        if M <= self.direct_rows:
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(xs, p.w, cols // len(p.scale), p.scale)
        else:
            # putting the columns in order is less work on the result than on the weight
            halves = (self._scaled(p, rows, xs.dtype) for rows in self._chunks(len(p.w), K))
            parts = [_natural(xs @ low, xs @ high) for low, high in halves]
            y = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return (y if len(p.w) == N else y[:, :N].contiguous()).to(x.dtype)


def _halves(w: Tensor, rows: slice) -> Tensor:
    """uint8 [2, cols, n / 2]: the stored integers of whole blocks that cover `rows`, transposed.

    The low nibbles of all blocks come first, then the high ones: long runs, which torch's operators take fast.
    """
    per_k, _ = _tile()
    block = 2 * per_k
    cols, stop = 2 * w.shape[1], -(-rows.stop // block) * block
    packed = w[rows.start : stop].view(-1, cols, per_k).transpose(0, 1).reshape(cols, -1)
    q = torch.empty(2, *packed.shape, dtype=torch.uint8)
    torch.bitwise_and(packed, 15, out=q[0])
    torch.bitwise_right_shift(packed, 4, out=q[1])
    return q


def _natural(low: Tensor, high: Tensor) -> Tensor:
    """Two halves [R, n / 2] -> [R, n], columns in the order of the rows of the weight."""
    per_k, order = _tile()
    q = torch.stack((low.view(len(low), -1, per_k), high.view(len(high), -1, per_k)), 2).flatten(2)
    return (q if order is None else q[:, :, order]).flatten(1)


def _apart(rows: Tensor) -> Tensor:
    """[G, n], in the order of the rows of the weight -> [2, G, 1, n / 2]: the inverse of `_natural`."""
    per_k, order = _tile()
    q = rows.reshape(len(rows), -1, 2 * per_k)
    if order is not None:
        q = q[:, :, order.argsort()]
    return q.view(len(rows), -1, 2, per_k).permute(2, 0, 1, 3).reshape(2, len(rows), 1, -1)
