"""`optimize`, `restore` and `optimized`: patch a model in place, and undo it exactly."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..checkpoints import SaveHook
from ..formats import Format
from ..nn import PackedLinear, QuantExperts, QuantLinear
from ..nn.linear import move_hook
from ..probe import outputs, probe, refuse_nan
from ..progress import track
from .accuracy import agreement
from .errors import NotSupportedError, refuse_coverage, refuse_state
from .plan import Decision, Patterns, Plan, Planner, as_it_is
from .report import Report, memory
from .speedups import Speedups

logger = logging.getLogger("fastllm")


class Patch:
    """What was done to a model: enough to undo it."""

    def __init__(self, report: Report, speedups: Speedups):
        self.report, self.speedups = report, speedups
        report.speedups = speedups
        self.loaded = False  # whether the layers came packed
        self.originals: dict[str, nn.Module] = {}
        self.changes: list[tuple[nn.Module, str, nn.Parameter]] = []  # parameters that were exchanged, as they were
        self.changed = False  # whether any was
        self.cache_scales: dict[str, tuple[Tensor, Tensor]] = {}  # to be saved for servers' caches
        self.hook: SaveHook | None = None


def optimize(
    model: Any,
    weights: str | Format | Mapping[str, str | Format | None] | None = "int4",
    *,
    activations: str | None = None,
    group_size: int | None = None,
    method: str | None = None,
    lm_head: str | Format | bool | None = None,
    include: Patterns = "*",
    exclude: Patterns = (),
    min_coverage: float = 0.5,
    batch_invariant: bool = False,
    attention: bool = True,
    fuse: bool | str | tuple[str, ...] = True,
    kv_cache: str | None = None,
    decode: bool | str = True,
    keep: bool = True,
    prompt: Tensor | None = None,
    dry_run: bool = False,
    quiet: bool = False,
) -> Report:
    """Make a Hugging Face model faster, in place: quantized weights, attention, fused modules, a lean decoding loop.

    Each is checked on the model before it stays; what was done, what was not and why is in the report.

    weights:      "int4", "int8", "fp8", a format such as "int4-g64" (see `fastllm.FORMATS`), or {pattern of module
                  names: format or None}, of which the first match counts and what matches none stays; None: as it is
    activations:  "int8" or "fp8", with the same weights: inputs of layers, but for the head and experts, are rounded
                  to 8 bits, token by token; in a mapping "int8-a8" or "fp8-a8", also for the head
    group_size:   weights per scale, in place of what `weights` says, but not in lm_head; -1: one per output channel
    method:       "rtn" or "hqq" (see `fastllm.quantizers`); by default hqq for 4 bits and rtn for 8
    lm_head:      the format of the output head; False: leave it; True: as `weights` says; by default as a mapping
                  says, else 8 bits with one scale per word. A tied head gets a read-only copy, the embedding stays
    include, exclude: patterns of module names, matched as file names are; exclude wins
    min_coverage: raise CoverageError if fewer of the bytes read per token would be quantized
    batch_invariant: quantized layers give a token the same bits whatever else is in the batch; slower for many tokens
    attention:    fastllm's attention in place of the model's own, where that can be exchanged
    fuse:         True, False, or some of "norm", "mlp", "attention", "layer": modules in a fused form that gives the
                  same answer, projections of one input merged
    kv_cache:     "int8" or "int4": `generate` keeps keys and values so; None: as they come
    decode:       `generate` runs fastllm's loop where that can do what is asked; "compile": by torch.compile
    keep:         keep the original modules, so that `restore` is exact; False frees them at the end
    prompt:       token ids [1, T] for the accuracy check; by default 64 random ones
    dry_run:      change nothing, only report

    Raises NotSupportedError (training mode, quantized, offloaded or meta weights) or CoverageError, ValueErrors of
    `fastllm.patch`, or ValueError (NaN, unknown format); the model is then as it was. A second call does nothing.
    """
    model = unwrapped(model)
    planner = None if weights is None else Planner(weights, group_size, lm_head, include, exclude, activations)
    if is_patched(model):
        return _again(model, planner, lambda: Speedups(model, attention, fuse, kv_cache, decode))
    refuse_state(model, planner is not None)
    plan = as_it_is(model) if planner is None else planned(model, planner, min_coverage)
    patch = Patch(Report(model, plan, keep), Speedups(model, attention, fuse, kv_cache, decode))
    if not dry_run:
        fill = partial(without_data, plan.chosen, method, quiet)
        carry_out(model, patch, fill, probe(model, prompt), prompt is not None, batch_invariant)
    return patch.report


def planned(model: Any, planner: Planner, min_coverage: float) -> Plan:
    """What `planner` plans; CoverageError if that is too little, or nothing."""
    plan = planner.plan(model)
    refuse_coverage(plan, min_coverage if plan.chosen else max(min_coverage, 1e-9), model)
    return plan


def _again(model: Any, planner: Planner | None, speedups: Callable[[], Speedups]) -> Report:
    """A model that is patched stays as it is, but for what it may still be given beside quantized weights."""
    patch = model._fastllm
    if planner is None and patch.speedups.idle:
        ids = probe(model, None)
        patch.speedups = patch.report.speedups = speedups()
        patch.speedups.apply(ids)
        return patch.report
    if patch.loaded and planner is not None:
        refuse_coverage(planner.plan(model), 1e-9, model)
    logger.warning("the model is already optimized; nothing done. fastllm.restore(model) undoes it")
    return patch.report


# How a layer is made: given `from_linear` or `from_experts`, the module, and the format.
Make = Callable[[Any, nn.Module, Format], nn.Module]
Put = Callable[[Decision, Make], None]


def without_data(chosen: list[Decision], method: str | None, quiet: bool, put: Put) -> None:
    """Quantize what was chosen by `method` of `fastllm.quantizers`."""
    for decision in track(chosen, "quantizing", [d.before for d in chosen], quiet):
        put(decision, lambda make, original, format: make(original, format, method))


def carry_out(
    model: Any, patch: Patch, fill: Callable[[Put], None], ids: Tensor, real: bool, batch_invariant: bool = False
) -> None:
    """Do what the report of `patch` plans, all of it or nothing, and complete the report.

    fill: puts a quantized module in the place of each that was chosen. ids [1, T]: what the answers are compared on;
    real: whether they are text.
    """
    report, before = patch.report, outputs(model, ids)
    with ExitStack() as on_failure:
        on_failure.callback(_undo, model, patch)
        fill(lambda decision, make: put_in_place(model, decision, patch, make, batch_invariant))
        if report.plan.chosen:
            patch.hook = SaveHook.attach(model, patch.cache_scales)
        patch.speedups.apply(ids)
        after = outputs(model, ids)
        if not bool(before.isnan().any()):
            refuse_nan(after)
        on_failure.pop_all()
    report.accuracy = agreement(before, after, report.has_vocabulary, real)
    report.memory_after = memory(model)
    patch.changed = bool(patch.changes)
    if report.keep:
        report.memory_kept = memory(model, *patch.originals.values()) - report.memory_after
    else:
        patch.originals.clear()
        patch.changes.clear()
    model._fastllm = patch


def put_in_place(model: Any, decision: Decision, patch: Patch, make: Make, batch_invariant: bool = False) -> None:
    """Put the quantized module where the dense one is; the layer's name goes into any complaint."""
    original, format = model.get_submodule(decision.name), decision.format
    assert format is not None
    kind: Any = QuantExperts.from_experts if decision.kind == "experts" else QuantLinear.from_linear
    try:
        new: Any = make(kind, original, format)
    except ValueError as error:
        raise ValueError(f"{decision.name}: {error}; leave it out with exclude={decision.name!r}") from error
    new.train(original.training)
    layers = new.layers() if isinstance(new, QuantExperts) else [new]
    for layer in layers:
        layer.batch_invariant = batch_invariant
    dense = sum(p.numel() * p.element_size() for p in original.parameters())
    # measured, where the plan could only foresee: some layouts keep the scales in a form of their own
    decision.after = round(sum(layer.nbytes for layer in layers) * decision.before / dense)
    if hook := getattr(original, "_hf_hook", None):
        move_hook(hook, new)
    patch.originals[decision.name] = original
    model.set_submodule(decision.name, new)


