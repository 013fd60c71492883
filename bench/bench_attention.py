"""Attention of many queries on this machine, against torch's own, in one run.

    python bench/bench_attention.py [--widths 64,128] [--lengths 1024,16384] [--seconds 0.02] [--budget 300]

On a GPU: as many sequences as make 16,384 tokens, 2048 / D heads, causal and not, against SDPA's FlashAttention-2 (the
baseline), SDPA's cuDNN and FlexAttention. On a CPU: the heads of Gemma 3 270M, with and without its window, against
scaled_dot_product_attention. Writes bench/results/<device>/attention.json and .md.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench_quant_matmul import faults, said
from measure import Cuda, cold_bytes, copies, error_of, measure, ready
from report import markdown_table
from results import RESULTS, about, device_name, smi, write
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from fastllm.ops.attention import attention
from fastllm.ops.attention_reference import reference

TOKENS, HIDDEN = 16384, 2048
CHECKED = 128  # queries of the first head, at either end, that are compared with the definition
BOUND = 1e-2  # relative Frobenius error; rounding the weights to bfloat16 costs 2e-3, and the result as much


class Shape(NamedTuple):
    """window: of sliding attention, or None."""

    B: int
    Hq: int
    Hkv: int
    S: int
    D: int
    causal: bool = True
    window: int | None = None

    def operations(self) -> float:
        """Of the two products, for the pairs of a query and a key that it sees."""
        S, w = self.S, min(self.window or self.S, self.S)
        pairs = S * w - w * (w - 1) / 2 if self.causal else S * S
        return 4.0 * self.B * self.Hq * self.D * pairs


Operands = tuple[Tensor, Tensor, Tensor]
Call = Callable[[Tensor, Tensor, Tensor], Tensor]


def own(shape: Shape) -> Call:
    return partial(attention, causal=shape.causal, window=shape.window)


def sdpa(shape: Shape, backend: SDPBackend) -> Call:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=shape.causal, enable_gqa=shape.Hq != shape.Hkv)

    return call


@cache
def compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(shape: Shape) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j <= i

    block = create_block_mask(sees, None, None, shape.S, shape.S, device="cuda") if shape.causal else None
    return partial(compiled_flex(), block_mask=block, enable_gqa=shape.Hq != shape.Hkv)


def masked(shape: Shape) -> Call:
    """With the window as a mask, which is how transformers calls it."""
    i = torch.arange(shape.S)
    distance = i - i[:, None]
    mask = (distance <= 0) & (distance > -(shape.window or shape.S))
    return partial(scaled_dot_product_attention, attn_mask=mask, enable_gqa=True)


def plain(shape: Shape) -> Call:
    """Without the window: more pairs, but no mask."""
    return partial(scaled_dot_product_attention, is_causal=shape.causal, enable_gqa=True)


def candidates(shape: Shape, device: str) -> dict[str, Callable[[], Call]]:
    """The baseline first. Each is made when it is its turn, and may fail."""
    if device == "cuda":
        return {
            "SDPA flash": lambda: sdpa(shape, SDPBackend.FLASH_ATTENTION),
            "fastllm": lambda: own(shape),
            "SDPA cuDNN": lambda: sdpa(shape, SDPBackend.CUDNN_ATTENTION),
            "FlexAttention": lambda: flex(shape),
        }
    found = {"SDPA": lambda: plain(shape), "fastllm": lambda: own(shape)}
    return found if shape.window is None else found | {"SDPA with a mask": lambda: masked(shape)}


def shapes(args: argparse.Namespace) -> Iterator[Shape]:
    for D in args.widths:
        for S in args.lengths:
            if args.device == "cuda":
                for causal in (True, False):
                    yield Shape(max(1, TOKENS // S), HIDDEN // D, HIDDEN // D, S, D, causal)
            else:
                for window in (None, 512):
                    yield Shape(1, 4, 1, S, D, True, window)


def operands(shape: Shape, device: str) -> Operands:
    """As a model has them: [B, S, heads, D] in memory."""

    def one(heads: int) -> Tensor:
        x = torch.randn(shape.B, shape.S, heads, shape.D, dtype=torch.bfloat16, device=device)
        return x.transpose(1, 2)

    return one(shape.Hq), one(shape.Hkv), one(shape.Hkv)


def worst_error(y: Tensor, x: Operands, shape: Shape, window: int | None) -> float:
    """Of the first and the last queries of the first head of the last sequence. NaN for anything not finite."""
    q, k, v = (t[-1:, :1].float() for t in x)
    n = min(CHECKED, shape.S)
    last = reference(q[:, :, -n:], k, v, causal=shape.causal, window=window)
    seen = n if shape.causal else shape.S
    first = reference(q[:, :, :n], k[:, :, :seen], v[:, :, :seen], causal=shape.causal, window=window)
    errors = error_of(y[-1:, :1, -n:], last), error_of(y[-1:, :1, :n], first)
    return max(errors) if y.isfinite().all() else float("nan")


def row(shape: Shape, args: argparse.Namespace, gpu: Cuda | None) -> dict[str, Any]:
    """Everything that is known of a shape."""
    bytes_each = 2 * shape.S * shape.D * shape.B * (shape.Hq + 2 * shape.Hkv)
    sets = [operands(shape, args.device) for _ in range(min(8, copies(bytes_each, cold_bytes(args.device))))]
    runners: dict[str, Any] = {}
    absent, wrong, errors = {}, {}, {}
    for name, make in candidates(shape, args.device).items():
        try:
            call = make()
            rotation = [partial(call, *x) for x in sets]
            y = rotation[0]()
            error = worst_error(y, sets[0], shape, None if name == "SDPA" else shape.window)
            if error <= BOUND:
                runners[name], errors[name] = rotation if gpu is None else ready(rotation, gpu), error
            else:
                wrong[name] = error
        except faults() as fault:
            absent[name] = said(fault)
            if gpu is not None:
                gpu.synchronize()  # raises if the device itself is in error
    baseline = next(iter(candidates(shape, args.device)))
    if baseline not in runners:
        raise SystemExit(f"{baseline} itself failed: {absent.get(baseline, wrong)}")
    times = measure(runners, baseline, args.seconds, gpu)
    return {
        **shape._asdict(), "baseline": baseline, "wrong": wrong, "absent": absent, "error": errors,
        "seconds": {name: t.median for name, t in times.items()},
        "p10": {name: t.p10 for name, t in times.items()}, "p90": {name: t.p90 for name, t in times.items()},
        "samples": {name: t.samples for name, t in times.items()},
        "teraflops": {name: shape.operations() / t.median / 1e12 for name, t in times.items()},
    }  # fmt: skip


def line(r: dict[str, Any]) -> list[str]:
    """A row of the table: operations per second that are needed, and the ratio to the baseline."""
    base = r["seconds"][r["baseline"]]
    kind = ("causal" if r["causal"] else "full") + (f", window {r['window']}" if r["window"] else "")
    cells = [f"{n} {r['teraflops'][n]:.4g} ({base / t:.2f}x)" for n, t in r["seconds"].items()]
    cells += [f"{name} WRONG ({error:.1e})" for name, error in r["wrong"].items()]
    return [f"{r['B']} x {r['S']}", f"{r['Hq']}/{r['Hkv']} x {r['D']}", kind, *cells]


def markdown(rows: list[dict[str, Any]]) -> str:
    """The page beside the result file."""
    lines = [line(r) for r in rows]
    widest = max((len(cells) for cells in lines), default=3)
    head = ["sequences", "heads", "", *("" for _ in range(widest - 3))]
    left_out = {(n, why) for r in rows for n, why in r["absent"].items()}
    text = "TFLOP/s of the pairs that are seen, and the speed over the first; medians, calls in turns, bfloat16.\n\n"
    text += markdown_table(head, [[*cells, *[""] * (widest - len(cells))] for cells in lines])
    return text + "".join(f"\n- {name}: {why}" for name, why in sorted(left_out)) + "\n"


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=auto, help="default here: %(default)s")
    parser.add_argument("--widths", help="columns of a head (default: 64,96,128,256; 256 on a CPU)")
    parser.add_argument("--lengths", help="of a sequence (default: 1024 to 16384; 512,4096 on a CPU)")
    parser.add_argument("--seconds", type=float, help="per candidate and shape (default: 0.02; 1.0 on a CPU)")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds in all; what is left is named")
    parser.add_argument("--out", type=Path, help="folder (default: bench/results/<device>)")
    args = parser.parse_args(argv)
    gpu = args.device == "cuda"
    args.start = time.perf_counter()
    args.widths = [int(n) for n in (args.widths or ("64,96,128,256" if gpu else "256")).split(",")]
    args.lengths = [int(n) for n in (args.lengths or ("1024,2048,4096,8192,16384" if gpu else "512,4096")).split(",")]
    args.seconds = args.seconds if args.seconds is not None else 0.02 if gpu else 1.0
    args.out = args.out or RESULTS / device_name(args.device)
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    gpu = Cuda() if args.device == "cuda" else None
    head: dict[str, Any] = about(args.device) | {"clocks": []}
    rows: list[dict[str, Any]] = []
    path = args.out / "attention.json"
    with torch.inference_mode():
        for shape in shapes(args):
            if time.perf_counter() - args.start > args.budget:
                print(f"not measured, the budget is spent: {shape}")
                continue
            rows.append(row(shape, args, gpu))
            print(*line(rows[-1]), sep="  ", flush=True)
            gc.collect()
            if gpu is not None:
                torch.cuda.empty_cache()
                head["clocks"].append(smi())
            write(path, head, rows)  # at once: what brings the process down takes nothing along
    path.with_suffix(".md").write_text(markdown(rows))
    print(f"written: {path}")
    if any("fastllm" in r["wrong"] for r in rows):
        sys.exit("fastllm is wrong somewhere: see WRONG above")


if __name__ == "__main__":
    main()
