"""`quantize(max_loss=...)`: make every candidate, foresee, choose, measure, and keep what was chosen."""

import math
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, product
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..data import sample_text
from ..formats import IntFormat
from ..patch.apply import Patch, Put, carry_out
from ..patch.plan import Plan, Planner
from ..patch.report import Report
from ..patch.speedups import Speedups
from ..perplexity import perplexity
from ..probe import probe
from ..progress import track
from .blocks import Blocks
from .budget import MEASURED, Budget, Point, Shown, Step, formats_after, nats, path, search
from .samples import Batch, Calibration, batches, together
from .sensitivity import foresee, head_loss, texts
from .task import Ask, Task
from .units import Unit, candidates, without_calibration

WINDOW, WINDOWS = 512, 10  # tokens, and how many windows of the text that comes along are measured
HEAD_TEXTS = 8  # on which what the head costs is measured
HELD_OUT = 8  # one of so many samples of the user's own data is measured on, and not calibrated with

Judge = Callable[[], float]


def quantize_within(model: Any, ask: Ask, keep: bool, prompt: Tensor | None) -> Report:
    """As `fastllm.quantize` with max_loss. ValueError for a model without perplexity, or a max_loss below 0."""
    goal = ask.goal
    assert goal is not None
    if not goal.max_loss >= 0:
        raise ValueError(f"max_loss={goal.max_loss}: by how much of itself the perplexity may grow, such as 0.01")
    if ask.method != "gptq":
        raise ValueError(f"max_loss chooses among what gptq makes, not among what {ask.method} does")
    if ask.kv_cache is not None:
        raise ValueError("max_loss is for weights alone: choose kv_cache= in a call of its own, without max_loss")
    if not (hasattr(model, "can_generate") and model.can_generate() and model.get_output_embeddings() is not None):
        raise ValueError(f"max_loss is about perplexity, and {type(model).__name__} does not predict the next token")
    task = ask.of(model)
    data, judge, measured_on = _judge(task, ask, goal.test)
    task = task._replace(data=data)
    with tempfile.TemporaryDirectory() as folder:
        units = _units(task, goal.formats, Path(folder))
        budget = Budget(goal.max_loss, measured_on, Point(task.plan.before, judge()))
        chosen = _choose(task, units, judge, budget)
        plan = _planned(model, {name: f for unit, f in zip(units, chosen, strict=True) for name in unit.names})
        patch = Patch(Report(model, plan, keep), Speedups(model, False, False, None, False))
        patch.report.budget = budget
        ids = data[0].ids[:1, :64] if prompt is None else prompt
        carry_out(model, patch, partial(_fill, plan, units), probe(model, ids), True)
    return patch.report


def _judge(task: Task, ask: Ask, test: Calibration) -> tuple[list[Batch], Judge, str]:
    """(what to calibrate with, what measures the perplexity, what that is measured on)."""
    model, data = task.model, task.data
    text = model.config.get_text_config()
    if test is None and ask.calib is None:
        window = min(WINDOW, getattr(text, "max_position_embeddings", None) or WINDOW)
        sample = partial(perplexity, model, sample_text(), task.tokenizer, window=window, windows=WINDOWS)
        return data, lambda: sample().value, f"measured on {WINDOWS} windows of {window} tokens of WikiText-2"
    if test is None:
        data, held = _hold_out(data)
        what = "calibration data held out"
    else:
        held = batches(test, task.tokenizer, text.vocab_size, ask.samples, ask.length)
        what = "the test data"
    rows = [row[0] for row in texts(held, ask.samples, ask.length)]

    if not rows:
        raise ValueError(f"{what} have no two tokens in a row; give more of it")

    def measure() -> float:
        found = [perplexity(model, row, None, window=len(row), windows=1, bos=None) for row in rows]
        return float(sum(p.nll * p.tokens for p in found) / sum(p.tokens for p in found))

    count = sum(map(len, rows))
    return data, lambda: math.exp(min(measure(), 700.0)), f"measured on {len(rows)} samples of {what}, {count} tokens"


