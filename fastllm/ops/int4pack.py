"""int4 weights on a CPU: the layout of `torch.ops.aten._weight_int4pack_mm_for_cpu`.

The operator is the fastest way to read an int4 weight once; from about 80 rows on it loses to a dense product, so
larger products dequantise a few MB at a time and multiply in bfloat16 (bench/results has the measurements).
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..formats import Format, QuantizedWeight, pack_bits, unpack_bits, unpack_zero_point
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
    n = torch.arange(TILE, dtype=torch.int32, device="cpu")[:, None].expand(TILE, 32)
    k = (torch.arange(32, dtype=torch.int32, device="cpu") % 16).expand(TILE, 32)
    convert = torch.ops.aten._convert_weight_to_int4pack_for_cpu
    low, high, ks = (convert(v.contiguous(), 1).flatten() for v in (n & 15, n >> 4, k))
    per_k = int((ks != ks[0]).nonzero()[0])
    low, high = low[:per_k], high[:per_k]
    order = torch.cat(((low & 15) + ((high & 15) << 4), (low >> 4) + ((high >> 4) << 4))).long()
    return per_k, None if torch.equal(order, torch.arange(2 * per_k, device="cpu")) else order.argsort()


class Int4Pack(Layout):
    name, runs = "int4pack", "aten int4pack / bf16 GEMM"
    stacks, scale_rows = TILE, 1
    direct_rows = 80  # rows of x up to which the operator beats dequantising and a GEMM

    def reasons(self, format: Format, N: int, K: int, dtype: torch.dtype, device: torch.device) -> list[str]:
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

    def pack(self, weight: QuantizedWeight, format: Format, shape: tuple[int, int]) -> Prepared:
        (N, K), group = shape, format.group_of(shape[1])
        g = native_group(group, K)
        rows, cols = -(-N // TILE) * TILE, -(-K // g) * g
        w = torch.empty(rows, cols // 2, dtype=torch.uint8, device="cpu")
        for start in range(0, N, self.step(K)):
            q = unpack_bits(weight.packed[start : start + self.step(K)], 4, K).to(torch.int32)
            q = pad(q, (0, cols - K, 0, -len(q) % TILE), value=8)
            w[start : start + len(q)] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
        owner = torch.arange(cols // g, device="cpu") * g // group  # the scale of each native group
        scale = weight.scale[:, owner]
        zero = torch.zeros_like(scale)
        if weight.zero_point is not None:
            # the operator computes (q - 8) * scale + zero
            zero = scale * (8 - unpack_zero_point(weight.zero_point, 4, N)[:, owner].to(scale.dtype))
        pairs = torch.stack((scale, zero), -1).transpose(0, 1)
        # the zero points are in `pairs`; passing them on tells that there are some
        return Prepared(w, pad(pairs, (0, 0, 0, rows - N)).to(torch.bfloat16).contiguous(), weight.zero_point)

    def unpack(self, w: Tensor, format: Format, shape: tuple[int, int]) -> Tensor:
        N, K = shape
        packed = torch.empty(N, format.words(K), dtype=torch.int32, device="cpu")
        for rows in self._chunks(N, K):
            q = _stored(w, rows)  # [cols, n]
            packed[rows] = pack_bits(q[:K, : rows.stop - rows.start].t().contiguous(), 4)
        return packed

    def _chunks(self, N: int, K: int) -> list[slice]:
        return [slice(start, min(start + self.step(K), N)) for start in range(0, N, self.step(K))]

    def dense(self, p: Prepared, bits: int, group: int, rows: slice, K: int, dtype: torch.dtype) -> Tensor:
        q = _stored(p.w, rows).view(torch.int8).sub_(8)
        cols, n = q.shape
        pairs = p.scale[:, None, rows.start : rows.start + n].to(dtype)  # [cols / g, 1, n, 2]
        wt = q.view(len(pairs), -1, n) * pairs[..., 0].contiguous()
        if p.zero is not None:
            wt += pairs[..., 1].contiguous()
        return wt.view(cols, n)[:K, : rows.stop - rows.start].t()

    def matmul(self, x: Tensor, p: Prepared, N: int, bits: int, group: int) -> Tensor:
        (M, K), (rows, half), groups = x.shape, p.w.shape, p.scale.shape[0]
        cols = 2 * half
        # a token comes here for each layer: what changes nothing still takes a microsecond
        xs = x if x.dtype == torch.bfloat16 else x.to(torch.bfloat16)
        if M > self.direct_rows:
            return self.by_chunks(xs, p, N, bits, group, xs.dtype).to(x.dtype)
        xs = xs.contiguous() if cols == K else pad(xs, (0, cols - K))
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(xs, p.w, cols // groups, p.scale.contiguous())
        y = y if rows == N else y[:, :N].contiguous()
        return y if x.dtype == y.dtype else y.to(x.dtype)


def _stored(w: Tensor, rows: slice) -> Tensor:
    """uint8 [cols, n]: the stored integers, transposed, of the whole blocks that cover `rows`."""
    per_k, order = _tile()
    block = 2 * per_k
    cols, stop = 2 * w.shape[1], -(-rows.stop // block) * block
    packed = w[rows.start : stop].view(-1, cols, per_k).transpose(0, 1).contiguous()
    low, high = (half.view(torch.int64) for half in (packed & 15, packed >> 4))
    q = torch.stack((low, high), 2)  # in words: copying is slow on runs as short as a block is wide
    stored = q.view(torch.uint8).view(cols, -1, block)
    return (stored if order is None else stored[:, :, order]).view(cols, -1)
