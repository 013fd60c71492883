"""`QuantExperts`: the experts of a mixture, quantized one by one."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..formats import IntFormat, QuantizedWeight
from ..ops.experts import INVARIANT, block_m, expert_matmul, plan_experts
from ..quantizers import quantize
from .linear import QuantLinear
from .stack import Stack, can_stack, stack

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


def _one_launch(layers: list[QuantLinear]) -> bool:
    """Whether one kernel can read them all: planar, and of one shape."""
    first = layers[0]
    return first.layout == "planar" and all(layer.shape == first.shape for layer in layers) and can_stack(layers)


class QuantExperts(nn.Module):
    """Experts whose weights stay packed: one `QuantLinear` for each expert and projection.

    On a GPU one launch multiplies by all experts of a projection, and their weights are views of one tensor.
    Elsewhere, and where gradients are wanted, a loop goes over the experts that are hit.
    """

    def __init__(self, up: list[QuantLinear], down: list[QuantLinear], shell: Any):
        """shell: the original module, for its gate, activation and settings; its parameters are left behind."""
        super().__init__()
        self.num_experts = len(up)
        self.up, self.down = nn.ModuleList(up), nn.ModuleList(down)
        self.shell = copy.copy(shell)
        self.shell._parameters = {}
        self.shell._modules = dict(shell._modules)
        self._stacks: dict[str, Stack] = {}

    def layers(self) -> list[QuantLinear]:
        """All of them, both projections."""
        return [layer for layers in (self.up, self.down) for layer in layers if isinstance(layer, QuantLinear)]

    @classmethod
    def from_experts(cls, experts: Any, format: IntFormat, method: str | None = None) -> "QuantExperts":
        """Quantize each expert of a fused module (see `is_experts`). ValueError if it computes something else."""
        method = method or ("hqq" if format.bits == 4 else "rtn")
        return cls.from_weights(experts, format, lambda which, expert, w: quantize(w, format, method))

    @classmethod
    def from_weights(
        cls, experts: Any, format: IntFormat, make: Callable[[str, int, Tensor], QuantizedWeight]
    ) -> "QuantExperts":
        """As `from_experts`, by make("up" or "down", number of the expert, weight [N, K])."""
        if not agrees(experts):
            raise ValueError(
                f"{type(experts).__name__} does not compute the sum of its experts that transformers defines"
            )
        lists: dict[str, list[QuantLinear]] = {"up": [], "down": []}
        for which, layers in lists.items():
            for expert in range(len(experts.down_proj)):
                weight, bias = expert_weight(experts, which, expert)
                packed, shape = make(which, expert, weight.detach()), (weight.shape[0], weight.shape[1])
                layers.append(QuantLinear(packed, shape, format, None if bias is None else bias.clone()))
        return cls(lists["up"], lists["down"], experts)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, H], top_k_index and top_k_weights [T, top_k] -> [T, H]."""

        if hidden_states.is_cuda and not (torch.is_grad_enabled() and hidden_states.requires_grad):
            up, down = self._stack("up"), self._stack("down")
            if up and down:
                return self._grouped(up, down, hidden_states, top_k_index, top_k_weights)

        def project(expert: int, which: str, x: Tensor) -> Tensor:
            return getattr(self, which)[expert](x)

        return mix(self.shell, project, self.num_experts, hidden_states, top_k_index, top_k_weights)

    def _stack(self, which: str) -> Stack | None:
        """The weights of a projection in one tensor, made on first use; None if one kernel cannot read them all."""
        layers = [layer for layer in getattr(self, which) if isinstance(layer, QuantLinear)]
        found = self._stacks.get(which)
        if found is None or not found.holds(layers):
            if len(layers) != self.num_experts or not _one_launch(layers):
                return None
            found = self._stacks[which] = stack(layers)
        return found

    def _grouped(self, up: Stack, down: Stack, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """As `mix`: the rows of each expert together, in tiles that are found on the device."""
        T, top_k = index.shape
        rows = INVARIANT if self.up[0].batch_invariant else T * top_k // self.num_experts
        BLOCK_M = block_m(rows, hidden.device)
        slots, tiles = plan_experts(index.reshape(-1), self.num_experts, BLOCK_M)

        def project(stacked: Stack, layer: Any, x: Tensor, per_token: int) -> Tensor:
            N, bits, group = layer.out_features, layer.format.bits, layer.format.group or layer.in_features
            w, scale, zero, bias, _ = stacked
            assert scale is not None
            return expert_matmul(x, slots, tiles, w, scale, zero, bias, N, bits, group, per_token)

        inner = project(up, self.up[0], hidden, top_k)
        inner = self.shell._apply_gate(inner) if self.shell.has_gate else self.shell.act_fn(inner)
        y = project(down, self.down[0], inner, 1).view(T, top_k, -1) * weights[..., None]
        # rows of slots without an expert have any content
        return torch.where((index < self.num_experts)[..., None], y, 0).sum(1).to(hidden.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantExperts":
        self._stacks.clear()  # or it would keep the memory that the weights leave
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stacks": {}}  # copies have weights of their own
