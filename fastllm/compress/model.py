"""`quantize`: weights that are rounded with a look at what goes into them."""

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.choice import Patterns
from ..formats import Format
from ..patch.apply import Patch, Put, carry_out
from ..patch.plan import Planner
from ..patch.report import Report
from ..patch.speedups import Speedups
from ..probe import probe
from .budget import formats_of
from .samples import LENGTH, SAMPLES, Calibration
from .stream import quantize_checkpoint
from .task import Ask, Goal
from .within import quantize_within


def quantize(
    model: Any,
    weights: str | Format | Mapping[str, str | Format | None] | Sequence[str | Format] | None = None,
    *,
    max_loss: float | None = None,
    method: str = "gptq",
    calib: Calibration = None,
    tokenizer: Any = None,
    samples: int = SAMPLES,
    length: int = LENGTH,
    kv_cache: str | None = None,
    test: Calibration = None,
    activations: str | None = None,
    group_size: int | None = None,
    lm_head: str | Format | bool | None = None,
    include: Patterns = "*",
    exclude: Patterns = (),
    min_coverage: float = 0.5,
    keep: bool = True,
    prompt: Tensor | None = None,
    out: str | PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    quiet: bool = False,
) -> Report:
    """Quantize a Hugging Face model in place, with calibration data; `fastllm.optimize(model, None)` does the rest.

    model:     a model, or the path of a dense checkpoint, which is quantized to the new folder `out`
    weights:   as in `fastllm.optimize`; by default "int4", and "int8-a8" for smoothquant
    max_loss:  by how much of itself the perplexity may grow, such as 0.01: each layer gets one of the formats in
               `weights` (default: int8, int4 in groups of 32, 64, 128), the fewest bytes that hold it: `report.budget`
    method:    "gptq" (weights of 4 or 8 bits), "awq" (the same), or "smoothquant" (weights and activations of 8 bits)
    calib:     the path of a text file, a text, token ids, or an iterable of texts or ids; None: text that comes along
    tokenizer: of the model, for texts; by default that which lies beside the model
    samples, length: at most so many samples, of at most so many tokens
    kv_cache:  "int8" or "int4": keys become such that this cache of `fastllm.optimize` loses less of them; "fp8": the
               scales that servers want for theirs are found, and saved with the model; with weights={} that alone
    test:      what max_loss is measured on, as `calib`; by default text that comes along, or an eighth of your `calib`
    prompt:    of a model: token ids [1, T] for the accuracy check; by default the beginning of the calibration data
    out:       of a path: where the result goes, with its tokenizer; one block at a time is in memory, on the CPU,
               and after an interrupt the same call goes on behind the last block that was done
    dtype:     of a path: what its weights become first; by default they stay as they are
    All others are as in `fastllm.optimize`. What lies outside of blocks, such as the head, is quantized without data.

    Raises what `fastllm.optimize` does, ValueError for an unknown method, for formats that it is not for, and for data
    without tokens, TypeError for a text without tokenizer; the model is then as it was. For a path also what
    `fastllm.load` raises, and ValueError if `out` is not empty.
    """
    goal = None if max_loss is None else Goal(max_loss, formats_of(weights), test)
    chosen = _chosen(weights, goal, method)
    planner = Planner(chosen, group_size, lm_head, include, exclude, activations)
    ask = Ask(planner, method, calib, tokenizer, samples, length, min_coverage, kv_cache, goal, quiet)
    if isinstance(model, (str, PathLike)):
        return quantize_checkpoint(Path(model), out, dtype, ask)
    if out is not None or dtype is not None:
        raise ValueError("out= and dtype= go with the path of a checkpoint; a model has save_pretrained(out)")
    return (quantize_model if goal is None else quantize_within)(model, ask, keep, prompt)


def _chosen(weights: Any, goal: Goal | None, method: str) -> Any:
    """What to plan with; with a goal any of its formats."""
    if goal is not None:
        return goal.formats[0]
    return weights if weights is not None else "int8-a8" if method == "smoothquant" else "int4"


def quantize_model(model: Any, ask: Ask, keep: bool, prompt: Tensor | None) -> Report:
    """Quantize a model in place, all of it or nothing."""
    task = ask.of(model)
    patch = Patch(Report(model, task.plan, keep), Speedups(model, False, False, None, False))

    def fill(put: Put) -> None:
        try:
            task.carry_out(put)
        finally:
            patch.changes += task.solver.changes
        patch.cache_scales = task.cache.complete()

    ids = task.data[0].ids[:1, :64] if prompt is None else prompt
    carry_out(model, patch, fill, probe(model, ids), True)
    return patch.report
