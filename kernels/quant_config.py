"""Which tile `quant_matmul` uses for a problem. A pure function over a few rows, so that nothing is tuned while a user
waits; `bench/tune_quant_matmul.py` looks for better rows."""

from functools import cache
from typing import NamedTuple

BLOCK = 128  # values of K: what a step is a multiple of


class Config(NamedTuple):
    """A program computes BLOCK_N columns x BLOCK_M rows of y, BLOCKS * 128 values of K a step.

    RUN: values of K a product takes, at most. PRESCALE: see the kernel. maxnreg: registers of a thread, at most, or 0.
    SPLIT_K programs share the K of one tile.
    """

    BLOCK_N: int
    BLOCK_M: int
    BLOCKS: int
    RUN: int
    PRESCALE: bool
    num_warps: int
    num_stages: int
    maxnreg: int = 0
    SPLIT_K: int = 1


class Row(NamedTuple):
    """Up to `rows` rows of x."""

    rows: int
    tile: Config


MANY = 1 << 31
# Rows that start at odd addresses are read value by value, and float32 is not for tensor cores: both get a tile small
# enough for plain registers.
SMALL = Row(MANY, Config(32, 16, 1, 32, False, 4, 2))

# Compute capability -> rows. On sm_90 a product takes all 128 values of a block. From 9 rows on tiles are 128 wide,
# which halves what is read of x, and with at most 128 registers two of them fit on a multiprocessor. On sm_80 the
# compiler keeps the weights of one plane at a time in registers, and needs half the instructions.
ROWS: dict[int, tuple[Row, ...]] = {
    100: (
        Row(16, Config(64, 16, 2, 128, False, 4, 3)),
        Row(32, Config(64, 32, 2, 128, False, 4, 3)),
        Row(64, Config(64, 64, 1, 128, False, 4, 3)),
        Row(MANY, Config(128, 64, 1, 128, True, 8, 3)),
    ),
    90: (
        Row(8, Config(64, 16, 2, 128, False, 4, 3)),
        Row(16, Config(128, 16, 2, 128, False, 8, 3, 128)),
        Row(32, Config(128, 32, 2, 128, False, 8, 3, 128)),
        Row(MANY, Config(128, 64, 1, 128, False, 8, 3, 128)),
    ),
    80: (
        Row(16, Config(64, 16, 2, 32, False, 4, 3)),
        Row(32, Config(64, 32, 1, 32, False, 4, 4)),
        Row(64, Config(64, 64, 1, 32, False, 4, 3)),
        Row(MANY, Config(128, 64, 1, 32, True, 8, 3)),
    ),
}
INVARIANT = 64  # the row for so many serves every M when results must not depend on it
MULTIPROCESSORS = 132  # of an H100 or H200; an A100 has 108
# Bytes of weights on their way that keep the memory of such a card busy, and then some: 3.35 TB/s x 700 ns = 2.3 MB.
IN_FLIGHT = 4 << 20
MOST_SPLITS = 8


def rows_of(capability: int) -> tuple[Row, ...]:
    """The rows for a compute capability such as 90; those of the newest architecture that is not newer."""
    return ROWS[max((known for known in ROWS if known <= capability), default=min(ROWS))]


def tile_of(row: Row, bits: int) -> Config:
    """The row's tile. With 8 bits half the blocks are the same bytes, and one stage more fits beside them."""
    tile = row.tile
    return tile._replace(BLOCKS=1, num_stages=4) if bits == 8 and tile.BLOCKS == 2 else tile


def options_of(tile: Config, bits: int, group: int, even: bool) -> dict[str, int]:
    """What the compiler is told beside the tile. group: 0 for one scale a row. even: K is shared without rest.

    Groups of 32, those of 8 bits, and masks for a rest of K keep more values at hand: in few registers they spill.
    """
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    if tile.maxnreg and even and (group == 0 or group % 64 == 0 and bits == 4):
        options["maxnreg"] = tile.maxnreg
    return options


@cache
def config(
    M: int,
    N: int,
    K: int,
    bits: int = 4,
    fp32: bool = False,
    batch_invariant: bool = False,
    capability: int = 90,
    multiprocessors: int = MULTIPROCESSORS,
) -> Config:
    """The tile for x [M, K], w [N, K] of `bits` bits.

    fp32: x is float32. batch_invariant: the same tile and the same split of K whatever M is.
    """
    rows = INVARIANT if batch_invariant else M
    row = SMALL if fp32 or K % 16 else next(row for row in rows_of(capability) if rows <= row.rows)
    tile = tile_of(row, bits)
    return tile._replace(SPLIT_K=split_k(tile, 1 if batch_invariant else M, N, K, bits, multiprocessors))


def split_k(tile: Config, M: int, N: int, K: int, bits: int, multiprocessors: int) -> int:
    """How many programs share the K of a tile: as few as keep the memory busy, for adding their parts takes its time.

    No more than give each two steps, and all but the last the same number of them; and none whose partial sums,
    written and read, are more bytes than the weights.
    """
    tiles = -(-N // tile.BLOCK_N) * -(-M // tile.BLOCK_M)
    steps = -(-K // (BLOCK * tile.BLOCKS))
    program = (tile.num_stages - 1) * tile.BLOCKS * BLOCK * tile.BLOCK_N * bits // 8  # bytes on their way
    most = min(MOST_SPLITS, steps // 2, K * bits // (64 * M))
    enough = max(-(-IN_FLIGHT // (program * tiles)), -(-multiprocessors // tiles))
    shares = [s for s in range(1, most + 1) if -(-steps // -(-steps // s)) == s]
    return next((s for s in shares if s >= enough), max(shares, default=1))
