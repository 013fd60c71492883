"""quant_matmul on this CPU: every candidate at every number of rows, against torch's dense bfloat16.

    python bench/bench_quant_matmul.py [--model gemma-3-270m] [--seconds 0.15]

Writes bench/results/<device>/quant_matmul.json and .md, in place of what is there.
The switches in fastllm/ops/ are read off them.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measure import alternate, copies, save
from shapes import ROWS, SHAPES
from torch import Tensor, nn

from fastllm.formats import IntFormat, QuantizedWeight, dequantize, parse_format
from fastllm.ops import LAYOUTS, choose_layout
from fastllm.ops.int4pack import Int4Pack
from fastllm.ops.int8 import Int8Blocks, Int8Rows
from fastllm.ops.layout import Layout, Prepared
from fastllm.quantizers import quantize

FOREVER = 1 << 30
WHY = """
Where it is below 0.9, no candidate is better unless brackets name it. int4: torch's operator dequantises again for
every few rows of x, so it loses to dense from about 16 rows on; dequantising once costs as much as 64 to 128 rows of
the product, whatever their number. int8, small layers: the cast to bfloat16 is what is left over. int8, large layers:
one layout serves all numbers of rows, and oneDNN's blocks, the best from 4 rows on, are behind plain rows at 1 and 2.
"""


def variant(kind: type[Layout], **switches: int) -> Layout:
    """A layout with its switch moved, so that one side of it runs at every size."""
    layout = kind()
    for name, value in switches.items():
        setattr(layout, name, value)
    return layout


CANDIDATES = {
    4: {
        "int4pack": variant(Int4Pack, direct_rows=FOREVER),
        "int4pack, dequantised": variant(Int4Pack, direct_rows=0),
    },
    8: {
        "int8pack": variant(Int8Rows, direct_rows=FOREVER),
        "int8, cast": variant(Int8Rows, direct_rows=0),
        "oneDNN digits": variant(Int8Blocks, smallest=0),
    },
}


def bench_shape(format: IntFormat, N: int, K: int, seconds: float) -> list[dict[str, Any]]:
    dtype, device = torch.bfloat16, torch.device("cpu")
    w = torch.randn(N, K, dtype=dtype) / K**0.5
    weight = quantize(w, format, "rtn")
    dense = dequantize(weight, format, (N, K), torch.float32)
    chosen, _ = choose_layout(format, N, K, dtype, device)
    layouts = {"fastllm": LAYOUTS[chosen.name], **CANDIDATES[format.bits]}
    layouts = {name: found for name, found in layouts.items() if not found.reasons(format, N, K, dtype, device)}
    count = copies(format.bytes(N, K))
    packed = {name: [pack(layout, weight, format, (N, K)) for _ in range(count)] for name, layout in layouts.items()}
    weights = [w.clone() for _ in range(copies(2 * N * K))]
    rows = []
    for M in ROWS:
        if M * N * 4 > 1 << 28:
            continue  # nobody wants that many logits
        x = torch.randn(M, K, dtype=dtype)
        calls: dict[str, list[Callable[[], Tensor]]] = {"bf16": [partial(nn.functional.linear, x, v) for v in weights]}
        want = x.float() @ dense.t()
        for name, layout in layouts.items():
            error = (layout.matmul(x, packed[name][0], N, format.bits, format.group_of(K)).float() - want).norm()
            if not error <= 6e-3 * want.norm():
                raise SystemExit(f"{name} is wrong at M={M}, N={N}, K={K}: relative error {error / want.norm():.1e}")
            calls[name] = [partial(layout.matmul, x, p, N, format.bits, format.group_of(K)) for p in packed[name]]
        if M > 128:
            calls = {name: found for name, found in calls.items() if name not in ("int4pack", "int8pack")}
        times = alternate(calls, seconds)
        rows.append({"format": format.name, "N": N, "K": K, "M": M, "layout": chosen.name, "seconds": times})
        ratios = "  ".join(f"{name} {times['bf16'] / t:.2f}x" for name, t in times.items() if name != "bf16")
        print(f"{format.name:10} {N:6} x {K:5}  M {M:3}  bf16 {times['bf16'] * 1e3:8.3f} ms  {ratios}", flush=True)
    return rows


def pack(layout: Layout, weight: QuantizedWeight, format: IntFormat, shape: tuple[int, int]) -> Prepared:
    return layout.pack(weight._replace(packed=weight.packed.clone()), format, shape)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: the speed-up of what fastllm chooses over bf16, and of the best candidate where that is another."""
    lines = [
        "| format | N x K | layout | " + " | ".join(f"M={M}" for M in ROWS) + " |",
        "|---" * (3 + len(ROWS)) + "|",
    ]
    for key in dict.fromkeys((r["format"], r["N"], r["K"], r["layout"]) for r in rows):
        cells = []
        for M in ROWS:
            found = [r["seconds"] for r in rows if (r["format"], r["N"], r["K"], r["layout"]) == key and r["M"] == M]
            cells.append(cell(found[0]) if found else "")
        lines.append(f"| {key[0]} | {key[1]} x {key[2]} | {key[3]} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def cell(seconds: dict[str, float]) -> str:
    best = min((t, name) for name, t in seconds.items() if name not in ("bf16", "fastllm"))
    ratio = seconds["bf16"] / seconds["fastllm"]
    better = f" ({best[1]} {seconds['bf16'] / best[0]:.2f})" if best[0] < 0.85 * seconds["fastllm"] else ""
    return f"{ratio:.2f}{better}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*SHAPES, "all"], default="all", help="default: all")
    parser.add_argument("--seconds", type=float, default=0.15, help="per candidate and shape")
    parser.add_argument("--formats", default="int8,int4-g32,int4-g128")
    args = parser.parse_args()
    shapes = [s for model, found in SHAPES.items() if args.model in (model, "all") for s in found]
    with torch.inference_mode():
        names = args.formats.split(",")
        rows = [r for name in names for N, K in shapes for r in bench_shape(parse_format(name), N, K, args.seconds)]
    path = save("quant_matmul", rows)
    path.with_suffix(".md").write_text(
        "Speed-up over torch's dense bfloat16 on the same machine, weights cold, calls in turns. "
        "In brackets: a candidate that was faster than the choice by more than 15 %.\n\n" + table(rows) + WHY
    )
    print(f"\n{table(rows)}\nwritten: {path}")


if __name__ == "__main__":
    main()
