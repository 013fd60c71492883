"""What `decode_attention` takes, which tile it uses, and among how many programs it splits the keys: pure functions of
shapes, so that nothing is tuned while a user waits."""

from math import gcd
from typing import NamedTuple

import torch

NUMBERS = [
    "HQ", "HKV", "L", "scale", "softcap", "window",
    "stride_qb", "stride_qh", "stride_qs", "stride_kb", "stride_kh", "stride_kl", 
    "stride_vb", "stride_vh", "stride_vl",
    "stride_ksb", "stride_ksh", "stride_ksl", "stride_vsb", "stride_vsh", "stride_vsl",
    "stride_tb", "stride_mb", "stride_mh", "stride_ms",
]  # fmt: skip
CONSTANTS = [
    "SQ", "HEADS", "D", "DV", "FORMAT", "PAGE", "WINDOW", "SOFTCAP", "UNIT_Q", "UNIT", "UNIT_S",
    "BLOCK_M", "BLOCK_N", "WARPS", "PTX", "STEPS", "SPLITS",
]  # fmt: skip
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
MOST_QUERIES, LARGEST = 16, 256  # new positions of a row; numbers of a head
GROUP = 32  # numbers that share a scale, at 4 bits

MULTIPROCESSORS = 132  # of an H100 or H200; an A100 has 108
MOST_SPLITS = 64
# How `splits` sees a device: estimates, in bytes, or shares of the memory's bandwidth (a 132nd, on an H100: 25 GB/s).
TOGETHER = 2  # programs that a multiprocessor runs at a time
FASTEST = 2  # shares that one multiprocessor uses while others idle: 64 KB on their way for 0.7 us could be 3.6
START = 8 << 10  # what a share delivers while a program starts, which others on its multiprocessor half hide
SHARE_OF_L2 = 4  # shares at which sums come out of the cache, to the program that puts them together


class Config(NamedTuple):
    """A tile of BLOCK_M rows, query heads times new positions, by BLOCK_N keys. WARPS: stretches that a block of keys
    is cut into, one for each warp; 1 if the warps share its columns."""

    BLOCK_M: int
    BLOCK_N: int
    WARPS: int
    num_warps: int
    num_stages: int


class Row(NamedTuple):
    """Up to `rows` rows of a tile and heads of up to D numbers."""

    rows: int
    D: int
    tile: Config


MANY = 1 << 31
# Bits of a stored number -> rows. Loads of about two blocks are on their way, 28 KB and more, in each of the two
# programs that a multiprocessor has. Sums of the warps' own, [BLOCK_M, D] each, have room up to D = 128; beyond it the
# warps share them. With 4 bits the parts of a value are too narrow to be shared. More rows than a tile has are several
# tiles, which read the keys out of the cache: 64 rows would be for sm_90's wgmma, whose sums spill.
ROWS: dict[int, tuple[Row, ...]] = {
    16: (
        Row(16, 64, Config(16, 128, 4, 4, 3)),
        Row(16, 128, Config(16, 64, 4, 4, 3)),
        Row(16, 256, Config(16, 32, 1, 4, 3)),
        Row(MANY, 128, Config(32, 64, 1, 4, 3)),
        Row(MANY, 256, Config(32, 64, 1, 8, 2)),
    ),
    8: (
        Row(MANY, 64, Config(16, 128, 4, 4, 3)),
        Row(16, 128, Config(16, 128, 1, 4, 3)),
        Row(16, 256, Config(16, 64, 1, 4, 3)),
        Row(MANY, 256, Config(32, 64, 1, 8, 3)),
    ),
    4: (
        Row(MANY, 128, Config(16, 128, 4, 4, 3)),
        Row(MANY, 256, Config(16, 64, 4, 4, 2)),
    ),
}
BIASED = Config(16, 64, 4, 4, 3)  # for up to D = 128 at 4 bits with slopes or a mask, which take registers
# float32 is not for tensor cores: a tile small enough for plain registers
SMALL = Config(16, 32, 1, 4, 2), Config(16, 16, 1, 4, 2)  # up to D = 64, and beyond


def config(rows: int, D: int, bits: int, fp32: bool = False, biased: bool = False) -> Config:
    """The tile for `rows` query heads of a group times new positions.

    D: the larger of the head dimensions of keys and values. bits: of a stored number. fp32: q is float32. biased: it
    has slopes or a mask. The same on all devices: nothing here takes more than an A100 has for two programs.
    """
    if fp32:
        return SMALL[D > 64]
    if biased and bits == 4 and D <= 128:
        return BIASED
    return next(row.tile for row in ROWS[bits] if rows <= row.rows and D <= row.D)


