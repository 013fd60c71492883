"""`quantize`: weights that are rounded with a look at what goes into them."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.choice import Patterns
from ..formats import Format
from ..patch.apply import Patch, Put, carry_out, is_patched
from ..patch.errors import NotSupportedError
from ..patch.plan import Planner
from ..patch.report import Report
from ..patch.speedups import Speedups
from ..probe import probe
from .samples import LENGTH, SAMPLES, Calibration
from .stream import quantize_checkpoint
from .task import Ask


def quantize(
    model: Any,
    weights: str | Format | Mapping[str, str | Format | None] | None = None,
    *,
    method: str = "gptq",
    calib: Calibration = None,
    tokenizer: Any = None,
    samples: int = SAMPLES,
    length: int = LENGTH,
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
    weights:   as in `fastllm.optimize`; by default "int4", and "int8" with activations="int8" for smoothquant
    method:    "gptq" (weights of 4 or 8 bits), "awq" (the same), or "smoothquant" (weights and activations of 8 bits)
    calib:     the path of a text file, a text, token ids, or an iterable of texts or ids; None: text that comes along
    tokenizer: of the model, for texts; by default that which lies beside the model
    samples, length: at most so many samples, of at most so many tokens
    prompt:    of a model: token ids [1, T] for the accuracy check; by default the beginning of the calibration data
    out:       of a path: where the result goes; its tokenizer goes there too. One block after the other is in memory,
               on the CPU; after an interrupt the same call goes on behind the last block that was done
    dtype:     of a path: what its weights become before anything else; by default they stay as they are
    The other arguments are those of `fastllm.optimize`. What lies outside of blocks, such as the head, is quantized
    without data.

    Raises what `fastllm.optimize` does, ValueError for an unknown method, for formats that it is not for, and for
    calibration data without tokens, TypeError for a text without tokenizer; the model is then as it was. For a path
    also what `fastllm.load` raises, and ValueError if `out` is not empty.
    """
    weights = weights if weights is not None else "int8-a8" if method == "smoothquant" else "int4"
    planner = Planner(weights, group_size, lm_head, include, exclude, activations)
    ask = Ask(planner, method, calib, tokenizer, samples, length, min_coverage, quiet)
    if not isinstance(model, (str, PathLike)):
        if out is not None or dtype is not None:
            raise ValueError("out= and dtype= go with the path of a checkpoint; a model has save_pretrained(out)")
        return quantize_model(model, ask, keep, prompt)
    if out is None:
        raise ValueError(f"where should the quantized {model} go? quantize(path, out=folder)")
    return quantize_checkpoint(Path(model), Path(out), dtype, ask)


def quantize_model(model: Any, ask: Ask, keep: bool, prompt: Tensor | None) -> Report:
    """Quantize a model in place, all of it or nothing."""
    if is_patched(model):
        raise NotSupportedError("the model is optimized already; fastllm.restore(model) first")
    task = ask.of(model, _tokenizer(model, ask.calib))
    patch = Patch(Report(model, task.plan, keep), Speedups(model, False, False, None, False))

    def fill(put: Put) -> None:
        try:
            task.carry_out(put)
        finally:
            patch.changes += getattr(task.solver, "changes", [])

    ids = task.data[0].ids[:1, :64] if prompt is None else prompt
    carry_out(model, patch, fill, probe(model, ids), True)
    return patch.report


def _tokenizer(model: Any, calib: Calibration) -> Any:
    """That which lies beside the model, if one is needed and there."""
    folder = Path(getattr(model, "name_or_path", "") or "")
    if isinstance(calib, Tensor) or not (folder / "tokenizer_config.json").is_file():
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
