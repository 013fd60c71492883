"""Which modules of a model can be fused: found by structure, and believed only if they give the answer of the module
that they stand in for, on the inputs that it has in a forward pass."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.merge import Merged, is_watched
from .attention import RECORD
from .recognise import CANDIDATES, LOOKS, Norms, Other, Unlike

PARTS = tuple(CANDIDATES)


@dataclass
class Fusion:
    """One module, and what stands in for it; or why nothing does."""

    name: str
    kind: str  # one of PARTS
    twin: Any = None
    reason: str = ""


@dataclass
class Fusions:
    """What was fused, and how to undo it."""

    found: list[Fusion] = field(default_factory=list)

    def count(self, kind: str) -> tuple[int, int]:
        """How many modules of a kind are fused, and how many there are."""
        of_kind = [f for f in self.found if f.kind == kind]
        return sum(f.twin is not None for f in of_kind), len(of_kind)

    def reasons(self) -> dict[str, list[str]]:
        """Why modules were left as they are: {reason: names}."""
        found: dict[str, list[str]] = {}
        for f in self.found:
            if f.twin is None:
                found.setdefault(f.reason, []).append(f.name)
        return found

    def install(self) -> None:
        for f in self.found:
            if f.twin is not None:
                f.twin.module.forward = f.twin.forward

    def undo(self) -> None:
        """Every module's own forward again, and merged weights apart."""
        for f in self.found:
            if f.twin is not None:
                f.twin.module.__dict__.pop("forward", None)
                for merged in (v for v in vars(f.twin).values() if isinstance(v, Merged)):
                    merged.undo()


def find(model: Any, ids: Tensor, parts: tuple[str, ...]) -> Fusions:
    """Look at one forward pass over ids [1, T] and find what can be fused. Changes nothing but where weights lie.

    Attention is fused where it is fastllm's already (`set_attn_implementation`), for what modules hand to it is what
    shows how they work.
    """
    fusions, norms = Fusions(), Norms()
    kinds = {*parts, "norm"} if {"attention", "layer"} & {*parts} else {*parts}  # these have norms inside
    todo: list[tuple[nn.Module, Fusion]] = []
    for name, module in model.named_modules():
        kind = next((kind for kind in PARTS if kind in kinds and CANDIDATES[kind](module)), None)
        if kind is None:
            continue
        fusion = Fusion(name, kind, reason="it was not called")
        if kind in parts:
            fusions.found.append(fusion)
        if is_watched(module):
            fusion.reason = "it has hooks, or another library has replaced its forward"
        else:
            todo.append((module, fusion))
    takes = inspect.signature(type(model).forward).parameters
    given: dict[str, Any] = {"use_cache": False} if "use_cache" in takes else {}
    if getattr(model.config, "is_encoder_decoder", False):
        given["decoder_input_ids"] = ids
    with ExitStack() as failed, torch.no_grad():
        failed.callback(fusions.undo)
        with ExitStack() as stack:
            for module, fusion in todo:
                stack.enter_context(_watched(module, fusion, partial(LOOKS[fusion.kind], norms)))
            model(input_ids=ids, **given)
        failed.pop_all()
    fusions.found = [f for f in fusions.found if f.twin is not None or f.reason]
    return fusions


@contextmanager
def _watched(module: nn.Module, fusion: Fusion, look: Callable) -> Iterator[None]:
    """While the model runs, `look` at the first call of `module`."""

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        for handle in handles:
            handle.remove()  # what is tried must not look watched
        try:
            fusion.twin = look(module, args, kwargs, output)
            fusion.reason = ""
        except Other:
            fusion.reason = ""
        except Unlike as why:
            fusion.reason = str(why)
        except (ValueError, TypeError, RuntimeError) as why:  # shapes and arguments that nothing here expects
            fusion.reason = f"trying its fused form failed: {str(why).splitlines()[0][:100]}"

    module.__dict__[RECORD] = calls = []
    handles = [module.register_forward_hook(hook, with_kwargs=True)]
    if fusion.kind == "layer":  # which of its children it calls, in order
        for name, child in module.named_children():
            handles.append(child.register_forward_hook(lambda *_, name=name: calls.append(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        del module.__dict__[RECORD]
