"""Offline search for the rows of `config()`: which tile is best for each bucket of rows, on the GPU at hand.

    python bench/tune_quant_matmul.py [--budget 300] [--formats int4-g128,int8] [--rows 1,16,32,64]

For each format and number of rows it compiles a modest space of tiles in parallel processes, times them as the
benchmark does (CUDA graphs, cold weights, in turns with the present choice), refines the best, and prints the best few
over several shapes with their gain. It also finds from how many rows on dequantising and cuBLAS are faster. Writes
tune_quant_matmul.json. Nothing in the package imports this: whoever reads the table edits `config()`.
"""

import argparse
import gc
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench_quant_matmul import faults, said
from crossover import crossings, crossover
from measure import Cuda, cold_bytes, copies, error_of, measure, ready
from providers import EXACT, Operands, Packed, Problem, fresh_tickets
from results import RESULTS, device_name, write
from targets import mean
from torch import Tensor
from tune_space import coarse, fine

from fastllm.formats import IntFormat, parse_format
from fastllm.ops import LAYOUTS

SHAPES = [(8192, 8192), (4096, 4096), (28672, 4096), (4096, 14336)]
BEST, GROUP = 4, 12  # tiles to refine; tiles timed together with the present one


def operands(problem: Problem) -> Operands:
    return Packed("planar", LAYOUTS["planar"]).prepare(problem)


def call(state: Any, x: Tensor, bits: int, group: int, tile: Any) -> Tensor:
    from fastllm.kernels.quant_matmul import quant_matmul

    return quant_matmul(x, state.w, state.scale, state.zero, None, bits, group, tile=tile)


class Card(NamedTuple):
    """The device to tune for; the tests tune for a CPU that interprets."""

    capability: int
    multiprocessors: int
    device: str = "cuda"
    cold: int = 0  # bytes of weights to rotate over
    dtype: torch.dtype = torch.bfloat16

    @classmethod
    def here(cls) -> "Card":
        major, minor = torch.cuda.get_device_capability()
        sms = torch.cuda.get_device_properties(0).multi_processor_count
        return cls(10 * major + minor, sms, cold=cold_bytes("cuda"))

    def present(self, M: int, N: int, K: int, bits: int) -> Any:
        """What `config` chooses."""
        from fastllm.kernels.quant_matmul import config

        return config(M, N, K, bits, capability=self.capability, multiprocessors=self.multiprocessors)


@lru_cache(maxsize=1)
def weight_of(name: str, N: int, K: int, card: Card) -> Any:
    """A packed weight, in a process that compiles."""
    return operands(Problem(parse_format(name), N, K, card.dtype, card.device)).make()


def compile_one(name: str, card: Card, M: int, N: int, K: int, tile: Any) -> str:
    """Run a tile once, in a process of its own; what it compiles lands in Triton's cache on disk. Returns a fault."""
    format = parse_format(name)
    try:
        with torch.inference_mode():
            x = torch.randn(M, K, dtype=card.dtype, device=card.device)
            call(weight_of(name, N, K, card), x, format.bits, format.group_of(K), tile)
            if card.device == "cuda":
                torch.cuda.synchronize()
    except faults() as error:
        return said(error)
    return ""


def compiled(
    pool: Any, name: str, card: Card, problem: tuple[int, int, int], tiles: Sequence[Any], seconds: float
) -> list[Any]:
    """Those tiles that compile and run within `seconds`."""
    futures: dict[Future, Any] = {pool.submit(compile_one, name, card, *problem, tile): tile for tile in tiles}
    wait(futures, timeout=max(1.0, seconds))
    for future in futures:
        future.cancel()
    wait([future for future in futures if future.running()], timeout=10)  # they would disturb what is timed next
    done = [(future, tile) for future, tile in futures.items() if future.done() and not future.cancelled()]
    faults_ = [future.result() for future, _ in done]  # raises if a process died, which no later one would survive
    for (_, tile), fault in zip(done, faults_, strict=True):
        if fault:
            print(f"{tile}: {fault}")
    return [tile for (_, tile), fault in zip(done, faults_, strict=True) if not fault]


class Bench:
    """One shape in one format: cold copies of its weight, and the times of tiles on them."""

    def __init__(self, format: IntFormat, N: int, K: int, card: Card, gpu: Any) -> None:
        self.format, self.N, self.K, self.card, self.gpu = format, N, K, card, gpu
        self.problem = Problem(format, N, K, card.dtype, card.device)
        self.kept: list[Any] = []  # alive as long as graphs may use it
        made = operands(self.problem)
        self.states = [made.make() for _ in range(copies(made.bytes, card.cold))]

    def times(self, M: int, tiles: Sequence[Any], until: float) -> dict[Any, float]:
        """Seconds of each tile that is right, relative to the first one's. What `until` cuts off is left out."""
        x = torch.randn(M, self.K, dtype=self.card.dtype, device=self.card.device)
        want = x.float() @ self.problem.dense.t()
        base, *others = tiles
        found = {base: 1.0}
        for start in range(0, len(others), GROUP):
            if time.perf_counter() > until:
                break
            runners = {}
            for tile in [base, *others[start : start + GROUP]]:
                runner = self.runner(x, want, tile)
                if runner is not None:
                    runners[tile] = runner
            if base not in runners:
                raise SystemExit(f"the present tile {base} does not run or is wrong at M={M}, {self.N} x {self.K}")
            seconds = measure(runners, base, 0.0, self.gpu)
            found |= {tile: timing.median / seconds[base].median for tile, timing in seconds.items()}
        return found

    def runner(self, x: Tensor, want: Tensor, tile: Any) -> Any:
        bits, group = self.format.bits, self.format.group_of(self.K)
        rotation = [partial(call, state, x, bits, group, tile) for state in self.states]
        self.kept.append(fresh_tickets())
        try:
            if not error_of(rotation[0](), want) <= EXACT:
                print(f"WRONG: {tile} at M={len(x)}, {self.N} x {self.K}")
                return None
            return ready(rotation, self.gpu)
        except faults() as error:
            print(f"{tile}: {said(error)}")
            self.gpu.synchronize()
            return None


