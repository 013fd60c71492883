"""`QuantExperts`: the experts of a mixture, quantized one by one."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..formats import IntFormat
from ..quantizers import quantize
from .linear import QuantLinear

# project(expert, "up" or "down", x) -> x @ W.T (+ bias) of that expert
Project = Callable[[int, str, Tensor], Tensor]


def up_name(experts: Any) -> str:
    return "gate_up_proj" if experts.has_gate else "up_proj"


def is_experts(module: Any) -> bool:
    """Whether `module` holds fused 3-D expert weights as transformers v5 declares them."""
    if not all(hasattr(module, flag) for flag in ("has_gate", "has_bias", "is_transposed")):
        return False
    if not hasattr(module, "_apply_gate" if module.has_gate else "act_fn"):
        return False
    weights = (getattr(module, name, None) for name in (up_name(module), "down_proj"))
    return all(isinstance(w, nn.Parameter) and w.ndim == 3 for w in weights)


def expert_weight(experts: Any, which: str, expert: int) -> tuple[Tensor, Tensor | None]:
    """(weight [N, K], bias [N] or None) of one expert. which: "up" or "down"."""
    name = up_name(experts) if which == "up" else "down_proj"
    weight = getattr(experts, name)[expert]
    bias = getattr(experts, name + "_bias")[expert] if experts.has_bias else None
    return (weight.t() if experts.is_transposed else weight), bias


def mix(shell: Any, project: Project, count: int, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """sum over k of weights[t, k] * expert_{index[t, k]}(hidden[t]): the loop that defines a mixture.

    shell: the experts module, for its gate or activation. hidden [T, H], index and weights [T, top_k] -> [T, H].
    An index of `count` marks a slot without an expert.
    """
    out = torch.zeros_like(hidden)
    for expert in index.unique().tolist():
        if expert == count:
            continue
        token, slot = torch.where(index == expert)
        inner = project(expert, "up", hidden[token])
        inner = shell._apply_gate(inner) if shell.has_gate else shell.act_fn(inner)
        y = project(expert, "down", inner) * weights[token, slot, None]
        out.index_add_(0, token, y.to(out.dtype))
    return out


def agrees(experts: Any) -> bool:
    """Whether `mix` over the dense weights computes what `experts` computes, on a small random input.

    Raises ValueError for experts that do not run at all.
    """
    weight, _ = expert_weight(experts, "up", 0)
    count = getattr(experts, up_name(experts)).shape[0]
    generator = torch.Generator("cpu").manual_seed(0)
    hidden = torch.randn(4, weight.shape[1], generator=generator, device="cpu").to(weight)
    few = [torch.randperm(count, generator=generator, device="cpu")[: min(2, count)] for _ in range(4)]
    index = torch.stack(few).to(weight.device)
    weights = torch.rand(index.shape, generator=generator, device="cpu").to(weight)

    def project(expert: int, which: str, x: Tensor) -> Tensor:
        return nn.functional.linear(x, *expert_weight(experts, which, expert))

    with torch.no_grad():
        try:
            want = experts(hidden, index, weights).float()
        except RuntimeError as error:
            raise ValueError(f"{type(experts).__name__} does not run as it is: {error}") from error
        got = mix(experts, project, count, hidden, index, weights).float()
    return bool((got - want).norm() <= 0.02 * want.norm())


class QuantExperts(nn.Module):
    """Experts whose weights stay packed: one `QuantLinear` for each expert and projection; a loop over those hit."""

    def __init__(self, up: list[QuantLinear], down: list[QuantLinear], shell: Any):
        """shell: the original module, for its gate, activation and settings; its parameters are left behind."""
        super().__init__()
        self.num_experts = len(up)
        self.up, self.down = nn.ModuleList(up), nn.ModuleList(down)
        self.shell = copy.copy(shell)
        self.shell._parameters = {}
        self.shell._modules = dict(shell._modules)

    def layers(self) -> list[QuantLinear]:
        """All of them, both projections."""
        return [layer for layers in (self.up, self.down) for layer in layers if isinstance(layer, QuantLinear)]

    @classmethod
    def from_experts(cls, experts: Any, format: IntFormat, method: str | None = None) -> "QuantExperts":
        """Quantize each expert of a fused module (see `is_experts`). ValueError if it computes something else."""
        if not agrees(experts):
            raise ValueError(
                f"{type(experts).__name__} does not compute the sum of its experts that transformers defines"
            )
        method = method or ("hqq" if format.bits == 4 else "rtn")
        lists: dict[str, list[QuantLinear]] = {"up": [], "down": []}
        for which, layers in lists.items():
            for expert in range(len(experts.down_proj)):
                weight, bias = expert_weight(experts, which, expert)
                packed = quantize(weight.detach(), format, method)
                layers.append(
                    QuantLinear(
                        packed, (weight.shape[0], weight.shape[1]), format, None if bias is None else bias.clone()
                    )
                )
        return cls(lists["up"], lists["down"], experts)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, H], top_k_index and top_k_weights [T, top_k] -> [T, H]."""

        def project(expert: int, which: str, x: Tensor) -> Tensor:
            return getattr(self, which)[expert](x)

        return mix(self.shell, project, self.num_experts, hidden_states, top_k_index, top_k_weights)
