"""One way to time a call, and one place for results."""

import json
import platform
import random
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
COLD = 96 << 20  # bytes of weights to rotate over: three times the largest cache that we expect


def device_name() -> str:
    """A folder name for the results of this machine's CPU, the only device that the benchmarks use so far."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*: (.*)", text)
    name = model[1] if model else platform.processor()
    isa = "amx" if torch.cpu._is_amx_tile_supported() else torch.backends.cpu.get_cpu_capability().lower()
    return re.sub(r"\W+", "-", f"cpu {name} {isa} {torch.get_num_threads()} threads").strip("-").lower()


def copies(bytes_each: int) -> int:
    """How many copies of a weight make it cold: each call then reads memory, as in a model."""
    return max(1, -(-COLD // max(1, bytes_each)))


def alternate(calls: dict[str, Sequence[Callable[[], Any]]], seconds: float = 0.4) -> dict[str, float]:
    """Median seconds of each entry, measured in turns so that noise falls on all alike.

    The order of a turn is drawn anew each time: what ran before decides what is in the caches. An entry is a rotation
    of equivalent calls, each with a weight of its own.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for rotation in calls.values():
        rotation[0]()
    turn, start, order = 0, time.perf_counter(), random.Random(0)
    while turn < 5 or time.perf_counter() - start < seconds * len(calls):
        for name in order.sample(list(calls), len(calls)):
            rotation = calls[name]
            call = rotation[turn % len(rotation)]
            before = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - before)
        turn += 1
    return {name: statistics.median(found) for name, found in times.items()}


def save(name: str, rows: list[dict[str, Any]]) -> Path:
    """Write results/<device>/<name>.json with the versions they were measured with."""
    path = RESULTS / device_name() / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "device": device_name(),
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
    path.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    return path
