"""Pictures of bench_quant_matmul.py's rows: speed-up against M, and the share of the bandwidth at few rows."""

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure  # without pyplot, which wants a display
from report import names, numbers
from targets import Row, bandwidth, ratio

FEW = 16


def colours(found: Sequence[str]) -> dict[str, Any]:
    """One for a provider, the same in every picture; fastllm's stands out."""
    wheel = colormaps["tab20"].colors
    return {name: "black" if name == "fastllm" else wheel[i % 20] for i, name in enumerate(found)}


def keys(rows: Sequence[Row]) -> list[tuple[str, int, int]]:
    return list(dict.fromkeys((row["format"], row["N"], row["K"]) for row in rows))


def grid(count: int) -> tuple[Any, list[Any]]:
    across = min(3, count)
    down = ceil(count / across)
    figure = Figure(figsize=(5.2 * across, 3.6 * down + 0.6), facecolor="white")
    axes = figure.subplots(down, across, squeeze=False)
    flat = list(axes.flat)
    for unused in flat[count:]:
        unused.axis("off")
    return figure, flat[:count]


def speedups(rows: Sequence[Row], path: Path) -> Path:
    """Speed-up over the dense product, a panel for each weight, a line for each provider."""
    everyone, found = colours(names(rows)), keys(rows)
    figure, axes = grid(len(found))
    for axis, key in zip(axes, found, strict=True):
        mine = sorted((r for r in rows if (r["format"], r["N"], r["K"]) == key), key=lambda r: r["M"])
        for name, colour in everyone.items():
            points = [(row["M"], ratio(row, name)) for row in mine if name in row["seconds"]]
            if points:
                width = 2.2 if name == "fastllm" else 1.2
                axis.plot(*zip(*points, strict=True), marker="o", ms=3, lw=width, color=colour, label=name)
        axis.axhline(1, color="grey", lw=0.8)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_formatter("{x:g}")
        axis.set_title(f"{key[0]}, {key[1]} x {key[2]}", fontsize=9)
        axis.set_xlabel("rows of x")
        axis.set_ylabel(f"speed-up over {mine[0].get('baseline', 'bf16')}")
        axis.grid(True, which="major", alpha=0.3)
    return finished(figure, axes, path)


def shares(rows: Sequence[Row], ceilings: dict[str, float], path: Path) -> Path:
    """The share of the measured bandwidth at few rows."""
    everyone, found = colours(names(rows)), keys(rows)
    figure, axes = grid(len(found))
    few = [M for M in numbers(rows) if M <= FEW]
    for axis, key in zip(axes, found, strict=True):
        mine = {r["M"]: r for r in rows if (r["format"], r["N"], r["K"]) == key}
        for i, (name, colour) in enumerate(everyone.items()):
            values = [(bandwidth(mine[M], ceilings, name) or 0.0) if M in mine else 0.0 for M in few]
            if any(values):
                places = [x + (i - len(everyone) / 2) * 0.8 / len(everyone) for x in range(len(few))]
                axis.bar(places, [100 * v for v in values], 0.8 / len(everyone), color=colour, label=name)
        axis.set_xticks(range(len(few)), [f"M={M}" for M in few])
        axis.set_ylim(0, 100)
        axis.set_title(f"{key[0]}, {key[1]} x {key[2]}", fontsize=9)
        axis.set_ylabel("% of measured bandwidth")
        axis.grid(True, axis="y", alpha=0.3)
    return finished(figure, axes, path)


def finished(figure: Any, axes: list[Any], path: Path) -> Path:
    """One legend for all panels."""
    labels = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(labels.values(), labels.keys(), loc="lower center", ncols=4, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, (0.2 + 0.25 * ceil(len(labels) / 4)) / figure.get_figheight(), 1, 1))
    figure.savefig(path, dpi=110)
    return path


def bars(groups: dict[str, dict[str, float]], title: str, path: Path) -> Path:
    """Speed-ups: a group of bars for each case, a bar for each model, a line at 1. groups: {case: {model: ratio}}."""
    figure = Figure(figsize=(2.4 * len(groups) + 2, 3.6), facecolor="white")
    axis = figure.subplots()
    models = list(dict.fromkeys(model for values in groups.values() for model in values))
    for i, (name, colour) in enumerate(colours(models).items()):
        places = [x + (i - (len(models) - 1) / 2) * 0.8 / len(models) for x in range(len(groups))]
        heights = [values.get(name, 0.0) for values in groups.values()]
        drawn = axis.bar(places, heights, 0.8 / len(models), color=colour, label=name)
        axis.bar_label(drawn, [f"{height:.2f}" if height else "" for height in heights], fontsize=7)
    axis.axhline(1, color="grey", lw=0.8)
    axis.set_xticks(range(len(groups)), list(groups))
    axis.set_ylabel("times as fast")
    axis.set_title(title, fontsize=10)
    return finished(figure, [axis], path)


def draw(rows: Sequence[Row], head: dict[str, Any], folder: Path) -> list[Path]:
    """Write the pictures beside the result file."""
    if not rows:
        return []
    found = [speedups(rows, folder / "quant_matmul_speedup.png")]
    if head.get("ceilings") and any(row["M"] <= FEW for row in rows):
        found.append(shares(rows, head["ceilings"], folder / "quant_matmul_bandwidth.png"))
    return found
