"""A decoder layer whose sums and norms are one step each."""

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.norm import norm_add, norm_add_norm, rms_norm
from .fused import FusedNorm
from .merge import has_hooks


class FusedLayer:
    """h = x + attention(norm(x)), y = h + mlp(norm(h)); or with a norm after attention and mlp too, before the sums.

    Attention, mlp and the first norm are called as the modules that they are.
    """

    def __init__(self, module: nn.Module, attention: str, mlp: str, first: str, norms: dict[str, FusedNorm]):
        """attention, mlp, first: names of children. norms: of the others, in order: one, or three."""
        self.module, self.attention, self.mlp, self.first = module, attention, mlp, first
        self.names, self.norms = tuple(norms), tuple(norms.values())

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # under autocast a dense projection answers in another dtype than the sum that it is added to
        if args or torch.is_autocast_enabled(hidden_states.device.type) or not self.stands_in():
            return type(self.module).forward(self.module, hidden_states, *args, **kwargs)
        children: dict[str, Any] = self.module._modules
        y = children[self.attention](hidden_states=children[self.first](hidden_states), **kwargs)[0]
        if len(self.norms) == 1:
            norm = self.norms[0]
            y, h = rms_norm(y, norm.weight(), norm.eps, residual=hidden_states, cast_first=norm.cast_first)
            return h + _tensor(children[self.mlp](y))
        a, b, c = self.norms
        y, h = norm_add_norm(y, hidden_states, a.weight(), b.weight(), a.eps, b.eps, b.cast_first)
        return norm_add(_tensor(children[self.mlp](y)), h, c.weight(), c.eps, c.cast_first)

    def stands_in(self) -> bool:
        """Whether the norms that it goes past are the layer's, unwatched, and do not learn, and nothing drops out."""
        if self.module.training:
            return False
        learning = torch.is_grad_enabled()
        children: dict[str, Any] = self.module._modules
        for name, norm in zip(self.names, self.norms, strict=True):
            own = norm.module._parameters["weight"]
            if children.get(name) is not norm.module or has_hooks(norm.module) or learning and own.requires_grad:
                return False
        return True


def _tensor(y: Any) -> Tensor:
    return y if isinstance(y, Tensor) else y[0]
