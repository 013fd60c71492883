"""Compiling the kernels of `quant_matmul` for GPUs that are not here: triton carries all it needs to build for one."""

import re
from collections.abc import Iterator
from itertools import product
from math import gcd
from pathlib import Path
from typing import Any, NamedTuple

from sass import dump_of, longest_loop, overwritten, resources

CAPABILITIES = (80, 90, 100)
AMD = 942  # gfx942
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, AMD: 64 * 1024}  # bytes that a program may have
# (bits, group, zero points); group 0: one scale a row
FORMATS = [(4, 128, False), (8, 0, False), (4, 32, True), (4, 64, False), (4, 0, False), (8, 128, True)]


class Build(NamedTuple):
    """A kernel to compile.

    kind: "whole" if programs share K without rest, else "tail"; "odd": rows of x start at any address; "experts": of a
    mixture. tile: a `Config` as a plain tuple, empty for `_dequantize`.
    """

    kernel: str
    target: int
    dtype: str
    bits: int
    group: int
    zero: bool
    tile: tuple[int, ...] = ()
    kind: str = "whole"


class Stats(NamedTuple):
    """What was built. `per_weight`: instructions of all lanes in the longest loop for one weight.

    A change of a tensor's layout that costs something shows as stores to shared memory, or as shuffles, in the loop.
    overwritten: see `sass.overwritten`.
    """

    shared: int
    registers: int
    stack: int
    tensor_cores: str
    weights_in_registers: bool
    stores_in_loop: int
    shuffles_in_loop: int
    spills_in_loop: int
    narrow_offsets: int
    per_weight: float
    overwritten: int


def builds(targets: tuple[int, ...], formats: list[tuple[int, int, bool]]) -> Iterator[Build]:
    """Every row of `config` for every format, split and whole, and what has one tile only."""
    from fastllm.kernels.quant_config import SMALL, rows_of, tile_of

    for i, (target, format) in enumerate(product(targets, formats)):
        one, other = ("fp16", "bf16") if i % 2 else ("bf16", "fp16")
        for row in rows_of(80 if target == AMD else target):
            tile = tile_of(row, format[0])
            yield Build(
                "_quant_matmul", target, one, *format, tuple(tile._replace(SPLIT_K=8)), ("tail", "whole")[i % 2]
            )
            if i < len(formats):
                yield Build("_quant_matmul", target, other, *format, tuple(tile))
        yield Build("_quant_matmul", target, "fp32", *format, tuple(SMALL.tile))
        yield Build("_quant_matmul", target, other, *format, tuple(SMALL.tile), "odd")
        yield Build("_quant_matmul", target, one, *format, tuple(tile_of(rows_of(target)[0], format[0])), "experts")
        yield Build("_dequantize", target, other, *format, (), "whole" if i % 3 else "odd")


def signature(build: Build, names: list[str]) -> tuple[dict[str, str], dict[str, Any], list[str]]:
    """Types of the arguments, values of those that are constants, and names of those that 16 divides."""
    from fastllm.kernels.quant_config import Config

    tile = Config(*build.tile)._asdict() if build.tile else {}
    span = gcd(build.group, 128)
    x = "*" + build.dtype
    pointers = {"x": x, "w": "*i16", "scale": x, "zero": "*u8", "bias": x, "y": x, "partial": "*fp32"}
    pointers |= {"tickets": "*i32", "slots": "*i32", "experts": "*i32"}
    absent = [] if build.zero else ["zero"]
    absent += ["partial", "tickets"] if tile.get("SPLIT_K", 1) == 1 else []
    absent += [] if build.kind == "experts" else ["slots", "experts"]
    constants = {
        **{"BITS": build.bits, "GROUP": build.group, "SPAN": span, "PTX": build.target != AMD},
        **{**tile, "RUN": min(span, tile.get("RUN", span)), "BLOCK_N": tile.get("BLOCK_N", 32)},
        **{"EVEN": build.kind == "whole", "stride_sg": 1, "stride_zg": 1},
        **dict.fromkeys(absent),
        **({} if build.kind == "experts" else {"per_token": 1}),
    }
    if build.dtype != "bf16" and "PRESCALE" in constants:
        constants["PRESCALE"] = False
    constants = {name: value for name, value in constants.items() if name in names}
    types = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in names}
    free = ("M", "steps", "per_token")
    divided = [n for n in names if n not in constants and (n in pointers or build.kind != "odd" and n not in free)]
    return types, constants, divided


def compile_one(build: Build, scratch: Path) -> Stats:
    import triton
    from bad_kernel import _bad_matmul
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fastllm.kernels.dequantize import _dequantize
    from fastllm.kernels.quant_config import Config, options_of
    from fastllm.kernels.quant_matmul import _quant_matmul

    kernels = {"_dequantize": _dequantize, "_quant_matmul": _quant_matmul, "_bad_matmul": _bad_matmul}
    kernel = kernels[build.kernel]
    names = kernel.arg_names
    types, constants, divided = signature(build, names)
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in divided},
    )
    tile = Config(*build.tile) if build.tile else Config(32, 0, 1, 0, False, 4, 3)
    options = options_of(tile, build.bits, build.group, build.kind == "whole")
    if build.target == AMD:
        options["num_stages"] = 2
    target = GPUTarget("hip", "gfx942", 64) if build.target == AMD else GPUTarget("cuda", build.target, 32)
    built = triton.compile(source, target=target, options=options)
    if build.target == AMD:
        return amd_stats(built)
    dump = dump_of(built, scratch)
    ttgir, ptx, loop = built.asm["ttgir"], built.asm["ptx"], longest_loop(dump)
    found = [name for name in ("wgmma.mma_async", "tcgen05.mma", "mma.sync") if name in ptx]
    return Stats(
        shared=built.metadata.shared,
        **resources(dump),
        tensor_cores=found[0] if found else "",
        weights_in_registers=all("dot_op" in line for line in re.findall(r".*warp_group_dot %.*", ttgir)),
        stores_in_loop=sum(" STS" in line for line in loop),
        spills_in_loop=sum(" STL" in line or " LDL" in line for line in loop),
        shuffles_in_loop=sum(" SHFL" in line or " MOVM" in line for line in loop),
        narrow_offsets=len(re.findall(r"arith\.muli .*tensor<\w+xi32>", built.asm["ttir"])),
        overwritten=overwritten(dump),
        per_weight=round(len(loop) * 32 * tile.num_warps / (128 * tile.BLOCKS * tile.BLOCK_N), 2),
    )


def amd_stats(built: Any) -> Stats:
    """Only what does not depend on NVIDIA's tools; the loop is not counted."""
    code = built.asm["amdgcn"]

    def value(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", code)[-1])

    return Stats(
        shared=built.metadata.shared,
        registers=value("vgpr_count"),
        stack=value("vgpr_spill_count") * 4,
        tensor_cores="v_mfma" if "v_mfma" in code else "",
        weights_in_registers=True,
        stores_in_loop=0,
        shuffles_in_loop=0,
        spills_in_loop=0,
        narrow_offsets=len(re.findall(r"arith\.muli .*tensor<\w+xi32>", built.asm["ttir"])),
        per_weight=0.0,
        overwritten=0,
    )
