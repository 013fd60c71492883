"""What the compiler makes of the prefill kernel for absent GPUs: registers, shared memory, tensor cores, the loop."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from offline import SHARED
from sass import dump_of, lines_of, longest_loop, loops, overwritten, resources

# Bytes that may be spilled, and the share of a loop's instructions that may look at them. What assemblers before CUDA
# 13 make of sm_90 spills nothing for plain attention of 64 and 128 columns; later ones keep less in registers.
SPILL, LOOKS = 96, 0.032
# Instructions of a lane for a score of a tile that needs no mask, addresses included: what a multiprocessor of sm_90
# issues (128 a clock) while its tensor cores (4096 operations a clock) do the 2 (D + Dv) of a score is (D + Dv) / 16.
FEWEST = 10.5  # narrow heads, where the softmax takes longer than the products, may have so many


class Build(NamedTuple):
    """A kernel to compile. tile: a `Config` as a plain tuple. features: what of FEATURES it has."""

    target: int
    dtype: str
    D: int
    Dv: int
    tile: tuple
    features: tuple[str, ...] = ("causal",)


FEATURES = ("causal", "window", "softcap", "sinks", "alibi", "mask", "added mask", "ranges", "varlen", "lse")
POINTERS = {"sinks": "sinks", "alibi": "slopes", "ranges": "kv_start kv_end", "varlen": "cu_q cu_k", "lse": "lse"}


class Stats(NamedTuple):
    """Of what was built; the loop is the longest. waits: on products, in that loop. overwritten: see sass.py."""

    shared: int
    registers: int
    stack: int
    tensor_cores: str
    weights_in_registers: bool
    loop: int
    stores_in_loop: int
    spills_in_loop: int
    exponentials: int
    waits: int
    async_loads: int
    overwritten: int


def scores(build: Build) -> float:
    """Of a tile, for each lane."""
    return build.tile[0] * build.tile[1] / (32 * build.tile[2])


def complaints(build: Build, stats: Stats) -> list[str]:
    hopper, exact = build.target == 90 and build.dtype != "fp32", build.dtype == "fp32"
    masked = bool({"mask", "added mask"} & {*build.features})
    plain = not masked and not {"softcap", "alibi", "window"} & {*build.features}
    budget = max(FEWEST, (build.D + build.Dv) / 16)
    parts = 2 if build.D not in (16, 32, 64, 128, 256) else 1
    limits: dict[str, tuple[float, float]] = {
        "shared memory": (stats.shared, SHARED[build.target]),
        "bytes on the stack": (stats.stack, SPILL),
        "spills in the loop": (stats.spills_in_loop, LOOKS * stats.loop),
        # P, as the left operand, goes from registers to the tensor cores; a mask comes through shared memory
        "stores to shared memory in the loop": (stats.stores_in_loop if hopper and not masked else 0, 0),
        # one for the scores; were it more, the softmax would run beside no product
        "waits on products": (stats.waits if hopper and build.tile[4] else 0, parts),
        "writes to registers that products have yet to read": (stats.overwritten, 0),
        "instructions per score": (stats.loop / scores(build) if hopper and plain else 0, budget),
        "exponentials": (stats.exponentials if hopper and plain else 0, scores(build) + 2 * build.tile[0] / 64),
    }
    found = [f"{value} {what}, allowed {limit}" for what, (value, limit) in limits.items() if value > limit]
    wanted = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[build.target]
    found += [f"no {wanted}"] if not exact and stats.tensor_cores != wanted else []
    found += ["weights go through shared memory"] if hopper and not stats.weights_in_registers else []
    found += ["loads wait"] if not exact and not stats.async_loads else []
    return found


MANY = ("causal", "window", "softcap", "ranges", "sinks", "lse")
SETS = [("causal", "lse"), (), MANY, ("causal", "alibi", "mask"), ("added mask",), ("varlen", "window", "causal")]


def builds(which: str) -> Iterator[Build]:
    """Every row of `config`; "few": those for many queries, with few features."""
    from fastllm.kernels.attention_config import AMPERE, BLACKWELL, EXACT, HOPPER

    for target, rows in ((80, AMPERE), (90, HOPPER), (100, BLACKWELL)):
        for width, (many, few, changed) in rows.items():
            Dv = 128 if width == 192 else width
            if which == "few":
                if target == 90 and width != 192:
                    yield Build(target, "bf16", width, Dv, tuple(many), ("causal", "lse"))
                elif width == 128:
                    yield Build(target, "fp16", width, Dv, tuple(changed), MANY)
                continue
            for i, features in enumerate(SETS):
                changes = {"softcap", "alibi", "mask", "added mask"} & {*features}
                yield Build(target, ("bf16", "fp16")[i % 2], width, Dv, tuple(changed if changes else many), features)
            yield Build(target, "bf16", width, Dv, tuple(few), ("causal", "sinks", "ranges"))
        if which != "few":
            for D in (72, 80, 96, 112):
                yield Build(target, "bf16", D, D, tuple(rows[128][0]), ("causal", "ranges"))
                yield Build(target, "bf16", D, D, tuple(rows[128][2]), MANY)
            for D in (64, 128):
                yield Build(target, "fp32", D, D, tuple(EXACT), ("causal", "ranges", "lse"))


BAD = {
    "shared memory": Build(90, "bf16", 256, 256, (128, 128, 8, 3, True, 256)),
    "bytes on the stack": Build(90, "bf16", 128, 128, (128, 128, 4, 2, True, 256)),
    "weights go through shared memory": Build(90, "bf16", 64, 64, (32, 64, 4, 2, False, 256)),
    "stores to shared memory": Build(90, "bf16", 64, 64, (64, 64, 8, 2, True, 256)),
    "loads wait": Build(80, "bf16", 64, 64, (128, 64, 4, 1, False, 256)),
}


def compile_one(build: Build, scratch: Path) -> Stats:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fastllm.kernels.attention_config import Config
    from fastllm.kernels.flash_attention import _flash_attention, _plan

    tile, has, x = Config(*build.tile), {*build.features}, "*" + build.dtype
    lowest = -3e38 if "added mask" in has else None
    flags = ("causal" in has, "window" in has, "softcap" in has, lowest)
    constants: dict[str, Any] = dict(_plan(build.D, build.Dv, 4, flags, tile).constants)
    for feature, names in POINTERS.items():
        constants |= {} if feature in has else dict.fromkeys(names.split())
    masked = bool(has & {"mask", "added mask"})
    constants |= {"stride_bn": 1} if masked else {"bias": None}
    types = dict.fromkeys(("q", "k", "v", "out", "sinks", "bias"), x) | {"lse": "*fp32", "slopes": "*fp32"}
    types |= dict.fromkeys(("kv_start", "kv_end", "cu_q", "cu_k"), "*i32") | {"scale": "fp32", "softcap": "fp32"}
    types |= {"bias": "*u8"} if "mask" in has else {}
    names = _flash_attention.arg_names
    divided = [n for n in names if (n.startswith("stride") or types.get(n, "").startswith("*")) and n not in constants]
    source = ASTSource(
        fn=_flash_attention,
        signature={n: "constexpr" if n in constants else types.get(n, "i32") for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in divided},
    )
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return measured(triton.compile(source, target=GPUTarget("cuda", build.target, 32), options=options), scratch)


def measured(built: Any, scratch: Path) -> Stats:
    dump = dump_of(built, scratch)
    ttgir, ptx, loop = built.asm["ttgir"], built.asm["ptx"], main_loop(dump)
    found = [name for name in ("wgmma.mma_async", "tcgen05.mma", "mma.sync") if name in ptx]
    return Stats(
        shared=built.metadata.shared,
        **resources(dump),
        tensor_cores=found[0] if found else "",
        # the left operand of a product whose sums go on is P
        weights_in_registers="warp_group_dot" in ttgir and "opIdx = 0" in ttgir,
        loop=len(loop),
        stores_in_loop=sum(" STS" in line for line in loop),
        spills_in_loop=sum(" STL" in line or " LDL" in line for line in loop),
        exponentials=sum("MUFU.EX2" in line for line in loop),
        waits=sum("WARPGROUP.DEPBAR" in line for line in loop),
        async_loads=len(re.findall(r"cp\.async\.cg.* 0x10", ptx)),
        overwritten=overwritten(dump),
    )


def main_loop(dump: str) -> list[str]:
    """The longest loop with a product, without what a branch to later in the loop leaves out: the mask, on sm_90."""
    lines = lines_of(dump)
    bodies = [lines[start : end + 1] for start, end in loops(lines)]
    bodies = [body for body in bodies if any("HGMMA" in text or "HMMA" in text for _, text in body)]
    if not bodies:
        return longest_loop(dump)
    body, until = max(bodies, key=len), 0
    taken = []
    for address, text in body:
        if address >= until:
            taken.append(text)
            branch = re.search(r"@!?U?P\w+ BRA\b.*?0x([0-9a-f]+)", text)
            until = int(branch[1], 16) if branch and int(branch[1], 16) <= body[-1][0] else 0
    return taken


def main(which: str, scratch: Path) -> None:
    """Compile and print one JSON object a line. A process of its own: the tests' own process interprets kernels."""
    for build in dict.fromkeys([*builds(which), *BAD.values()]):
        print(json.dumps([build, compile_one(build, scratch)]), flush=True)


