"""What the compiler makes of the kernel of `decode_attention` for absent GPUs: no spills, copies ahead of need, and so
few instructions for a byte that reading the cache is what takes the time."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from offline import CAPABILITIES, SHARED
from sass import dump_of, lines_of, loops, resources

REGISTERS = 65536  # of a multiprocessor
RESERVED = 1024  # bytes of shared memory that a program has beside its own
IN_FLIGHT = 64 << 10  # bytes of shared memory that tiles of a multiprocessor have: two thirds are always on their way
ALL = ("kv_start", "sinks", "slopes", "mask", "WINDOW", "SOFTCAP")
SOME = ("kv_start", "WINDOW", "SOFTCAP")  # what models have at the same time; the largest tiles have no room for all
# Instructions of all lanes for a byte of the cache, scales included, by bits and rows. In the time that memory takes
# for a byte, an A100 has 9.6 of them, an H100 8.9 and an H200 6.2; what is asked is that they leave room: 85 % of the
# bandwidth in 16 bits takes a quarter of an H100's, 1.6 times the speed from int8 three quarters of the bandwidth and
# half of the instructions, 2.2 times from int4 60 % of the bandwidth and of the instructions.
BUDGET = {(16, 16): 2.4, (16, 32): 4.4, (8, 16): 5.4, (8, 32): 6.8, (4, 16): 8.2}


class Build(NamedTuple):
    """The kernel for one tile. features: names of ALL that are present. page: keys of a page."""

    capability: int
    bits: int
    D: int
    tile: tuple[int, ...]
    dtype: str = "bf16"
    SQ: int = 1
    features: tuple[str, ...] = ()
    page: int = 0
    unit: int = 16


class Stats(NamedTuple):
    """What was built. The loop is the one with products; `converted`: conversions of integers to floats in it."""

    shared: int
    registers: int
    stack: int
    tensor_cores: int
    async_loads: int
    converted: int
    spills_in_loop: int
    per_byte: float


def complaints(build: Build, stats: Stats) -> list[str]:
    BLOCK_M, threads = build.tile[0], 32 * build.tile[3]
    plain = build.dtype != "fp32" and not build.features and build.page % 64 == 0
    programs = min(
        (SHARED[build.capability] + RESERVED) // (stats.shared + RESERVED), REGISTERS // (threads * stats.registers)
    )
    found = []
    for what, value, limit in (
        ("bytes on the stack", stats.stack, 0),
        ("bytes of shared memory", stats.shared, SHARED[build.capability]),
        (
            "conversions of integers in the loop",
            stats.converted,
            1000 if build.dtype == "fp32" or "slopes" in build.features else 0,
        ),
        ("instructions per byte", stats.per_byte, BUDGET[build.bits, BLOCK_M] if plain and build.unit == 16 else 1000),
    ):
        if value > limit:
            found.append(f"{value} {what}, allowed {limit}")
    if build.dtype != "fp32" and not stats.tensor_cores:
        found.append("no tensor cores")
    if build.dtype != "fp32" and not stats.async_loads:
        found.append("loads wait")
    if plain and programs * stats.shared < IN_FLIGHT:
        found.append(f"{programs} programs of {stats.shared} bytes, too few on their way")
    return found


def rows_to_build(capability: int) -> Iterator[Build]:
    """Every row of ROWS at its largest head and at one that fills no tile; features, pages, dtypes in turn."""
    from fastllm.kernels.decode_config import BIASED, ROWS, SMALL

    for bits, rows in ROWS.items():
        for i, row in enumerate(rows):
            tile, SQ = tuple(row.tile), row.tile.BLOCK_M // 4
            one, other = ("bf16", "fp16") if i % 2 else ("fp16", "bf16")
            yield Build(capability, bits, row.D, tile, one, SQ)
            yield Build(capability, bits, row.D, tile, other, SQ, page=256)
            biased = tuple(BIASED) if bits == 4 and row.D <= 128 else tile
            roomy = tile[0] == 16 and (bits > 4 or row.D <= 128)
            yield Build(capability, bits, row.D, biased, one, SQ, ALL if roomy else SOME, 16)
            yield Build(capability, bits, row.D, tile, other, 1, ("kv_start", "WINDOW"))
            if bits == 4:
                yield Build(capability, bits, row.D // 2 if i == 0 else row.D - 64, tile, other)
            elif row.D > 64:
                yield Build(capability, bits, row.D - 48 - 8 * (bits == 16), tile, other, SQ, unit=8)
        tile = tuple(SMALL[1])
        yield Build(capability, bits, 128, tile, "fp32", 2, ALL)


def few() -> list[Build]:
    from fastllm.kernels.decode_config import config

    return [
        Build(90, 16, 128, tuple(config(4, 128, 16)), page=16, features=("kv_start",)),
        Build(80, 8, 128, tuple(config(4, 128, 8)), "fp16"),
        Build(90, 4, 128, tuple(config(4, 128, 4)), "bf16"),
        Build(80, 16, 256, tuple(config(4, 256, 16)), "bf16"),
    ]


BAD = {
    "bytes on the stack": Build(90, 16, 256, (16, 64, 4, 4, 3)),
    "instructions per byte": Build(80, 4, 64, (16, 64, 4, 4, 3)),
    "too few on their way": Build(90, 8, 64, (16, 16, 1, 4, 2)),
}


def signature(build: Build, names: list[str]) -> tuple[dict[str, str], dict[str, object]]:
    """Types of the arguments, and the values of those that are constants."""
    x = "*" + build.dtype
    stored, scale = {16: (x, x), 8: ("*i8", "*fp32"), 4: ("*u8", "*fp16")}[build.bits]
    pointers = {"q": x, "k": stored, "v": stored, "k_scale": scale, "v_scale": scale, "out": x, "mask": "*i1"}
    pointers |= {"sinks": "*fp32", "slopes": "*fp32", "partial": "*fp32"}
    pointers |= dict.fromkeys(("kv_end", "kv_start", "block_table", "tickets"), "*i32")
    BLOCK_M, BLOCK_N, WARPS, *_ = build.tile
    constants: dict[str, object] = {
        "SQ": build.SQ, "HEADS": 4, "D": build.D, "DV": build.D, "FORMAT": build.bits % 16, "PAGE": build.page,
        "WINDOW": "WINDOW" in build.features, "SOFTCAP": "SOFTCAP" in build.features, "UNIT_Q": build.unit,
        "UNIT": build.unit, "UNIT_S": build.D // 16 if build.bits == 4 else 1, "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N,
        "WARPS": WARPS, "PTX": True, "STEPS": None, "SPLITS": None,
    }  # fmt: skip
    absent = [name for name in ("kv_start", "sinks", "slopes", "mask") if name not in build.features]
    absent += ([] if build.page else ["block_table"]) + (["k_scale", "v_scale"] if build.bits == 16 else [])
    constants |= dict.fromkeys(absent)
    floats = ("scale", "softcap")
    return {
        n: "constexpr" if n in constants else pointers.get(n, "fp32" if n in floats else "i32") for n in names
    }, constants


def compile_one(build: Build, scratch: Path) -> Stats:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fastllm.kernels.decode_attention import _decode_attention as kernel

    names = kernel.arg_names
    types, constants = signature(build, names)
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in names if types[n].startswith("*")},
    )
    _, BLOCK_N, _, num_warps, num_stages = build.tile
    options = {"num_warps": num_warps, "num_stages": num_stages}
    built = triton.compile(source, target=GPUTarget("cuda", build.capability, 32), options=options)
    dump = dump_of(built, scratch)
    lines, ptx = lines_of(dump), built.asm["ptx"]
    bodies = [[text for _, text in lines[start : end + 1]] for start, end in loops(lines)]
    product = re.compile(r" FFMA" if build.dtype == "fp32" else r" (HMMA|HGMMA|UTC\w*MMA)")
    loop = max((b for b in bodies if any(product.search(text) for text in b)), key=len, default=[])
    scales = {16: 0, 8: 8, 4: build.D // 4}[build.bits]
    return Stats(
        shared=built.metadata.shared,
        **resources(dump),
        tensor_cores=len(re.findall(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma", ptx)),
        async_loads=len(re.findall(r"cp\.async\.cg.* 0x10", ptx)),
        converted=sum(" I2F" in text for text in loop),
        spills_in_loop=sum(" STL" in text or " LDL" in text for text in loop),
        per_byte=round(len(loop) * 32 * num_warps / (BLOCK_N * (build.D * build.bits // 4 + scales)), 2),
    )


def main(which: str, scratch: Path) -> None:
    """Compile and print one JSON object a line. A process of its own: the tests' own process interprets kernels."""
    good = few() if which == "few" else [build for target in CAPABILITIES for build in rows_to_build(target)]
    bad = [*BAD.values()]
    for build in [*good, *(bad[:1] if which == "few" else bad)]:
        print(json.dumps([build, compile_one(build, scratch)]), flush=True)


