"""The speeds that the project wants to reach on a GPU, each judged from measured rows. Pure: no GPU, no files."""

from collections.abc import Iterable, Sequence
from math import exp, log
from typing import Any, NamedTuple

from shapes import LLAMA_8B_LAYERS

Row = dict[str, Any]
MAIN, FORMAT = (8192, 8192), "int4-g128"


class Verdict(NamedTuple):
    """A target. measured: None where nothing was; least: whether `measured` must be at least or at most `limit`."""

    what: str
    limit: float
    measured: float | None
    least: bool = True
    unit: str = "x"

    @property
    def said(self) -> str:
        if self.measured is None:
            return "not measured"
        return "met" if (self.measured >= self.limit if self.least else self.measured <= self.limit) else "missed"


def pick(rows: Iterable[Row], format: str, shape: tuple[int, int] | None = None, M: Sequence[int] = ()) -> list[Row]:
    """Rows of a format, of a shape if one is given, and of these numbers of rows if some are."""
    return [
        row
        for row in rows
        if row["format"] == format and shape in (None, (row["N"], row["K"])) and (not M or row["M"] in M)
    ]


def ratio(row: Row, name: str = "fastllm", over: str | None = None) -> float | None:
    """How many times faster `name` is than `over`, by default the dense product."""
    seconds, over = row["seconds"], over or row.get("baseline", "bf16")
    return seconds[over] / seconds[name] if name in seconds and over in seconds else None


def least(values: Iterable[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)


def mean(values: Iterable[float | None]) -> float | None:
    """The geometric mean of what is there."""
    found = [log(value) for value in values if value]
    return exp(sum(found) / len(found)) if found else None


def bandwidth(row: Row, ceilings: dict[str, float], name: str = "fastllm") -> float | None:
    """The share of the measured bandwidth, all bytes counted."""
    if name not in row["seconds"] or name not in row.get("bytes", {}) or not ceilings:
        return None
    return row["bytes"][name] / row["seconds"][name] / ceilings["bandwidth"]


def layer_sum(rows: Sequence[Row], format: str, name: str, M: int = 1) -> float | None:
    """Seconds of all layers of a model of the shape of Llama 3.1 8B; None if a shape is missing."""
    total = 0.0
    for shape, count in LLAMA_8B_LAYERS.items():
        found = [row["seconds"][name] for row in pick(rows, format, shape, [M]) if name in row["seconds"]]
        if not found:
            return None
        total += count * found[0]
    return total


def layers_ratio(rows: Sequence[Row], format: str, over: str) -> float | None:
    ours, theirs = layer_sum(rows, format, "fastllm"), layer_sum(rows, format, over)
    return theirs / ours if ours and theirs else None


def flatness(rows: Sequence[Row]) -> float | None:
    """How much longer the slowest of 2 to 16 rows takes than one row."""
    one = [row["seconds"]["fastllm"] for row in pick(rows, FORMAT, MAIN, [1]) if "fastllm" in row["seconds"]]
    few = [row["seconds"]["fastllm"] for row in pick(rows, FORMAT, MAIN, range(2, 17)) if "fastllm" in row["seconds"]]
    return max(few) / one[0] - 1 if one and few else None


def verdicts(rows: Sequence[Row], head: dict[str, Any]) -> list[Verdict]:
    """Every target of bench/UNVERIFIED.md that `bench_quant_matmul.py` can judge. head: ceilings and launch costs."""
    ceilings, launch = head.get("ceilings", {}), head.get("launch", {})
    one, large = pick(rows, FORMAT, MAIN, [1]), [row for row in pick(rows, FORMAT, MAIN) if row["M"] >= 1024]

    def at(M: int) -> float | None:
        return least(ratio(row) for row in pick(rows, FORMAT, MAIN, [M]))

    share = least(bandwidth(row, ceilings) for row in one)
    int8 = least(bandwidth(row, ceilings) for row in pick(rows, "int8", MAIN, [1]))
    peer = [least(ratio(row, "fastllm", "GemLite") for row in pick(rows, FORMAT, M=Ms)) for Ms in ([1], range(2, 17))]
    w8a8 = least(ratio(row, "fastllm w8a8") for row in pick(rows, "int8", MAIN) if row["M"] >= 2048)
    dense = rows[0].get("baseline", "bf16") if rows else "bf16"
    return [
        Verdict(f"{FORMAT} 8192 x 8192, M=1: share of the measured bandwidth", 0.75, share, unit="share"),
        Verdict("the same, stretch", 0.85, share, unit="share"),
        Verdict("M=2..16: longer than M=1 by", 0.08, flatness(rows), least=False, unit="share"),
        Verdict("M=32, over cuBLAS", 2.3, at(32)),
        Verdict("M=64, over cuBLAS", 1.7, at(64)),
        Verdict("M=128, over cuBLAS", 1.1, at(128)),
        Verdict("M>=1024, over cuBLAS, the worst", 0.85, least(map(ratio, large))),
        Verdict("the same, stretch", 0.92, least(map(ratio, large))),
        Verdict("any shape and M, over cuBLAS, the worst", 0.8, least(map(ratio, pick(rows, FORMAT)))),
        Verdict("M=1, over GemLite, the worst shape", 1.4, peer[0]),
        Verdict("M=2..16, over GemLite, the worst", 2.0, peer[1]),
        Verdict("int8 8192 x 8192, M=1: share of the measured bandwidth", 0.8, int8, unit="share"),
        Verdict("W8A8, M>=2048, over cuBLAS, activations quantized, the worst", 1.4, w8a8),
        Verdict("layers of Llama 3.1 8B, M=1, over cuBLAS", 3.0, layers_ratio(rows, FORMAT, dense)),
        Verdict("first call of a new shape", 1.0, launch.get("new_shape_s"), least=False, unit="s"),
        Verdict("eager launch", 15.0, launch.get("launch_us", {}).get("fastllm"), least=False, unit="us"),
        Verdict("grouped experts over a loop, 64 experts, 8 tokens", 3.0, head.get("grouped_x")),
    ]
