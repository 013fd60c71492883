"""`QuantLinear`: a linear layer whose weight stays packed."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..formats import Format, QuantizedWeight, check, dequantize, parse_format
from ..ops import dynamic_matmul, layout_for, layouts_of, quant_matmul
from ..ops.layout import Prepared
from ..quantizers import quantize


class QuantLinear(nn.Module):
    """y = x @ W.T + bias, with W [out_features, in_features] stored in a `Format`.

    x [..., in_features] in float16, bfloat16 or float32; y [..., out_features] in the dtype of x. Differentiable with
    respect to x, so adapters train on top of it; the weight itself does not learn. With the formats "int8-a8" and
    "fp8-a8" each row of x is rounded to 8 bits on the way in, and products are of two such numbers.

    The parameters have the names and, whenever they leave the module (`state_dict`, copying, moving), the layout of a
    compressed-tensors checkpoint. Between those moments the packed weight is permuted for the device it lies on.
    """

    # tensor-parallel plans of transformers shard plain local tensors, in `_parameters`
    _hf_quantized_needs_local_tp = True

    _HELD: tuple[str, ...] = ("packed",)  # what a layout permutes, of a `QuantizedWeight`
    transposed = False  # whether the layer it replaces stores its weight as [in, out]
    batch_invariant = False  # whether a row of y must have the same bits whatever the other rows of x are
    weight_scale: Tensor
    weight_packed: Tensor
    weight_zero_point: Tensor | None
    bias: Tensor | None
    _scale: Tensor
    _zero: Tensor | None

    def __init__(self, weight: QuantizedWeight, shape: tuple[int, int], format: Format, bias: Tensor | None = None):
        """weight: at rest; its tensors are taken over, not copied. shape: (out_features, in_features).

        Raises ValueError if the tensors cannot be such a weight.
        """
        super().__init__()
        self._check(weight, format, shape)
        self.out_features, self.in_features = shape
        self.format = format
        self._register(weight, bias)
        self.register_buffer("_scale", None, persistent=False)
        self.register_buffer("_zero", None, persistent=False)
        self.layout = ""  # at rest
        self.prepare()

    @staticmethod
    def _check(weight: QuantizedWeight, format: Format, shape: tuple[int, int]) -> None:
        check(weight, format, shape)

    def _register(self, weight: QuantizedWeight, bias: Tensor | None) -> None:
        for name, tensor in (
            ("weight_scale", weight.scale),
            ("weight_packed", weight.packed),
            ("weight_zero_point", weight.zero_point),
            ("bias", bias),
        ):
            self.register_parameter(
                name, None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=False)
            )

    @classmethod
    def from_linear(
        cls,
        linear: Any,
        format: str | Format = "int4",
        method: str | None = None,
        group_size: int | None = None,
    ) -> "QuantLinear":
        """Quantize `linear` (an `nn.Linear`, or a transformers `Conv1D`, whose weight is [in, out]).

        method: "rtn" or "hqq"; by default hqq for 4 bits and rtn for 8, where hqq finds nothing to gain.
        group_size: weights per scale, in place of the format's; -1: one scale per channel. The bias is shared.
        Raises ValueError for an unknown format or method, and a weight that is not a finite floating-point matrix.
        """
        format = parse_format(format, group_size)
        weight = linear.weight.detach()
        if not isinstance(linear, nn.Linear):
            weight = weight.t()
        packed = quantize(weight, format, method or ("hqq" if format.bits == 4 else "rtn"))
        layer = cls(packed, (weight.shape[0], weight.shape[1]), format, linear.bias)
        layer.transposed = not isinstance(linear, nn.Linear)
        return layer

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        bias: bool,
        format: Format,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "meta",
    ) -> "QuantLinear":
        """A layer whose parameters are still to be loaded."""
        N, G, words = out_features, format.groups(in_features), format.words(in_features)

        def new(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        zero = None if format.symmetric else new((-(-N * format.bits // 32), G), torch.int32)
        weight = QuantizedWeight(new((N, words), torch.int32), new((N, G), dtype), zero)
        return cls(weight, (N, in_features), format, new((N,), dtype) if bias else None)

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def weight(self) -> Tensor:
        """Only the shape, dtype and device of the weight, for code that asks; its values are NaN."""
        return self.weight_scale.detach().new_full((1, 1), float("nan")).expand(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that one forward pass reads: packed weight, scales, zero points and bias."""
        tensors = (self.weight_packed, self._scale, self._zero, self.bias)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def at_rest(self) -> QuantizedWeight:
        """The weight in the layout of the checkpoint; `packed` is new memory if a layout had to be undone."""
        packed = self.weight_packed.detach()
        if self.layout:
            packed = layouts_of(self.format)[self.layout].unpack(packed, self.format, self.shape)
        zero = self.weight_zero_point
        return QuantizedWeight(packed, self.weight_scale.detach(), None if zero is None else zero.detach())

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight [out_features, in_features]."""
        return dequantize(self.at_rest(), self.format, self.shape, dtype or self.weight_scale.dtype)

    def prepare(self) -> None:
        """Permute the packed weight for the device it lies on. No-op if that is done, or on the meta device."""
        device = self.weight_packed.device
        if self.layout or device.type == "meta":
            return
        layout = layout_for(self.format, *self.shape, self.weight_scale.dtype, device)
        prepared = layout.pack(self.at_rest(), self.format, self.shape)
        self.layout = layout.name
        self._take(prepared)

    def _take(self, prepared: Prepared) -> None:
        """Let a layout's operands be the layer's."""
        self._parameters["weight_packed"] = nn.Parameter(prepared.w, requires_grad=False)
        self._scale, self._zero = prepared.scale, prepared.zero

    def to_rest(self) -> None:
        """The inverse of `prepare`."""
        if self.layout:
            self._hold(self.at_rest()._asdict())
            self.layout = ""
            self._buffers.update(_scale=None, _zero=None)

    def _hold(self, weight: Mapping[str, Any]) -> None:
        for part in self._HELD:
            self._parameters[f"weight_{part}"] = nn.Parameter(weight[part], requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features], floating point -> [..., out_features] in x's dtype. ValueError for anything else."""
        if x.shape[-1] != self.in_features or not x.is_floating_point():
            raise ValueError(f"x must be floating point [..., {self.in_features}], got {x.dtype} {list(x.shape)}")
        # straight from the dictionaries: a small layer is called in 20 us, of which nn.Module.__getattr__ would take 2
        parameters: dict[str, Any] = self._parameters
        buffers: dict[str, Any] = self._buffers
        w, scale, zero, bias = parameters["weight_packed"], buffers["_scale"], buffers["_zero"], parameters["bias"]
        return self.product(x, w, scale, zero, bias, self.out_features)

    def product(
        self, x: Tensor, w: Tensor, scale: Tensor | None, zero: Tensor | None, bias: Tensor | None, N: int
    ) -> Tensor:
        """x times prepared weights of this layer's format and layout: its own, or those of several layers."""
        assert scale is not None
        format, layout = self.format, self.layout
        if format.activations:
            return dynamic_matmul(x, w, scale, zero, bias, N, layout, self.batch_invariant)
        group = format.group or self.in_features
        return quant_matmul(x, w, scale, zero, bias, N, format.bits, group, layout, self.batch_invariant)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        runs = layouts_of(self.format)[self.layout].runs if self.layout else "not loaded"
        return f"in_features={self.in_features}, out_features={self.out_features}, {bias=}, {self.format.name}, {runs}"

    # Whatever leaves or enters the module passes through the layout at rest.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantLinear":
        self.to_rest()
        super()._apply(fn, recurse)
        self.prepare()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, held in self._parameters.items():
            if held is not None and not held.is_mkldnn and held.untyped_storage().nbytes() > held.nbytes:
                destination[prefix + name] = held.detach().clone()  # experts share memory, which files cannot
        rest = self.at_rest()._asdict()
        for part in self._HELD:
            shares = rest[part].untyped_storage().nbytes() > rest[part].nbytes
            destination[f"{prefix}weight_{part}"] = rest[part].clone() if shares else rest[part]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.to_rest()
        super()._load_from_state_dict(state_dict, prefix, *args)
        for part in self._HELD:
            given, own = state_dict.get(f"{prefix}weight_{part}"), self._parameters[f"weight_{part}"]
            if given is not None and own is not None and not own.is_meta and own.data_ptr() == given.data_ptr():
                # assign=True: preparing it must not touch what was given
                self._parameters[f"weight_{part}"] = nn.Parameter(own.detach().clone(), requires_grad=False)
        self.prepare()

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        if self.layout:
            rest = self.at_rest()._asdict()
            held = {f"weight_{part}": nn.Parameter(rest[part], requires_grad=False) for part in self._HELD}
            state["_parameters"] = {**self._parameters, **held}
            state["_buffers"] = {**self._buffers, "_scale": None, "_zero": None}
            state["layout"] = ""
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.prepare()


def move_hook(hook: Any, new: nn.Module) -> None:
    """Give `new`, a layer or several, the accelerate hook of the module that it replaces, which moves its inputs."""
    from accelerate.hooks import add_hook_to_module

    layers = [module for module in new.modules() if isinstance(module, QuantLinear)]
    for layer in layers:
        layer.to_rest()  # the hook looks at every parameter
    add_hook_to_module(new, hook)
    for layer in layers:
        layer.prepare()
