"""What the compiler makes of the kernels of `quant_matmul`, on a machine without a GPU.

A tile may be right and still be slow: because it spills registers, does not fit in shared memory, misses the tensor
cores, or spends more instructions on a weight than the memory takes time to deliver it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from offline import AMD, CAPABILITIES, FORMATS, SHARED, Build, Stats, builds, compile_one
from sass import longest_loop, overwritten

# Bytes that may be spilled, and how often a step of 128 values may look at them: what two programs on a multiprocessor
# instead of one are worth, where sums are split and tiles large.
SPILL, LOOKS = 96, 2
# Instructions of a lane in the time that memory takes for a byte: multiprocessors x clock x 128 / bandwidth.
BALANCE = {80: 9.6, 90: 8.9}


def bytes_per_weight(build: Build) -> float:
    """The packed weight, and its share of a scale of 16 bits and a zero point of 8."""
    return build.bits / 8 + ((2 + build.zero) / build.group if build.group else 0)


def complaints(build: Build, stats: Stats) -> list[str]:
    product = build.kernel != "_dequantize" and build.dtype != "fp32" and build.kind != "odd"
    wgmma = product and build.target == 90
    decode = product and build.target in BALANCE and build.tile[1] == 16
    budget = round(BALANCE[build.target] * bytes_per_weight(build), 2) if decode else 0.0
    limits: dict[str, tuple[float, float]] = {
        "shared memory": (stats.shared, SHARED[build.target]),
        "bytes on the stack": (stats.stack, SPILL),
        "spills in the loop": (stats.spills_in_loop if build.target in BALANCE else 0, LOOKS),
        "products of rows and strides in 32 bits": (stats.narrow_offsets, 0),
        "stores to shared memory in the loop": (stats.stores_in_loop if wgmma else 0, 0),
        "shuffles between lanes in the loop": (stats.shuffles_in_loop if wgmma else 0, 0),
        "instructions per weight": (stats.per_weight if decode else 0, budget),
        "writes to registers that products have yet to read": (stats.overwritten, 0),
    }
    found = [f"{value} {what}, allowed {limit}" for what, (value, limit) in limits.items() if value > limit]
    found += ["no wgmma"] if wgmma and stats.tensor_cores != "wgmma.mma_async" else []
    found += ["weights go through shared memory"] if wgmma and not stats.weights_in_registers else []
    found += ["no tensor cores"] if product and not stats.tensor_cores else []
    return found


TILE = (64, 16, 2, 128, False, 4, 3, 0, 1)
BAD = {
    "shared memory": Build("_quant_matmul", 90, "bf16", 4, 128, False, (128, 128, 2, 128, False, 8, 5, 0, 1)),
    "stack": Build("_quant_matmul", 90, "bf16", 4, 128, False, (128, 128, 1, 128, False, 4, 3, 0, 1)),
    "instructions per weight": Build("_quant_matmul", 90, "bf16", 4, 128, False, (64, 16, 1, 128, False, 16, 3, 0, 1)),
    "no wgmma": Build("_quant_matmul", 90, "bf16", 4, 128, False, (32, 16, 1, 128, False, 4, 3, 0, 1)),
    "yet to read": Build("_quant_matmul", 90, "bf16", 4, 128, False, (128, 64, 1, 128, True, 8, 3, 0, 1)),
    "stores to shared memory": Build("_bad_matmul", 90, "bf16", 4, 128, False, (64, 64, 1, 128, False, 4, 3, 0, 1)),
}


def main(which: str, scratch: Path) -> None:
    """Compile and print one JSON object a line. A process of its own: the tests' own process interprets kernels."""
    if which == "few":
        good = {*builds((80, 90), FORMATS[:2]), *builds((100, AMD), FORMATS[:1])}
    else:
        good = {*builds((*CAPABILITIES, AMD), FORMATS)}
    for build in [*sorted(good), *BAD.values()]:
        print(json.dumps([build, compile_one(build, scratch)]), flush=True)


@pytest.fixture(scope="module", params=["few", pytest.param("all", marks=pytest.mark.slow)])
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[Build, Stats]:
    scratch = tmp_path_factory.mktemp("compiled")
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environ |= {"TRITON_CACHE_DIR": str(scratch), "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, __file__, request.param, scratch]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pairs = [json.loads(line) for line in done.stdout.splitlines()]
    return {Build(*build[:6], tuple(build[6]), build[7]): Stats(*stats) for build, stats in pairs}


def test_every_tile_compiles_well(compiled: dict[Build, Stats]) -> None:
    good = {build: stats for build, stats in compiled.items() if build not in BAD.values()}
    assert len(good) > 50
    found = [f"{build}: {line} ({stats})" for build, stats in good.items() for line in complaints(build, stats)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("what", BAD)
def test_a_bad_tile_is_seen(what: str, compiled: dict[Build, Stats]) -> None:
    assert any(what in line for line in complaints(BAD[what], compiled[BAD[what]]))


GOOD_BUILD = Build("_quant_matmul", 90, "bf16", 4, 128, False, TILE)
GOOD_STATS = Stats(28672, 78, 0, "wgmma.mma_async", True, 0, 0, 0, 0, 2.7, 0)
FAULTS: dict[str, Callable[[Stats], Stats]] = {
    "no wgmma": lambda s: s._replace(tensor_cores="mma.sync"),
    "no tensor cores": lambda s: s._replace(tensor_cores=""),
    "through shared memory": lambda s: s._replace(weights_in_registers=False),
    "stores to shared": lambda s: s._replace(stores_in_loop=4),
    "yet to read": lambda s: s._replace(overwritten=1),
    "shuffles": lambda s: s._replace(shuffles_in_loop=1),
    "in 32 bits": lambda s: s._replace(narrow_offsets=1),
    "bytes on the stack": lambda s: s._replace(stack=104),
    "spills in the loop": lambda s: s._replace(spills_in_loop=3),
    "4.6 instructions per weight, allowed 4.59": lambda s: s._replace(per_weight=4.6),
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
    assert [line.split()[0] for line in longest_loop(sass)] == ["FADD", "FMUL", "@!P1"]
    assert longest_loop("") == []


@pytest.mark.parametrize(
    "wait, write, found", [(0, "R8", 0), (1, "R8", 1), (1, "R12", 0), (1, "R4", 0), (1, "R11", 1)]
)
def test_a_write_under_a_product_is_seen(wait: int, write: str, found: int) -> None:
    program = ["HGMMA.64x16x16.F32 R24, R8, gdesc[UR4], R24, gsb0", f"WARPGROUP.DEPBAR.LE gsb0, 0x{wait}"]
    program += [f"LOP3.LUT {write}, R1, 0xf, R2, 0xc0, !PT", "@P0 BRA 0x0"]
    sass = "".join(f"        /*{16 * i:04x}*/                   {op} ;\n" for i, op in enumerate(program))
    assert overwritten(sass) == found


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
