"""From how many rows of x on dequantising the weight and the library's product are faster than the fused kernel."""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from measure import cold_bytes, copies, measure, ready
from providers import CHUNKS, FUSED, WHOLE, Dense, Kernel, Problem, fresh_tickets

from fastllm.formats import IntFormat

CROSSOVER = [64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048]


def crossover(format: IntFormat, shapes: Sequence[tuple[int, int]], gpu: Any, until: float) -> list[dict[str, Any]]:
    """Speed over the dense product of the fused kernel and of dequantising, by M; see `from_which`."""
    found = []
    for N, K in shapes:
        problem = Problem(format, N, K, torch.bfloat16, "cuda")
        kinds = [Dense(torch.bfloat16), *(Kernel(name) for name in (FUSED, WHOLE, CHUNKS))]
        made = {kind.name: kind.prepare(problem) for kind in kinds}
        states = {n: [o.make() for _ in range(copies(o.bytes, cold_bytes("cuda")))] for n, o in made.items()}
        for M in CROSSOVER:
            if time.perf_counter() > until:
                break
            x = torch.randn(M, K, dtype=torch.bfloat16, device="cuda")
            kept, runners = [], {}
            for name in made:
                kept.append(fresh_tickets())
                runners[name] = ready([partial(made[name].run, state, x) for state in states[name]], gpu)
            times = {name: timing.median for name, timing in measure(runners, "bf16", 0.0, gpu).items()}
            found.append({"format": format.name, "N": N, "K": K, "M": M, "seconds": times})
    return found


def from_which(rows: Sequence[dict[str, Any]], N: int, K: int) -> int | None:
    """The smallest M that was measured from which on dequantising is always faster than the fused kernel."""
    mine = sorted((row for row in rows if (row["N"], row["K"]) == (N, K)), key=lambda row: -row["M"])
    found = None
    for row in mine:
        if min(row["seconds"][WHOLE], row["seconds"][CHUNKS]) >= row["seconds"][FUSED]:
            break
        found = row["M"]
    return found


def crossings(rows: Sequence[dict[str, Any]]) -> str:
    keys = dict.fromkeys((row["format"], row["N"], row["K"]) for row in rows)
    lines = []
    for name, N, K in keys:
        mine = [row for row in rows if row["format"] == name]
        lines.append(f"{name} {N} x {K}: dequantise + cuBLAS is faster from M={from_which(mine, N, K)} on")
        lines += [
            f"    M {r['M']:5}  " + "  ".join(f"{n} {r['seconds']['bf16'] / t:.2f}x" for n, t in r["seconds"].items())
            for r in mine
            if (r["N"], r["K"]) == (N, K)
        ]
    return "\n".join(lines)
