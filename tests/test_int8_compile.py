"""What the compiler makes of the kernels of 8-bit products for absent GPUs: no spills, tensor cores, async loads."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from offline import SHARED
from sass import dump_of, resources

TARGETS = ((80, "i8"), (90, "i8"), (90, "fp8e4nv"))  # sm_80 has no tensor cores for float8


class Build(NamedTuple):
    """A kernel to compile. `kind`: "whole" blocks of K, one with a "tail", "split" sums, or an "odd" K."""

    kernel: str
    capability: int
    dtype: str
    kind: str
    BLOCK_M: int = 0
    BLOCK_N: int = 0
    BLOCK_K: int = 0
    SWAP: bool = False
    num_warps: int = 4
    num_stages: int = 3
    operand: str = "i8"  # or "fp8e4nv"


class Stats(NamedTuple):
    """What was built. `async_loads`: of 16 bytes, from memory to shared memory."""

    shared: int
    registers: int
    stack: int
    wgmma: int
    mma: int
    async_loads: int
    narrow_offsets: int


def complaints(build: Build, stats: Stats) -> list[str]:
    product, hopper = build.kernel == "_scaled_matmul", build.capability == 90
    limits = {
        "shared memory": (stats.shared, SHARED[build.capability]),
        "bytes on the stack": (stats.stack, 0),
        "products of rows and strides in 32 bits": (stats.narrow_offsets, 0),
    }
    found = [f"{value} {what}, allowed {limit}" for what, (value, limit) in limits.items() if value > limit]
    found += [f"no wgmma on {build.operand}"] if product and hopper and not stats.wgmma else []
    found += [f"no tensor cores on {build.operand}"] if product and not hopper and not stats.mma else []
    # without them nothing is in flight while the tensor cores work; odd addresses cannot have them
    found += ["loads wait"] if product and build.kind != "odd" and not stats.async_loads else []
    return found


def builds() -> Iterator[Build]:
    """Every row of `config` on both architectures, and the kernels that have one tile only."""
    from fastllm.kernels.scaled_matmul import config

    shapes = [(M, N, K) for M in (1, 17, 33, 65, 2048) for N in (256, 4096, 28672) for K in (4096, 4097)]
    for capability, operand in TARGETS:
        rows = {config(*shape, capability, operand != "i8")._replace(SPLIT_K=1) for shape in shapes}
        for i, row in enumerate(sorted(rows)):
            tile = (row.BLOCK_M, row.BLOCK_N, row.BLOCK_K, row.SWAP, row.num_warps, row.num_stages)
            kinds = (
                ("odd",)
                if row.BLOCK_K == 64
                else ("whole", "tail", "split")
                if row.BLOCK_M <= 64
                else ("whole", "tail")
            )
            for kind in kinds:
                yield Build("_scaled_matmul", capability, ("bf16", "fp16", "fp32")[i % 3], kind, *tile, operand)
        yield Build("_sum_splits", capability, "bf16", "split", 4, 256, operand=operand)
        for BLOCK_K, num_warps in ((256, 4), (4096, 8)):
            yield Build("_quantize_rows", capability, "bf16", "whole", 0, 0, BLOCK_K, False, num_warps, 3, operand)


BAD = [
    ("shared memory", Build("_scaled_matmul", 90, "bf16", "whole", 128, 256, 128, False, 8, 5)),
    ("bytes on the stack", Build("_scaled_matmul", 90, "bf16", "whole", 128, 256, 128, False, 4, 3)),
    (
        "bytes on the stack",
        Build("_scaled_matmul", 90, "bf16", "whole", 128, 256, 128, False, 8, 4, "fp8e4nv"),
    ),  # twice the registers
    (
        "no wgmma",
        Build("_scaled_matmul", 90, "bf16", "whole", 16, 64, 256, False, 4, 4),
    ),  # rows of x as the left operand
    ("loads wait", Build("_scaled_matmul", 80, "bf16", "whole", 64, 64, 128, True, 4, 1)),
]


def compile_one(build: Build, scratch: Path) -> Stats:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fastllm.kernels import scaled_matmul

    kernel = getattr(scaled_matmul, build.kernel)
    names, floats, operand = kernel.arg_names, build.operand != "i8", f"*{build.operand}"
    partial = "*fp32" if floats else "*i32"
    out = partial if build.kind == "split" else "*" + build.dtype
    types = {"q": operand, "w": operand, "x_scale": "*fp32", "w_scale": "*fp32", "scale": "*fp32", "partial": partial}
    types |= {
        "x": "*" + build.dtype,
        "bias": "*" + build.dtype,
        "y": out if build.kernel == "_scaled_matmul" else "*bf16",
    }
    constants = {
        "WHOLE": build.kind in ("whole", "split"),
        "SPLIT": build.kind == "split",
        "SPLIT_K": 8,
        "PRECISE_K": min(scaled_matmul.PRECISE_K, build.BLOCK_K) if floats else None,
        "LARGEST": 448.0 if floats else 127.0,
        "GROUP_M": 8,
        "stride_xk": 1,
        **{name: getattr(build, name) for name in ("SWAP", "BLOCK_M", "BLOCK_N", "BLOCK_K")},
    }
    constants = {name: value for name, value in constants.items() if name in names}
    divisible = [n for n in names if n in types or build.kind != "odd" and n not in ("M", "steps")]
    source = ASTSource(
        fn=kernel,
        signature={n: "constexpr" if n in constants else types.get(n, "i32") for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in divisible if n not in constants},
    )
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages}
    built = triton.compile(source, target=GPUTarget("cuda", build.capability, 32), options=options)
    dump = dump_of(built, scratch)
    ptx = built.asm["ptx"]
    return Stats(
        shared=built.metadata.shared,
        **resources(dump),
        wgmma=len(re.findall(r"wgmma\.mma_async.*\." + ("f32.e4m3.e4m3" if floats else "s32.s8.s8"), ptx)),
        mma=len(re.findall(r"mma\.sync.*\.s32\.s8\.s8\.s32", ptx)),
        async_loads=len(re.findall(r"cp\.async\.cg.* 0x10", ptx)),
        narrow_offsets=len(re.findall(r"arith\.muli .*tensor<\w+xi32>", built.asm["ttir"])),
    )


def main(scratch: Path) -> None:
    """Compile and print one JSON object a line. A process of its own: the tests' own process interprets kernels."""

    for build in [*builds(), *(build for _, build in BAD)]:
        print(json.dumps([build, compile_one(build, scratch)]), flush=True)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[Build, Stats]:
    scratch = tmp_path_factory.mktemp("compiled")
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
    environ |= {"TRITON_CACHE_DIR": str(scratch), "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, __file__, scratch], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pairs = [json.loads(line) for line in done.stdout.splitlines()]
    return {Build(*build): Stats(*stats) for build, stats in pairs}


def test_every_tile_compiles_well(compiled: dict[Build, Stats]) -> None:
    good = {build: stats for build, stats in compiled.items() if build not in [b for _, b in BAD]}
    assert {(b.capability, b.operand, b.kind) for b in good} == {
        (*pair, k) for pair in TARGETS for k in ("whole", "tail", "split", "odd")
    }
    found = [f"{build}: {line} ({stats})" for build, stats in good.items() for line in complaints(build, stats)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("what, build", BAD)
def test_a_bad_tile_is_seen(what: str, build: Build, compiled: dict[Build, Stats]) -> None:
    assert any(what in line for line in complaints(build, compiled[build]))


GOOD_BUILD = Build("_scaled_matmul", 90, "bf16", "whole", 128, 256, 128, False, 8, 4)
GOOD_STATS = Stats(196608, 242, 0, 8, 0, 48, 0)
FAULTS: dict[str, Callable[[Stats], Stats]] = {
    "no wgmma": lambda s: s._replace(wgmma=0),
    "loads wait": lambda s: s._replace(async_loads=0),
    "in 32 bits": lambda s: s._replace(narrow_offsets=1),
    "bytes on the stack": lambda s: s._replace(stack=8),
    "shared memory, allowed 232448": lambda s: s._replace(shared=232449),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named(fault: str) -> None:
    assert not complaints(GOOD_BUILD, GOOD_STATS)
    assert any(fault in line for line in complaints(GOOD_BUILD, FAULTS[fault](GOOD_STATS)))


def test_older_tensor_cores_count_on_sm_80() -> None:
    older, stats = GOOD_BUILD._replace(capability=80), GOOD_STATS._replace(shared=98304, wgmma=0, mma=64)
    assert not complaints(older, stats)
    assert complaints(older, stats._replace(mma=0)) == ["no tensor cores on i8"]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