def unwrapped(model: Any) -> Any:
    """The model itself, if `model` is what torch.compile made of it."""
    return getattr(model, "_orig_mod", model)


def is_patched(model: nn.Module) -> bool:
    return "_fastllm" in model.__dict__


def _undo(model: nn.Module, patch: Patch) -> None:
    patch.speedups.undo()
    if patch.hook is not None:
        patch.hook.detach()
    for name, original in patch.originals.items():
        replaced = model.get_submodule(name)
        layer = replaced.layers()[0] if isinstance(replaced, QuantExperts) else replaced
        if isinstance(layer, PackedLinear):  # the model may have been moved, or set to train, since
            weight, now = next(original.parameters()), layer.weight
            if (weight.dtype, weight.device) != (now.dtype, now.device):
                original.to(now)
            original.train(layer.training)
        model.set_submodule(name, original)
    for module, name, parameter in reversed(patch.changes):
        held = module._parameters[name]
        if held is not None and (held.dtype, held.device) != (parameter.dtype, parameter.device):
            parameter.data = parameter.data.to(held)
        module._parameters[name] = parameter


def restore(model: Any) -> Any:
    """Undo `optimize`: the original modules come back, the very same objects. Returns the model.

    Raises NotSupportedError if the model is not patched, has adapters, or if the originals were not kept.
    """
    inner = unwrapped(model)
    if not is_patched(inner):
        raise NotSupportedError("the model is not optimized by fastllm; nothing to restore")
    patch = inner._fastllm
    if not patch.report.keep and (patch.report.plan.chosen or patch.changed):
        raise NotSupportedError("the originals were freed (keep=False); load the model again")
    for name in patch.originals:
        if not isinstance(now := inner.get_submodule(name), PackedLinear | QuantExperts):
            raise NotSupportedError(
                f"{name} has become a {type(now).__name__}, which would be lost; call unload() first"
            )
    _undo(inner, patch)
    del inner._fastllm
    return model


@contextmanager
def optimized(model: Any, *args: Any, **kwargs: Any) -> Iterator[Report]:
    """`with optimized(model, "int8") as report:` the model is patched inside, and as it was after."""
    if is_patched(unwrapped(model)):
        raise NotSupportedError("the model is already optimized; fastllm.restore(model) first")
    if kwargs.get("dry_run"):
        raise ValueError("optimized(dry_run=True) would change nothing; call optimize(model, dry_run=True)")
    report = optimize(model, *args, **{**kwargs, "keep": True})
    try:
        yield report
    finally:
        restore(model)
