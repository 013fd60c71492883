"""Weights of which 16 of 32 columns, or two of four, are kept, on this GPU: against the dense product, and our int8.

    python bench/bench_sparse.py [--shapes 4096x4096] [--rows 1,16] [--only 2:4] [--budget 100]

Needs a CUDA GPU; bfloat16, weights of the shapes of Llama 3.1 8B. Every candidate is a CUDA graph over rotating, cold
copies of its weight; outputs are checked before anything is timed. At equal bytes int8 is the one to beat: it loses
less. "cuSPARSELt" is torch's own product with a 2:4 weight, which fastllm does not use: this measures whether it
should. Writes bench/results/<device>/sparse.json and .md and prints which targets are met.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench_quant_matmul import faults, said
from measure import Cuda, cold_bytes, copies, error_of, measure, ready
from providers import fresh_tickets
from report import markdown_table, target_table
from results import RESULTS, about, device_name, write
from shapes import shapes_of
from targets import Verdict, least, ratio
from torch import Tensor
from torch.nn.functional import linear

from fastllm.formats import QuantizedWeight, dequantize, parse_format
from fastllm.ops import layout_for, quant_matmul
from fastllm.ops.layout import choose
from fastllm.ops.sparse_matmul import SPARSE_LAYOUTS, sparse_matmul
from fastllm.quantizers import quantize
from fastllm.sparse_formats import compress, dequantize_sparse, parse_sparse

FORMATS = ("16:32", "2:4", "8:32", "16:32-int8", "2:4-int8")
ROWS = "1,2,4,8,16,17,32,64,1024,4096"
LIBRARY = "cuSPARSELt 2:4"
LIBRARY_ROWS = 512  # fewer are none of its business
BOUND = 1e-2  # relative error of a product in bfloat16
MOST_COPIES = 64
Call = Callable[[Tensor], Tensor]


class Candidate(NamedTuple):
    """make: a call with a weight of its own; bytes: of the weight; dense: what it stands for, float32."""

    make: Callable[[], Call]
    bytes: int
    dense: Tensor


def size(*tensors: Tensor | None) -> int:
    return sum(t.nbytes for t in tensors if t is not None)


def dense(w: Tensor) -> Candidate:
    return Candidate(lambda: partial(linear, weight=w.clone()), w.nbytes, w.float())


def int8(w: Tensor) -> Candidate:
    """Every column, one scale for each row: as many bytes as 16 of 32 in 16 bits, less the index."""
    (N, K), format = w.shape, parse_format("int8")
    weight, layout = quantize(w, format, "rtn"), layout_for(format, N, K, w.dtype, w.device)

    def make() -> Call:
        p = layout.pack(QuantizedWeight(weight.packed.clone(), weight.scale.clone()), format, (N, K))
        return lambda x: quant_matmul(x, p.w, p.scale, p.zero, None, N, 8, K, layout.name)

    return Candidate(make, size(weight.packed, weight.scale), dequantize(weight, format, (N, K), torch.float32))


def sparse(w: Tensor, name: str) -> Candidate:
    """The largest columns are kept: which they are makes no difference to speed."""
    (N, K), format = w.shape, parse_sparse(name)
    mask = format.largest(w.abs())
    if format.values is None:
        weight = compress(w, mask, w.new_empty(N, 0), format)
    else:
        scale = w.float().abs().amax(1, keepdim=True) / 127
        codes = ((w.float() / scale).round() + 128).to(torch.uint8)
        weight = compress(codes, mask, scale.to(w.dtype), format)
    layout = choose(SPARSE_LAYOUTS, format, N, K, w.dtype, w.device)[0]  # type: ignore[arg-type]

    def make() -> Call:
        p = layout.pack(QuantizedWeight(*(None if t is None else t.clone() for t in weight)), format, (N, K))
        return lambda x: sparse_matmul(x, p.w, p.scale, p.zero, None, N, name, layout.name)

    bytes = size(weight.packed, weight.scale, weight.index)
    return Candidate(make, bytes, dequantize_sparse(weight, format, (N, K), torch.float32))


def library(w: Tensor) -> Candidate:
    """torch's 2:4: only the first factor may be sparse, so a linear layer is (w @ x.T).T."""
    kept = w * parse_sparse("2:4").largest(w.abs())

    def make() -> Call:
        packed = torch.sparse.to_sparse_semi_structured(kept.clone())
        return lambda x: torch.mm(packed, x.t()).t()

    return Candidate(make, w.nbytes * 9 // 16, kept.float())


def candidates(w: Tensor, M: int, only: str) -> dict[str, Callable[[], Candidate]]:
    """By name; the baseline first."""
    found: dict[str, Callable[[], Candidate]] = {"int8": partial(int8, w)}
    found |= {name: partial(sparse, w, name) for name in FORMATS}
    found |= {LIBRARY: partial(library, w)} if M >= LIBRARY_ROWS else {}
    return {"bf16": partial(dense, w)} | {name: make for name, make in found.items() if only in name}


def bench(N: int, K: int, M: int, device: str, only: str, seconds: float, gpu: Any) -> dict[str, Any]:
    """Everything about M rows of x; SystemExit if a product is wrong."""
    w = (torch.randn(N, K, device=device) / K**0.5).to(torch.bfloat16)
    x = torch.randn(M, K, device=device).to(torch.bfloat16)
    runners: dict[str, Any] = {}
    absent, errors, bytes_of, kept = {}, {}, {}, []
    for name, prepare in candidates(w, M, only).items():
        try:
            found = prepare()
            count = min(MOST_COPIES, copies(found.bytes, cold_bytes(device)))
            calls = [partial(found.make(), x) for _ in range(count)]
            error = error_of(calls[0](), x.float() @ found.dense.t())
            kept.append(fresh_tickets() if gpu else None)  # those that graphs count in live as long as the graphs
            made: Any = calls if gpu is None else ready(calls, gpu)
        except faults() as fault:
            if name != LIBRARY:
                raise
            absent[name] = said(fault)
            continue
        if not error <= BOUND:
            raise SystemExit(f"{N} x {K}, M={M}: {name}: relative error {error:.1e}, allowed {BOUND:.0e}")
        runners[name], errors[name], bytes_of[name] = made, error, found.bytes + 2 * M * (N + K)
    times = measure(runners, "bf16", seconds, gpu)
    return {
        "N": N, "K": K, "M": M, "dtype": "bfloat16", "error": errors, "absent": absent, "bytes": bytes_of,
        "seconds": {name: t.median for name, t in times.items()},
        "p10": {name: t.p10 for name, t in times.items()}, "p90": {name: t.p90 for name, t in times.items()},
        "mode": {name: t.mode for name, t in times.items()},
    }  # fmt: skip


def verdicts(rows: Sequence[dict[str, Any]]) -> list[Verdict]:
    """The targets; the worst shape counts."""

    def worst(name: str, over: str, fits: Callable[[int], bool]) -> float | None:
        return least(ratio(row, name, over) for row in rows if fits(row["M"]))

    def one(M: int) -> bool:
        return M == 1

    return [
        Verdict("16:32 in bf16, M=1, over cuBLAS bf16", 1.3, worst("16:32", "bf16", one)),
        Verdict("2:4 in bf16, M=1, over cuBLAS bf16", 1.3, worst("2:4", "bf16", one)),
        Verdict("the same, stretch", 1.4, worst("2:4", "bf16", one)),
        Verdict("16:32 in int8, M=1, over our int8", 1.2, worst("16:32-int8", "int8", one)),
        Verdict("2:4 in int8, M=1, over our int8", 1.2, worst("2:4-int8", "int8", one)),
        Verdict("16:32 in bf16, M=2 to 8, over cuBLAS bf16", 1.0, worst("16:32", "bf16", lambda M: 2 <= M <= 8)),
        Verdict(
            f"{LIBRARY}, M>=1024, over cuBLAS bf16: worth a layout", 1.2, worst(LIBRARY, "bf16", lambda M: M >= 1024)
        ),
    ]


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row["seconds"] if name != "bf16"))
    lines = []
    for row in rows:
        ratios = (ratio(row, name, "bf16") for name in names)
        cells = ["" if value is None else f"{value:.2f}" for value in ratios]
        lines.append([f"{row['N']} x {row['K']}", str(row["M"]), f"{1e6 * row['seconds']['bf16']:.1f}", *cells])
    text = "Medians in bfloat16; times faster than torch's dense product.\n\n"
    return text + markdown_table(["weight", "M", "bf16 us", *names], lines) + "\n" + target_table(verdicts(rows))


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", help="N x K, such as 4096x4096,14336x4096 (default: those of Llama 3.1 8B)")
    parser.add_argument("--rows", default=ROWS, help="of x (default: %(default)s)")
    parser.add_argument("--only", default="", help="what the names of the candidates to run contain")
    parser.add_argument("--seconds", type=float, default=0.02, help="per candidate (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds in all; what is left is named")
    parser.add_argument("--out", type=Path, help="folder (default: bench/results/<device>)")
    args = parser.parse_args(argv)
    args.start = time.perf_counter()
    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes.split(",")] if args.shapes else None
    args.shapes = shapes or shapes_of("llama-3.1-8b", "cuda")
    args.rows = [int(M) for M in args.rows.split(",")]
    return args


def main(argv: list[str] | None = None) -> None:
    args, rows = arguments(argv), []
    if not torch.cuda.is_available():
        sys.exit(
            "bench_sparse.py needs a CUDA GPU, and torch sees none here: on a CPU sparse weights run as dense ones"
        )
    gpu, out = Cuda(), args.out or RESULTS / device_name("cuda")
    with torch.inference_mode():
        for M in args.rows:  # one row first, whose targets are the most
            for N, K in args.shapes:
                if time.perf_counter() - args.start > args.budget:
                    print(f"not measured, the budget is spent: {N} x {K}, M={M}")
                    continue
                row = bench(N, K, M, "cuda", args.only, args.seconds, gpu)
                rows.append(row)
                speeds = [f"{name} {row['seconds']['bf16'] / t:.2f}x" for name, t in row["seconds"].items()]
                print(f"{N:6} x {K:5}  M {M:4}  {'  '.join(speeds)}", *row["absent"].values(), flush=True)
                torch.cuda.empty_cache()
    path = write(out / "sparse.json", about("cuda"), rows)
    path.with_suffix(".md").write_text(markdown(rows))
    print("\n" + markdown(rows) + f"\nwritten: {path}")


if __name__ == "__main__":
    main()
