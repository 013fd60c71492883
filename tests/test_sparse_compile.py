"""What the compiler makes of the kernels of sparse weights for absent GPUs: no spills, few instructions."""

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
from sass import dump_of, longest_loop, resources

TARGETS = (80, 89, 90)
# What an H100 has time for while it reads a weight of 16 of 32, 1.125 or 0.625 bytes: 8.9 instructions for a byte.
# (bits of a value, quads) -> instructions of all threads for one weight, dense ones counted, allowed at M = 1
ALLOWED = {(16, False): 4.3, (16, True): 3.7, (8, False): 4.7, (8, True): 4.1, (32, False): 4.6}
UNEVEN = 1.1  # more, where the last program has less to do than the others: loads are guarded
ROWS = {2: 5.5, 4: 8.9, 8: 14.8, 16: 27.0}  # the same for 16 of 32 in 16 bits, by rows of x in a program


class Build(NamedTuple):
    """A kernel to compile. kind: "whole", "tail" (the last program has less to do), "split" (parts of sums), or
    "plain" (without PTX)."""

    kernel: str
    capability: int
    x: str
    values: str
    kept: int
    quads: bool
    BLOCK_M: int = 1
    kind: str = "whole"
    maxnreg: int = 0


class Stats(NamedTuple):
    """What was built. per_weight, loads: instructions, and loads of them, of all threads for one weight, dense ones
    counted. local: accesses to local memory."""

    shared: int
    registers: int
    stack: int
    local: int
    per_weight: float
    loads: float
    shuffles: float
    barriers: int


BITS = {"i8": 8, "bf16": 16, "fp16": 16, "fp32": 32}


def allowed(build: Build) -> float:
    if build.kernel != "_sparse_matmul" or build.kept != 16:
        return float("inf")
    most = ROWS.get(build.BLOCK_M) or ALLOWED[BITS[build.values], build.quads]
    return most + (build.kind == "tail") * UNEVEN