@pytest.fixture(scope="module", params=["few", pytest.param("all", marks=pytest.mark.slow)])
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[Build, Stats]:
    scratch = tmp_path_factory.mktemp("compiled")
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parent), environ.get("PYTHONPATH", "")]
    environ |= {"TRITON_CACHE_DIR": str(scratch), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, __file__, request.param, scratch]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pairs = [json.loads(line) for line in done.stdout.splitlines()]
    return {Build(*b[:4], tuple(b[4]), tuple(b[5])): Stats(*stats) for b, stats in pairs}


def test_every_tile_compiles_well(compiled: dict[Build, Stats]) -> None:
    good = {build: stats for build, stats in compiled.items() if build not in BAD.values()}
    assert {build.target for build in good} == {80, 90, 100}
    found = [f"{build}: {line} ({stats})" for build, stats in good.items() for line in complaints(build, stats)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("what", BAD)
def test_a_bad_tile_is_seen(what: str, compiled: dict[Build, Stats]) -> None:
    assert any(what in line for line in complaints(BAD[what], compiled[BAD[what]])), compiled[BAD[what]]


GOOD_BUILD = Build(90, "bf16", 128, 128, (128, 128, 8, 3, True, 256))
GOOD_STATS = Stats(229376, 255, 0, "wgmma.mma_async", True, 690, 0, 0, 66, 1, 48, 0)
FAULTS: dict[str, Callable[[Stats], Stats]] = {
    "shared memory": lambda s: s._replace(shared=232449),
    "104 bytes on the stack": lambda s: s._replace(stack=104),
    "spills in the loop": lambda s: s._replace(spills_in_loop=30),
    "stores to shared": lambda s: s._replace(stores_in_loop=8),
    "waits on products": lambda s: s._replace(waits=16),
    "yet to read": lambda s: s._replace(overwritten=1),
    "instructions per score": lambda s: s._replace(loop=1100),
    "exponentials": lambda s: s._replace(exponentials=132),
    "no wgmma": lambda s: s._replace(tensor_cores="mma.sync"),
    "weights go through": lambda s: s._replace(weights_in_registers=False),
    "loads wait": lambda s: s._replace(async_loads=0),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named(fault: str) -> None:
    assert not complaints(GOOD_BUILD, GOOD_STATS)
    found = complaints(GOOD_BUILD, FAULTS[fault](GOOD_STATS))
    assert len(found) == 1 and fault in found[0]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
