"""What the compiler makes of the block-sparse kernel for absent GPUs: no spills, tensor cores, no loads that wait."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
from offline import SHARED
from sass import dump_of, longest_loop, overwritten, resources

LIMITS = {**SHARED, 89: 99 * 1024}  # bytes of shared memory


class Build(NamedTuple):
    """A tile to compile, for blocks of B x B."""

    target: int
    dtype: str
    B: int
    BLOCK_M: int
    BLOCK_K: int
    SWAP: bool
    num_warps: int
    num_stages: int
    SPLIT_K: int = 1
    GROUP_M: int = 4
    bias: bool = True


class Stats(NamedTuple):
    """What was built. `async_loads`: of 16 bytes. `stores`: to shared memory, in the loop. per_block: instructions of
    all lanes of the loop for one value of a block."""

    shared: int
    registers: int
    stack: int
    wgmma: int
    mma: int
    async_loads: int
    stores: int
    narrow_offsets: int
    overwritten: int
    per_value: float


def complaints(build: Build, stats: Stats) -> list[str]:
    wide = build.B >= 64 or build.BLOCK_M >= 64  # wgmma has 64 rows
    # so many that two programs of 8 warps fit on a multiprocessor, as `TILES` reckons with
    registers = 128 if (build.target, build.B) == (90, 64) else 255
    limits = {
        "shared memory": (stats.shared, LIMITS[build.target]),
        "bytes on the stack": (stats.stack, 0),
        "registers": (stats.registers, registers),
        "stores in the loop": (stats.stores, 0),
        "products of rows and strides in 32 bits": (stats.narrow_offsets, 0),
        "overwritten operands": (stats.overwritten, 0),
    }
    found = [f"{value} {what}, allowed {limit}" for what, (value, limit) in limits.items() if value > limit]
    found += [] if stats.async_loads else ["loads wait"]
    if build.dtype != "fp32":
        # with few rows the memory's time is what counts: an H100 can spend 18 on the 2 bytes of a value
        most = 4 + build.BLOCK_M / 12
        found += [f"{stats.per_value} instructions for a value"] if stats.per_value > most else []
        found += ["no wgmma"] if build.target == 90 and wide and not stats.wgmma else []
        found += ["no tensor cores"] if not stats.wgmma + stats.mma else []
    return found


def builds(every: bool) -> Iterator[Build]:
    """Tiles of sm_90, and of sm_80 and sm_89, which share theirs; of each size of block a few, or all in all forms."""
    from fastllm.kernels.block_sparse_matmul import FLOAT32, TILES

    for (B, capability), tiles in TILES.items():
        for i, tile in enumerate(tiles):
            if not every and i not in (0, len(tiles) - 1) and (i, B, capability) != (1, 64, 90):
                continue
            forms = [(("bf16", "fp16")[i % 2], 90 if capability == 90 else (80, 89)[B == 64], tile.BLOCK_M <= 32)]
            if every:
                targets = (90,) if capability == 90 else (80, 89)
                forms = list(product(("bf16", "fp16"), targets, (False, True) if tile.BLOCK_M <= 64 else (False,)))
            for dtype, target, split in forms:
                own = tile._replace(SPLIT_K=4 if split else 1, GROUP_M=4)
                yield Build(target, dtype, B, *own, bias=split or i % 2 > 0)
        for tile, split in product(FLOAT32, (1, 4)) if every else [(FLOAT32[0], 1)] if B == capability - 26 else []:
            yield Build(capability, "fp32", B, *tile._replace(SPLIT_K=split, GROUP_M=4))


BAD = [
    ("shared memory", Build(90, "bf16", 128, 256, 64, True, 8, 6)),
    ("bytes on the stack", Build(90, "bf16", 128, 256, 64, True, 4, 3)),
    ("no wgmma", Build(90, "bf16", 64, 16, 64, False, 4, 4)),  # rows of x as the left operand
    ("stores in the loop", Build(80, "bf16", 64, 16, 64, True, 4, 4)),  # weights as the left operand
    ("loads wait", Build(90, "bf16", 64, 128, 64, True, 4, 1)),
]


def compile_one(build: Build, scratch: Path) -> Stats:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fastllm.kernels.block_sparse_matmul import _block_sparse_matmul as kernel

    names, x = kernel.arg_names, "*" + build.dtype
    types = {"x": x, "values": x, "bias": x, "y": x, "partial": "*fp32"}
    types |= dict.fromkeys(("columns", "rows", "order", "tickets"), "*i32")
    constants = {name: getattr(build, name) for name in ("B", "SWAP", "BLOCK_M", "BLOCK_K", "SPLIT_K", "GROUP_M")}
    constants |= dict.fromkeys(["partial", "tickets"] if build.SPLIT_K == 1 else [])
    constants |= {} if build.bias else {"bias": None}
    source = ASTSource(
        fn=kernel,
        signature={n: "constexpr" if n in constants else types.get(n, "i32") for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in names if n not in constants and n != "M"},
    )
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages}
    built = triton.compile(source, target=GPUTarget("cuda", build.target, 32), options=options)
    dump, ptx = dump_of(built, scratch), built.asm["ptx"]
    loop = longest_loop(dump)
    return Stats(
        shared=built.metadata.shared,
        **resources(dump),
        wgmma=len(re.findall(r"wgmma\.mma_async", ptx)),
        mma=len(re.findall(r"mma\.sync", ptx)),
        async_loads=len(re.findall(r"cp\.async\.cg.* 0x10", ptx)),
        stores=sum(" STS" in line for line in loop),
        narrow_offsets=len(re.findall(r"arith\.muli .*tensor<\w+xi32>", built.asm["ttir"])),
        overwritten=overwritten(dump),
        per_value=round(len(loop) * 32 * build.num_warps / (build.BLOCK_K * build.B), 2),
    )


def main(scratch: Path, which: str) -> None:
    """Compile and print one JSON object a line. A process of its own: the tests' own process interprets kernels."""
    for build in [*builds(which == "all"), *(build for _, build in BAD)]:
        print(json.dumps([build, compile_one(build, scratch)]), flush=True)


