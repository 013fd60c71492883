"""`max_loss`: the format of each layer, chosen so that the model reads the fewest bytes at a loss that is measured."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ..formats import Format, IntFormat, parse_format
from ..progress import size
from .units import Unit

FORMATS = ("int8", "int4-g32", "int4-g64", "int4-g128")  # that are chosen from, and as it is
MEASURED = 10  # ways along the path that are measured at most
ENOUGH = 0.002  # of the bytes: ways as near to each other as this are not told apart


class Step(NamedTuple):
    """One unit gets a smaller format: what that saves and costs."""

    unit: int
    format: IntFormat
    saved: int  # bytes a token
    lost: float  # nats a token, foreseen


class Point(NamedTuple):
    """A measured way to quantize the model: bytes read per token and perplexity."""

    bytes: int
    perplexity: float
    what: str = ""


@dataclass
class Budget:
    """What was chosen, and what it came to. `print` shows the table; `draw(path)` the Pareto curve."""

    max_loss: float
    measured_on: str
    before: Point
    chosen: Point = Point(0, 0.0)
    points: list[Point] = field(default_factory=list)
    foreseen: list[tuple[int, float]] = field(default_factory=list)  # bytes, perplexity, all along the path
    formats: dict[str, str] = field(default_factory=dict)  # of each layer, "dense" for those left as they are
    losses: dict[str, dict[str, float]] = field(default_factory=dict)  # nats a token by unit and format, foreseen

    @property
    def loss(self) -> float:
        """By how much of itself the perplexity grew."""
        return self.chosen.perplexity / self.before.perplexity - 1

    def summary(self) -> str:
        """One line."""
        p, q = self.before, self.chosen
        return (
            f"perplexity {p.perplexity:.2f} -> {q.perplexity:.2f} ({self.loss:+.2%}, at most {self.max_loss:+.2%}), "
            f"{size(p.bytes)} -> {size(q.bytes)} per token as stored; {self.measured_on}"
        )

    def __str__(self) -> str:
        known = list(next(iter(self.losses.values()), {}))
        lines = [self.summary(), f"  {'layers':52} {'chosen':10}" + "".join(f"{name:>12}" for name in known)]
        for names, losses in self.losses.items():
            chosen = self.formats[names.split(", ")[0]]
            costs = "".join(f"{losses[name]:12.2e}" for name in known)
            lines.append(f"  {_short(names):52} {chosen:10}{costs}")
        lines.append("  the numbers: nats a token that each format is foreseen to cost there")
        lines += [f"  measured: {size(p.bytes)} perplexity {p.perplexity:.3f}  {p.what}" for p in sorted(self.points)]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """All of it, with plain values."""
        names = ("max_loss", "measured_on", "loss", "points", "foreseen", "formats", "losses")
        told = {name: getattr(self, name) for name in names}
        return told | {"before": self.before._asdict(), "chosen": self.chosen._asdict()}

    def draw(self, path: str | Path) -> None:
        """The Pareto curve, as PNG or SVG. ImportError without matplotlib."""
        from .pareto import draw

        draw(self, Path(path))


def _short(names: str) -> str:
    """ "a.b.q, a.b.k" -> "a.b.q k"."""
    first, *others = names.split(", ")
    return " ".join([first, *(name.rpartition(".")[2] for name in others)])


def formats_of(weights: Any) -> list[IntFormat]:
    """The formats to choose from, of one name or several. ValueError for those that are not for weights alone."""
    if isinstance(weights, Mapping):
        raise ValueError("max_loss chooses the format of each layer itself: weights=[formats to choose from]")
    names: Sequence[str | Format] = FORMATS
    if weights is not None:
        names = [weights] if isinstance(weights, str) or not isinstance(weights, Sequence) else weights
    found = [parse_format(name) for name in names]
    for format in found:
        if not isinstance(format, IntFormat) or format.activations:
            raise ValueError(f"max_loss chooses among formats of weights, of 4 or 8 bits, not {format.name}")
    return [format for format in found if isinstance(format, IntFormat)]


def path(units: Sequence[Unit]) -> list[Step]:
    """The order in which units get smaller: what saves most bytes for its loss comes first.

    Of each unit only the formats on the lower convex hull of (bytes, loss) are used, so that its own steps come in
    order.
    """
    steps = []
    for number, unit in enumerate(units):
        here: IntFormat | None = None
        while True:
            smaller = [f for f in unit.bytes if f is not None and unit.bytes[f] < unit.bytes[here]]
            if not smaller:
                break
            slopes = {f: (unit.loss[f] - unit.loss[here]) / (unit.bytes[here] - unit.bytes[f]) for f in smaller}
            best = min(smaller, key=lambda f: (slopes[f], unit.bytes[f]))
            saved, lost = unit.bytes[here] - unit.bytes[best], unit.loss[best] - unit.loss[here]
            steps.append(Step(number, best, saved, lost))
            here = best
    return sorted(steps, key=lambda step: step.lost / step.saved)


def formats_after(steps: Sequence[Step], units: int) -> list[IntFormat | None]:
    """The format of each of so many units after these steps."""
    found: list[IntFormat | None] = [None] * units
    for step in steps:
        found[step.unit] = step.format
    return found


def search(
    steps: Sequence[Step], measure: Callable[[Sequence[Step]], float], allowed: float, total: int
) -> list[Step]:
    """The steps that can be made while the measured loss stays within `allowed`, nats a token.

    measure(made) tells the loss; total: bytes before the first. Each guess, of how far along `steps` it goes, follows
    what is foreseen, corrected by what was measured so far. Of all that was measured within, the longest way counts; a
    large step that is too much is left out, and the way goes on behind it.
    """
    left, good, known = list(steps), 0, {0: 0.0}
    bad = len(left) + 1
    for _ in range(MEASURED):
        if bad - good <= 1 or good and sum(step.saved for step in left[good : bad - 1]) < ENOUGH * total:
            if good == len(left) or left[good].saved < ENOUGH * total:
                break
            left = left[:good] + [step for step in left[good:] if step.unit != left[good].unit]
            bad, known = len(left) + 1, {count: loss for count, loss in known.items() if count <= good}
            if good == len(left):
                break
        lost = list(accumulate((step.lost for step in left), initial=0.0))
        guess = _guess(lost, known, allowed, good, bad)
        known[guess] = measure(left[:guess])
        if known[guess] <= allowed:
            good = guess
        else:
            bad = guess
    return left[:good]


def _guess(lost: Sequence[float], known: dict[int, float], allowed: float, good: int, bad: int) -> int:
    """Where, between `good` and `bad`, the loss should reach `allowed`: what was measured, joined as foreseen."""
    low = known[good]
    above = known.get(bad)
    if above is None:
        factor = low / lost[good] if good and low > 0 and lost[good] > 0 else 1.0
    else:
        factor = (above - low) / max(lost[bad] - lost[good], 1e-12)
    within = [k for k in range(good + 1, bad) if low + factor * (lost[k] - lost[good]) <= allowed]
    found = within[-1] if within else good + 1
    middle = (good + bad) // 2
    # as in regula falsi: what keeps guessing next to one end is helped along
    near = min(found - good, bad - found) * 8 < bad - good and above is not None
    return middle if near and len(known) > 3 else found


class Shown:
    """A model with its units in some formats, for as long as it is measured."""

    def __init__(self, model: Any, units: Sequence[Unit]):
        self.model, self.units = model, units
        self.originals: dict[str, nn.Module] = {name: model.get_submodule(name) for u in units for name in u.names}
        self.now: list[IntFormat | None] = [None] * len(units)

    def show(self, formats: Sequence[IntFormat | None]) -> None:
        """Put the modules of these formats in."""
        for unit, before, format in zip(self.units, self.now, formats, strict=True):
            if before != format:
                for name in unit.names:
                    new = self.originals[name] if format is None else unit.build(name, format)
                    self.model.set_submodule(name, new)
        self.now = list(formats)

    def end(self) -> None:
        """Put everything back."""
        self.show([None] * len(self.units))


def nats(before: float, after: float) -> float:
    """How much a perplexity grew, infinite if it is no number any more."""
    return math.log(after / before) if math.isfinite(after) and after > 0 else math.inf
