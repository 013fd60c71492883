"""What a launch of attention needs beforehand: a tile, from a pure function over a few rows, and checked operands."""

from functools import cache
from typing import NamedTuple

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
WIDEST = 256  # columns of a head


class Config(NamedTuple):
    """A program takes BLOCK_M queries of one head, and BLOCK_N keys at a time.

    OVERLAP: weights meet their values one step late, so that the tensor cores of sm_90 multiply them while the softmax
    of the next tile is computed. Costs registers.
    VALUES: columns of values that one product takes at most. On sm_80 more of them than BLOCK_M make the compiler send
    the weights through shared memory.
    """

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    OVERLAP: bool = False
    VALUES: int = 256


# By the columns of a head, up to so many; for many queries, for at most 64, and for scores that are more than a
# product times a scale. What is in flight between memory and tensor cores is bounded by shared memory (227 KiB on
# sm_90 and sm_100, 163 on sm_80, 99 on its smaller relatives), the rest by 255 registers.
HOPPER = {
    64: (Config(128, 128, 8, 3, True), Config(64, 64, 4, 3, True), Config(128, 64, 8, 3, True)),
    128: (Config(128, 128, 8, 3, True), Config(64, 64, 4, 3, True), Config(128, 64, 8, 3, True)),
    192: (Config(128, 64, 8, 3, True), Config(64, 64, 4, 2, True), Config(128, 64, 8, 3, True)),
    256: (Config(128, 64, 8, 2, True), Config(64, 64, 4, 2, True), Config(128, 64, 8, 2, True)),
}
BLACKWELL = {
    64: (Config(128, 64, 4, 3), Config(64, 64, 4, 3), Config(128, 64, 4, 3)),
    128: (Config(128, 64, 8, 3), Config(64, 64, 4, 3), Config(128, 64, 8, 3)),
    256: (Config(128, 64, 8, 2), Config(64, 64, 4, 2), Config(128, 64, 8, 2)),
}
AMPERE = {
    64: (Config(128, 64, 4, 3), Config(64, 64, 4, 3), Config(128, 64, 4, 3)),
    128: (Config(128, 64, 8, 3), Config(64, 64, 4, 2, VALUES=64), Config(128, 64, 8, 3)),
    192: (Config(128, 64, 8, 2, VALUES=128), Config(64, 32, 4, 2), Config(128, 64, 8, 2, VALUES=128)),
    256: (Config(128, 32, 8, 2, VALUES=128), Config(64, 32, 4, 2), Config(128, 32, 8, 2, VALUES=128)),
}
EXACT = Config(32, 32, 8, 1)  # float32, which has no tensor cores
SHORT = 64  # queries


@cache
def config(
    D: int, Dv: int, causal: bool, Sq: int, fp32: bool = False, capability: int = 90, plain: bool = True
) -> Config:
    """The tile for heads of D columns, Dv of values, and Sq queries, on a device of `capability` (90 for sm_90).

    plain: scores are products times a scale. A softcap, ALiBi or a mask take more registers. causal makes no
    difference so far.
    """
    if fp32:
        return EXACT
    rows = HOPPER if capability // 10 == 9 else BLACKWELL if capability // 10 == 10 else AMPERE
    many, few, changed = rows[next(width for width in rows if width >= max(D, Dv))]
    return few if Sq <= SHORT else many if plain else changed


def columns(D: int, most: int = WIDEST) -> tuple[int, int]:
    """D as a sum of two powers of two, where that is less than the next one: 96 = 64 + 32, and 64 + 16 for 72.

    The second is 0 if there is one part only. Each is at least 16, as a tensor core needs; two halves if one part had
    more than `most`.
    """
    whole = max(16, 1 << (D - 1).bit_length())
    first = whole // 2
    second = max(16, 1 << (D - first - 1).bit_length()) if D > first else whole
    if first >= 16 and first + second < whole:
        return first, second
    return (whole, 0) if whole <= most else (first, first)


def check_operands(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """ValueError unless the kernels can take them: see `check_shapes`; dtypes and widths are limited as well."""
    check_shapes(q, k, v)
    if q.dtype not in DTYPES:
        raise ValueError(f"q, k and v must be float16, bfloat16 or float32, got {q.dtype}")
    if not (1 <= q.shape[-1] <= WIDEST and 1 <= v.shape[-1] <= WIDEST):
        raise ValueError(f"heads may have 1 to {WIDEST} columns, got {q.shape[-1]} and, of values, {v.shape[-1]}")


def check_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """ValueError unless q is [B, Hq, Sq, D], k [B, Hkv, Sk, D], v [B, Hkv, Sk, Dv], alike in dtype and device."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.ndim != 4 or t.dtype != q.dtype or t.device != q.device or not t.is_floating_point():
            raise ValueError(
                f"{name} must have 4 dimensions, heads second, and be floating-point, of q's dtype and on q's device; "
                f"got {t.dtype} {list(t.shape)} on {t.device}"
            )
    (B, Hq, _, D), (Hkv, Sk), Dv = q.shape, k.shape[1:3], v.shape[-1]
    if k.shape != (B, Hkv, Sk, D) or v.shape != (B, Hkv, Sk, Dv):
        raise ValueError(f"k and v do not fit q {list(q.shape)}: {list(k.shape)}, {list(v.shape)}")
    if Hkv == 0 or Hq % Hkv:
        raise ValueError(f"heads of queries must be a multiple of heads of keys, got {Hq} and {Hkv}")


def check_features(
    B: int,
    Hq: int,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    slopes: torch.Tensor | None,
) -> torch.Tensor | None:
    """The slopes of ALiBi as [B, Hq], any stride of B; ValueError for what does not fit."""
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, the query's own key, or None; got {window}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be positive, or None; got {softcap}")
    if sinks is not None and (sinks.shape != (Hq,) or not sinks.is_contiguous()):
        raise ValueError(f"sinks must be a contiguous [{Hq}], one for each head of queries; got {list(sinks.shape)}")
    if slopes is None:
        return None
    if slopes.shape not in ((Hq,), (B, Hq)):
        raise ValueError(f"alibi_slopes must be [{Hq}] or [{B}, {Hq}], got {list(slopes.shape)}")
    return slopes.contiguous().expand(B, Hq)


def check_mask(mask: torch.Tensor | None, shape: tuple[int, int, int, int]) -> torch.Tensor | None:
    """The mask as [B, Hq, Sq, Sk] with strides of 0 where it is broadcast, a bool as uint8."""
    if mask is None:
        return None
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"mask must be bool, True where a query sees a key, or floating-point; got {mask.dtype}")
    if mask.ndim > 4 or any(have not in (1, want) for have, want in zip(mask.shape[::-1], shape[::-1], strict=False)):
        raise ValueError(f"mask must be broadcastable to {list(shape)}, got {list(mask.shape)}")
    return (mask.view(torch.uint8) if mask.dtype == torch.bool else mask).expand(shape)


def check_ranges(count: int, device: torch.device, **ranges: torch.Tensor | None) -> None:
    """ValueError unless each of `ranges` that is there is a contiguous int32 [count] on `device`."""
    for name, t in ranges.items():
        if t is not None and (
            t.shape != (count,) or t.dtype != torch.int32 or t.device != device or not t.is_contiguous()
        ):
            raise ValueError(
                f"{name} must be a contiguous int32 [{count}] on {device}, got {t.dtype} {list(t.shape)} on {t.device}"
            )
