"""`FastllmConfig`: transformers' `from_pretrained` with fastllm's layers in place of dense ones.

    AutoModelForCausalLM.from_pretrained(dense, quantization_config=FastllmConfig("int4", group_size=64))

quantizes tensor by tensor while the checkpoint streams in. `fastllm.load` also reads packed checkpoints through it.
The name "fastllm" lives in memory only: what such a model saves is a compressed-tensors checkpoint.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..formats import Format
from ..nn.experts import is_experts, up_name
from ..nn.linear import move_hook
from ..progress import track
from .choice import Choice, Patterns
from .coding import CheckpointError, Source
from .compressed_tensors import Stored
from .headers import Header, read_headers
from .names import Names, without
from .nf4 import PartRenaming
from .save import SaveHook
from .slots import ExpertSlots, Slot, is_linear, understood
from .sources import source_of
from .sparse import SparseStored
from .validate import packed_experts, parts_found, validate


@register_quantization_config("fastllm")
class FastllmConfig(QuantizationConfigMixin):
    """How to quantize a model while it is loaded; the arguments are those of `fastllm.optimize`.

    stored: instead, the `quantization_config` of a packed checkpoint (see `sources.py`), whose layers stay packed.
    """

    def __init__(
        self,
        weights: str | Format | Mapping[str, str | Format | None] = "int4",
        group_size: int | None = None,
        method: str | None = None,
        lm_head: str | Format | bool | None = None,
        include: Patterns = "*",
        exclude: Patterns = (),
        quiet: bool = True,
        activations: str | None = None,
        stored: Mapping[str, Any] | None = None,
        **_: Any,
    ):
        self.quant_method: Any = "fastllm"
        self.weights = dict(weights) if isinstance(weights, Mapping) else weights
        self.group_size, self.method, self.lm_head = group_size, method, lm_head
        self.include, self.exclude, self.quiet, self.activations = include, exclude, quiet, activations
        self.stored = None if stored is None else dict(stored)
        self.choice()  # complains now, not in the middle of loading

    def choice(self) -> Choice:
        return Choice(self.weights, self.group_size, self.lm_head, self.include, self.exclude, self.activations)

    def to_dict(self) -> dict[str, Any]:
        return {name: _plain(value) for name, value in self.__dict__.items()}


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(v) for v in value]
    return value.name if isinstance(value, Format) else value


class Quantize(ConversionOps):
    """Hands a dense weight, as soon as it is read, to the place that quantizes it."""

    def __init__(self, quantizer: "FastllmQuantizer"):
        self.quantizer = quantizer

    def convert(
        self, input_dict: dict[str, Any], *_: Any, full_layer_name: str = "", missing_keys: Any = None, **__: Any
    ) -> dict[str, Tensor]:
        value = next(iter(input_dict.values()))
        tensor = value[0] if isinstance(value, list) else value
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        return self.quantizer.quantize(full_layer_name, tensor)


@register_quantizer("fastllm")
class FastllmQuantizer(HfQuantizer):
    """Puts slots into the model before loading, and packed layers in their place after it."""

    requires_calibration = False

    def __init__(self, quantization_config: FastllmConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.settings = quantization_config
        self.slots: dict[str, Slot | ExpertSlots] = {}
        self.embedding, self.head = "", ""  # the weight that a tied head is quantized from; the head's name
        stored = quantization_config.stored
        self.source = None if stored is None else source_of(stored)
        self.errors: list[ValueError] = []
        self.progress: Iterator[str] = iter(())

    # before the weights are loaded

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        files = [f for f in checkpoint_files or [] if str(f).endswith(".safetensors")]
        headers = read_headers(files)
        if self.source is None:
            self._place_dense(model)
        else:
            self._place_packed(model, headers, self.source)
            if isinstance(self.source, (Stored, SparseStored)):
                self.source.leave_out(model)
        if not self.slots and self.source is not None:
            raise CheckpointError(
                "the files have no packed layer of those that quantization_config describes: config.json is wrong, or "
                "describes another model; without quantization_config it is loaded as a dense one"
            )
        if not self.slots:
            raise ValueError(
                "no layer of the model is to be quantized; widen weights= or include=, or load it without"
            )
        for name, slot in self.slots.items():
            model.set_submodule(name, slot)
        if headers:
            validate(model, headers, self.slots, self)
        if self.settings.stored is None:
            names = list(self.slots)
            sizes = [slot.dense_bytes for slot in self.slots.values()]
            self.progress = track(names, "quantizing", sizes, self.settings.quiet)
            next(self.progress, None)

    def _place_dense(self, model: PreTrainedModel) -> None:
        choice, head = self.settings.choice(), model.get_output_embeddings()
        for name, module in model.named_modules():
            if is_experts(module):
                weight_only, _, _ = choice.experts(name, module.down_proj.shape[1])
                if weight_only is not None:
                    understood(name, module)
                    self.slots[name] = ExpertSlots(module, module.down_proj.dtype, dense=weight_only)
            elif is_linear(module):
                transposed, weight = not isinstance(module, nn.Linear), module.weight
                shape = (weight.shape[1], weight.shape[0]) if transposed else (weight.shape[0], weight.shape[1])
                format, _, _ = choice.format(name, shape[0], model if module is head else None)
                if format is not None:
                    bias = module.bias is not None
                    self.slots[name] = Slot(shape, weight.dtype, bias, dense=format, transposed=transposed)
                    if module is head:
                        self._place_head(model, name)

    def _place_head(self, model: PreTrainedModel, name: str) -> None:
        """A tied head is quantized from the embedding, which stays as it is."""
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        weight = f"{name}.weight"
        partners = [tied[weight]] if weight in tied else [key for key, source in tied.items() if source == weight]
        if partners:
            self.embedding, self.head = partners[0], name
            self.slots[name]._parameters.pop("weight")
        model.all_tied_weights_keys = {k: v for k, v in tied.items() if weight not in (k, v)}

    def _place_packed(self, model: PreTrainedModel, headers: dict[str, Header], source: Source) -> None:
        names, head = Names(model), model.get_output_embeddings()
        found_parts = parts_found(model, headers, source, self)
        for name, module in model.named_modules():
            if is_experts(module) and packed_experts(model, name, headers, source):
                coding = source.experts().expert(name)
                understood(name, module)
                parts = {}
                for which, weight in (("up", up_name(module)), ("down", "down_proj")):
                    found = names.experts(name, weight)
                    if found is None:
                        raise CheckpointError(f"{name}: packed experts of {type(module).__name__} are not understood")
                    parts[which] = [n.removeprefix(f"{name}.") for n in found]
                self.slots[name] = ExpertSlots(module, module.down_proj.dtype, coding, parts)
            elif type(module) is nn.Linear:
                own = found_parts.get(name, set())
                packed = source.coding(name, own)
                if packed is None:
                    continue
                shape = (module.out_features, module.in_features)
                packed.fits(name, *shape)
                bias, spare = module.bias is not None, module.bias is None and "bias" in own
                self.slots[name] = Slot(shape, module.weight.dtype, bias or spare, packed, spare_bias=spare)
                if module is head:
                    tied = getattr(model, "all_tied_weights_keys", None) or {}
                    keys = {key: source for key, source in tied.items() if f"{name}.weight" not in (key, source)}
                    model.all_tied_weights_keys = keys

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Packed experts are loaded one by one, so nothing fuses them; parts get names that parameters can have."""
        fused = [
            f"{name}.{weight}"
            for name, slot in self.slots.items()
            if isinstance(slot, ExpertSlots) and slot.coding is not None
            for weight in slot.weights.values()
        ]
        return [*without(weight_conversions, fused), *(self.source.renamings() if self.source else ())]

    # while they are loaded

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        name, _, part = param_name.rpartition(".")
        slot = self.slots.get(name)
        if isinstance(slot, ExpertSlots):
            return slot.dense is not None and part in slot.weights.values()
        return param_name == self.embedding or (slot is not None and slot.dense is not None and part == "weight")

    def get_quantize_ops(self) -> Quantize:
        return Quantize(self)

    def quantize(self, key: str, tensor: Tensor) -> dict[str, Tensor]:
        """Quantize the weight `key` into its slot; return what is still to be loaded."""
        tied = key == self.embedding
        name, _, part = (f"{self.head}.weight" if tied else key).rpartition(".")
        slot = self.slots[name]
        try:
            if isinstance(slot, ExpertSlots):
                slot.quantize(part, tensor, self.settings.method)
            else:
                slot.quantize(tensor, self.settings.method)
        except ValueError as error:  # transformers would only log it; raised once loading is through
            self.errors.append(ValueError(f"{name}: {error}; leave it out with exclude={name!r}"))
            slot._parameters.pop(part, None)
        if isinstance(slot, Slot) or len(slot.quantized) == len(slot.weights):
            next(self.progress, None)
        return {key: tensor} if tied else {}

    # after it

    def postprocess_model(self, model: PreTrainedModel, **_: Any) -> None:
        """Put the layers where their slots are; the model then looks as if `fastllm.optimize` had been at it."""
        for _name in self.progress:  # says that it is through
            pass
        _forget(model)
        if self.errors:
            raise self.errors[0]
        _refuse_offload(model)
        quiet = self.settings.quiet or self.settings.stored is None
        # the largest first, while memory is empty: changing a layout takes some of its own
        names = sorted(self.slots, key=lambda name: -self.slots[name].dense_bytes)
        for name in track(names, "preparing", [self.slots[name].dense_bytes for name in names], quiet):
            slot = self.slots.pop(name)
            layer = slot.finish(name)
            layer.train(slot.training)
            if hook := getattr(slot, "_hf_hook", None):
                move_hook(hook, layer)
            model.set_submodule(name, layer)
        left = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
        if left:
            raise CheckpointError(f"the checkpoint lacks {len(left)} weights: {', '.join(left[:8])}")
        SaveHook.attach(model)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _forget(model: PreTrainedModel) -> None:
    """Remove what transformers noted of the loading quantizer."""
    used = model.__dict__.get("_weight_conversions")
    if used:
        model._weight_conversions = [c for c in used if not isinstance(c, PartRenaming)]
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            for owner, key in (
                (module, "hf_quantizer"),
                (module, "is_quantized"),
                (module, "quantization_method"),
                (module.config, "quantization_config"),
                (module.config, "_is_quantized"),
            ):
                owner.__dict__.pop(key, None)


def _refuse_offload(model: PreTrainedModel) -> None:
    devices = {str(d) for d in (getattr(model, "hf_device_map", None) or {}).values()}
    if "disk" in devices or ("cpu" in devices and len(devices) > 1):
        raise ValueError(
            f"device_map places layers on {', '.join(sorted(devices))}: packed layers cannot be offloaded; use "
            "device_map={'': 0}, or fewer bits"
        )
