"""What the compiler makes of the kernels, on a machine without a GPU: triton carries all it needs to build for one.

A tile may be right and still be slow: because it spills registers, does not fit in shared memory, misses the tensor
cores, or spends more instructions on a weight than the memory takes time to deliver it.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from math import gcd
from pathlib import Path
from typing import NamedTuple

import pytest


class Build(NamedTuple):
    """A kernel to compile, of 16-bit or float32 x. `aligned`: sizes and strides are multiples of 16."""

    kernel: str
    capability: int
    dtype: str
    bits: int
    group: int
    zero: bool
    BLOCK_N: int
    BLOCK_M: int
    num_warps: int
    num_stages: int
    aligned: bool = True


class Stats(NamedTuple):
    """What was built. `per_weight`: instructions of all lanes in the longest loop, which reads 128 weights a row."""

    shared: int
    registers: int
    stack: int
    wgmma: int
    mma: int
    weights_in_registers: bool
    stores_to_shared: int
    narrow_offsets: int
    per_weight: float


SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a program may have
SPILL = 64  # bytes of loop invariants that ptxas may trade for one more program on a multiprocessor; not on sm_90


def complaints(build: Build, stats: Stats) -> list[str]:
    tensor_cores, hopper = build.dtype != "fp32" and build.kernel == "_quant_matmul", build.capability == 90
    wgmma = tensor_cores and hopper and build.BLOCK_N % 64 == 0
    limits = {
        "shared memory": (stats.shared, SHARED[build.capability]),
        "bytes on the stack": (stats.stack, 0 if wgmma else SPILL),
        "products of rows and strides in 32 bits": (stats.narrow_offsets, 0),
        "stores of weights to shared memory": (stats.stores_to_shared if wgmma else 0, 0),
        # One H100 delivers a byte in the time of 8.9 instructions of a lane: 4.6 for a weight of 4 bits and its scale.
        "instructions per weight": (stats.per_weight if wgmma and build[3:8] == (4, 128, False, 64, 16) else 0, 4.6),
    }
    found = [f"{value} {what}, allowed {limit}" for what, (value, limit) in limits.items() if value > limit]
    found += ["no wgmma"] if wgmma and not stats.wgmma else []
    found += ["weights go through shared memory"] if wgmma and not stats.weights_in_registers else []
    found += ["no tensor cores"] if tensor_cores and not wgmma and not stats.mma else []
    return found


FORMATS = [(4, 128, False), (8, 0, False), (4, 32, True), (4, 64, False), (4, 0, False), (8, 128, True)]


def builds(capabilities: Iterable[int], formats: list[tuple[int, int, bool]]) -> Iterator[Build]:
    """Every row of `config` for every format, and what has one tile only: float32, odd sizes, `dequantize`."""
    from fastllm.kernels.quant_matmul import config

    rows = {(t.BLOCK_N, t.BLOCK_M, *t[3:]) for M in range(1, 2050) for t in [config(M, 4096, 4096, 4, 128)]}
    small = config(1, 4096, 4096, 4, 128, fp32=True)
    small_row = (small.BLOCK_N, small.BLOCK_M, *small[3:])
    for i, (capability, format) in enumerate(product(capabilities, formats)):
        one, other = ("fp16", "bf16") if i % 2 else ("bf16", "fp16")
        for row in sorted(rows):
            yield Build("_quant_matmul", capability, one, *format, *row)
        yield Build("_quant_matmul", capability, "fp32", *format, *small_row)
        yield Build("_quant_matmul", capability, other, *format, *small_row, aligned=False)
        yield Build("_dequantize", capability, other, *format, 32, 0, 4, 3, i % 4 > 0)
        if format == FORMATS[0]:
            yield Build("_sum_splits", capability, other, *format, 1, 0, 4, 3)


BAD = {
    "shared memory": Build("_quant_matmul", 90, "bf16", 4, 128, False, 128, 128, 8, 8),
    "stack": Build("_quant_matmul", 90, "bf16", 4, 128, False, 128, 128, 4, 3),
    "instructions per weight": Build("_quant_matmul", 90, "bf16", 4, 128, False, 64, 16, 8, 4),
}


def compile_one(build: Build, cuobjdump: str, scratch: Path) -> Stats:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fastllm.kernels import quant_matmul

    kernel = getattr(quant_matmul, build.kernel)
    x, words = "*" + build.dtype, "*i32" if build.bits == 4 else "*u8"
    types = {"x": x, "w": words, "scale": x, "zero": "*u8", "bias": x, "y": x, "partial": "*fp32"}
    small = build.dtype == "fp32" or not build.aligned
    constants = {
        "BITS": build.bits,
        "GROUP": build.group,
        "RUN": 32 if small and build.kernel == "_quant_matmul" else gcd(build.group, 128),
        "BLOCK_N": build.BLOCK_N,
        "BLOCK_M": build.BLOCK_M,
        "SPLIT_K": 8,
        "BLOCK": 1024,
        "stride_sg": 1,
        "stride_zg": 1,
        **({} if build.zero else {"zero": None}),
    }
    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    divisible = [n for n in names if n in types or build.aligned and n not in ("M", "steps", "size")]
    source = ASTSource(
        fn=kernel,
        signature={n: "constexpr" if n in constants else types.get(n, "i32") for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in divisible if n not in constants},
    )
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages}
    built = triton.compile(source, target=GPUTarget("cuda", build.capability, 32), options=options)
    cubin = scratch / "kernel.cubin"
    cubin.write_bytes(built.asm["cubin"])
    dump = subprocess.run([cuobjdump, "-res-usage", "-sass", cubin], capture_output=True, text=True, check=True).stdout
    ttgir, ptx = built.asm["ttgir"], built.asm["ptx"]
    lanes, weights = 32 * build.num_warps, 128 * build.BLOCK_N
    return Stats(
        shared=built.metadata.shared,
        registers=int(re.findall(r"REG:(\d+)", dump)[-1]),
        stack=int(re.findall(r"STACK:(\d+)", dump)[-1]) + int(re.findall(r"LOCAL:(\d+)", dump)[-1]),
        wgmma=ptx.count("wgmma.mma_async"),
        mma=ptx.count("mma.sync"),
        weights_in_registers=all("dot_op" in line for line in re.findall(r".*warp_group_dot %.*", ttgir)),
        stores_to_shared=ptx.count("st.shared"),
        narrow_offsets=len(re.findall(r"arith\.muli .*tensor<\w+xi32>", built.asm["ttir"])),
        per_weight=round(longest_loop(dump) * lanes / weights, 2),
    )


def longest_loop(sass: str) -> int:
    """Instructions between a branch and the earlier address that it goes to, at most."""
    lines = re.findall(r"^\s+/\*([0-9a-f]+)\*/\s+(.*)$", sass, re.M)
    place = {int(address, 16): i for i, (address, _) in enumerate(lines)}
    branches = [(i, re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)) for i, (_, text) in enumerate(lines)]
    return max((i - place.get(int(to[1], 16), i) + 1 for i, to in branches if to), default=0)


def main(which: str, scratch: Path) -> None:
    """Compile and print one JSON object a line. A process of its own: the tests' own process interprets kernels."""
    import triton

    few = which == "few"
    good = builds([90] if few else SHARED, FORMATS[:2] if few else FORMATS)
    for build in [*good, *BAD.values()]:
        print(json.dumps([build, compile_one(build, triton.knobs.nvidia.cuobjdump.path, scratch)]), flush=True)


