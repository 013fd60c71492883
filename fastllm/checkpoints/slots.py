"""Places for weights while a checkpoint is loaded.

transformers fills the parameters of a model on the meta device. A `Slot` stands where a packed layer will be and
declares what the file holds; `finish` turns it into the layer.
"""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from ..formats import Format, QuantizedWeight
from ..nn import QuantExperts, QuantLinear, build_layer
from ..nn.experts import agrees, up_name
from ..quantizers import quantize
from .coding import CheckpointError, Coding


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)


class Slot(nn.Module):
    """The place of a layer [N, K], either for the packed tensors of `coding` or for a dense weight to quantize.

    dense: the format to quantize to; `transposed`: the dense weight is [K, N], as in transformers' `Conv1D`;
    `spare_bias`: the file has a bias, which the model lacks: some writers add zeros.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        dtype: torch.dtype,
        bias: bool,
        coding: Coding | None = None,
        dense: Format | None = None,
        transposed: bool = False,
        spare_bias: bool = False,
    ):
        super().__init__()
        self.spare_bias = spare_bias
        self.shape, self.dtype, self.coding, self.dense, self.transposed = shape, dtype, coding, dense, transposed
        self.quantized: list[QuantLinear] = []  # a list hides it from `modules()`
        if coding is not None:
            for name, part in coding.parts(*shape).items():
                self._parameters[name] = nn.Parameter(part.empty(dtype), requires_grad=False)
        elif dense is not None:
            self._parameters["weight"] = _empty(shape[::-1] if transposed else shape, dtype)
        self.bias = _empty(shape[:1], dtype) if bias else None

    def __getattr__(self, name: str) -> Any:
        if name == "weight":  # models look at it when they initialize what was missing: there is nothing to do
            weight = torch.empty(0, dtype=self.dtype)
            weight._is_hf_initialized = True  # type: ignore[attr-defined]
            return weight
        return super().__getattr__(name)

    @property
    def dense_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)

    def quantize(self, weight: Tensor, method: str | None) -> None:
        """Quantize the dense weight; it can then be freed."""
        weight = weight.t() if self.transposed else weight
        _expect(weight, self.shape)
        self.quantized = [_quantize(weight, self.dense, method)]
        self._parameters.pop("weight", None)

    def take(self, name: str) -> Any:
        """The weight as it was loaded, in memory of its own. Raises CheckpointError naming `name`."""
        if self.coding is None:
            raise CheckpointError(f"{name}.weight is missing from the checkpoint: it is incomplete")
        parts: dict[str, Tensor] = {}
        for part, declared in self.coding.parts(*self.shape).items():
            tensor = self._parameters.pop(part, None)
            if tensor is not None and not tensor.is_meta:
                parts[part] = tensor.detach()
            elif not declared.optional:
                raise CheckpointError(f"{name}.{part} is missing from the checkpoint: it is incomplete")
        weight: Any = self.coding.read(name, parts, self.shape, self.dtype)
        return weight

    def finish(self, name: str) -> Any:
        layer: Any = self.quantized.pop() if self.quantized else self._packed(name)
        if self.spare_bias and self.bias is not None and bool(self.bias.any()):
            raise CheckpointError(
                f"{name}.bias is in the checkpoint and not zero, but the model has none there: config.json describes "
                "another model"
            )
        if self.bias is not None and not self.spare_bias:
            layer.bias = nn.Parameter(self.bias.detach(), requires_grad=False)
        layer.transposed = self.transposed
        return layer

    def _packed(self, name: str) -> Any:
        weight = self.take(name)
        assert self.coding is not None
        weight, format = self.coding.layer(weight, self.shape[1], name)
        return build_layer(weight, self.shape, format)


def _expect(weight: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(weight.shape) != tuple(shape):
        raise CheckpointError(f"the checkpoint has a weight {list(weight.shape)}, the model {list(shape)}")


def _quantize(weight: Tensor, format: Format | None, method: str | None) -> QuantLinear:
    """The layer is prepared at once, so that memory at rest is used again for the next one."""
    assert format is not None
    packed = quantize(weight.detach(), format, method or ("hqq" if format.bits == 4 else "rtn"))
    return QuantLinear(packed, (weight.shape[0], weight.shape[1]), format)


class ExpertSlots(nn.Module):
    """The place of the experts of a mixture: 3-D weights to quantize, or a `Slot` for each expert and projection.

    parts: for packed experts, the names under which the checkpoint keeps what makes up the "up" and "down" weight of
    an expert, such as ["*.w1", "*.w3"]: the rows of the one follow those of the other.
    """

    def __init__(
        self,
        shell: nn.Module,
        dtype: torch.dtype,
        coding: Coding | None = None,
        parts: dict[str, list[str]] | None = None,
        dense: Format | None = None,
    ):
        super().__init__()
        self.weights = {"up": up_name(shell), "down": "down_proj"}
        self.parts, self.coding, self.dense, self.dtype = parts or {}, coding, dense, dtype
        self.quantized: dict[str, list[QuantLinear]] = {}
        self.shapes: dict[str, tuple[int, int, int]] = {}  # [experts, N, K]
        self._shell = [shell]  # a list hides it from `modules()`: its weights are never loaded
        for name, p in shell.named_parameters(recurse=False):
            if name not in self.weights.values() or coding is None:
                self.register_parameter(name, _empty(tuple(p.shape), p.dtype))
        for name, b in shell.named_buffers(recurse=False):
            self.register_buffer(name, b, persistent=name not in shell._non_persistent_buffers_set)
        for name, module in shell.named_children():
            self.add_module(name, module)
        for which, weight in self.weights.items():
            E, N, K = getattr(shell, weight).shape
            self.shapes[which] = (E, K, N) if shell.is_transposed else (E, N, K)
            for pattern in self.parts.get(which, []):
                self._add_slots(pattern, self.shapes[which], len(self.parts[which]))

    def _add_slots(self, pattern: str, shape: tuple[int, int, int], pieces: int) -> None:
        E, N, K = shape
        for expert in range(E):
            *path, last = pattern.replace("*", str(expert)).split(".")
            parent: nn.Module = self
            for step in path:
                if step not in parent._modules:
                    parent.add_module(step, nn.Module())
                parent = parent._modules[step]  # type: ignore[assignment]
            parent.add_module(last, Slot((N // pieces, K), self.dtype, False, self.coding))

    @property
    def dense_bytes(self) -> int:
        return self.dtype.itemsize * sum(math.prod(shape) for shape in self.shapes.values())

    def quantize(self, weight_name: str, weight: Tensor, method: str | None) -> None:
        """Quantize the dense 3-D weight `weight_name`, expert by expert."""
        which = next(w for w, n in self.weights.items() if n == weight_name)
        transposed = self._shell[0].is_transposed
        _expect(weight.transpose(1, 2) if transposed else weight, self.shapes[which])
        self.quantized[which] = [_quantize(w.t() if transposed else w, self.dense, method) for w in weight]
        self._parameters.pop(weight_name, None)

    def _expert(self, name: str, which: str, expert: int) -> QuantLinear:
        if self.coding is None:
            if which not in self.quantized:
                raise CheckpointError(f"{name}.{self.weights[which]} is missing from the checkpoint: it is incomplete")
            return self.quantized[which][expert]
        paths = [pattern.replace("*", str(expert)) for pattern in self.parts[which]]
        slots: list[Any] = [self.get_submodule(path) for path in paths]
        taken = [slot.take(f"{name}.{path}") for slot, path in zip(slots, paths, strict=True)]
        if len(taken) > 1 and taken[0].zero_point is not None and slots[0].shape[0] * self.coding.bits % 32:
            raise CheckpointError(f"{name}: zero points of {slots[0].shape[0]} rows do not fill whole words")
        joined: list[Any] = [None if parts[0] is None else torch.cat(parts) for parts in zip(*taken, strict=True)]
        _, N, K = self.shapes[which]
        weight, format = self.coding.layer(QuantizedWeight(*joined), K, name)
        weight_only = format.weight_only  # experts leave activations as they are
        assert weight_only is not None, "experts in float8 were refused"
        return QuantLinear(weight, (N, K), weight_only)

    def finish(self, name: str) -> QuantExperts:
        shell = copy.copy(self._shell[0])
        layers: dict[str, list[QuantLinear]] = {"up": [], "down": []}
        for which, (E, _, _) in self.shapes.items():
            biases: Any = self._parameters.get(f"{self.weights[which]}_bias")
            layers[which] = [self._expert(name, which, expert) for expert in range(E)]
            for layer, bias in zip(layers[which], () if biases is None else biases, strict=False):
                layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        shell._modules = {key: self._modules[key] for key in shell._modules}
        shell._buffers = dict(self._buffers)
        return QuantExperts(layers["up"], layers["down"], shell)


def is_linear(module: nn.Module) -> bool:
    """An `nn.Linear` itself, or transformers' `Conv1D`."""
    return type(module) is nn.Linear or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def understood(name: str, experts: nn.Module) -> None:
    """Raise ValueError unless experts of this class are a gated sum: tried on random ones of the real size."""
    sample = copy.copy(experts)
    generator = torch.Generator().manual_seed(0)
    sample._parameters = {}
    with torch.device("cpu"):  # transformers loads on the meta device
        for key, p in experts.named_parameters(recurse=False):
            values = torch.randn(1, *p.shape[1:], generator=generator).mul_(0.05).to(p.dtype)
            sample._parameters[key] = nn.Parameter(values.expand(p.shape).clone(), requires_grad=False)
        try:
            why = "" if agrees(sample) else f"{type(experts).__name__} does not compute a gated sum of its experts"
        except ValueError as error:
            why = str(error)
        if why:
            raise ValueError(f"{name}: {why}; leave it out with exclude={name!r}")