def complaints(build: Build, stats: Stats) -> list[str]:
    words = -(-build.kept * BITS[build.values] // 32)
    # a word of the index, and one for each row of x; two rows of 16 bits share a shuffle from four rows on
    loads = (words + 1 + build.BLOCK_M) / 32
    rows = build.BLOCK_M // 2 if build.BLOCK_M > 2 and build.x != "fp32" else build.BLOCK_M
    limits = {
        "shared memory": (stats.shared, SHARED[80] // 4),
        "registers": (stats.registers, 128),
        "bytes on the stack": (stats.stack, 0),
        "accesses to local memory": (stats.local, 0),
    }
    if build.kernel == "_sparse_matmul":
        limits |= {
            "instructions a weight": (stats.per_weight, allowed(build)),
            "loads a weight": (stats.loads, loads),
            "shuffles a weight": (stats.shuffles, rows * build.kept / 32),
            "barriers in the loop": (stats.barriers, 0),
        }
    return [f"{value} {what}, allowed {limit}" for what, (value, limit) in limits.items() if value > limit + 1e-9]


def builds(few: bool) -> Iterator[Build]:
    """Formats on every architecture, and rows of x, tails, splits and other numbers of kept values on one."""
    formats = [("bf16", False), ("bf16", True), ("i8", False), ("i8", True)]
    for i, (target, (values, quads)) in enumerate(product(TARGETS, formats)):
        if not few or target == 90 or i % 5 == 0:
            yield Build("_sparse_matmul", target, "bf16", values, 16, quads)
        if not few or i % 5 == 0:
            yield Build("_sparse_expand", target, "bf16", values, 16, quads)
    if few:
        yield Build("_sparse_matmul", 90, "bf16", "bf16", 16, False, 4, "split")
        return
    for BLOCK_M in ROWS:
        yield Build("_sparse_matmul", 90, "bf16", "bf16", 16, False, BLOCK_M, ("whole", "split")[BLOCK_M == 2])
    for values, quads in formats:
        yield Build("_sparse_matmul", 90, "bf16", values, 16, quads, 1, "tail")
        yield Build("_sparse_matmul", 90, "fp16", "i8" if values == "i8" else "fp16", 16, quads, 1, "split")
    yield Build("_sparse_matmul", 90, "fp32", "fp32", 16, False)
    yield Build("_sparse_matmul", 80, "fp32", "fp32", 16, False, 16, "tail")
    yield Build("_sparse_expand", 90, "fp32", "fp32", 8, False)
    for kept, values in ((8, "bf16"), (31, "i8"), (32, "bf16")):
        yield Build("_sparse_matmul", 90, "bf16", values, kept, False, 4, "tail")


BAD = [
    ("bytes on the stack", Build("_sparse_matmul", 90, "bf16", "bf16", 16, False, 4, "whole", 24)),
    ("instructions a weight", Build("_sparse_matmul", 90, "bf16", "i8", 16, False, 1, "plain")),
]


def compile_one(build: Build, scratch: Path) -> Stats:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fastllm.kernels.sparse_expand import BLOCKS, _sparse_expand
    from fastllm.kernels.sparse_matmul import WARPS, Config, _sparse_matmul, turn

    kernel = {"_sparse_matmul": _sparse_matmul, "_sparse_expand": _sparse_expand}[build.kernel]
    names, words = kernel.arg_names, -(-build.kept * BITS[build.values] // 32)
    tile = Config(build.BLOCK_M, turn(words) if build.BLOCK_M < 8 else 1, 4 if build.kind == "split" else 1)
    x = "*" + build.x
    types = {
        "x": x,
        "y": x,
        "scale": x,
        "bias": x,
        "w": "*i32",
        "index": "*i32",
        "partial": "*fp32",
        "tickets": "*i32",
    }
    absent = ([] if build.values == "i8" else ["scale"]) + ([] if tile.SPLIT_K > 1 else ["partial", "tickets"])
    constants = {
        **{"KEPT": build.kept, "QUADS": build.quads, "BITS": BITS[build.values], "BF16": build.values == "bf16"},
        **{
            "WORDS": words,
            "WARPS": WARPS,
            "EVEN": build.kind != "tail",
            "PTX": build.kind != "plain",
            "BLOCKS": BLOCKS,
        },
        **tile._asdict(),
        **dict.fromkeys(absent),
    }
    constants = {name: value for name, value in constants.items() if name in names}
    divisible = [n for n in names if n in types or n not in ("M", "steps", "blocks")]
    source = ASTSource(
        fn=kernel,
        signature={n: "constexpr" if n in constants else types.get(n, "i32") for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in divisible if n not in constants},
    )
    options = {"num_warps": WARPS} | ({"maxnreg": build.maxnreg} if build.maxnreg else {})
    built = triton.compile(source, target=GPUTarget("cuda", build.capability, 32), options=options)
    dump = dump_of(built, scratch)
    loop, each = longest_loop(dump), 32 * tile.UNROLL

    def count(name: str, lines: list[str] = loop) -> int:
        return sum(re.search(rf"\s{name}\b", line) is not None for line in lines)

    return Stats(
        shared=built.metadata.shared,
        **resources(dump),
        local=count("(LDL|STL)", dump.splitlines()),
        per_weight=round(len(loop) / each, 4),
        loads=round(count("LDG") / each, 6),
        shuffles=round(count("SHFL") / each, 6),
        barriers=count("BAR"),
    )


def main(scratch: Path, few: bool) -> None:
    """Compile and print one JSON object a line. A process of its own: the tests' own process interprets kernels."""
    for build in [*builds(few), *(build for _, build in BAD)]:
        print(json.dumps([build, compile_one(build, scratch)]), flush=True)


@pytest.fixture(scope="module", params=["few", pytest.param("all", marks=pytest.mark.slow)])
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[Build, Stats]:
    scratch = tmp_path_factory.mktemp("compiled")
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
    environ |= {"TRITON_CACHE_DIR": str(scratch), "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, __file__, str(scratch), request.param]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pairs = [json.loads(line) for line in done.stdout.splitlines()]
    return {Build(*build): Stats(*stats) for build, stats in pairs}


def test_every_kernel_compiles_well(compiled: dict[Build, Stats]) -> None:
    good = {build: stats for build, stats in compiled.items() if build not in [b for _, b in BAD]}
    assert {b.capability for b in good} == set(TARGETS) and len(good) >= 10
    assert {(b.values, b.quads) for b in good} >= {(v, q) for v in ("bf16", "i8") for q in (False, True)}
    found = [f"{build}: {line} ({stats})" for build, stats in good.items() for line in complaints(build, stats)]
    assert not found, "\n".join(found)


def test_a_bad_kernel_is_seen(compiled: dict[Build, Stats]) -> None:
    for what, build in BAD:
        assert any(what in line for line in complaints(build, compiled[build])), (what, compiled[build])


GOOD_BUILD = Build("_sparse_matmul", 90, "bf16", "bf16", 16, False)
GOOD_STATS = Stats(1024, 32, 0, 0, 4.05, 10 / 32, 0.5, 0)
FAULTS: dict[str, Callable[[Stats], Stats]] = {
    "shared memory, allowed 41728": lambda s: s._replace(shared=41729),
    "registers": lambda s: s._replace(registers=129),
    "bytes on the stack": lambda s: s._replace(stack=8),
    "local memory": lambda s: s._replace(local=1),
    "instructions a weight, allowed 4.3": lambda s: s._replace(per_weight=4.31),
    "loads a weight": lambda s: s._replace(loads=11 / 32),
    "shuffles a weight": lambda s: s._replace(shuffles=17 / 32),
    "barriers in the loop": lambda s: s._replace(barriers=1),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named(fault: str) -> None:
    assert not complaints(GOOD_BUILD, GOOD_STATS)
    assert any(fault in line for line in complaints(GOOD_BUILD, FAULTS[fault](GOOD_STATS)))


def test_the_gates_leave_time_for_memory() -> None:
    """An H100 has 8.9 instructions for each byte that it reads: 10 for a weight of 16 of 32 in 16 bits, 5.6 in 8."""
    for (bits, _), most in ALLOWED.items():
        assert most < 8.9 * (bits / 16 + 1 / 8)
    assert ROWS[4] < 8.9 * 1.125  # up to four rows


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "few")
