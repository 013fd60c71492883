"""What this machine's GPU can do at best: the bandwidth of its memory and its rate of multiplying, measured.

The bandwidth that others are compared with is the larger of two: a copy (bytes read and bytes written) and a sum
(bytes read), since a quantized product mostly reads.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measure import Cuda, measure, ready

SIZE = 8192  # of the square product
BYTES = 2 << 30  # of the buffers that are copied and summed


def bandwidths(read: dict[str, float], copy: float, size: int) -> dict[str, float]:
    """Bytes per second: from the seconds that sums over `size` bytes took, and a copy of as many."""
    found = {"copy": 2 * size / copy, "read": size / min(read.values())}
    return found | {"bandwidth": max(found.values())}


def ceilings(gpu: Any, size: int = BYTES, side: int = SIZE) -> dict[str, float]:
    """Bytes per second as `bandwidths` has them, and the operations per second of bfloat16 and float16 products."""
    times = {}
    source = torch.randn(size // 4, device="cuda")
    target = torch.empty_like(source)
    work: dict[str, Callable[[], Any]] = {
        "copy": partial(target.copy_, source),
        "sum": source.sum,
        "amax": source.amax,
        "sum of bfloat16": source.view(torch.bfloat16).nan_to_num_(0.0, 0.0, 0.0).sum,
    }
    runners = {name: ready([call], gpu) for name, call in work.items()}
    for name, timing in measure(runners, "copy", 0.0, gpu).items():
        times[name] = timing.median
    del source, target, work, runners
    torch.cuda.empty_cache()
    reads = {name: seconds for name, seconds in times.items() if name != "copy"}
    found = bandwidths(reads, times["copy"], size)
    for dtype in (torch.bfloat16, torch.float16):
        a, b = (torch.randn(side, side, dtype=dtype, device="cuda") / side**0.5 for _ in range(2))
        timing = measure({"matmul": ready([partial(torch.mm, a, b)], gpu)}, "matmul", 0.0, gpu)["matmul"]
        found[f"{str(dtype).removeprefix('torch.')} matmul"] = 2 * side**3 / timing.median
        del a, b
    torch.cuda.empty_cache()
    return found


def shown(found: dict[str, float]) -> str:
    """One line for people."""
    bytes_, rates = ("bandwidth", "copy", "read"), [name for name in found if name.endswith("matmul")]
    return ", ".join(
        [f"{name} {found[name] / 1e12:.2f} TB/s" for name in bytes_]
        + [f"{name} {found[name] / 1e12:.0f} TFLOP/s" for name in rates]
    )


def main() -> None:
    print(shown(ceilings(Cuda())))


if __name__ == "__main__":
    main()
