"""The small fused ops around attention on this machine, against torch's eager formulation, as transformers writes it.

    python bench/bench_fused.py [--device cuda] [--dtype bfloat16] [--only norm] [--seconds 0.15]

Runs on the GPU if there is one, else on the CPU. On a GPU each candidate is a CUDA graph over rotating, cold copies of
its operands; on a CPU calls are taken in turns. Outputs are checked before anything is timed. GB/s count every operand
and result once. Writes bench/results/<device>/fused.json and .md.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measure import Cuda, cold_bytes, copies, error_of, measure, ready
from report import markdown_table
from results import RESULTS, about, device_name, write
from torch import Tensor
from torch.nn import functional as F

from fastllm.ops.append_kv import append_kv
from fastllm.ops.gated_activation import gated_activation_pair
from fastllm.ops.norm import layer_norm, norm_add_norm, rms_norm
from fastllm.ops.rotary import rotary

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
BOUND = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}  # relative error of a result
TOKENS = {"cpu": (1, 512), "cuda": (1, 16, 4096)}
Call = Callable[..., Tensor]


class Case(NamedTuple):
    """An op: `make` gives operands, `own` and `eager` a result from them, `moved` the bytes that must move."""

    name: str
    shape: str
    make: Callable[[], tuple[Tensor, ...]]
    own: Call
    eager: Call
    moved: int


def llama_norm(x: Tensor, weight: Tensor) -> Tensor:
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * h.to(x.dtype)


def gemma_norm(x: Tensor, weight: Tensor) -> Tensor:
    """weight: as in a checkpoint, less 1."""
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (h * (1.0 + weight.float())).type_as(x)


def half_turn(x: Tensor) -> Tensor:
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1)


def eager_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + half_turn(q) * sin, k * cos + half_turn(k) * sin


def eager_append(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, w: Tensor, keys: Tensor, values: Tensor, at: Tensor
) -> Tensor:
    """What Qwen 3 and a static cache do."""
    q, k = eager_rotary(llama_norm(q, w), llama_norm(k, w), cos, sin)
    keys.index_copy_(2, at, k)
    values.index_copy_(2, at, v)
    return q


def eager_sandwich(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    return gemma_norm(residual + gemma_norm(x, weight), weight)


def eager_add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    return llama_norm(x + residual, weight)


def row_cases(M: int, D: int, dtype: torch.dtype, device: str) -> list[Case]:
    """Norms of M rows of D numbers, and the activation of M rows of twice 4 D."""
    size = M * D * dtype.itemsize

    def rows(count: int, width: int = D) -> tuple[Tensor, ...]:
        return tuple(torch.randn(M, width, dtype=dtype, device=device) for _ in range(count))

    def weight() -> Tensor:
        return torch.rand(D, device=device).to(dtype)

    shape = f"{M} x {D}"
    return [
        Case("rms_norm", shape, lambda: (*rows(1), weight()),
             lambda x, w: rms_norm(x, w, 1e-6, cast_first=True), llama_norm, 2 * size),
        Case("add + rms_norm", shape, lambda: (*rows(2), weight()),
             lambda x, r, w: rms_norm(x, w, 1e-6, residual=r, cast_first=True)[0], eager_add_norm, 4 * size),
        Case("norm + add + norm", shape, lambda: (*rows(2), weight()),
             lambda x, r, w, cache={}: norm_add_norm(x, r, *2 * (plus_one(w, cache),), 1e-6, 1e-6)[0],
             eager_sandwich, 4 * size),
        Case("layer_norm", shape, lambda: (*rows(1), weight()),
             lambda x, w: layer_norm(x, w, w, 1e-6), lambda x, w: F.layer_norm(x, (D,), w, w, 1e-6), 2 * size),
        Case("silu * up", f"{M} x {4 * D}", lambda: rows(2, 4 * D),
             lambda g, u: gated_activation_pair(g, u, "silu"), lambda g, u: F.silu(g) * u, 12 * size),
        Case("gelu_tanh * up", f"{M} x {4 * D}", lambda: rows(2, 4 * D), lambda g, u: gated_activation_pair(g, u,
             "gelu_tanh"), lambda g, u: F.gelu(g, approximate="tanh") * u, 12 * size),
    ]  # fmt: skip


def plus_one(w: Tensor, cache: dict[int, Tensor]) -> Tensor:
    """1 + w in float32, made once for each weight, as a patched model keeps it."""
    if id(w) not in cache:
        cache[id(w)] = 1.0 + w.float()
    return cache[id(w)]


def head_cases(M: int, Hq: int, Hk: int, D: int, dtype: torch.dtype, device: str) -> list[Case]:
    """M tokens of one sequence, a cache of 1024 slots more."""
    size = M * D * dtype.itemsize

    def heads() -> tuple[Tensor, ...]:
        y = torch.randn(1, M, (Hq + 2 * Hk) * D, dtype=dtype, device=device)
        q, k, v = y.view(1, M, -1, D).transpose(1, 2).split((Hq, Hk, Hk), 1)
        angle = torch.rand(1, M, D // 2, device=device)
        table = torch.cat((angle, angle), -1)
        return q, k, v, table.cos().to(dtype), table.sin().to(dtype)

    def all_of() -> tuple[Tensor, ...]:
        cache = torch.zeros(2, 1, Hk, 1024 + M, D, dtype=dtype, device=device)
        return *heads(), torch.ones(D, dtype=dtype, device=device), *cache, torch.arange(9, 9 + M, device=device)

    def own(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, w: Tensor, *rest: Tensor) -> Tensor:
        return append_kv(q, k, v, cos, sin, *rest, q_weight=w, k_weight=w, cast_first=True)

    shape = f"{M} x ({Hq} + 2 x {Hk}) x {D}"
    return [
        Case("rotary", shape, heads, lambda q, k, v, c, s: rotary(q, k, c, s)[0],
             lambda q, k, v, c, s: eager_rotary(q, k, c, s)[0], 2 * (Hq + Hk + 1) * size),
        Case("norm + rotary + append", shape, all_of, own, eager_append, 2 * (Hq + 2 * Hk + 1) * size),
    ]  # fmt: skip


def bench(case: Case, dtype: torch.dtype, seconds: float, gpu: Any) -> dict[str, Any]:
    """Seconds of both, and their relative difference; SystemExit if they do not agree."""
    device = "cpu" if gpu is None else "cuda"
    count = min(copies(case.moved, cold_bytes(device)), 64 if gpu is None else 4096)
    sets = [case.make() for _ in range(count)]
    want, got = case.eager(*sets[0]), case.own(*sets[0])
    error = error_of(got, want.float())
    if not error <= BOUND[dtype]:
        raise SystemExit(f"{case.name} {case.shape}: relative difference {error:.1e}, allowed {BOUND[dtype]:.0e}")
    rotations = {"eager": [partial(case.eager, *s) for s in sets], "fastllm": [partial(case.own, *s) for s in sets]}
    runners: Any = rotations if gpu is None else {name: ready(calls, gpu) for name, calls in rotations.items()}
    times = measure(runners, "eager", seconds, gpu)
    return {
        "op": case.name, "shape": case.shape, "dtype": str(dtype)[6:], "bytes": case.moved, "error": error,
        "seconds": {name: t.median for name, t in times.items()},
        "p10": {name: t.p10 for name, t in times.items()}, "p90": {name: t.p90 for name, t in times.items()},
        "mode": {name: t.mode for name, t in times.items()},
    }  # fmt: skip


def cells(row: dict[str, Any]) -> list[str]:
    own, eager = row["seconds"]["fastllm"], row["seconds"]["eager"]
    micro = [f"{1e6 * eager:.1f}", f"{1e6 * own:.1f}", f"{eager / own:.2f}", f"{row['bytes'] / own / 1e9:.1f}"]
    return [row["op"], row["shape"], row["dtype"], *micro]


def markdown(rows: list[dict[str, Any]]) -> str:
    header = ["op", "shape", "dtype", "eager us", "fastllm us", "ratio", "GB/s"]
    return "Medians; eager: torch, as transformers writes it.\n\n" + markdown_table(
        header, [cells(row) for row in rows]
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=auto, help="default here: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--rows", help="tokens, such as 1,512")
    parser.add_argument("--only", default="", help="a word that the names of the ops to run contain")
    parser.add_argument("--seconds", type=float, help="per candidate (default: 0.15; 0.02 on a GPU)")
    parser.add_argument("--out", type=Path, help="folder (default: bench/results/<device>)")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch sees no GPU here")
    gpu = Cuda() if args.device == "cuda" else None
    tokens = [int(M) for M in args.rows.split(",")] if args.rows else TOKENS[args.device]
    seconds = args.seconds if args.seconds is not None else 0.15 if gpu is None else 0.02
    dtype, rows = DTYPES[args.dtype], []
    # of Gemma 3 270M and Llama 3.2 1B on a CPU, of Llama 3.1 8B on a GPU
    sizes = ((640, 4, 1, 256), (2048, 32, 8, 64)) if gpu is None else ((4096, 32, 8, 128),)
    with torch.inference_mode():
        for D, *heads in sizes:
            for M in tokens:
                for case in (*row_cases(M, D, dtype, args.device), *head_cases(M, *heads, dtype, args.device)):
                    if args.only in case.name:
                        rows.append(bench(case, dtype, seconds, gpu))
                        print("  ".join(cells(rows[-1])), flush=True)
    path = write((args.out or RESULTS / device_name(args.device)) / "fused.json", about(args.device), rows)
    path.with_suffix(".md").write_text(markdown(rows))
    print(f"written: {path}")


if __name__ == "__main__":
    main()
