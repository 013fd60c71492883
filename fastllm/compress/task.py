"""A model, what is to become of its layers, and the data that tells how."""

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import AutoTokenizer

from ..formats import Format, Fp8Format, IntFormat, QuantizedWeight
from ..nn import QuantExperts, build_layer
from ..patch.apply import Put, is_patched, planned, without_data
from ..patch.errors import NotSupportedError, refuse_state
from ..patch.plan import Decision, Plan, Planner
from .blocks import Blocks
from .cache_scales import CacheScales
from .calibrate import Layer, Solver, calibrate
from .mixtures import Make as Rounding
from .samples import Batch, Calibration, batches
from .solvers import AWQ, GPTQ, SmoothQuant
from .work import Work

METHODS: dict[str, type[Solver]] = {"gptq": GPTQ, "awq": AWQ, "smoothquant": SmoothQuant}


class Goal(NamedTuple):
    """A loss to stay within, the formats to choose from, and what the loss is measured on."""

    max_loss: float
    formats: list[IntFormat]
    test: Calibration


class Ask(NamedTuple):
    """What `fastllm.quantize` is asked for, whatever the model."""

    planner: Planner
    method: str
    calib: Calibration
    tokenizer: Any
    samples: int
    length: int
    min_coverage: float
    kv_cache: str | None
    goal: Goal | None
    quiet: bool

    def of(self, model: Any, tokenizer: Any = None) -> "Task":
        """For one model. tokenizer: if none was given. Raises what `fastllm.quantize` does; nothing is changed yet."""
        if self.method not in METHODS:
            raise ValueError(
                f"unknown method {self.method!r}; with data there are {', '.join(METHODS)}, without data "
                'fastllm.optimize(method="rtn" or "hqq")'
            )
        if is_patched(model):
            raise NotSupportedError("the model is optimized already; fastllm.restore(model) first")
        refuse_state(model)
        cache_alone = self.kv_cache is not None and not self.planner.choice.table
        if cache_alone and self.kv_cache == "fp8":
            raise ValueError('the scales of kv_cache="fp8" are saved beside packed layers: give weights= some')
        plan = self.planner.plan(model) if cache_alone else planned(model, self.planner, self.min_coverage)
        _refuse_formats(plan.chosen, self.method)
        vocabulary = model.config.get_text_config().vocab_size
        tokenizer = self.tokenizer or tokenizer or tokenizer_of(model, self.calib)
        data = batches(self.calib, tokenizer, vocabulary, self.samples, self.length)
        return Task(model, plan, METHODS[self.method](), data, tokenizer, CacheScales(self.kv_cache), self.quiet)


def tokenizer_of(model: Any, calib: Calibration) -> Any:
    """That which lies beside the model, if one is needed and there."""
    folder = Path(getattr(model, "name_or_path", "") or "")
    if isinstance(calib, Tensor) or not (folder / "tokenizer_config.json").is_file():
        return None
    return AutoTokenizer.from_pretrained(folder)


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


class Task(NamedTuple):
    """What is to be done to one model."""

    model: Any
    plan: Plan
    solver: Solver
    data: list[Batch]
    tokenizer: Any
    cache: CacheScales
    quiet: bool

    def carry_out(self, put: Put, blocks: Blocks | None = None, work: Work | None = None) -> None:
        """Quantize what was chosen: layers within blocks by the solver, all else without data."""
        of = {decision.name: decision for decision in self.plan.chosen}
        layers = {
            d.name: Layer(self.model.get_submodule(d.name), d.format)
            for d in self.plan.chosen
            if d.kind in ("linear", "conv1d", "experts") and d.format is not None
        }

        def ready(name: str, found: QuantizedWeight | Rounding) -> None:
            def make(kind: Any, original: Any, format: Format) -> nn.Module:
                if not isinstance(found, QuantizedWeight):
                    assert isinstance(format, IntFormat)
                    return QuantExperts.from_weights(original, format, found)
                old = Layer(original, format)
                layer = build_layer(found, old.shape, format, original.bias)
                layer.transposed = old.transposed
                return layer

            put(of.pop(name), make)

        calibrate(blocks or Blocks(self.model, self.data), layers, self.solver, ready, self.quiet, work, self.cache)
        without_data(list(of.values()), None, self.quiet, put)