def _hold_out(data: list[Batch]) -> tuple[list[Batch], list[Batch]]:
    """(most of the samples, one of eight)."""
    rows = [
        Batch(ids[i : i + 1], None if seen is None else seen[i : i + 1]) for ids, seen in data for i in range(len(ids))
    ]
    if len(rows) < HELD_OUT:
        raise ValueError(
            f"the calibration data has {len(rows)} samples: too few to hold one of {HELD_OUT} out for measuring; "
            "give more, or test="
        )
    held = rows[::HELD_OUT]  # of every length, as they are in order of that
    return list(together([row for i, row in enumerate(rows) if i % HELD_OUT])), held


def _units(task: Task, formats: Sequence[IntFormat], folder: Path) -> list[Unit]:
    """All that can be given a format, in every format, with the losses that are foreseen."""
    model, head = task.model, task.model.get_output_embeddings()
    chosen = {d.name: d for d in task.plan.chosen}
    layers = {name: model.get_submodule(name) for name in chosen}
    share = {name: chosen[name].before / sum(p.nbytes for p in layer.parameters()) for name, layer in layers.items()}
    inside = {name: layer for name, layer in layers.items() if layer is not head}
    units = candidates(Blocks(model, task.data), inside, share, formats, task.solver, folder, task.quiet)
    done = {name for unit in units for name in unit.names}
    outside = [without_calibration(name, layer, formats) for name, layer in inside.items() if name not in done]
    for unit, format in product(outside, formats):
        unit.weigh(format)
    units += outside
    ids = texts(task.data)
    foresee(model, units, ids, task.quiet)
    for name in (name for name, layer in layers.items() if layer is head):
        unit = without_calibration(name, head, formats)
        unit.loss |= {format: head_loss(model, unit, format, ids[:HEAD_TEXTS]) for format in unit.weights}
        units.append(unit)
    return units


def _choose(task: Task, units: Sequence[Unit], judge: Judge, budget: Budget) -> list[IntFormat | None]:
    """The formats of all units, measured to stay within the budget, which is completed; None: as it is."""
    steps, shown, before = path(units), Shown(task.model, units), budget.before
    left = list(accumulate((-step.saved for step in steps), initial=before.bytes))
    lost = list(accumulate((step.lost for step in steps), initial=0.0))
    budget.foreseen = [
        (size, before.perplexity * math.exp(min(nats, 700.0))) for size, nats in zip(left, lost, strict=True)
    ]

    def look(made: Sequence[Step]) -> Point:
        shown.show(formats_after(made, len(units)))
        saved = sum(step.saved for step in made)
        budget.points.append(Point(before.bytes - saved, judge(), f"{len(made)} of {len(steps)} steps"))
        next(bar, None)
        return budget.points[-1]

    bar = track(range(MEASURED), "measuring", quiet=task.quiet)
    try:
        made = search(
            steps,
            lambda made: nats(before.perplexity, look(made).perplexity),
            math.log1p(budget.max_loss),
            before.bytes,
        )
        size = before.bytes - sum(step.saved for step in made)
        budget.chosen = next((point for point in reversed(budget.points) if point.bytes == size), before)
        for eight in (f for f in units[0].weights if f.bits == 8):
            shown.show([eight] * len(units))
            size = before.bytes - sum(unit.bytes[None] - unit.bytes[eight] for unit in units)
            budget.points.append(Point(size, judge(), f"{eight.name} everywhere"))
    finally:
        shown.end()
    chosen = formats_after(made, len(units))
    for unit, format in zip(units, chosen, strict=True):
        budget.formats |= {name: "dense" if format is None else format.name for name in unit.names}
        budget.losses[", ".join(unit.names)] = {f.name: unit.loss[f] for f in unit.weights}
    return chosen


def _planned(model: Any, formats: dict[str, IntFormat | None]) -> Plan:
    plan = Planner({name: f for name, f in formats.items() if f is not None}, None, None, "*", ()).plan(model)
    for decision in plan.decisions:
        if decision.name in formats and decision.format is None:
            decision.reason, decision.remedy = "the budget leaves it as it is", "allow a larger max_loss"
    return plan


def _fill(plan: Plan, units: Sequence[Unit], put: Put) -> None:
    of = {name: unit for unit in units for name in unit.names}

    def make(name: str, kind: Any, original: Any, format: Any) -> nn.Module:
        return of[name].build(name, format)

    for decision in plan.chosen:
        put(decision, partial(make, decision.name))