@pytest.fixture(scope="module", params=["few", pytest.param("all", marks=pytest.mark.slow)])
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[Build, Stats]:
    scratch = tmp_path_factory.mktemp("compiled")
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environ |= {"TRITON_CACHE_DIR": str(scratch), "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, __file__, request.param, scratch]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pairs = [json.loads(line) for line in done.stdout.splitlines()]
    return {Build(*build): Stats(*stats) for build, stats in pairs}


def test_every_tile_compiles_well(compiled: dict[Build, Stats]) -> None:
    good = {build: stats for build, stats in compiled.items() if build not in BAD.values()}
    assert len(good) in (15, 86)
    found = [f"{build}: {line} ({stats})" for build, stats in good.items() for line in complaints(build, stats)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("what", BAD)
def test_a_bad_tile_is_seen(what: str, compiled: dict[Build, Stats]) -> None:
    assert any(what in line for line in complaints(BAD[what], compiled[BAD[what]]))


GOOD_BUILD = Build("_quant_matmul", 90, "bf16", 4, 128, False, 64, 16, 4, 4)
GOOD_STATS = Stats(28672, 78, 0, 8, 0, True, 0, 0, 3.5)
FAULTS: dict[str, Callable[[Stats], Stats]] = {
    "no wgmma": lambda s: s._replace(wgmma=0),
    "through shared memory": lambda s: s._replace(weights_in_registers=False),
    "stores of weights": lambda s: s._replace(stores_to_shared=4),
    "in 32 bits": lambda s: s._replace(narrow_offsets=1),
    "bytes on the stack": lambda s: s._replace(stack=8),
    "instructions per weight": lambda s: s._replace(per_weight=4.7),
    "shared memory, allowed 232448": lambda s: s._replace(shared=232449),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named(fault: str) -> None:
    assert not complaints(GOOD_BUILD, GOOD_STATS)
    assert any(fault in line for line in complaints(GOOD_BUILD, FAULTS[fault](GOOD_STATS)))


def test_the_longest_loop_is_measured() -> None:
    sass = "".join(f"        /*{16 * i:04x}*/                   {op} ;\n" for i, op in enumerate(
        ["MOV R1, R2", "IADD3 R1", "@P0 BRA 0x10", "FADD", "FMUL", "@!P1 BRA 0x30", "BRA 0x80", "EXIT", "BRA 0x70"]
    ))  # fmt: skip
    assert longest_loop(sass) == 3
    assert longest_loop("") == 0


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
