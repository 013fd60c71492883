"""`prune`: from a model to a smaller dense one, which stock transformers loads."""

import logging
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..checkpoints.folder import refuse_out
from ..checkpoints.loading import without_bars
from ..progress import track
from . import prune_repair as solver
from .blocks import Blocks
from .prune_config import changes, skeleton, with_settings, without_layers
from .prune_edits import Edits, matrix, put_matrix
from .prune_edits import sizes as edits_sizes
from .prune_layers import Judge, Removed, choose, named, predicts
from .prune_parts import Part, adopt
from .prune_plan import Cut, plan_feed_forward, plan_heads, within
from .prune_report import Narrowed, PruneReport, title, totals
from .prune_subject import Subject, layers_asked, refused, subject
from .samples import LENGTH, SAMPLES, Batch, Calibration, batches
from .stream import bring_along, open_checkpoint
from .task import tokenizer_of

logger = logging.getLogger("fastllm")
Layers = float | int | Sequence[int] | None


class Ask(NamedTuple):
    """What `prune` is asked for."""

    layers: Layers
    ffn: float | None
    heads: float | None
    calib: Calibration
    tokenizer: Any
    samples: int
    length: int
    repair: bool
    multiple: int
    quiet: bool


def prune(
    model: Any,
    *,
    layers: Layers = None,
    ffn: float | None = None,
    heads: float | None = None,
    calib: Calibration = None,
    tokenizer: Any = None,
    samples: int = SAMPLES,
    length: int = LENGTH,
    repair: bool = True,
    multiple: int = 128,
    out: str | PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    quiet: bool = False,
) -> PruneReport:
    """Make a Hugging Face model smaller, in place: fewer layers, neurons or heads, and dense as before.

    model:    a model, or the path of a dense checkpoint, of which the folder `out` gets the smaller one
    layers:   the share to remove, or their number, or a list of which. They are chosen one after the other: of the
              three inner layers that change least what goes through them, that whose loss on the data hurts least
    ffn:      the share of neurons to remove from each feed-forward part, those whose inputs times weights are smallest
    heads:    the share of heads to remove, by what they add to the output, with their keys and values: whole groups
              where queries share these, and queries alone where all of them share one
    calib:    the path of a text file, a text, token ids, or an iterable of texts or ids; None: text that comes along
    tokenizer: of the model, for texts; by default that which lies beside the model
    samples, length: at most so many samples, of at most so many tokens, and no more than the model has positions
    repair:   the layer that takes in what is left makes up for the rest, by least squares (no training); with fewer
              tokens than channels are left, a warning says so and it is damped more
    multiple: of what the neurons left are a multiple, rounded up; of its half, and so on, where with it more than half
              of those to go would stay
    out, dtype, device: of a path: where the result goes, with its tokenizer; what its weights become first, by default
              what they are; and where it runs, by default the CPU
    quiet:    no progress

    A share is rounded down to whole layers, neurons or heads. Layers go first: what is repaired in those that stay is
    what reaches them then. Then block by block, the heads before the neurons, each on what the blocks before make.

    Raises ValueError for shares that are none or leave nothing, for data without tokens, and for models whose
    configuration cannot say what would be left; NotSupportedError, which is one, for models that train or are
    quantized, patched, or not in memory; TypeError for a text without tokenizer. The model is then as it was.
    """
    ask = Ask(layers, ffn, heads, calib, tokenizer, samples, length, repair, multiple, quiet)
    if layers is None and ffn is None and heads is None:
        raise ValueError("what is to be removed? give layers=, ffn= or heads=, such as ffn=0.25")
    if isinstance(model, (str, PathLike)):
        return _prune_checkpoint(Path(model), out, dtype, device, ask)
    if out is not None or dtype is not None or device is not None:
        raise ValueError("out=, dtype= and device= go with the path of a checkpoint; a model has save_pretrained(out)")
    return _prune_model(model, ask)


def _prune_checkpoint(
    path: Path, to: str | PathLike[str] | None, dtype: torch.dtype | None, device: Any, ask: Ask
) -> PruneReport:
    """As `prune`, from a folder, or a GGUF file, to a folder, which is there when all is done."""
    if to is None:
        raise ValueError(f"where should the pruned {path} go? prune(path, out=folder)")
    out = Path(to)
    refuse_out(out, path)
    model, tokenizer, _ = open_checkpoint(path, dtype)
    if device is not None:
        model.to(device)
    report = _prune_model(model, ask._replace(tokenizer=ask.tokenizer or tokenizer))
    result = out.with_name(f"{out.name}.unfinished")
    with ExitStack() as failed, without_bars(ask.quiet):
        failed.callback(shutil.rmtree, result, ignore_errors=True)
        model.save_pretrained(result)
        if (ask.tokenizer or tokenizer) is not None:
            (ask.tokenizer or tokenizer).save_pretrained(result)
        bring_along(path, result)
        os.rename(result, out)
        failed.pop_all()
    report.saved = str(out)
    return report


