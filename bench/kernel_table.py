"""What the compiler makes of every row of `config()`: registers, shared memory, instructions for a weight, and the
floors that follow. Needs no GPU.

    python bench/kernel_table.py

Writes bench/results/kernels.json and kernels.md. Nothing here is a measurement of time.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
# name: compute capability, multiprocessors, GHz, TB/s, from the makers' data sheets
CARDS = {"A100 80GB": (80, 108, 1.41, 2.04), "H100": (90, 132, 1.755, 3.35), "H200": (90, 132, 1.755, 4.8)}
SHAPE = (8192, 8192)


def name_of(format: tuple[int, int, bool]) -> str:
    bits, group, zero = format
    return f"int{bits}-{f'g{group}' if group else 'channel'}{'-asym' if zero else ''}"


def bytes_of(format: tuple[int, int, bool]) -> float:
    """Of one weight, with its share of a scale of 16 bits and a zero point of 8."""
    bits, group, zero = format
    return bits / 8 + ((2 + zero) / group if group else 0)


def floors(per_weight: float, format: tuple[int, int, bool], target: int) -> dict[str, Any]:
    """For each card: the microseconds that memory needs for an 8192 x 8192 layer, and issuing the instructions."""
    weights = SHAPE[0] * SHAPE[1]
    found = {}
    for card, (capability, multiprocessors, ghz, bandwidth) in CARDS.items():
        if capability == target:
            memory = weights * bytes_of(format) / bandwidth / 1e6
            issue = weights * per_weight / (multiprocessors * 128 * ghz * 1e3)
            found[card] = {"memory_us": round(memory, 1), "issue_us": round(issue, 1)}
    return found


def rows() -> list[dict[str, Any]]:
    from offline import FORMATS, Build, compile_one

    from fastllm.kernels.quant_config import rows_of, tile_of

    found = []
    with tempfile.TemporaryDirectory() as scratch:
        for target in (80, 90, 100):
            for row in rows_of(target):
                for format in FORMATS:
                    tile = tile_of(row, format[0])
                    build = Build("_quant_matmul", target, "bf16", *format, tuple(tile._replace(SPLIT_K=2)))
                    stats = compile_one(build, Path(scratch))
                    entry = {"target": f"sm_{target}", "rows": min(row.rows, 4096), "format": name_of(format)}
                    entry |= {"tile": tile._asdict(), **stats._asdict()}
                    if row.rows <= 16 and tile.BLOCK_N == 64:
                        entry["floors"] = floors(stats.per_weight, format, target)
                    found.append(entry)
                    print(json.dumps(entry), flush=True)
    return found


def tables(found: list[dict[str, Any]]) -> str:
    lines = [
        "Compiled with Triton {triton} for bfloat16 x; `python bench/kernel_table.py` writes this page anew. "
        "Instructions are those of all lanes in the main loop, for one weight. Nothing here is a measurement of time.",
        "",
        "| target | rows of x, up to | tile N x M x K | warps | format | registers | shared KiB | instructions |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for e in found:
        tile = e["tile"]
        shape = f"{tile['BLOCK_N']} x {tile['BLOCK_M']} x {128 * tile['BLOCKS']}"
        last = f"{e['registers']} | {e['shared'] / 1024:.0f} | {e['per_weight']:.2f} |"
        limit = e["rows"] if e["rows"] < 4096 else "any"
        lines.append(f"| {e['target']} | {limit} | {shape} | {tile['num_warps']} | {e['format']} | {last}")
    lines += [
        "",
        f"Floors for one row of x and a layer of {SHAPE[0]} x {SHAPE[1]}, in microseconds: what memory takes at the "
        "data sheet's bandwidth, and what issuing the instructions takes at its clock. Where the second is the "
        "larger, the kernel cannot reach the bandwidth.",
        "",
        "| card | format | memory | instructions |",
        "|---|---|---|---|",
    ]
    for card in CARDS:
        for e in found:
            if card in e.get("floors", {}):
                floor = e["floors"][card]
                lines.append(f"| {card} | {e['format']} | {floor['memory_us']} | {floor['issue_us']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # where the compiling is
    os.environ.pop("TRITON_INTERPRET", None)
    import triton

    found = rows()
    RESULTS.mkdir(exist_ok=True)
    content = {"triton": triton.__version__, "rows": found}
    (RESULTS / "kernels.json").write_text(json.dumps(content, indent=1) + "\n")
    (RESULTS / "kernels.md").write_text(tables(found).replace("{triton}", triton.__version__))


if __name__ == "__main__":
    main()
