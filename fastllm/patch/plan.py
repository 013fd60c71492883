"""What `optimize` would do to a model: one decision for each weight, found by structure, never by model name."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..checkpoints.choice import Choice, Patterns
from ..formats import Format
from ..nn import PackedLinear, QuantExperts
from ..nn.experts import is_experts, up_name
from ..ops import what_runs


@dataclass
class Decision:
    """One module: what it is, the bytes of it that a token reads, and what is to be done with it."""

    name: str
    kind: str  # linear | conv1d | head | experts | embedding | other
    before: int  # bytes read per token, now
    after: int
    layers: int = 1
    format: Format | None = None  # None: left alone
    runs: str = ""  # the kernel
    reason: str = ""  # why it is left alone
    remedy: str = ""

    @property
    def part(self) -> str:
        """The row of the report that it belongs to: the name with the layer numbers, and the last step, taken out."""
        if self.kind in ("head", "embedding", "experts"):
            return re.sub(r"\.\d+\.", ".*.", self.name)
        return re.sub(r"\.\d+\.", ".*.", self.name.rpartition(".")[0] or self.name)


@dataclass
class Plan:
    decisions: list[Decision] = field(default_factory=list)

    @property
    def chosen(self) -> list[Decision]:
        return [d for d in self.decisions if d.format is not None]

    @property
    def skipped(self) -> list[Decision]:
        return [d for d in self.decisions if d.format is None and d.reason]

    @property
    def before(self) -> int:
        return sum(d.before for d in self.decisions)

    @property
    def after(self) -> int:
        return sum(d.after for d in self.decisions)

    @property
    def coverage(self) -> float:
        """The share of the bytes read per token that belongs to weights chosen."""
        return sum(d.before for d in self.chosen) / max(1, self.before)


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' `Conv1D`: a linear layer whose weight is [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and getattr(module, "weight", None) is not None


def _top_k(config: object) -> int | None:
    """Experts used per token, by the names that configs have for it."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_k", "top_k_experts", "top_k")
    return next((k for n in names if isinstance(k := getattr(text, n, None), int)), None)


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))


class Planner:
    """Walks a model once. The arguments are those of `optimize`."""

    def __init__(
        self,
        weights: str | Format | Mapping[str, str | Format | None],
        group_size: int | None,
        lm_head: str | Format | bool | None,
        include: Patterns,
        exclude: Patterns,
        activations: str | None = None,
    ):
        self.choice = Choice(weights, group_size, lm_head, include, exclude, activations)

    def plan(self, model: Any) -> Plan:
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        plan = Plan()
        seen: set[int] = set()
        inside: tuple[str, ...] = ()
        for name, module in model.named_modules():
            if name.startswith(inside) and inside:
                continue
            if isinstance(module, QuantExperts):
                inside += (f"{name}.",)
                size = int(sum(layer.nbytes for layer in module.layers()) * self._share(model, module.num_experts))
                plan.decisions.append(self._leave(Decision(name, "experts", size, size), *self._why_other(module)))
                continue
            if module is not head and all(id(p) in seen for p in module.parameters(recurse=False)):
                continue  # no weight of its own
            seen.update(id(p) for p in module.parameters(recurse=False))
            plan.decisions.append(self._decide(name, module, module is head, model))
        return plan

    def _decide(self, name: str, module: Any, is_head: bool, model: Any) -> Decision:
        size = module.nbytes if isinstance(module, PackedLinear) else _bytes(module)
        if isinstance(module, nn.Embedding) and not is_head:
            row = size // max(1, module.num_embeddings)
            return Decision(name, "embedding", row, row)
        if is_experts(module):
            return self._experts(name, module, model)
        linear = type(module) is nn.Linear or is_conv1d(module)
        if not linear:
            return self._leave(Decision(name, "other", size, size), *self._why_other(module))
        if module._forward_hooks or module._forward_pre_hooks:
            return self._leave(Decision(name, "other", size, size), "it has forward hooks", "remove them first")
        kind = "head" if is_head else "conv1d" if is_conv1d(module) else "linear"
        decision = Decision(name, kind, size, size)
        weight = module.weight
        N, K = weight.shape if isinstance(module, nn.Linear) else weight.shape[::-1]
        format, reason, remedy = self.choice.format(name, N, model if is_head else None)
        if format is None:
            return self._leave(decision, reason, remedy)
        decision.after = self._take(decision, format, N, K, weight, 1, getattr(module, "bias", None) is not None)
        return decision

    def _take(
        self, decision: Decision, format: Format, N: int, K: int, weight: nn.Parameter, count: int, bias: bool
    ) -> int:
        """Choose `format` for `count` weights [N, K]; return the bytes that they will have."""
        runs = what_runs(format, N, K, weight.dtype, weight.device)
        decision.format, decision.runs = format, f"{format.name}, {runs}"
        return count * (format.bytes(N, K, weight.element_size()) + bias * N * weight.element_size())

    def _share(self, model: Any, count: int) -> float:
        """The share of `count` experts that one token uses."""
        return min(1.0, (_top_k(getattr(model, "config", None)) or count) / count)

    def _experts(self, name: str, module: Any, model: Any) -> Decision:
        up, down = getattr(module, up_name(module)), module.down_proj
        count, size = len(up), _bytes(module)
        share = self._share(model, count)
        decision = Decision(name, "experts", int(size * share), int(size * share), layers=count)
        format, reason, remedy = self.choice.experts(name, module.down_proj.shape[1])
        if format is None:
            return self._leave(decision, reason, remedy)
        total = 0
        for w in (up, down):
            N, K = (w.shape[2], w.shape[1]) if module.is_transposed else (w.shape[1], w.shape[2])
            total += self._take(decision, format, N, K, w, count, module.has_bias)
        decision.after = int(total * share)
        if format != self.choice.format(name, module.down_proj.shape[1])[0]:
            decision.runs += " (activations stay as they are: experts are quantized in their weights only)"
        return decision

    def _why_other(self, module: nn.Module) -> tuple[str, str]:
        if isinstance(module, PackedLinear | QuantExperts):
            return "already quantized by fastllm", "start from the dense checkpoint"
        if isinstance(module, nn.Linear):
            return (
                f"{type(module).__name__} is a subclass of Linear with behaviour of its own",
                "replace it by an nn.Linear",
            )
        wide = [n for n, p in module.named_parameters(recurse=False) if p.ndim == 3]
        if wide:
            what = f"{', '.join(wide)}: 3-D weights that are not declared as transformers declares experts"
            return what, "quantize the model before fusing its experts"
        return "", ""

    def _leave(self, decision: Decision, reason: str, remedy: str) -> Decision:
        decision.reason, decision.remedy = reason, remedy
        return decision


def as_it_is(model: Any) -> Plan:
    """The plan that changes no weight; as none was to be changed, it gives no reasons."""
    plan = Planner({}, None, False, "*", ()).plan(model)
    for decision in plan.decisions:
        decision.reason = decision.remedy = ""
    return plan
