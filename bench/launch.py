"""What a call costs the host: microseconds to launch it, and seconds of the first call of a shape, which compiles.

    python bench/launch.py        (on a machine with a CUDA GPU; prints JSON)

The benchmark runs it as a process of its own, with an empty cache of compiled kernels.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

TINY, CALLS, BATCHES = 256, 100, 30
FIRST = [1, 2, 16, 17, 32, 64, 128, 512, 2048]  # rows: every bucket of tiles, and its neighbours
SHAPE = (4096, 4096)
MARK = "launch costs: "


def launch_us(call: Callable[[], Any], calls: int = CALLS, batches: int = BATCHES) -> float:
    """Microseconds of the host for a call that the device finishes later: the median over batches of calls."""
    found = []
    for _ in range(batches):
        torch.cuda.synchronize()
        before = time.perf_counter()
        for _ in range(calls):
            call()
        found.append((time.perf_counter() - before) / calls * 1e6)
    return statistics.median(found)


def first_calls() -> dict[str, float]:
    """Seconds of the first call at each number of rows. The very first also starts Triton; it is called "start"."""
    from fastllm import QuantLinear

    N, K = SHAPE
    found = {}
    dense = torch.nn.Linear(K, N, bias=False, dtype=torch.bfloat16, device="cuda")
    layers = {name: QuantLinear.from_linear(dense, name) for name in ("int8", "int4-g128")}
    torch.cuda.synchronize()
    for name, rows in [("int8", 1), *(("int4-g128", M) for M in FIRST)]:
        x = torch.randn(rows, K, dtype=torch.bfloat16, device="cuda")
        torch.nn.functional.linear(x, dense.weight)  # cuBLAS starts up, too
        torch.cuda.synchronize()
        before = time.perf_counter()
        layers[name](x)
        torch.cuda.synchronize()
        found[f"M={rows}" if found else "start"] = time.perf_counter() - before
    return found


def costs() -> dict[str, Any]:
    from fastllm import QuantLinear

    first = first_calls()
    dense = torch.nn.Linear(TINY, TINY, bias=False, dtype=torch.bfloat16, device="cuda")
    layer = QuantLinear.from_linear(dense, "int4-g128")
    x = torch.randn(1, TINY, dtype=torch.bfloat16, device="cuda")
    calls = {"fastllm": partial(layer, x), "bf16": partial(dense, x)}
    for call in calls.values():
        call()
    us = {name: launch_us(call) for name, call in calls.items()}
    return {"launch_us": us, "first_call_s": first, "new_shape_s": max(t for n, t in first.items() if n != "start")}


def measured() -> dict[str, Any]:
    """`costs`, from a process whose cache of compiled kernels is empty; the reason if that fails."""
    with tempfile.TemporaryDirectory() as cache:
        here = os.path.dirname(os.path.abspath(__file__))
        path = os.pathsep.join([os.path.dirname(here), *filter(None, [os.environ.get("PYTHONPATH")])])
        done = subprocess.run(
            [sys.executable, os.path.join(here, "launch.py")],
            env={**os.environ, "TRITON_CACHE_DIR": cache, "PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not lines:
        return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1]}
    return json.loads(lines[-1].removeprefix(MARK))


def shown(found: dict[str, Any]) -> str:
    if "error" in found:
        return f"launch costs could not be measured: {found['error']}"
    us = ", ".join(f"{name} {value:.1f} us" for name, value in found["launch_us"].items())
    first = ", ".join(f"{name} {value:.2f} s" for name, value in found["first_call_s"].items())
    return f"eager launch: {us}; first calls: {first}"


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("launch costs are measured on a CUDA GPU; torch sees none here")
    with torch.inference_mode():
        print(MARK + json.dumps(costs()))


if __name__ == "__main__":
    main()
