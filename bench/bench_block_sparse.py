"""block_sparse_matmul on this machine, against torch's dense product with the same weights.

    python bench/bench_block_sparse.py [--shapes 4096x4096] [--blocks 64] [--sparsity 0.6] [--rows 1,2048] [--paths]

Runs on the GPU if there is one, else on the CPU; bfloat16. Which blocks are zero is random, so that rows of blocks are
uneven. On a GPU each candidate is a CUDA graph over rotating, cold copies of its weight; on a CPU calls are taken in
turns. Outputs are checked before anything is timed. Writes bench/results/<device>/block_sparse.json and .md; on a GPU
it prints which targets are met. --paths, on a CPU: also every way there, and torch's own sparse_bsr (in float32, which
is all it has): the switches in fastllm/ops/block_sparse.py are read off that.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import Cuda, cold_bytes, copies, error_of, measure, ready
from report import markdown_table, target_table
from results import RESULTS, about, device_name, write
from targets import Verdict, least, ratio
from torch import Tensor
from torch.nn.functional import linear

from fastllm.bsr_format import BlockSparseWeight, order_of, pack_blocks
from fastllm.ops import block_sparse
from fastllm.ops.block_sparse import block_sparse_matmul

SHAPES = {  # of Gemma 3 270M and of the size of Llama 3.2 1B on a CPU, of Llama 3.1 8B on a GPU
    "cpu": "640x2048,2048x640,1024x640,2048x2048,5632x2048",
    "cuda": "4096x4096,14336x4096,4096x14336",
}
ROWS = {"cpu": "1,512", "cuda": "1,16,2048"}
BOUND = 1e-2  # relative error of a product in bfloat16
MOST_COPIES = 64
G4 = {0.6: 1.4, 0.8: 2.2, 0.9: 3.5}  # sparsity -> least speed-up over the dense product, blocks of 64, 2048 rows


def weight(N: int, K: int, B: int, sparsity: float, device: str) -> tuple[Tensor, Tensor]:
    """A dense bfloat16 weight, and which of its blocks are kept: exactly 1 - sparsity of them, at random."""
    nb, kb = N // B, K // B
    mask = torch.zeros(nb * kb, dtype=torch.bool, device=device)
    mask[torch.randperm(nb * kb, device=device)[: round(nb * kb * (1 - sparsity))]] = True
    mask = mask.view(nb, kb)
    dense = torch.randn(N, K, device=device) * mask.repeat_interleave(B, 0).repeat_interleave(B, 1) / K**0.5
    return dense.to(torch.bfloat16), mask


def sparse_bsr(w: BlockSparseWeight, shape: tuple[int, int], x: Tensor) -> Callable[[], Tensor]:
    """torch's own, in float32; x is converted ahead."""
    values, xt = w.values.transpose(1, 2).float().contiguous(), x.float().t().contiguous()
    matrix = torch.sparse_bsr_tensor(w.rows, w.columns, values, size=shape, check_invariants=False)
    return lambda: (matrix @ xt).t()


def candidates(dense: Tensor, w: BlockSparseWeight, x: Tensor, paths: bool) -> dict[str, list[Callable[[], Tensor]]]:
    """What is timed: rotations of calls, each with a copy of the weight of its own."""
    device, order = x.device.type, order_of(w.rows)

    def cold(bytes_each: int) -> range:
        return range(min(MOST_COPIES, copies(bytes_each, cold_bytes(device))))

    packed = [BlockSparseWeight(w.values.clone(), w.columns, w.rows) for _ in cold(w.nbytes)]
    found = {
        "bf16": [partial(linear, x, dense.clone()) for _ in cold(dense.nbytes)],
        "fastllm": [partial(block_sparse_matmul, x, *own, order) for own in packed],
    }
    if paths:
        names = ["by_rows", "by_groups"] + (["by_blocks"] if len(x) <= 64 else [])
        for i, name in enumerate(names, 1):  # not the copies whose turn it was just now
            turned = packed[i % len(packed) :] + packed[: i % len(packed)]
            found[name] = [partial(getattr(block_sparse, name), x, own) for own in turned]
        if x.device.type == "cpu":
            found["sparse_bsr float32"] = [sparse_bsr(own, dense.shape, x) for own in packed[:8]]
    return found


