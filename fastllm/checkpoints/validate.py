"""A checkpoint against the model it is to fill: names, shapes and types, from the files' headers alone.

The files are not trusted. transformers accepts wrong shapes where a quantizer is at work, so nothing is left to it.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from .coding import CheckpointError, Source
from .headers import Header
from .slots import Slot

if TYPE_CHECKING:
    from .quantizer import FastllmQuantizer

MARKS = ("weight_packed", "qweight", "weight_absmax")  # parts that only packed layers have
LARGEST = 1 << 16  # bytes of a part that describes a layer


def packed_experts(model: PreTrainedModel, name: str, headers: dict[str, Header], source: Source) -> bool:
    """Whether the checkpoint keeps the experts module `name` as packed layers."""
    renamings = [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightRenaming)]
    prefix = model.base_model_prefix
    for key in headers:
        if ".experts." in key and key.endswith(f".{source.key}"):
            renamed, _ = rename_source_key(key, renamings, [])
            if any(
                k.startswith(f"{name}.") for k in (renamed, f"{prefix}.{renamed}", renamed.removeprefix(f"{prefix}."))
            ):
                return True
    return False


def parts_found(
    model: PreTrainedModel, headers: dict[str, Header], source: Source, quantizer: "FastllmQuantizer"
) -> dict[str, set[str]]:
    """Which of the parts by which `source` knows a packed layer the files have: {linear layer: parts}."""
    conversions = get_model_conversion_mapping(model, None, quantizer)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    linears = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    places = {f"{name}.{part}": True for name in linears for part in source.names}
    found: dict[str, set[str]] = defaultdict(set)
    for key in headers if source.names else ():
        layer, _, part = rename_source_key(key, renamings, [], model.base_model_prefix, places)[0].rpartition(".")
        if part in source.names:
            found[layer].add(part)
    return found


def validate(
    model: PreTrainedModel, headers: dict[str, Header], slots: "Mapping[str, nn.Module]", quantizer: "FastllmQuantizer"
) -> None:
    """Raise CheckpointError, naming layer and numbers, unless every slot finds what it declares.

    model: on the meta device, with the slots in place; they lose the optional parts that the files lack.
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
        layer, _, part = renamed.rpartition(".")
        if pattern is not None:
            _refuse_packed(key, header)
            continue
        found[renamed] = header
        if renamed in state:
            _check(renamed, header, state[renamed], modules[layer])
        elif part == "weight_g_idx":
            raise CheckpointError(
                f"{key}: weights in activation order (g_idx) are not read; quantize the dense checkpoint"
            )
        elif part in MARKS and layer in modules:
            raise CheckpointError(
                f"{header.file} has {key}, but by the quantization_config of config.json {layer} is not packed, or it "
                f"is a {type(modules[layer]).__name__}, which is not read packed: one of them is wrong"
            )
    for name, slot in slots.items():
        _check_complete(name, slot, found)
    _look(found, modules)


def _refuse_packed(key: str, header: Header) -> None:
    """Whatever transformers joins or cuts while it loads has to be dense."""
    part = key.rpartition(".")[2]
    if part in (*MARKS, "qzeros", "weight_scale") or header.dtype in ("I32", "U8"):
        raise CheckpointError(
            f"{key} ({header.dtype}) belongs to a packed weight, and the model joins or cuts the weights of that "
            "name: that is not read packed; load it with transformers, or quantize the dense checkpoint"
        )


def _check(name: str, header: Header, place: Tensor, module: nn.Module) -> None:
    part, of, shape = name.rpartition(".")[2], "", tuple(place.shape)
    if isinstance(module, Slot):
        of = f" for a weight {list(module.shape)}" + ("" if module.coding is None else f" in {module.coding}")
        declared = None if module.coding is None else module.coding.parts(*module.shape).get(part)
        if declared is not None and header.dtype not in declared.dtypes:
            types = " or ".join(declared.dtypes)
            raise CheckpointError(f"{name} has dtype {header.dtype}, not {types}: {header.file} is damaged")
        if declared is not None and declared.shape is None:
            if len(header.shape) != 1 or header.shape[0] > LARGEST:
                raise CheckpointError(
                    f"{name} has shape {list(header.shape)}, not [n] with n up to {LARGEST}: {header.file} is damaged"
                )
            return
    if place.is_floating_point() and not header.dtype.startswith(("F", "BF")):
        raise CheckpointError(f"{name} has dtype {header.dtype}, not floating point: {header.file} is damaged")
    if header.shape != shape:
        raise CheckpointError(
            f"{name} has shape {list(header.shape)}, not {list(shape)}{of}: {header.file} is damaged, or its "
            "config.json describes another checkpoint"
        )


def _check_complete(name: str, slot: nn.Module, found: dict[str, Header]) -> None:
    for path, module in slot.named_modules(prefix=name):
        if not isinstance(module, Slot) or module.coding is None:
            continue
        declared = module.coding.parts(*module.shape)
        for part in [part for part in declared if f"{path}.{part}" not in found]:
            if declared[part].optional:
                module._parameters.pop(part)
                continue
            other = "weight" not in declared and f"{path}.weight" in found
            dense = " (a dense weight is there, so config.json is wrong)" if other else ""
            raise CheckpointError(f"{path}.{part} is missing from the checkpoint{dense}: it is incomplete")
        if module.bias is not None and f"{path}.bias" not in found:
            raise CheckpointError(f"{path}.bias is missing from the checkpoint: it is incomplete")


def _look(found: dict[str, Header], modules: dict[str, nn.Module]) -> None:
    """Let each layer look at those of its parts that tell whether it can be read."""
    seen: dict[str, dict[str, Tensor]] = defaultdict(dict)
    wanted = defaultdict(list)
    for name, header in found.items():
        layer, _, part = name.rpartition(".")
        slot = modules.get(layer)
        if isinstance(slot, Slot) and slot.coding is not None and part in slot.coding.seen:
            wanted[header.file].append((layer, part, header.key))
    for file in sorted(wanted):
        with safe_open(file, framework="pt") as opened:
            for layer, part, key in wanted[file]:
                seen[layer][part] = opened.get_tensor(key)
    with torch.device("cpu"):  # transformers loads on the meta device
        for layer, slot in modules.items():
            if isinstance(slot, Slot) and slot.coding is not None and slot.coding.seen:
                slot.coding.look(layer, seen[layer], slot.shape)