def compiled_by(which: str, scratch: Path) -> dict[Build, Stats]:
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parent), os.environ.get("OTHER_TRITON", "")]
    environ |= {"TRITON_CACHE_DIR": str(scratch), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run([sys.executable, __file__, scratch, which], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pairs = [json.loads(line) for line in done.stdout.splitlines()]
    return {Build(*build): Stats(*stats) for build, stats in pairs}


def all_complaints(compiled: dict[Build, Stats]) -> str:
    return "\n".join(f"{b}: {line} ({stats})" for b, stats in compiled.items() for line in complaints(b, stats))


@pytest.fixture(scope="module", params=["few", pytest.param("all", marks=pytest.mark.slow)])
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[Build, Stats]:
    return compiled_by(request.param, tmp_path_factory.mktemp("compiled"))


def test_every_tile_compiles_well(compiled: dict[Build, Stats]) -> None:
    good = {build: stats for build, stats in compiled.items() if build not in [b for _, b in BAD]}
    assert {b.target for b in good} == {80, 89, 90} and {b.B for b in good if b.target == 90} == {32, 64, 128}
    assert {b.dtype for b in good} == {"bf16", "fp16", "fp32"} and {b.SPLIT_K for b in good} == {1, 4}
    found = all_complaints(good)
    assert not found, found


@pytest.mark.parametrize("what, build", BAD)
def test_a_bad_tile_is_seen(what: str, build: Build, compiled: dict[Build, Stats]) -> None:
    assert any(what in line for line in complaints(build, compiled[build]))


def test_large_tiles_leave_room_for_what_they_should(compiled: dict[Build, Stats]) -> None:
    """Blocks of 64 on sm_90: two programs on a multiprocessor; its memory for them, and 65536 registers."""
    large = [
        (b, s) for b, s in compiled.items() if (b.target, b.B) == (90, 64) and b.BLOCK_M >= 128 and b.num_stages > 1
    ]
    assert len(large) >= 2
    for build, stats in large:
        assert 2 * (stats.shared + 1024) <= 228 * 1024 and 2 * 32 * build.num_warps * stats.registers <= 65536


GOOD_BUILD = Build(90, "bf16", 64, 256, 32, True, 8, 5)
GOOD_STATS = Stats(102400, 108, 0, 2, 0, 25, 0, 0, 0, 9.6)
FAULTS: dict[str, Callable[[Stats], Stats]] = {
    "no wgmma": lambda s: s._replace(wgmma=0, mma=9),
    "no tensor cores": lambda s: s._replace(wgmma=0),
    "loads wait": lambda s: s._replace(async_loads=0),
    "in 32 bits": lambda s: s._replace(narrow_offsets=1),
    "bytes on the stack": lambda s: s._replace(stack=8),
    "129 registers, allowed 128": lambda s: s._replace(registers=129),
    "stores in the loop": lambda s: s._replace(stores=1),
    "overwritten": lambda s: s._replace(overwritten=1),
    "instructions for a value": lambda s: s._replace(per_value=300.0),
    "shared memory, allowed 232448": lambda s: s._replace(shared=232449),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named(fault: str) -> None:
    assert not complaints(GOOD_BUILD, GOOD_STATS)
    assert any(fault in line for line in complaints(GOOD_BUILD, FAULTS[fault](GOOD_STATS)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
