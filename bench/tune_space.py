"""The tiles that `tune_quant_matmul.py` tries: a modest space, and what cannot be good taken out. Pure.

A tile is whatever `fastllm.kernels.quant_matmul.config` returns, with some of its fields replaced.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

SPACE: dict[str, tuple[Any, ...]] = {
    "BLOCK_N": (64, 128),
    "BLOCK_M": (16, 32, 64, 128, 256),
    "BLOCKS": (1, 2, 4),
    "PRESCALE": (False, True),
    "num_warps": (4, 8),
    "maxnreg": (0, 128),
    "num_stages": (2, 3, 4, 5),
    "SPLIT_K": (1, 2, 3, 4, 6, 8),
}
FINE = ("num_stages", "SPLIT_K")  # varied last, around the best of the rest
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a program may have
STEP = 128  # values of K in a block
ACCUMULATORS = 128  # registers of a thread for sums, at most: 255 are all there are
PROGRAMS = 8  # for each multiprocessor, beyond which splitting K further is pointless


def shared_bytes(tile: Any, bits: int) -> int:
    """What the pipeline of a tile keeps in shared memory, about: a step of packed weights and of x, for each stage."""
    K = STEP * getattr(tile, "BLOCKS", 1)
    return tile.num_stages * K * (tile.BLOCK_N * bits // 8 + 2 * tile.BLOCK_M)


def complaints(
    tile: Any, M: int, N: int, K: int, bits: int, capability: int = 90, multiprocessors: int = 132
) -> list[str]:
    """Why a tile is not worth compiling for such a problem."""
    room = SHARED[max((known for known in SHARED if known <= capability), default=80)]
    sums = tile.BLOCK_N * tile.BLOCK_M / (32 * tile.num_warps)
    tiles = -(-N // tile.BLOCK_N) * -(-M // tile.BLOCK_M)
    steps = -(-K // (STEP * getattr(tile, "BLOCKS", 1)))
    prescale = getattr(tile, "PRESCALE", False)
    return [
        why
        for bad, why in (
            (shared_bytes(tile, bits) > room, f"{shared_bytes(tile, bits)} bytes of shared memory, there are {room}"),
            (sums > ACCUMULATORS / (1 if prescale else 2), f"{sums:.0f} sums a thread, held twice unless PRESCALE"),
            (tile.BLOCK_M > max(16, 2 * M - 1), f"BLOCK_M={tile.BLOCK_M} is mostly empty at M={M}"),
            (
                prescale and capability == 90,
                "sums that carry on: assemblers before CUDA 13.3 overwrite registers that products have yet to read",
            ),
            (
                getattr(tile, "maxnreg", 0) > 0 and tile.num_warps == 4,
                "four warps have registers enough for several programs",
            ),
            (tile.BLOCK_N == 64 and tile.num_warps == 8, "64 columns are too few for eight warps"),
            (tile.SPLIT_K > 1 and steps < 2 * tile.SPLIT_K, f"{steps} steps are too few for SPLIT_K={tile.SPLIT_K}"),
            (
                tile.SPLIT_K > 1 and tiles * tile.SPLIT_K > PROGRAMS * multiprocessors,
                f"{tiles} tiles times {tile.SPLIT_K} are more programs than run at once",
            ),
            (
                -(-steps // -(-steps // tile.SPLIT_K)) != tile.SPLIT_K,
                "a program of the split would have nothing to do",
            ),
        )
        if bad
    ]


def variants(present: Any, fields: Sequence[str]) -> Iterator[Any]:
    """`present` with those of `fields` that it has replaced by every combination of their values in SPACE."""
    known = [name for name in fields if name in present._fields]
    for values in product(*(SPACE[name] for name in known)):
        yield present._replace(**dict(zip(known, values, strict=True)))


def coarse(present: Any, problem: tuple[int, int, int], bits: int, capability: int, multiprocessors: int) -> list[Any]:
    """Every geometry with the present number of stages, splits of 1, 2, 4 and 8; the present tile first."""
    fields = [name for name in SPACE if name not in FINE]
    found = [
        tile._replace(SPLIT_K=split)
        for tile in variants(present, fields)
        for split in sorted({1, 2, 4, 8, present.SPLIT_K})
        if not complaints(tile._replace(SPLIT_K=split), *problem, bits, capability, multiprocessors)
    ]
    return list(dict.fromkeys([present, *found]))


def fine(best: Sequence[Any], problem: tuple[int, int, int], bits: int, capability: int, sms: int) -> list[Any]:
    """The neighbours of the best geometries: every number of stages and of splits."""
    found = [t for tile in best for t in variants(tile, FINE) if not complaints(t, *problem, bits, capability, sms)]
    return list(dict.fromkeys([*best, *found]))