def splits(tiles: int, length: int, tile: Config, key_bytes: int, sums_bytes: int, multiprocessors: int) -> int:
    """Among how many programs to split the keys of a tile: whatever lets the busiest multiprocessor finish first.

    tiles: of rows. length: keys of the longest. key_bytes: of a key and its value. sums_bytes: of a split's sums.
    There is no number of tiles at which splitting stops: with few of them splits fill the multiprocessors, with many
    they even out what is left over.
    """
    blocks = max(1, -(-length // tile.BLOCK_N))

    def cost(count: int) -> float:
        kept = sums_bytes if count > 1 else 0
        program = -(-blocks // count) * tile.BLOCK_N * key_bytes + START + kept
        waves, rest = divmod(tiles * count, TOGETHER * multiprocessors)
        last = max(rest / multiprocessors, -(-rest // multiprocessors) / FASTEST)
        last = last if waves or not rest else max(last, 1.0)  # to leave some idle from the start is not worth a guess
        return (TOGETHER * waves + last) * program + kept * count / SHARE_OF_L2

    return min(range(1, min(blocks, MOST_SPLITS) + 1), key=cost)


class About(NamedTuple):
    """What is known of a tensor without its contents."""

    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    device: torch.device


def about(t: torch.Tensor | None) -> About | None:
    return None if t is None else About(t.dtype, t.shape, t.stride(), t.device)


class Problem(NamedTuple):
    """What the shapes of the operands say. page: keys of a page, 0 without pages. L: keys of a row, at most."""

    operands: tuple[About | None, ...]
    B: int
    Hq: int
    Hkv: int
    Sq: int
    D: int
    Dv: int
    L: int
    page: int
    bits: int

    @property
    def key_bytes(self) -> int:
        """Bytes of a key and its value."""
        scales = {8: 8, 4: (self.D + self.Dv) // GROUP * 4}.get(self.bits, 0)
        return (self.D + self.Dv) * self.bits // 8 + scales

    def numbers(self, scale: float, softcap: float, window: int) -> tuple[tuple[float, ...], tuple[int, int, int]]:
        """Arguments of the kernel as NUMBERS has them, and the units that strides are given in: of q, k and v, scales.

        A unit, a power of two, is all that the compiler may assume of strides.
        """
        q, k, v, k_scale, v_scale, _, _, table, _, _, mask = self.operands
        assert q and k and v
        most = (q.shape, k.shape, v.shape)
        own, keys, values = (
            tuple(0 if n == 1 else stride for n, stride in zip(shape[:3], t.stride, strict=False))
            for shape, t in zip(most, (q, k, v), strict=True)
        )
        if q.stride[3] != 1:  # it will be copied
            own = tuple(torch.empty(q.shape, device="meta").stride()[:3])
        if self.bits <= 8:  # in int16
            keys, values = tuple(n // 2 for n in keys), tuple(n // 2 for n in values)
        scales = [(0, 0, 0) if t is None else t.stride[:3] for t in (k_scale, v_scale)]
        masks = (
            (0, 0, 0)
            if mask is None
            else [0 if n == 1 else s for n, s in zip(mask.shape, mask.stride, strict=True)][:3]
        )
        unit_q, unit, unit_s = (gcd(16, *n) for n in (own, (*keys, *values), (*scales[0], *scales[1])))
        strides = [n // unit_q for n in own] + [n // unit for n in (*keys, *values)]
        strides += [n // unit_s for n in (*scales[0], *scales[1])]
        strides += [0 if table is None else table.stride[0], *masks]
        return (self.Hq, self.Hkv, self.L, scale, softcap, window, *strides), (unit_q, unit, unit_s)


def check(
    operands: tuple[About | None, ...], format: str | None, window: int | None, softcap: float | None
) -> Problem:
    """Raise ValueError unless the operands fit: a kernel would read beyond them.

    operands: q, k, v, k_scale, v_scale, kv_end, kv_start, block_table, sinks, alibi_slopes, mask.
    """
    q, k, v, _, _, _, _, table, *_ = operands
    if format not in (None, "int8", "int4"):
        raise ValueError(f"format may be None, 'int8' or 'int4', not {format!r}")
    if q is None or k is None or v is None or not len(q.shape) == len(k.shape) == len(v.shape) == 4:
        raise ValueError(f"q, k and v must have four dimensions, got {[t and list(t.shape) for t in (q, k, v)]}")
    if q.dtype not in FLOATS:
        raise ValueError(f"q must be float16, bfloat16 or float32, got {q.dtype}")
    bits = {"int8": 8, "int4": 4}.get(format or "", q.dtype.itemsize * 8)
    (B, Hq, Sq, D), Hkv, size = q.shape, k.shape[1], k.shape[2]
    Dv = v.shape[3] * (2 if bits == 4 else 1)
    length = size if table is None else table.shape[-1] * size
    problem = Problem(operands, B, Hq, Hkv, Sq, D, Dv, length, 0 if table is None else size, bits)
    if not 1 <= Sq <= MOST_QUERIES:
        raise ValueError(f"q must have 1 to {MOST_QUERIES} positions, got {Sq}: a longer prompt is for attention")
    for name, n in (("D", D), ("Dv", Dv)):
        step = {8: 2, 4: 2 * GROUP}.get(bits, 1)
        if not 1 <= n <= LARGEST or n % step:
            raise ValueError(f"{name} may be a multiple of {step} up to {LARGEST} with format {format!r}, got {n}")
    if not Hkv or Hq % Hkv:
        raise ValueError(f"{Hq} query heads are not a multiple of {Hkv} key heads")
    if table is not None and (size < 16 or size & size - 1):
        raise ValueError(f"a page must have a power of two keys, 16 at least, got {size}")
    if window is not None and window < 1:
        raise ValueError(f"window must be 1 at least, got {window}: it counts the query's own key")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}; None for no cap")
    _check_tensors(problem, format)
    return problem


def _check_tensors(p: Problem, format: str | None) -> None:
    q, k, v, k_scale, v_scale, kv_end, kv_start, table, sinks, slopes, mask = p.operands
    assert q and k and v
    paged, size, stored = table is not None, k.shape[2], {8: torch.int8, 4: torch.uint8}.get(p.bits, q.dtype)
    first = k.shape[0] if paged else p.B
    outer = (first, p.Hkv, size)
    at_4 = format == "int4"
    heads, rows = ((p.Hq,),), ((p.B,),)
    widths = [p.D // 2, p.Dv // 2] if at_4 else [p.D, p.Dv]
    scale = [(*outer, 2, n // GROUP) if at_4 else outer for n in (p.D, p.Dv)]
    masks = [(b, h, s) for b in (p.B, 1) for h in (p.Hq, 1) for s in (p.Sq, 1)]
    wanted = (
        ("k", k, (stored,), ((*outer, widths[0]),), 4),
        ("v", v, (stored,), ((*outer, widths[1]),), 4),
        ("k_scale", k_scale, (torch.float16 if at_4 else torch.float32,), (scale[0],), 0),
        ("v_scale", v_scale, (torch.float16 if at_4 else torch.float32,), (scale[1],), 0),
        ("kv_end", kv_end, (torch.int32,), rows, 1),
        ("kv_start", kv_start, (torch.int32,), rows, 1),
        ("block_table", table, (torch.int32,), ((p.B, p.L // size if size else 0),), 2),
        ("sinks", sinks, FLOATS, heads, 1),
        ("alibi_slopes", slopes, FLOATS, heads, 1),
    )
    for name, t, dtypes, shapes, inner in wanted:
        if t is None:
            if name in ("k_scale", "v_scale") and format or name == "kv_end":
                raise ValueError(f"{name} is missing: format {format!r} needs it" if format else f"{name} is missing")
            continue
        if name.endswith("_scale") and not format:
            raise ValueError(f"{name} is for a quantized cache: give its format")
        if t.dtype not in dtypes or tuple(t.shape) not in shapes or t.device != q.device:
            kinds = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
            got = f"{t.dtype} {list(t.shape)} on {t.device}"
            raise ValueError(f"{name} must be {kinds} {list(shapes[0])} on {q.device}, got {got}")
        if inner and t.stride[inner - 1] != 1 and t.shape[inner - 1] > 1:
            raise ValueError(f"{name} must have unit inner stride, got {t.stride}: use contiguous()")
    if mask is not None:
        fits = len(mask.shape) == 4 and tuple(mask.shape[:3]) in masks and mask.shape[3] >= p.L
        if mask.dtype != torch.bool or not fits or mask.stride[3] != 1 or mask.device != q.device:
            raise ValueError(
                f"mask must be bool [{p.B} or 1, {p.Hq} or 1, {p.Sq} or 1, at least {p.L}] with unit inner stride on "
                f"{q.device}, got {mask.dtype} {list(mask.shape)} {mask.stride} on {mask.device}"
            )
    if format:
        _check_words(p, at_4)


def _check_words(p: Problem, at_4: bool) -> None:
    """Codes are read as words of 2 bytes, scales of int4 of 4."""
    for name, codes, scale, n in (("k", p.operands[1], p.operands[3], p.D), ("v", p.operands[2], p.operands[4], p.Dv)):
        assert codes and scale
        if any(stride % 2 for stride, size in zip(codes.stride[:3], codes.shape, strict=False) if size > 1):
            raise ValueError(f"{name} must have even strides, got {codes.stride}")
        if at_4 and (scale.stride[3:] != (n // GROUP, 1) or any(stride % 2 for stride in scale.stride[:3])):
            raise ValueError(f"{name}_scale must be contiguous in its last two dimensions, got strides {scale.stride}")


def check_addresses(*tensors: torch.Tensor | None) -> None:
    """Raise ValueError unless words can be read where quantized operands begin."""
    for t in tensors:
        word = 4 if t is not None and t.dtype == torch.float16 else 2
        if t is not None and t.data_ptr() % word:
            raise ValueError(f"a quantized cache must begin at a multiple of {word} bytes, got {t.data_ptr():#x}")
