"""The demo's picture: three panels of bars."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind eyes tell apart; with the grey text they are seen on white and on black
COLOURS = ("#8c8c8c", "#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#D55E00")
TEXT = "#7d8590"
PANELS = (
    ("decode_tok_s", 1.0, "Tokens per second", "higher is better", "{:.1f}"),
    ("bytes_per_token", 1e-6, "MB read per token", "lower is better", "{:.0f}"),
    ("perplexity", 1.0, "Perplexity", "lower is better", "{:.1f}"),
)


def draw(rows: Mapping[str, Mapping[str, Any]], title: str, note: str, path: Path) -> None:
    """Bars for each of `rows` {label: figures} in each panel, written to `path` (PNG or SVG) without background."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, (key, scale, name, better, form) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        _panel(axes, {label: row[key] * scale for label, row in rows.items()}, form)
        axes.set_title(f"{name}\n", color=TEXT, fontsize=12, fontweight="bold")
        axes.text(0.5, 1.03, better, transform=axes.transAxes, ha="center", color=TEXT, fontsize=9)
    figure.suptitle(title, color=TEXT, fontsize=13, fontweight="bold")
    figure.supxlabel(note, color=TEXT, fontsize=8)
    figure.savefig(path, dpi=160, transparent=True)


def _panel(axes: Axes, values: Mapping[str, float], form: str) -> None:
    bars = axes.bar(list(values), list(values.values()), width=0.62, color=COLOURS[: len(values)])
    axes.bar_label(bars, [form.format(value) for value in values.values()], color=TEXT, fontsize=11, padding=2)
    axes.set_ylim(0, 1.15 * max(values.values()))
    axes.set_yticks([])
    axes.tick_params(axis="x", length=0, colors=TEXT, labelsize=11)
    axes.spines[["left", "top", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(TEXT)
