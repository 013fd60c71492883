"""quant_matmul on this machine: every implementation at every number of rows, against torch's dense product.

    python bench/bench_quant_matmul.py [--model gemma-3-270m] [--formats int4-g128,int8] [--rows 1,16] [--seconds 0.15]

Runs on the GPU if there is one, else on the CPU. Writes bench/results/<device>/quant_matmul.json and .md, in place of
what is there (`--append`: beside it), and on a GPU two plots; then prints which targets are met. The switches in
fastllm/ops/ are read off these files.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peers
import providers
import report
import torch
from measure import Cuda, Runner, Timing, cold_bytes, copies, error_of, measure, ready
from providers import Operands, Problem, Provider
from results import RESULTS, about, device_name, smi, write
from shapes import ROWS, SHAPES, shapes_of
from torch import Tensor

from fastllm.formats import IntFormat, parse_format
from fastllm.ops import layout_for

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
MOST = {"cpu": 1 << 28, "cuda": 1 << 30}  # bytes of a result in 16 bits times two: nobody wants that many logits


def faults() -> tuple[type[Exception], ...]:
    """What a library that does not suit this machine may raise. After it, the device is asked whether it is well."""
    kinds = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ImportError, OSError)
    if find_spec("triton") is None:
        return kinds
    from triton.errors import TritonError

    return *kinds, TritonError


def said(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0][:300]}"


class Shape:
    """One weight, and what every provider made of it. Lives as long as its shape is measured."""

    def __init__(self, format: IntFormat, N: int, K: int, dtype: torch.dtype, device: str, asked: list[Provider]):
        self.problem = problem = Problem(format, N, K, dtype, device)
        self.baseline = asked[0].name
        self.absent: dict[str, list[str]] = {}
        self.wrong: dict[str, float] = {}
        self.kinds: dict[str, Provider] = {}
        self.operands: dict[str, Operands] = {}
        self.copies: dict[str, list[Any]] = {}
        self.kept: list[Any] = []  # alive as long as graphs may use it
        self.gpu = Cuda() if device == "cuda" else None
        self.dense = problem.w.float()
        for provider in asked:
            if provider.bits not in (None, format.bits):
                continue
            name = provider.name
            reasons = provider.reasons(format, N, K, dtype, device)
            try:
                if not reasons:
                    found = provider.prepare(problem)
                    self.copies[name] = [found.make() for _ in range(copies(found.bytes, cold_bytes(device)))]
                    self.operands[name], self.kinds[name] = found, provider
            except faults() as error:
                reasons = [said(error)]
                self.settle()
            if reasons:
                self.absent[name] = reasons

    def settle(self) -> None:
        """Raises if the device is in error, which nothing would survive."""
        if self.gpu is not None:
            self.gpu.synchronize()

    def wanted(self, x: Tensor, operands: Operands) -> Tensor:
        torch.set_float32_matmul_precision("highest")  # some library may have changed it
        weight = self.dense if operands.weight is None else operands.weight
        return x.float() @ weight.t()

    def runner(self, name: str, x: Tensor) -> tuple[Any, float]:
        """What is to be timed, and the error of what it computes."""
        operands, provider = self.operands[name], self.kinds[name]
        rotation = [partial(operands.run, state, x) for state in self.copies[name]]
        want = self.wanted(x, operands)
        if self.gpu is None:
            return rotation, error_of(rotation[0](), want)
        provider.begin()
        self.kept.append(providers.fresh_tickets())
        made = ready(rotation, self.gpu)
        y = made.replay()
        if made.mode == "graph":
            y.fill_(float("nan"))  # what the graph does not write then shows
            y = made.replay()
        self.gpu.synchronize()
        return made, error_of(y, want)

    def row(self, M: int, seconds: float) -> dict[str, Any]:
        """Everything that is known of M rows of input."""
        problem = self.problem
        x = torch.randn(M, problem.K, dtype=problem.dtype, device=problem.device)
        absent, wrong, errors = dict(self.absent), {}, {}
        runners: dict[str, Any] = {}
        for name, provider in self.kinds.items():
            if provider.most_rows < M:
                absent[name] = [f"it is not run beyond {provider.most_rows} rows: it is far behind by then"]
                continue
            try:
                made, error = self.runner(name, x)
            except faults() as fault:
                absent[name] = [said(fault)]
                self.settle()
                continue
            if error <= self.operands[name].bound:
                runners[name], errors[name] = made, error
            else:
                wrong[name] = error
        if self.baseline not in runners:
            raise SystemExit(f"the dense product itself failed: {absent.get(self.baseline, wrong)}")
        times = measure(runners, self.baseline, seconds, self.gpu)
        return {**self.about(M), "wrong": wrong, "absent": absent, "error": errors, **self.figures(times, runners, M)}

    def about(self, M: int) -> dict[str, Any]:
        p = self.problem
        layout = layout_for(p.format, p.N, p.K, p.dtype, torch.device(p.device))
        return {
            "format": p.format.name, "N": p.N, "K": p.K, "M": M, "layout": layout.name,
            "dtype": str(p.dtype).removeprefix("torch."), "baseline": self.baseline,
        }  # fmt: skip

    def figures(self, times: dict[str, Timing], runners: dict[str, Any], M: int) -> dict[str, Any]:
        """bytes: weights, scales and zero points, x and y, each once."""
        p = self.problem
        xy = (M * p.K + M * p.N) * p.dtype.itemsize
        return {
            "seconds": {name: t.median for name, t in times.items()},
            "p10": {name: t.p10 for name, t in times.items()},
            "p90": {name: t.p90 for name, t in times.items()},
            "samples": {name: t.samples for name, t in times.items()},
            "calls": {name: t.calls for name, t in times.items()},
            "bytes": {name: self.operands[name].bytes + xy for name in times},
            "eager": {n: r.why for n, r in runners.items() if isinstance(r, Runner) and r.mode != "graph"},
        }


def line(row: dict[str, Any]) -> str:
    """A row on the screen, as it is measured."""
    seconds, base = row["seconds"], row["baseline"]
    ratios = [
        f"{name}{' (eager)' if name in row['eager'] else ''} {seconds[base] / t:.2f}x"
        for name, t in seconds.items()
        if name != base
    ] + [f"{name} WRONG ({error:.1e})" for name, error in row["wrong"].items()]
    start = f"{row['format']:10} {row['N']:6} x {row['K']:5}  M {row['M']:4}  {base} {seconds[base] * 1e6:9.1f} us"
    return start + "  " + "  ".join(ratios)


def bench(args: argparse.Namespace, formats: list[IntFormat], asked: list[Provider]) -> Iterator[dict[str, Any]]:
    """Rows, shape by shape, until the budget is spent."""
    dtype = DTYPES[args.dtype]
    for format in formats:
        for N, K in args.shapes or shapes_of(args.model, args.device):
            if time.perf_counter() - args.start > args.budget:
                print(f"not measured, the budget is spent: {format.name} {N} x {K}")
                continue
            shape = Shape(format, N, K, dtype, args.device, asked)
            for M in args.rows:
                if 2 * M * N * dtype.itemsize > MOST[args.device]:
                    continue
                if time.perf_counter() - args.start > args.budget:
                    print(f"not measured, the budget is spent: {format.name} {N} x {K}, M {M}")
                    continue
                yield shape.row(M, args.seconds)
            del shape
            gc.collect()
            if args.device == "cuda":
                torch.cuda.empty_cache()


def merged(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`old` rows and `new` ones; of the same problem the new one, whole: its times come from one run."""

    def key(row: dict[str, Any]) -> tuple:
        return row["format"], row.get("dtype", "bfloat16"), row["N"], row["K"], row["M"]

    return list({**{key(row): row for row in old}, **{key(row): row for row in new}}.values())


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--model", choices=[*SHAPES, "all"], default="all", help="default: all")
    parser.add_argument("--shapes", help="N x K in place of a model's, such as 8192x8192,4096x14336")
    parser.add_argument("--device", choices=["cpu", "cuda"], default=auto, help="default here: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the activations (default: bfloat16)")
    parser.add_argument("--formats", help="default: int8,int4-g32,int4-g128,int8-a8 on a CPU, int4-g128,int8 on a GPU")
    parser.add_argument("--rows", help="of input, such as 1,16,4096")
    parser.add_argument("--seconds", type=float, help="per candidate and shape (default: 0.15; 0.02 on a GPU)")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds in all; what is left is named")
    parser.add_argument("--peers", choices=["none", "fast", "all"], help="default: none on a CPU, fast on a GPU")
    parser.add_argument("--only", help="a word that the names of the candidates to run contain, or several: a,b")
    parser.add_argument("--append", action="store_true", help="keep rows that are not measured again")
    parser.add_argument("--out", type=Path, help="folder (default: bench/results/<device>)")
    args = parser.parse_args(argv)
    gpu = args.device == "cuda"
    pairs = [shape.split("x") for shape in args.shapes.split(",")] if args.shapes else []
    args.start = time.perf_counter()
    args.shapes = [(int(N), int(K)) for N, K in pairs]
    args.formats = args.formats or ("int4-g128,int8" if gpu else "int8,int4-g32,int4-g128,int8-a8")
    args.rows = [int(M) for M in args.rows.split(",")] if args.rows else ROWS[args.device]
    args.seconds = args.seconds if args.seconds is not None else 0.02 if gpu else 0.15
    args.peers = args.peers or ("fast" if gpu else "none")
    args.out = args.out or RESULTS / device_name(args.device)
    return args


