"""`quantize`: weights that are rounded with a look at what goes into them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..checkpoints.choice import Patterns
from ..formats import Format, Fp8Format, IntFormat, QuantizedWeight
from ..nn import QuantExperts, QuantLinear
from ..patch.apply import Patch, Put, carry_out, is_patched, planned, without_data
from ..patch.errors import NotSupportedError, refuse_state
from ..patch.plan import Decision, Planner
from ..patch.report import Report
from ..patch.speedups import Speedups
from ..probe import probe
from .blocks import Blocks
from .calibrate import Layer, Solver, calibrate
from .mixtures import Make as Rounding
from .samples import LENGTH, SAMPLES, Batch, Calibration, batches
from .solvers import AWQ, GPTQ, SmoothQuant

METHODS: dict[str, type[Solver]] = {"gptq": GPTQ, "awq": AWQ, "smoothquant": SmoothQuant}


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
    quiet: bool = False,
) -> Report:
    """Quantize a Hugging Face model in place, with calibration data; `fastllm.optimize(model, None)` does the rest.

    weights:   as in `fastllm.optimize`; by default "int4", and "int8" with activations="int8" for smoothquant
    method:    "gptq" (weights of 4 or 8 bits), "awq" (the same), or "smoothquant" (weights and activations of 8 bits)
    calib:     the path of a text file, a text, token ids, or an iterable of texts or ids; None: text that comes along
    tokenizer: of the model, for texts; by default that which lies beside the model
    samples, length: at most so many samples, of at most so many tokens
    prompt:    token ids [1, T] for the accuracy check; by default the beginning of the calibration data
    The other arguments are those of `fastllm.optimize`. What lies outside of blocks, such as the head, is quantized
    without data.

    Raises what `fastllm.optimize` does, ValueError for an unknown method, for formats that it is not for, and for
    calibration data without tokens, TypeError for a text without tokenizer; the model is then as it was.
    """
    if method not in METHODS:
        raise ValueError(
            f"unknown method {method!r}; with data there are {', '.join(METHODS)}, without data "
            'fastllm.optimize(method="rtn" or "hqq")'
        )
    if is_patched(model):
        raise NotSupportedError("the model is optimized already; fastllm.restore(model) first")
    refuse_state(model)
    if weights is None:
        weights = "int8-a8" if method == "smoothquant" else "int4"
    plan = planned(model, Planner(weights, group_size, lm_head, include, exclude, activations), min_coverage)
    _refuse_formats(plan.chosen, method)
    data = batches(
        calib, tokenizer or _tokenizer(model, calib), model.config.get_text_config().vocab_size, samples, length
    )
    patch = Patch(Report(model, plan, keep), Speedups(model, False, False, None, False))
    solver = METHODS[method]()

    def fill(put: Put) -> None:
        try:
            _calibrated(model, plan.chosen, solver, data, put, quiet)
        finally:
            patch.changes += getattr(solver, "changes", [])

    ids = data[0].ids[:1, :64] if prompt is None else prompt
    carry_out(model, patch, fill, probe(model, ids), True)
    return patch.report


def _calibrated(model: Any, chosen: list[Decision], solver: Solver, data: list[Batch], put: Put, quiet: bool) -> None:
    """Quantize what was chosen: layers within blocks by `solver`, all else without data."""
    of = {decision.name: decision for decision in chosen}
    layers = {
        d.name: Layer(model.get_submodule(d.name), d.format)
        for d in chosen
        if d.kind in ("linear", "conv1d", "experts") and d.format is not None
    }

    def ready(name: str, found: QuantizedWeight | Rounding) -> None:
        def make(kind: Any, original: Any, format: Format) -> nn.Module:
            if not isinstance(found, QuantizedWeight):
                assert isinstance(format, IntFormat)
                return QuantExperts.from_weights(original, format, found)
            layer = QuantLinear(found, layers[name].shape, format, original.bias)
            layer.transposed = layers[name].transposed
            return layer

        put(of.pop(name), make)

    calibrate(Blocks(model, data), layers, solver, ready, quiet)
    without_data(list(of.values()), None, quiet, put)


def _refuse_formats(chosen: list[Decision], method: str) -> None:
    for d in chosen:
        if d.kind not in ("linear", "conv1d"):
            continue
        rounds = d.format is not None and d.format.activations is not None
        if (method == "smoothquant") != rounds or isinstance(d.format, Fp8Format):
            assert d.format is not None
            want = 'activations="int8"' if method == "smoothquant" else "weights only, of 4 or 8 bits"
            raise ValueError(f"{d.name}: method={method!r} is for {want}, not for {d.format.name}")
        assert isinstance(d.format, IntFormat)


def _tokenizer(model: Any, calib: Calibration) -> Any:
    """That which lies beside the model, if one is needed and there."""
    folder = Path(getattr(model, "name_or_path", "") or "")
    if isinstance(calib, Tensor) or not (folder / "tokenizer_config.json").is_file():
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
