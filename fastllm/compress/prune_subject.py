"""A model that can be pruned, and which of its layers can go: nothing is changed yet."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from ..nn import QuantExperts, QuantLinear
from ..patch.apply import is_patched
from ..patch.errors import NotSupportedError, refuse_state
from ..probe import reads_tokens
from .blocks import find_blocks
from .prune_config import Skeleton, changes, skeleton, with_settings, without_layers


class Subject(NamedTuple):
    """A model that can be pruned, and what stock transformers makes of its configuration."""

    model: Any
    prefix: str
    layers: nn.ModuleList
    whole: Skeleton

    @property
    def text(self) -> Any:
        """The part of the configuration that is about the layers."""
        return self.model.config.get_text_config()


def check_share(name: str, value: Any, what: str) -> None:
    """ValueError unless it is one, of some and not all."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise ValueError(f"{name}={value!r}: give the share of {what} to remove, above 0 and below 1")


def share_of(name: str, value: float, count: int, what: str) -> int:
    """How many of `count` a share is, no more than that. ValueError unless that is some and not all."""
    check_share(name, value, what)
    found = math.floor(value * count + 1e-9)
    if not found:
        raise ValueError(f"{name}={value}: less than one of {count} {what}; at least {1 / count:.3g} removes one")
    return found


def subject(model: Any) -> Subject:
    """Raises NotSupportedError for the state that a model is in, ValueError for models that are not made of layers."""
    if not isinstance(model, PreTrainedModel) or not reads_tokens(model):
        raise ValueError(f"{type(model).__name__} is no Hugging Face model that reads tokens: those are pruned")
    if is_patched(model):
        raise NotSupportedError("the model is optimized already; fastllm.restore(model) first")
    refuse_state(model)
    packed = next((n for n, m in model.named_modules() if isinstance(m, (QuantLinear, QuantExperts))), None)
    if packed is not None:
        raise NotSupportedError(f"{packed} is quantized already; prune the dense model, and quantize the result")
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"{type(model).__name__} has an encoder and a decoder; models with one list of layers are pruned"
        )
    prefix, layers = find_blocks(model)
    text = model.config.get_text_config()
    if getattr(text, "num_hidden_layers", None) != len(layers) or getattr(text, "is_heterogeneous", False):
        told = getattr(text, "num_hidden_layers", None)
        raise ValueError(f"{prefix} has {len(layers)} layers, and the configuration tells of {told} that are alike")
    own = [id(p) for layer in layers for p in layer.parameters()]
    if len(own) != len(set(own)):
        raise ValueError(f"layers of {prefix} share parameters: one cannot be changed without the other")
    whole = skeleton(model, model.config)
    for name, t in model.state_dict().items():
        if whole.shapes.get(name) != tuple(t.shape):
            raise ValueError(f"{name} is {list(t.shape)}, and {whole.shapes.get(name)} by the model's configuration")
    return Subject(model, prefix, layers, whole)


def layers_asked(subject: Subject, layers: Any) -> int | list[int]:
    """How many layers are to be removed, or which. ValueError for what cannot be."""
    count = len(subject.layers)
    if isinstance(layers, (list, tuple)):
        fine = all(type(i) is int and 0 <= i < count for i in layers) and len(set(layers)) == len(layers)
        if not layers or not fine:
            raise ValueError(f"layers={list(layers)}: give different numbers of layers from 0 to {count - 1}")
        if len(layers) == count:
            raise ValueError(f"layers={list(layers)} are all {count} layers")
        if why := refused(subject, layers):
            raise ValueError(f"layers={list(layers)} cannot be removed: {why}")
        return list(layers)
    found = layers if type(layers) is int else share_of("layers", layers, count, "layers")
    if not 0 < found <= count - 2:
        raise ValueError(
            f"layers={layers}: of {count} layers at most {max(0, count - 2)} can be removed: the first and last stay"
        )
    return found


def refused(subject: Subject, gone: Sequence[int]) -> str:
    """Why a model without these layers is not what its configuration would say, or ""."""
    if getattr(subject.text, "num_kv_shared_layers", 0):
        return "its last layers have the keys and values of others"
    kept = [i for i in range(len(subject.layers)) if i not in gone]
    config = with_settings(subject.model.config, without_layers(subject.text, kept))
    try:
        smaller = skeleton(subject.model, config)
    except ValueError as error:
        return str(error)
    return changes(subject.whole, smaller, subject.prefix, kept, {})[1]
