"""The picture of a `Budget`: bytes read per token against perplexity."""

from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from .budget import Budget

TEXT, FORESEEN, MEASURED, CHOSEN = "#7d8590", "#56B4E9", "#E69F00", "#D55E00"  # seen on white and on black


def draw(budget: "Budget", path: Path) -> None:
    """What was foreseen as a line, what was measured as dots, what was chosen as a star; PNG or SVG."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    most = max([point.perplexity for point in budget.points] + [budget.before.perplexity * (1 + budget.max_loss)])
    line = [(bytes, p) for bytes, p in budget.foreseen if p <= 1.1 * most]
    axes.plot([b / 1e6 for b, _ in line], [p for _, p in line], color=FORESEEN, label="foreseen")
    dots = [budget.before, *budget.points]
    axes.plot([p.bytes / 1e6 for p in dots], [p.perplexity for p in dots], "o", color=MEASURED, label="measured")
    for point in (point for point in budget.points if "everywhere" in point.what):
        axes.annotate(
            point.what, (point.bytes / 1e6, point.perplexity), (4, 6), textcoords="offset points", color=TEXT
        )
    chosen = budget.chosen
    axes.plot(chosen.bytes / 1e6, chosen.perplexity, "*", markersize=15, color=CHOSEN, label="chosen")
    allowed = budget.before.perplexity * (1 + budget.max_loss)
    axes.axhline(allowed, color=TEXT, linestyle="--", linewidth=1)
    axes.annotate(
        f"max_loss={budget.max_loss:g}",
        (1, allowed),
        (-4, 4),
        ("axes fraction", "data"),
        "offset points",
        ha="right",
        color=TEXT,
    )
    axes.set_xlabel("MB read per token", color=TEXT)
    axes.set_ylabel("perplexity", color=TEXT)
    axes.tick_params(colors=TEXT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(TEXT)
    axes.legend(frameon=False, labelcolor=TEXT)
    figure.savefig(path, dpi=160, transparent=True)
