"""Tables and sentences from the rows of bench_quant_matmul.py."""

from collections.abc import Sequence
from typing import Any

from targets import Row, Verdict, bandwidth, layer_sum, mean, pick, ratio, verdicts

CPU = (
    "Speed-up over torch's dense bfloat16 on the same machine, weights cold, calls in turns. "
    "In brackets: a candidate that was faster than the choice by more than 15 %.\n\n"
)
GPU = (
    "Speed-up over the dense product (cuBLAS) on the same GPU: CUDA graphs over rotating, cold weights, replayed in "
    "turns with the baseline; medians. In brackets: whoever else was faster by more than 15 %.\n\n"
)
WHY = """
Where it is below 0.9, no candidate is better unless brackets name it. int4: torch's operator dequantises again for
every few rows of x, so it loses to dense from about 16 rows on; dequantising once costs as much as 64 to 128 rows of
the product, whatever their number. int8, small layers: the cast to bfloat16 is what is left over. int8, large layers:
one layout serves all numbers of rows, and oneDNN's blocks, the best from 4 rows on, are behind plain rows at 1 and 2.
"""


def numbers(rows: Sequence[Row]) -> list[int]:
    """The numbers of rows of input that occur."""
    return sorted({row["M"] for row in rows})


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = "| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|\n"
    return head + "".join("| " + " | ".join(line) + " |\n" for line in lines)


def table(rows: Sequence[Row]) -> str:
    """The speed-up of what fastllm chooses over the dense product, and of the best other where that is far better."""
    lines = []
    for key in dict.fromkeys((r["format"], r["N"], r["K"], r["layout"]) for r in rows):
        mine = {r["M"]: r for r in rows if (r["format"], r["N"], r["K"], r["layout"]) == key}
        cells = [cell(mine[M]) if M in mine else "" for M in numbers(rows)]
        lines.append([key[0], f"{key[1]} x {key[2]}", key[3], *cells])
    return markdown_table(["format", "N x K", "layout", *(f"M={M}" for M in numbers(rows))], lines)


def cell(row: Row) -> str:
    seconds, own = row["seconds"], ratio(row)
    if own is None:
        return "wrong" if "fastllm" in row.get("wrong", {}) else "failed"
    others = [(t, name) for name, t in seconds.items() if name not in (row.get("baseline", "bf16"), "fastllm")]
    if not others or min(others)[0] >= 0.85 * seconds["fastllm"]:
        return f"{own:.2f}"
    return f"{own:.2f} ({min(others)[1]} {ratio(row, min(others)[1]):.2f})"


def names(rows: Sequence[Row]) -> list[str]:
    """Everyone who was measured, fastllm first, the baseline left out."""
    found = dict.fromkeys(name for row in rows for name in row["seconds"] if name != row.get("baseline", "bf16"))
    return sorted(found, key=lambda name: name != "fastllm")


def everyone(rows: Sequence[Row]) -> str:
    """For each format: the geometric mean over the shapes of each provider's speed-up, by M."""
    parts = []
    for format in dict.fromkeys(row["format"] for row in rows):
        mine = pick(rows, format)
        lines = []
        for name in names(mine):
            means = [mean(ratio(row, name) for row in mine if row["M"] == M) for M in numbers(mine)]
            lines.append([name, *("" if value is None else f"{value:.2f}" for value in means)])
        parts.append(f"{format}\n\n" + markdown_table(["", *(f"M={M}" for M in numbers(mine))], lines))
    return "\n".join(parts)


def shares(rows: Sequence[Row], ceilings: dict[str, float]) -> str:
    """The share of the measured bandwidth at few rows, for each shape and provider."""
    few = [M for M in numbers(rows) if M <= 16]
    lines = []
    for key in dict.fromkeys((r["format"], r["N"], r["K"]) for r in rows):
        mine = {r["M"]: r for r in rows if (r["format"], r["N"], r["K"]) == key}
        base = next(iter(mine.values())).get("baseline", "bf16")
        for name in [*names(list(mine.values())), base]:
            found = [bandwidth(mine[M], ceilings, name) if M in mine else None for M in few]
            cells = ["" if value is None else f"{value:.0%}" for value in found]
            lines.append([key[0], f"{key[1]} x {key[2]}", name, *cells])
    return markdown_table(["format", "N x K", "", *(f"M={M}" for M in few)], lines)


def left_out(rows: Sequence[Row]) -> str:
    """Who did not run, and why; each reason once, with the formats that it was given for."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, reasons in row.get("absent", {}).items():
            found.setdefault((name, "; ".join(reasons)), []).append(row["format"])
        for name, why in row.get("eager", {}).items():
            found.setdefault((name, f"timed eagerly: {why}"), []).append(row["format"])
        for name, error in row.get("wrong", {}).items():
            found.setdefault((name, f"WRONG, and not timed: relative error {error:.1e}"), []).append(row["format"])
    return "\n".join(
        f"- {name} ({', '.join(dict.fromkeys(formats))}): {why}" for (name, why), formats in sorted(found.items())
    )


def target_table(found: Sequence[Verdict]) -> str:
    lines = [
        [v.what, ("at least " if v.least else "at most ") + shown(v.limit, v.unit), shown(v.measured, v.unit), v.said]
        for v in found
    ]
    return markdown_table(["target", "", "measured", ""], lines)


def shown(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    return f"{value:.0%}" if unit == "share" else f"{value:.2f} {unit}" if unit != "x" else f"{value:.2f}x"


def layer_sums(rows: Sequence[Row]) -> str:
    """The layers of Llama 3.1 8B at M=1, for each format and whoever was measured at all of its shapes."""
    lines = []
    for format in dict.fromkeys(row["format"] for row in rows):
        mine = pick(rows, format)
        base = mine[0].get("baseline", "bf16")
        dense = layer_sum(mine, format, base)
        for name in [base, *names(mine)]:
            total = layer_sum(mine, format, name)
            if total and dense:
                lines.append(f"{format:10} {name:28} {total * 1e3:9.3f} ms  {dense / total:.2f}x")
    return "\n".join(lines) or "not every shape was measured at M=1"


def markdown(rows: Sequence[Row], head: dict[str, Any]) -> str:
    """The page beside the result file."""
    if "ceilings" not in head:
        return CPU + table(rows) + WHY
    parts = [
        GPU + table(rows),
        "Targets\n\n" + target_table(verdicts(rows, head)),
        "Geometric mean over the shapes\n\n" + everyone(rows),
        "Share of the measured bandwidth (the larger of a copy's and a sum's), all bytes counted\n\n"
        + shares(rows, head["ceilings"]),
        "Layers of Llama 3.1 8B, M=1\n\n```\n" + layer_sums(rows) + "\n```\n",
        "Who did not run, or not as a graph\n\n" + left_out(rows) + "\n",
    ]
    return "\n".join(parts)


def told(rows: Sequence[Row], head: dict[str, Any]) -> str:
    """What the script prints last."""
    parts = [table(rows), "layers of Llama 3.1 8B, M=1:\n" + layer_sums(rows), "geometric means over the shapes:"]
    parts += [everyone(rows)]
    if "ceilings" in head:
        parts += ["not run, or not as measured elsewhere:\n" + left_out(rows), target_table(verdicts(rows, head))]
    return "\n".join(parts)
