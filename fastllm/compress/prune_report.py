"""What `prune` tells of what it did."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from ..patch.plan import as_it_is
from ..progress import size
from .prune_layers import Removed


@dataclass(frozen=True)
class Totals:
    """Of a model. bytes: of its parameters, each once. flops_per_token: two for each weight of a matrix product that a
    token goes through, the head's included, those of attention over the context not. loss: of the next token, in nats,
    or of models that predict none the error of the last hidden states, as a share of their mean square."""

    parameters: int
    bytes: int
    flops_per_token: int
    loss: float


def totals(model: Any, loss: float) -> Totals:
    """With a loss that was measured."""
    own = list(model.parameters())
    flops = 0
    for d in as_it_is(model).decisions:
        module = model.get_submodule(d.name)
        if d.kind == "experts":
            flops += 2 * d.before // next(module.parameters()).element_size()
        elif d.kind != "embedding" and not isinstance(module, nn.Embedding):
            flops += 2 * sum(p.numel() for p in module.parameters(recurse=False) if p.ndim == 2)
    return Totals(sum(p.numel() for p in own), sum(p.numel() * p.element_size() for p in own), flops, loss)


@dataclass(frozen=True)
class Narrowed:
    """One layer's neurons or heads: which went, the scores of all, and by what share of its mean square the output is
    off, without the repair and as it is now."""

    layer: int  # in the model as it was
    removed: list[int]
    scores: list[float]
    without_repair: float
    error: float


@dataclass
class PruneReport:
    """What `fastllm.prune` did. `print(report)` shows one screen; `to_dict()` is for JSON."""

    title: str
    tokens: int  # of calibration data
    scored: int  # of these, on how many the loss was measured
    predicts: bool  # whether the loss is that of the next token
    repair: bool
    before: Totals
    after: Totals | None = None
    settings: dict[str, tuple[Any, Any]] = field(default_factory=dict)  # of the configuration: before, after
    layers: list[Removed] = field(default_factory=list)
    ffn: list[Narrowed] = field(default_factory=list)
    heads: list[Narrowed] = field(default_factory=list)
    unit: str = ""  # of which heads were removed
    warnings: list[str] = field(default_factory=list)
    saved: str = ""

    def __str__(self) -> str:
        assert self.after is not None
        lines = [f"fastllm: {self.title}, pruned"]
        for name in ("parameters", "bytes", "flops_per_token"):
            a, b = getattr(self.before, name), getattr(self.after, name)
            show = size if name == "bytes" else lambda n: size(n).removesuffix("B").strip()
            lines.append(f"  {name.replace('_', ' '):16} {show(a):>8} -> {show(b):>8}  {b / a - 1:+.1%}")
        lines.append(f"  {self._loss()}")
        for name, (a, b) in self.settings.items():
            lines.append(f"  {name:24} {a} -> {b}")
        for removed in self.layers:
            others = ", ".join(f"{i} {show[1]:.4g}" for i, show in sorted(removed.others.items()))
            beside = f"; without other candidates: {others}" if others else ""
            lines.append(
                f"  removed layer {removed.layer}: influence {removed.influence:.3f}, "
                f"loss without it {removed.loss:.4g}{beside}"
            )
        lines += [self._narrowed("neurons", self.ffn)] if self.ffn else []
        lines += [self._narrowed(self.unit, self.heads)] if self.heads else []
        lines += [f"  warning: {warning}" for warning in self.warnings]
        lines.append(f"  saved: {self.saved}" if self.saved else "  save: model.save_pretrained(directory)")
        return "\n".join(lines)

    __repr__ = __str__

    def _loss(self) -> str:
        assert self.after is not None
        a, b = self.before.loss, self.after.loss
        if not self.predicts:
            return (
                f"last hidden states on {self.scored} tokens of calibration data: off by {b:.2%} of their mean square"
            )
        shown = f" (perplexity {_exp(a):.4g} -> {_exp(b):.4g})"
        return f"loss on {self.scored} tokens of calibration data {a:.4f} -> {b:.4f}{shown}"

    def _narrowed(self, what: str, found: list[Narrowed]) -> str:
        count, of = len(found[0].removed), len(found[0].scores)
        worst = max(found, key=lambda n: n.error)
        mean = [sum(getattr(n, name) for n in found) / len(found) for name in ("without_repair", "error")]
        done = f"{mean[0]:.2%} of its mean square, repaired to {mean[1]:.2%}" if self.repair else f"{mean[0]:.2%}"
        return (
            f"  removed {count} of {of} {what} in each of {len(found)} layers: output off by {done} "
            f"(most in layer {worst.layer}: {worst.error:.2%})"
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it, with plain values."""
        layers = [
            {**removed._asdict(), "others": {str(i): list(v) for i, v in removed.others.items()}}
            for removed in self.layers
        ]
        return {**asdict(self), "settings": {k: list(v) for k, v in self.settings.items()}, "layers": layers}


def title(model: Any) -> str:
    device = next(model.parameters()).device
    return f"{type(model).__name__} on {torch.cuda.get_device_name(device) if device.type == 'cuda' else 'CPU'}"


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
