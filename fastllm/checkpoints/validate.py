"""A checkpoint against the model it is to fill: names, shapes and types, from the files' headers alone.

The files are not trusted. transformers accepts wrong shapes where a quantizer is at work, so nothing is left to it.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from .headers import Header
from .scheme import CheckpointError
from .slots import Slot

if TYPE_CHECKING:
    from .quantizer import FastllmQuantizer

DTYPES = {
    "weight_packed": ("I32",),
    "weight_zero_point": ("I32",),
    "weight_shape": ("I64", "I32"),
    "weight_scale": ("BF16", "F16", "F32"),
}


def packed_experts(model: PreTrainedModel, name: str, headers: dict[str, Header]) -> bool:
    """Whether the checkpoint keeps the experts module `name` as packed layers."""
    renamings = [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightRenaming)]
    prefix = model.base_model_prefix
    for key in headers:
        if ".experts." in key and key.endswith(".weight_scale"):
            renamed, _ = rename_source_key(key, renamings, [])
            if any(
                k.startswith(f"{name}.") for k in (renamed, f"{prefix}.{renamed}", renamed.removeprefix(f"{prefix}."))
            ):
                return True
    return False


def validate(
    model: PreTrainedModel, headers: dict[str, Header], slots: "Mapping[str, nn.Module]", quantizer: "FastllmQuantizer"
) -> None:
    """Raise CheckpointError, naming layer and numbers, unless every slot finds what it declares.

    model: on the meta device, with the slots in place.
    """
    conversions = get_model_conversion_mapping(model, None, quantizer)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    state, modules = model.state_dict(), dict(model.named_modules())
    found: dict[str, Header] = {}
    for key, header in headers.items():
        renamed, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if renamed not in state and key in state:
            renamed, pattern = key, None
        if pattern is not None:
            continue
        found[renamed] = header
        layer, _, part = renamed.rpartition(".")
        if renamed in state:
            _check(renamed, header, tuple(state[renamed].shape), modules[layer])
        elif part == "weight_g_idx":
            raise CheckpointError(
                f"{key}: weights in activation order (g_idx) are not read; quantize the dense checkpoint"
            )
        elif part == "weight_packed" and layer in modules:
            raise CheckpointError(
                f"{header.file} has {key}, but by the quantization_config of config.json {layer} is not packed: one "
                "of them is wrong"
            )
    for name, slot in slots.items():
        _check_complete(name, slot, found)
    _check_stored_shapes({name: h for name, h in found.items() if name.endswith(".weight_shape")}, modules)


def _check(name: str, header: Header, shape: tuple[int, ...], module: nn.Module) -> None:
    part, of = name.rpartition(".")[2], ""
    if isinstance(module, Slot):
        of = f" for a weight {list(module.shape)}" + ("" if module.scheme is None else f" in {module.scheme}")
        types = DTYPES | {"weight": ("F8_E4M3",) if module.scheme and module.scheme.activations == "fp8" else ("I8",)}
        if module.scheme is not None and header.dtype not in types.get(part, (header.dtype,)):
            wanted = " or ".join(types[part])
            raise CheckpointError(f"{name} has dtype {header.dtype}, not {wanted}: {header.file} is damaged")
    if header.shape != shape:
        raise CheckpointError(
            f"{name} has shape {list(header.shape)}, not {list(shape)}{of}: {header.file} is damaged, or its "
            "config.json describes another checkpoint"
        )


def _check_complete(name: str, slot: nn.Module, found: dict[str, Header]) -> None:
    for path, module in slot.named_modules(prefix=name):
        if not isinstance(module, Slot) or module.scheme is None:
            continue
        for part, p in module._parameters.items():
            if p is not None and f"{path}.{part}" not in found:
                other = f"{path}.weight" in found and not module.scheme.activations
                dense = " (a dense weight is there, so config.json is wrong)" if other else ""
                raise CheckpointError(f"{path}.{part} is missing from the checkpoint{dense}: it is incomplete")


def _check_stored_shapes(stored: dict[str, Header], modules: dict[str, nn.Module]) -> None:
    for file in sorted({header.file for header in stored.values()}):
        with safe_open(file, framework="pt") as opened:
            for name, header in stored.items():
                slot = modules.get(name.removesuffix(".weight_shape"))
                if header.file != file or not isinstance(slot, Slot):
                    continue
                value = opened.get_tensor(header.key).tolist()
                if value != list(slot.shape):
                    raise CheckpointError(
                        f"{name} says {value}, but the weight is {list(slot.shape)}: {file} or config.json is wrong"
                    )