def candidates(args: argparse.Namespace) -> list[Provider]:
    """The baseline first."""
    found = providers.own(args.device)
    found += peers.peers(slow=args.peers == "all") if args.peers != "none" else []
    words = args.only.split(",") if args.only else [""]
    found = [p for p in found if p.name == "fastllm" or any(word.lower() in p.name.lower() for word in words)]
    return [providers.Dense(DTYPES[args.dtype]), *found]


def ceilings_and_launch(before: dict[str, Any]) -> dict[str, Any]:
    """What a GPU can do at best, and what a call costs its host; what `before` has of them is kept."""
    import ceilings
    import launch

    found = {
        "ceilings": before.get("ceilings") or ceilings.ceilings(Cuda()),
        "launch": before.get("launch") or launch.measured(),
    }
    print(ceilings.shown(found["ceilings"]), launch.shown(found["launch"]), sep="\n", flush=True)
    return found


def main() -> None:
    args = arguments()
    formats, asked = [parse_format(name) for name in args.formats.split(",")], candidates(args)
    gpu, path = args.device == "cuda", args.out / "quant_matmul.json"
    before = json.loads(path.read_text()) if args.append and path.exists() else {"rows": []}
    head: dict[str, Any] = about(args.device)
    if gpu:
        gc.freeze()  # a capture collects garbage first: what was imported need not be looked at each time
        head |= {**ceilings_and_launch(before), "clocks": before.get("clocks", [])}
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for row in bench(args, formats, asked):
            rows.append(row)
            print(line(row), flush=True)
            if gpu:  # at once: a library that brings the process down takes nothing along
                head["clocks"] += [smi()] if row["M"] == args.rows[0] else []
                write(path, head, merged(before["rows"], rows))
    everything = merged(before["rows"], rows)
    write(path, head, everything)
    path.with_suffix(".md").write_text(report.markdown(everything, head))
    print("\n" + report.told(everything, head))
    if gpu:
        import plots

        print("written:", *plots.draw(everything, head, args.out))
    print(f"written: {path}")
    if any("fastllm" in row["wrong"] for row in rows):
        sys.exit("fastllm is wrong somewhere: see WRONG above")


if __name__ == "__main__":
    main()