def bench(
    N: int, K: int, B: int, sparsity: float, rows: Sequence[int], args: argparse.Namespace, gpu: Any
) -> Iterator:
    """A row for each number of rows of x; SystemExit if a result is wrong."""
    device = "cpu" if gpu is None else "cuda"
    dense, mask = weight(N, K, B, sparsity, device)
    w = pack_blocks(dense, mask, B)
    for M in rows:
        x = torch.randn(M, K, device=device).to(torch.bfloat16)
        calls, want = candidates(dense, w, x, args.paths), x.float() @ dense.float().t()
        errors = {name: error_of(rotation[0](), want) for name, rotation in calls.items()}
        wrong = [f"{name}: relative error {error:.1e}" for name, error in errors.items() if not error <= BOUND]
        if wrong:
            raise SystemExit(f"{N} x {K}, blocks of {B}, M={M}: {'; '.join(wrong)}; allowed {BOUND:.0e}")
        runners: Any = calls if gpu is None else {name: ready(rotation, gpu) for name, rotation in calls.items()}
        times = measure(runners, "bf16", args.seconds, gpu)
        yield {
            "N": N, "K": K, "M": M, "block": B, "sparsity": sparsity, "dtype": "bfloat16", "baseline": "bf16",
            "bytes": {"bf16": dense.nbytes, "fastllm": w.nbytes}, "error": errors,
            "seconds": {name: t.median for name, t in times.items()},
            "p10": {name: t.p10 for name, t in times.items()}, "p90": {name: t.p90 for name, t in times.items()},
            "mode": {name: t.mode for name, t in times.items()},
        }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """A row on the screen, as it is measured."""
    base = row["seconds"]["bf16"]
    others = "  ".join(f"{name} {base / t:.2f}x" for name, t in row["seconds"].items() if name != "bf16")
    what = f"{row['N']:5} x {row['K']:5}  {row['block']:3}  {row['sparsity']:.0%}  M {row['M']:4}"
    return f"{what}  bf16 {base * 1e6:8.1f} us  {others}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """How many times faster than the dense product, by sparsity."""
    levels = sorted({row["sparsity"] for row in rows})
    lines = []
    for key in dict.fromkeys((r["N"], r["K"], r["M"], r["block"]) for r in rows):
        mine = {r["sparsity"]: r for r in rows if (r["N"], r["K"], r["M"], r["block"]) == key}
        dense = 1e6 * min(r["seconds"]["bf16"] for r in mine.values())
        cells = [f"{ratio(mine[level]):.2f}" if level in mine else "" for level in levels]
        lines.append([f"{key[0]} x {key[1]}", str(key[2]), str(key[3]), f"{dense:.0f}", *cells])
    head = ["N x K", "rows", "block", "bf16 us", *(f"{level:.0%}" for level in levels)]
    return markdown_table(head, lines)


def verdicts(rows: Sequence[dict[str, Any]]) -> list[Verdict]:
    """The targets of a GPU; the worst shape counts."""
    found = []
    for sparsity, limit in G4.items():
        mine = [r for r in rows if (r["block"], r["M"], r["sparsity"]) == (64, 2048, sparsity)]
        found.append(
            Verdict(f"blocks of 64, {sparsity:.0%} zero, M=2048, over cuBLAS", limit, least(map(ratio, mine)))
        )
    few = [r for r in rows if r["M"] <= 16 and r["block"] >= 64 and r["sparsity"] >= 0.8]
    every = [r for r in rows if r["block"] >= 64 and r["sparsity"] >= 0.6]
    return [
        *found,
        Verdict("blocks of 64 and 128, 80 % zero, M=1 and 16, over cuBLAS, the worst", 2.0, least(map(ratio, few))),
        Verdict("blocks of 64 and 128, 60 % zero, over cuBLAS, the worst", 1.0, least(map(ratio, every))),
    ]


def markdown(rows: Sequence[dict[str, Any]], device: str) -> str:
    text = "Medians in bfloat16; times faster than torch's dense product, by the share of blocks that is zero.\n\n"
    return text + table(rows) + ("\n" + target_table(verdicts(rows)) if device == "cuda" else "")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=auto, help="default here: %(default)s")
    parser.add_argument("--shapes", help="N x K, such as 4096x4096,14336x4096")
    parser.add_argument("--blocks", default="32,64,128", help="(default: %(default)s)")
    parser.add_argument("--sparsity", default="0.5,0.6,0.8,0.9", help="shares of blocks (default: %(default)s)")
    parser.add_argument("--rows", help="of input (default: 1,512; 1,16,2048 on a GPU)")
    parser.add_argument("--paths", action="store_true", help="on a CPU: every way there")
    parser.add_argument("--seconds", type=float, help="per candidate (default: 0.15; 0.02 on a GPU)")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds in all; what is left is named")
    parser.add_argument("--out", type=Path, help="folder (default: bench/results/<device>)")
    args = parser.parse_args(argv)
    args.start = time.perf_counter()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch sees no GPU here")
    args.shapes = [tuple(map(int, s.split("x"))) for s in (args.shapes or SHAPES[args.device]).split(",")]
    args.blocks = [int(B) for B in args.blocks.split(",")]
    args.sparsity = [float(s) for s in args.sparsity.split(",")]
    args.rows = [int(M) for M in (args.rows or ROWS[args.device]).split(",")]
    args.seconds = args.seconds if args.seconds is not None else 0.15 if args.device == "cpu" else 0.02
    args.out = args.out or RESULTS / device_name(args.device)
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    gpu, rows = Cuda() if args.device == "cuda" else None, []
    todo = [
        (N, K, B, s) for B in sorted(args.blocks, key=lambda B: B != 64) for N, K in args.shapes for s in args.sparsity
    ]
    with torch.inference_mode():
        for N, K, B, sparsity in todo:
            if time.perf_counter() - args.start > args.budget:
                print(f"not measured, the budget is spent: {N} x {K}, blocks of {B}, {sparsity:.0%}")
                continue
            for row in bench(N, K, B, sparsity, args.rows, args, gpu):
                rows.append(row)
                print(line(row), flush=True)
    path = write(args.out / "block_sparse.json", about(args.device), rows)
    path.with_suffix(".md").write_text(markdown(rows, args.device))
    print("\n" + markdown(rows, args.device) + f"\nwritten: {path}")


if __name__ == "__main__":
    main()