def _prune_model(model: Any, ask: Ask) -> PruneReport:
    """In place, all of it or nothing."""
    found = subject(model)
    cuts = [] if ask.heads is None else [plan_heads(found, ask.heads)]
    cuts += [] if ask.ffn is None else [plan_feed_forward(found, ask.ffn, ask.multiple)]
    asked = None if ask.layers is None else layers_asked(found, ask.layers)
    tokenizer = ask.tokenizer or tokenizer_of(model, ask.calib)
    positions = getattr(found.text, "max_position_embeddings", None) or ask.length
    length = min(ask.length, positions)
    data = batches(ask.calib, tokenizer, found.text.vocab_size, ask.samples, length)
    judge = Judge(model, list(found.layers), data)
    tokens = sum(batch.tokens for batch in data)
    before = totals(model, judge.loss())
    if not math.isfinite(before.loss):
        raise ValueError(f"the model's loss on the calibration data is {before.loss} as it is: mend the model first")
    report = PruneReport(title(model), tokens, judge.tokens, predicts(model), ask.repair, before)
    if asked is not None:
        report.layers = _chosen(found, judge, asked, ask.quiet)
    edits = Edits()
    with ExitStack() as failed:
        failed.callback(edits.undo)
        _carry_out(found, cuts, data, edits, report, ask)
        judge.layers = list(found.layers)
        report.after = totals(model, judge.loss())
        if not math.isfinite(report.after.loss):
            raise ValueError(f"the pruned model's loss is {report.after.loss}; more calibration data may help")
        failed.pop_all()
    for warning in report.warnings:
        logger.warning("%s", warning)
    return report


def _chosen(subject: Subject, judge: Judge, asked: int | list[int], quiet: bool) -> list[Removed]:
    if isinstance(asked, list):
        return named(judge, asked)
    return choose(judge, asked, lambda gone: refused(subject, gone), quiet)


def _carry_out(
    subject: Subject, cuts: list[Cut], data: list[Batch], edits: Edits, report: PruneReport, ask: Ask
) -> None:
    """Remove the layers that the report names, then the units of `cuts` from the rest."""
    model, text = subject.model, subject.text
    gone = {removed.layer for removed in report.layers}
    kept = [i for i in range(len(subject.layers)) if i not in gone]
    fewer = without_layers(text, kept) if gone else {}
    narrow = {name: value for cut in cuts for name, value in cut.settings.items()}
    shapes = {name: shape for cut in cuts for name, shape in cut.shapes(subject, kept).items()}
    after = skeleton(model, with_settings(model.config, fewer | narrow))
    values, why = changes(subject.whole, after, subject.prefix, kept, shapes)
    if why:
        raise ValueError(f"{type(model).__name__} cannot be pruned so: {why}")
    told = {name: getattr(text, name, None) for name in fewer | narrow}
    _set(edits, model, fewer)  # which the model's own forward pass reads, unlike the others
    if gone:
        edits.keep(subject.layers, kept)
    if cuts:
        _narrow(subject, cuts, kept, data, edits, report, ask)
    _set(edits, model, narrow)
    adopt(edits, model, values)
    lists = (list, tuple)
    report.settings = {n: (v, getattr(text, n)) for n, v in told.items() if not isinstance(v, lists)}


def _set(edits: Edits, model: Any, settings: Mapping[str, Any]) -> None:
    """In the configuration, and in the copies of it that modules have."""
    text = model.config.get_text_config()
    own = (getattr(module, "config", None) for module in model.modules())
    for config in {id(c): c for c in (text, *own) if type(c) is type(text)}.values():
        for name, value in settings.items():
            edits.set(config, name, value)


def _narrow(
    subject: Subject, cuts: list[Cut], kept: list[int], data: list[Batch], edits: Edits, report: PruneReport, ask: Ask
) -> None:
    """Block by block, each part on what those before make by then."""
    blocks = Blocks(subject.model, data)
    rows: dict[str, list[int]] = {}
    sizes = [sum(p.numel() * p.element_size() for p in block.parameters()) for block in blocks.layers]
    for index in track(range(len(blocks)), "pruning", sizes, ask.quiet):
        for cut in cuts:
            part, consumer = cut.parts[kept[index]], cut.parts[kept[index]].consumer
            done, count = _cut_part(blocks, index, part, cut.kept, edits, ask.repair, kept[index])
            adopt(edits, blocks.layers[index], within(cut.values, f"{subject.prefix}.{kept[index]}"))
            (report.ffn if cut.what == "neurons" else report.heads).append(done)
            report.unit = report.unit if cut.what == "neurons" else cut.what
            rows.setdefault(consumer, []).append(count)
        if index + 1 < len(blocks):
            blocks.advance(index)
    for cut in cuts if ask.repair else ():
        part = cut.parts[kept[0]]
        wide = edits_sizes(blocks.layers[0].get_submodule(part.consumer))[1]
        report.warnings += filter(None, [solver.shortage(rows[part.consumer], wide)])


def _cut_part(
    blocks: Blocks, index: int, part: Part, count: int, edits: Edits, wanted: bool, layer: int
) -> tuple[Narrowed, int]:
    """Leave `count` units of a part: (what was done, on how many rows)."""
    block = blocks.layers[index]
    consumer: Any = block.get_submodule(part.consumer)
    w, bias = matrix(consumer), consumer.bias
    seen = solver.observe(blocks, index, part.consumer, w, bias)
    score = solver.scores(w, seen.products, part.units)
    stay = solver.strongest(score, count)
    fixed = solver.repair(w, bias, seen, part.columns(block, stay), wanted)
    part.cut(edits, block, stay)
    put_matrix(edits, consumer, fixed.weight, fixed.bias)
    gone = sorted(set(range(part.units)) - set(stay))
    return Narrowed(layer, gone, score.tolist(), fixed.without, fixed.error), seen.rows
