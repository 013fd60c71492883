"""Which tile `quant_matmul` uses for a problem. A pure function over a few rows, so that nothing is tuned while a user
waits; `bench/tune_quant_matmul.py` looks for better rows."""

from functools import cache
from typing import NamedTuple

BLOCK = 128  # values of K: what a step is a multiple of


class Config(NamedTuple):
    """A program computes BLOCK_N columns x BLOCK_M rows of y, BLOCKS * 128 values of K a step.

    RUN: values of K a product takes, at most. SPLIT_K programs share the K of one tile. PRESCALE: see the kernel.
    """

    BLOCK_N: int
    BLOCK_M: int
    BLOCKS: int
    RUN: int
    PRESCALE: bool
    num_warps: int
    num_stages: int
    SPLIT_K: int = 1


class Row(NamedTuple):
    """Up to `rows` rows of x. `resident`: programs that a multiprocessor needs at once to keep its memory busy."""

    rows: int
    tile: Config
    resident: int


# Rows that start at odd addresses are read value by value, and float32 is not for tensor cores: both get a tile small
# enough for plain registers.
SMALL = Row(1 << 31, Config(32, 16, 1, 32, False, 4, 2), 4)

# Compute capability -> rows. On sm_90 a product takes all 128 values of a block; on sm_80 the compiler keeps the
# weights of one plane at a time in registers, and needs half the instructions.
ROWS: dict[int, tuple[Row, ...]] = {
    90: (
        Row(16, Config(64, 16, 2, 128, False, 4, 3), 4),
        Row(32, Config(64, 32, 2, 128, False, 4, 3), 3),
        Row(64, Config(64, 64, 1, 128, False, 4, 3), 3),
        Row(128, Config(128, 64, 1, 128, True, 8, 3), 2),
        Row(1 << 31, Config(128, 128, 1, 128, True, 8, 3), 1),
    ),
    100: (
        Row(16, Config(64, 16, 2, 128, False, 4, 3), 4),
        Row(32, Config(64, 32, 2, 128, False, 4, 3), 3),
        Row(64, Config(64, 64, 1, 128, False, 4, 3), 3),
        Row(1 << 31, Config(128, 64, 1, 128, True, 8, 3), 2),  # sums of 128 rows do not fit beside small groups
    ),
    80: (
        Row(16, Config(64, 16, 2, 32, False, 4, 3), 4),
        Row(32, Config(64, 32, 1, 32, False, 4, 4), 3),
        Row(64, Config(64, 64, 1, 32, False, 4, 3), 3),
        Row(1 << 31, Config(128, 64, 1, 32, True, 8, 3), 2),
    ),
}
INVARIANT = 64  # the row that serves every M when results must not depend on it
MULTIPROCESSORS = 132  # of an H100 or H200; an A100 has 108
STEPS = 2  # what a program costs beside its steps, in steps: filling the pipeline, adding its part


def rows_of(capability: int) -> tuple[Row, ...]:
    """The rows for a compute capability such as 90; those of the newest architecture that is not newer."""
    return ROWS[max((known for known in ROWS if known <= capability), default=min(ROWS))]


@cache
def config(
    M: int,
    N: int,
    K: int,
    fp32: bool = False,
    batch_invariant: bool = False,
    capability: int = 90,
    multiprocessors: int = MULTIPROCESSORS,
) -> Config:
    """The tile for x [M, K], w [N, K].

    fp32: x is float32. batch_invariant: the same tile and the same split of K whatever M is.
    """
    rows = rows_of(capability)
    if batch_invariant:
        M = 1
        rows = tuple(row for row in rows if row.rows == INVARIANT)
    row = SMALL if fp32 or K % 16 else next(row for row in rows if M <= row.rows)
    tile = row.tile
    tiles = -(-N // tile.BLOCK_N) * -(-M // tile.BLOCK_M)
    steps = -(-K // (BLOCK * tile.BLOCKS))
    return tile._replace(SPLIT_K=split_k(tiles, steps, row.resident, multiprocessors))


def split_k(tiles: int, steps: int, resident: int, multiprocessors: int) -> int:
    """How many programs share the K of a tile: what is over soonest by a simple count.

    The busiest multiprocessor has `each` programs of some steps; with fewer than `resident` its memory is idle part of
    the time. Programs get at least two steps, and the same number of them but for the last one.
    """
    if tiles >= resident * multiprocessors:
        return 1

    def time(split: int) -> float:
        each = -(-tiles * split // multiprocessors)
        return max(each, resident) * (-(-steps // split) + STEPS)

    return min((s for s in range(1, 9) if s == 1 or steps >= 2 * s and -(-steps // -(-steps // s)) == s), key=time)
