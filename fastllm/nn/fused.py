"""What a fused norm, feed-forward block or attention computes, in fewer steps than the module that it stands in for.

Each holds the module, whose parameters it reads at every call, and whose own `forward` it takes where it cannot stand
in: for gradients of weights that learn, for adapters on a projection, for hooks.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.gated_activation import gated_activation
from ..ops.norm import rms_norm
from ..ops.rotary import rotary
from .attend import attend, is_compact, refuse_unknown
from .merge import Merged


class FusedNorm:
    """y = x / rms(x) * (offset + weight), rounded before the product with the weight if `cast_first`."""

    def __init__(self, module: Any, eps: float, offset: float, cast_first: bool):
        self.module, self.eps, self.offset, self.cast_first = module, eps, offset, cast_first
        self._made: tuple[Any, ...] = ()  # what the weight below was made of
        self._weight: Tensor | None = None

    def weight(self) -> Tensor:
        """offset + weight, float32 if it is to be multiplied before rounding."""
        own = self.module._parameters["weight"]
        if self.offset == 0.0 and self.cast_first:
            return own
        if torch.compiler.is_compiling():
            return self._make(own)
        made = (own, own.data_ptr(), 0 if own.is_inference() else own._version)
        if len(self._made) != 3 or self._made[0] is not own or self._made[1:] != made[1:]:
            with torch.inference_mode(False), torch.no_grad():
                self._weight = self._make(own)
            self._made = made
        assert self._weight is not None
        return self._weight

    def _make(self, own: Tensor) -> Tensor:
        weight = own.detach().float() + self.offset
        return weight.to(own.dtype) if self.cast_first else weight

    def forward(self, x: Tensor) -> Tensor:
        module = self.module
        if module.training or torch.is_grad_enabled() and module._parameters["weight"].requires_grad:
            return type(module).forward(module, x)
        return rms_norm(x, self.weight(), self.eps, cast_first=self.cast_first)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": (), "_weight": None}


class FusedMLP:
    """down(act(gate(x)) * up(x)), with gate and up as one product."""

    def __init__(self, module: Any, gate_up: Merged, down: str, kind: str):
        self.module, self.gate_up, self.down, self.kind = module, gate_up, down, kind

    def stands_in(self) -> bool:
        """Whether it can, as the module is now."""
        return not self.module.training and self.gate_up.is_current()

    def forward(self, x: Tensor) -> Tensor:
        if not self.stands_in():
            return type(self.module).forward(self.module, x)
        return self.module._modules[self.down](gated_activation(self.gate_up(x), self.kind))


# How queries and keys are rotated: each value with the one half the head further on, or with its neighbour; "twice":
# as the first, by angles that are given once for both halves.
ROTATIONS = ("halves", "neighbours", "twice")


class Shape(NamedTuple):
    """Heads of the queries and of the keys, and their size; that of the values."""

    Hq: int
    Hkv: int
    D: int
    Dv: int


class FusedAttention:
    """softmax(rotate(norm(q)) rotate(norm(k)).T * scale) v, projected; q, k and v as one product.

    With a cache of fastllm's, norm, rotation and appending are one step more, and quantized keys and values are read
    as they are. Other caches are given dense rows, as they expect.
    """

    def __init__(
        self,
        module: Any,
        qkv: Merged,
        shape: Shape,
        output: str,
        norms: tuple[FusedNorm, FusedNorm] | None,
        rotation: str | None,
        options: Mapping[str, Any],
    ):
        """output: the name of the projection after it. rotation: one of ROTATIONS, None: it does not rotate.

        options: what `attend` is given beside q, k, v and the mask; a parameter by its name.
        """
        self.module, self.qkv, self.shape, self.output = module, qkv, shape, output
        self.norms, self.rotation, self.options = norms, rotation, dict(options)

    def stands_in(self) -> bool:
        """Whether it can, as the module is now."""
        return not self.module.training and self.qkv.is_current()

    def forward(self, hidden_states: Tensor, **given: Any) -> tuple[Tensor, None]:
        cache = given.get("past_key_values")
        other = cache is not None and not hasattr(cache, "layers")  # an encoder's and a decoder's in one
        if other or not self.stands_in() or given.get("output_attentions"):
            return type(self.module).forward(self.module, hidden_states, **given)
        return self._forward(hidden_states, **given)

    def _forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        refuse_unknown(kwargs)
        q, k, v = self.split(hidden_states)
        options = self.current_options()
        layer: Any = None
        if past_key_values is not None:
            index = self.module.layer_idx
            layer = past_key_values.layers[index] if index < len(past_key_values.layers) else None
        if hasattr(layer, "attend") and (attention_mask is None or is_compact(attention_mask)):
            rotated = layer.append(q, k, v, **self._steps(position_embeddings))
            if rotated is not None:
                return self._project(layer.attend(rotated, attention_mask, **options)), None
        q, k = self.rotate(q, k, position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.module.layer_idx)
        return self._project(attend(q, k, v, attention_mask, **options)), None

    def split(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, Hq, T, D], k [B, Hkv, T, D], v [B, Hkv, T, Dv]: views of one product."""
        Hq, Hkv, D, Dv = self.shape
        B, T, _ = hidden_states.shape
        y = self.qkv(hidden_states)
        if D == Dv:
            q, k, v = y.view(B, T, -1, D).transpose(1, 2).split_with_sizes((Hq, Hkv, Hkv), 1)
            return q, k, v
        parts = y.split_with_sizes((Hq * D, Hkv * D, Hkv * Dv), -1)
        q, k, v = (
            part.unflatten(-1, (heads, -1)).transpose(1, 2) for part, heads in zip(parts, (Hq, Hkv, Hkv), strict=True)
        )
        return q, k, v

    def rotate(self, q: Tensor, k: Tensor, embeddings: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """q and k with norm and rotation."""
        if self.norms is not None:
            q, k = (norm.forward(x) for norm, x in zip(self.norms, (q, k), strict=True))
        cos, sin = self._angles(embeddings)
        if cos is None or sin is None:
            return q, k
        return rotary(q, k, cos, sin, interleaved=self.rotation == "neighbours")

    def _angles(self, embeddings: tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
        """cos and sin as `rotary` wants them."""
        if self.rotation is None or embeddings is None:
            return None, None
        cos, sin = embeddings
        if self.rotation == "twice":
            return torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
        return cos, sin

    def current_options(self) -> dict[str, Any]:
        """The options, with the parameters that they name."""
        parameters = self.module._parameters
        return {name: parameters[value] if type(value) is str else value for name, value in self.options.items()}

    def _steps(self, embeddings: tuple[Tensor, Tensor] | None) -> dict[str, Any]:
        """What `append_kv` does before it appends."""
        cos, sin = self._angles(embeddings)
        steps: dict[str, Any] = {"cos": cos, "sin": sin, "interleaved": self.rotation == "neighbours"}
        if self.norms is not None:
            a, b = self.norms
            steps |= {"q_weight": a.weight(), "k_weight": b.weight(), "eps": a.eps, "cast_first": a.cast_first}
        return steps

    def _project(self, y: Tensor) -> Tensor:
        """y [B, Hq, T, Dv]"""
        return self.module._modules[self.output](y.transpose(1, 2).flatten(2))
