"""`quantize`: weights that are rounded with a look at what goes into them."""

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.choice import Patterns
from ..formats import Format
from ..patch.apply import Patch, Put, carry_out, unwrapped
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
               and after an interrupt the same call goes on behind the last block that was done, in <out>.unfinished
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
    path = isinstance(model, (str, PathLike))
    model = model if path else unwrapped(model)
    some = {"out": out, "dtype": dtype, "prompt": prompt, "test": test, "group_size": group_size}
    named = {name: value is not None for name, value in some.items()} | {"lm_head": lm_head not in (None, True, False)}
    _refuse(path, goal is not None, named)
    if path:
        return quantize_checkpoint(Path(model), out, dtype, ask)
    return (quantize_model if goal is None else quantize_within)(model, ask, keep, prompt)


def _chosen(weights: Any, goal: Goal | None, method: str) -> Any:
    """What to plan with; with a goal any of its formats."""
    if goal is not None:
        return goal.formats[0]
    if isinstance(weights, (list, tuple)):
        raise ValueError(f"weights={weights!r}: several formats to choose from go with max_loss=")
    return weights if weights is not None else "int8-a8" if method == "smoothquant" else "int4"


def _refuse(path: bool, goal: bool, given: Mapping[str, bool]) -> None:
    """Raise ValueError for arguments that would be ignored."""
    for wanted, names, why in (
        (not path, ("out", "dtype"), "goes with the path of a checkpoint; a model has save_pretrained(out)"),
        (path, ("prompt",), "goes with a model; of a checkpoint the calibration data's beginning is looked at"),
        (not goal, ("test",), "is what max_loss is measured on; give that too"),
        (
            goal,
            ("group_size", "lm_head"),
            "is chosen by max_loss, out of weights=[...]; lm_head=False leaves it",
        ),
    ):
        if wanted and (bad := [name for name in names if given[name]]):
            raise ValueError(f"{bad[0]}= {why}")


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