def tune(
    format: IntFormat,
    M: int,
    card: Card,
    pool: Any,
    gpu: Any,
    seconds: float,
    shapes: Sequence[tuple[int, int]] = SHAPES,
) -> list[dict[str, Any]]:
    """The best tiles at M rows: their time relative to the present choice on each shape, and its geometric mean."""
    start = time.perf_counter()
    N, K = shapes[0]
    problem = (M, N, K)
    about = (problem, format.bits, card.capability, card.multiprocessors)
    main, now = Bench(format, N, K, card, gpu), card.present(*problem, format.bits)
    tiles = compiled(pool, format.name, card, problem, coarse(now, *about), 0.3 * seconds)
    first = main.times(M, [now, *(t for t in tiles if t != now)], start + 0.5 * seconds)
    best = sorted(first, key=first.__getitem__)[:BEST]
    near = [t for t in fine(best, *about) if t not in first]
    near = compiled(pool, format.name, card, problem, near, 0.15 * seconds)
    first |= main.times(M, [now, *(t for t in near if t != now)], start + 0.75 * seconds)
    best = sorted(first, key=first.__getitem__)[:BEST]
    found = {tile: {f"{N} x {K}": first[tile]} for tile in best}
    del main
    for N, K in shapes[1:]:
        if time.perf_counter() > start + seconds:
            break
        here = card.present(M, N, K, format.bits)
        # SPLIT_K follows from the shape: the geometry is compared, with its own split and with the present one
        moved = {t: [t, t._replace(SPLIT_K=here.SPLIT_K)] for t in best}
        wanted = list(dict.fromkeys(t for ts in moved.values() for t in ts))
        built = compiled(pool, format.name, card, (M, N, K), wanted, 0.1 * seconds)
        bench = Bench(format, N, K, card, gpu)
        times = bench.times(M, [here, *(t for t in built if t != here)], start + 1.1 * seconds)
        for tile in best:
            reached = [times[t] for t in moved[tile] if t in times]
            if reached:
                found[tile][f"{N} x {K}"] = min(reached)
    rows = [
        {"format": format.name, "M": M, "tile": tile._asdict(), "now": now._asdict(), "relative": relative,
         "gain": 1 / (mean(relative.values()) or 1.0), "tried": len(first)}
        for tile, relative in found.items()
    ]  # fmt: skip
    return sorted(rows, key=lambda row: -row["gain"])


def line(row: dict[str, Any]) -> str:
    changed = {name: value for name, value in row["tile"].items() if value != row["now"].get(name)}
    relative = ", ".join(f"{shape} {1 / t:.2f}x" for shape, t in row["relative"].items())
    return f"{row['format']:10} M {row['M']:5}  gain {row['gain']:.3f}x  {changed or 'as it is'}  ({relative})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=300.0, help="seconds in all (default: %(default)s)")
    parser.add_argument("--formats", default="int4-g128,int8")
    parser.add_argument("--rows", default="1,16,32,64,128,256", help="of input (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder (default: bench/results/<device>)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tiles are tuned on a CUDA GPU; torch sees none here")
    start, gpu, card = time.perf_counter(), Cuda(), Card.here()
    gc.freeze()  # a capture collects garbage first: what was imported need not be looked at each time
    formats = [parse_format(name) for name in args.formats.split(",")]
    work = [(format, int(M)) for format in formats for M in args.rows.split(",")]
    path = (args.out or RESULTS / device_name("cuda")) / "tune_quant_matmul.json"
    head: dict[str, Any] = {"device": device_name("cuda"), "crossover": []}
    rows: list[dict[str, Any]] = []
    context = multiprocessing.get_context("spawn")
    workers = max(1, min(14, (os.cpu_count() or 2) - 2))
    with torch.inference_mode(), ProcessPoolExecutor(workers, mp_context=context) as pool:
        pool.submit(time.sleep, 0)  # starts the processes, which take a while to import torch
        for format in formats:
            head["crossover"] += crossover(format, SHAPES[:2], gpu, start + 0.15 * args.budget)
            write(path, head, rows)
        for i, (format, M) in enumerate(work):
            left = start + args.budget - time.perf_counter()
            if left < 10:
                print(f"not tuned, the budget is spent: {[(f.name, m) for f, m in work[i:]]}")
                break
            rows += tune(format, M, card, pool, gpu, left / (len(work) - i))
            write(path, head, rows)
            print(
                "\n".join(map(line, [row for row in rows if (row["format"], row["M"]) == (format.name, M)])),
                flush=True,
            )
            gc.collect()
            torch.cuda.empty_cache()
        pool.shutdown(wait=False, cancel_futures=True)
    print("\n" + crossings(head["crossover"]))
    print("best of each:\n" + "\n".join(line(row) for row in first_of_each(rows)))
    print(f"written: {path}: {len(json.dumps(rows))} characters")


def first_of_each(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The best row of each format and number of rows of input; `rows` has them best first."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        found.setdefault((row["format"], row["M"]), row)
    return list(found.values())


if __name__ == "__main__":
    main()