@pytest.fixture(scope="module", params=["few", pytest.param("all", marks=pytest.mark.slow)])
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[Build, Stats]:
    scratch = tmp_path_factory.mktemp("compiled")
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parent), environ.get("PYTHONPATH", "")]
    environ |= {"TRITON_CACHE_DIR": str(scratch), "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, __file__, request.param, scratch]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pairs = [json.loads(line) for line in done.stdout.splitlines()]
    return {build_of(build): Stats(*stats) for build, stats in pairs}


def build_of(fields: list) -> Build:
    return Build(*(tuple(field) if isinstance(field, list) else field for field in fields))


def test_every_tile_compiles_well(compiled: dict[Build, Stats]) -> None:
    good = {build: stats for build, stats in compiled.items() if build not in BAD.values()}
    assert {build.bits for build in good} == {16, 8, 4} and {build.capability for build in good} >= {80, 90}
    found = [f"{build}: {line} ({stats})" for build, stats in good.items() for line in complaints(build, stats)]
    assert not found, "\n".join(found)


def test_a_bad_tile_is_seen(compiled: dict[Build, Stats]) -> None:
    bad = [what for what, build in BAD.items() if build in compiled]
    assert bad
    for what in bad:
        assert any(what in line for line in complaints(BAD[what], compiled[BAD[what]])), what


def test_each_fault_is_named() -> None:
    build, good = Build(90, 8, 128, (16, 64, 4, 4, 3)), Stats(81920, 168, 0, 32, 16, 0, 0, 4.0)
    assert not complaints(build, good)
    for what, stats in {
        "conversions": good._replace(converted=1),
        "no tensor cores": good._replace(tensor_cores=0),
        "loads wait": good._replace(async_loads=0),
        "stack": good._replace(stack=8),
        "shared memory": good._replace(shared=232449),
        "too few": good._replace(registers=255, shared=49152),
    }.items():
        found = complaints(build, stats)
        assert any(what in line for line in found) or what == "too few" and not found, (what, found)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
