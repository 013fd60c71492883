"""What the compiler makes of the fused kernels for absent GPUs, exactly as they are launched: no spills, and memory
read and written 16 bytes at a time."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from sass import dump_of, resources

HERE = Path(__file__)
ODD = ("odd", "interleaved")  # words in the names of cases whose reads cannot all be of 16 bytes


class Stats(NamedTuple):
    """What was built. wide: reads and writes of memory of 16 bytes; narrow: of 1 or 2 bytes."""

    registers: int
    stack: int
    shared: int
    wide: int
    wide_stores: int
    narrow: int
    narrow_stores: int
    warps: int


def norm_cases(torch: Any) -> dict[str, Callable[[], Any]]:
    from fastllm.kernels.norm import norm

    found: dict[str, Callable[[], Any]] = {}
    brain, half = torch.bfloat16, torch.float16
    for M, D, dtype in ((1, 4096, brain), (1, 640, half), (4096, 4096, brain), (2048, 128, half), (7, 641, brain),
                        (2, 16384, brain), (2, 16384, torch.float32)):  # fmt: skip
        x, w = torch.zeros(M, D, dtype=dtype), torch.ones(D)
        odd = " odd" if D % 8 else ""
        name = f"{M} x {D} {str(dtype)[6:]}{odd}"
        found[f"rms {name}"] = lambda x=x, w=w: norm(x, None, None, w, None, None, 1e-6)
        found[f"add rms {name}"] = lambda x=x, w=w: norm(x, x, None, w.to(x.dtype), None, None, 1e-6, False, True)
        found[f"rms add rms {name}"] = lambda x=x, w=w: norm(x, x, w, w, None, 1e-6, 1e-6)
        found[f"layer {name}"] = lambda x=x, w=w: norm(x, None, None, w, w, None, 1e-6, True)
    return found


def head_cases(torch: Any) -> dict[str, Callable[[], Any]]:
    from fastllm.kernels.append_kv import Store, append_kv
    from fastllm.kernels.rotary import rotary
    from fastllm.kv_formats import KV_FORMATS

    found: dict[str, Callable[[], Any]] = {}
    for D, S, R, kind in ((128, 1, 128, ""), (128, 99, 128, ""), (64, 1, 64, ""), (256, 1, 256, ""), (80, 65, 80, ""),
                          (128, 1, 64, "partial"), (128, 99, 128, "interleaved")):  # fmt: skip
        qkv = torch.zeros(1, S, 48 * D, dtype=torch.bfloat16).view(1, S, 48, D).transpose(1, 2)
        q, k, v = qkv.split((32, 8, 8), 1)
        cos, w = torch.zeros(1, S, R, dtype=torch.bfloat16), torch.ones(D)
        name, paired = f"{S} x {D} {kind}", kind == "interleaved"
        found[f"rotary {name}"] = lambda q=q, k=k, cos=cos, paired=paired: rotary(q, k, cos, cos, paired)
        for format in (None, *KV_FORMATS):
            rows = torch.zeros(1, 8, 512, D, dtype=torch.bfloat16)
            f = KV_FORMATS[format] if format else None
            if f is not None and f.reasons(D):
                continue
            cache, scale = f.quantize(rows) if f is not None else (rows, None)
            slots = torch.zeros(S, dtype=torch.int64)
            pages, table = cache.view(32, 8, 16, -1), torch.zeros(1, 32, dtype=torch.int32)
            page_scale = None if scale is None else scale.view(32, 8, 16, *scale.shape[3:])
            plain = Store(cache, cache, scale, scale, slots, 0, None, f.bits if f else 16)
            paged = Store(pages, pages, page_scale, page_scale, None, 5, table, plain.bits)
            for what, store, weight in (("append", plain, None), ("norm append paged", paged, w)):
                found[f"{what} {format} {name}"] = lambda q=q, k=k, v=v, c=cos, w=weight, s=store, p=paired: append_kv(
                    q, k, v, c, c, w, w, s, 1e-6, False, p
                )
    return found


def gated_cases(torch: Any) -> dict[str, Callable[[], Any]]:
    from fastllm.kernels.gated_activation import KINDS, gated_activation

    x, odd = torch.zeros(300, 2 * 14336, dtype=torch.bfloat16), torch.zeros(3, 2 * 1027, dtype=torch.float16)
    found: dict[str, Callable[[], Any]] = {
        f"gated {k}": lambda k=k: gated_activation(*x.chunk(2, 1), k) for k in KINDS
    }
    found["gated silu, one row"] = lambda: gated_activation(*x[:1].chunk(2, 1), "silu")
    found["gated silu, odd"] = lambda: gated_activation(*odd.chunk(2, 1), "silu")
    return found


def complaints(name: str, stats: Stats) -> list[str]:
    found = [f"{stats.stack} bytes on the stack"] if stats.stack else []
    found += [f"{stats.shared} bytes of shared memory"] if stats.shared > 48 * 1024 else []
    found += [f"{stats.registers} registers do not fit"] if stats.registers * 32 * stats.warps > 65536 else []
    if any(word in name for word in ODD):
        return found
    found += [] if stats.wide else ["no reads of 16 bytes"]
    found += [] if stats.wide_stores else ["no writes of 16 bytes"]
    # codes of a byte, and scales of four or two, are all that may be written in less
    # heads of one token share its cos and sin, which are few
    found += (
        [f"{stats.narrow} narrow reads"] if stats.narrow > (4 if "append" in name or "rotary" in name else 0) else []
    )
    found += [f"{stats.narrow_stores} narrow writes"] if stats.narrow_stores and "int" not in name else []
    return found


def stats_of(built: Any, scratch: Path) -> Stats:
    dump = dump_of(built, scratch)

    def count(pattern: str) -> int:
        return len(re.findall(pattern, dump))

    return Stats(
        **resources(dump),
        shared=built.metadata.shared,
        wide=count(r"\bLDG\.E\S*\.128"),
        wide_stores=count(r"\bSTG\.E\S*\.128"),
        narrow=count(r"\bLDG\.E\S*\.[US](?:8|16)"),
        narrow_stores=count(r"\bSTG\.E\S*\.[US](?:8|16)"),
        warps=built.metadata.num_warps,
    )


def main(capability: int, scratch: Path) -> None:
    """Launch every case on a GPU that is not there and print {name: stats}. In a process that interprets nothing."""
    import torch
    from test_launch import Driver, Launcher, plain
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from fastllm.kernels import append_kv, gated_activation, norm, rotary
    from fastllm.kernels import launch as shortcut

    class Absent(Driver):
        def get_current_target(self) -> Any:
            return GPUTarget("cuda", capability, 32)

    driver.set_active(Absent())
    built: list[Any] = []

    def launch(kernel: Any, grid: Any, pointers: Any, numbers: Any, plan: Any, kind: Any) -> None:
        built.append(kernel[grid](*pointers, *numbers, **plan.constants, **plan.options))
        for _ in range(2):  # the second time without triton's look at the arguments
            shortcut.launch(kernel, grid, pointers, numbers, plan, kind)

    for module in (append_kv, gated_activation, norm, rotary):
        module.launch = launch  # type: ignore[attr-defined]
    found = {}
    for name, call in {**norm_cases(torch), **head_cases(torch), **gated_cases(torch)}.items():
        built.clear()
        Launcher.launched.clear()
        call()
        assert len(built) == 1, f"{name}: {len(built)} launches"
        first, *again = plain(Launcher.launched)
        assert again == [first, first], f"{name}: launched {again} after {first}"
        found[name] = stats_of(built[0], scratch)
    print(json.dumps(found))


def compiled(capability: int, scratch: Path) -> dict[str, Stats]:
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(HERE.parents[1]), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    environ |= {"TRITON_CACHE_DIR": str(scratch), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, str(HERE), str(capability), str(scratch)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name: Stats(*stats) for name, stats in json.loads(done.stdout).items()}


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_every_kernel_compiles_well(capability: int, tmp_path: Path) -> None:
    found = compiled(capability, tmp_path)
    assert len(found) > 70
    wrong = [f"{name}: {line} ({stats})" for name, stats in found.items() for line in complaints(name, stats)]
    assert not wrong, "\n".join(wrong)


GOOD = Stats(40, 0, 64, 4, 2, 0, 0, 8)
FAULTS: dict[str, Callable[[Stats], Stats]] = {
    "bytes on the stack": lambda s: s._replace(stack=8),
    "shared memory": lambda s: s._replace(shared=50000),
    "do not fit": lambda s: s._replace(registers=255, warps=16),
    "no reads": lambda s: s._replace(wide=0),
    "no writes": lambda s: s._replace(wide_stores=0),
    "narrow reads": lambda s: s._replace(narrow=1),
    "narrow writes": lambda s: s._replace(narrow_stores=1),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named(fault: str) -> None:
    assert not complaints("rms", GOOD)
    assert any(fault in line for line in complaints("rms", FAULTS[fault](GOOD)))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
