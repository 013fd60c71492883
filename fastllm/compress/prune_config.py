"""What a configuration makes of a model: without weights, to see beforehand what a smaller one would be."""

import copy
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers.initialization import no_init_weights

KINDS = (int, bool, str, float, type(None))
FAILURES = (
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    RuntimeError,
    ZeroDivisionError,
    StrictDataclassError,
)


class Skeleton(NamedTuple):
    """Of a model: the shapes of what is saved, and of each module its type and its plain attributes, by name."""

    shapes: dict[str, tuple[int, ...]]
    types: dict[str, type]
    values: dict[str, dict[str, Any]]


def skeleton(model: Any, config: Any) -> Skeleton:
    """What stock transformers builds from the file of a configuration. ValueError, which says why, if it does not."""
    try:
        stored = type(config).from_dict(json.loads(config.to_json_string(use_diff=False)))
        with torch.device("meta"), no_init_weights():
            twin = type(model)(stored)
    except FAILURES as error:
        why = str(_first(error)).rstrip(".")
        raise ValueError(f"a configuration like that gives no {type(model).__name__}: {why}") from error
    return Skeleton(
        {name: tuple(t.shape) for name, t in twin.state_dict().items()},
        {name: type(module) for name, module in twin.named_modules()},
        {name: _plain(module) for name, module in twin.named_modules()},
    )


def _first(error: BaseException) -> BaseException:
    """What an error that was raised from others began with."""
    return error if error.__cause__ is None else _first(error.__cause__)


def _plain(module: nn.Module) -> dict[str, Any]:
    return {k: v for k, v in vars(module).items() if isinstance(v, KINDS) and k != "training"}


def with_settings(config: Any, settings: Mapping[str, Any]) -> Any:
    """A copy of a configuration, of whose text part some attributes are others."""
    other = copy.deepcopy(config)
    for name, value in settings.items():
        setattr(other.get_text_config(), name, value)
    return other


def without_layers(text: Any, kept: Sequence[int]) -> dict[str, Any]:
    """The settings of a configuration that has only some of its layers: their number, and each list of one a layer."""
    count = text.num_hidden_layers
    others = re.compile("token|architectures|labels")  # whose length says nothing
    lists = {
        name: type(value)(value[i] for i in kept)
        for name, value in vars(text).items()
        if isinstance(value, (list, tuple)) and len(value) == count and not others.search(name)
    }
    return {"num_hidden_layers": len(kept), **lists}


Values = dict[str, dict[str, int]]  # by module: attributes and what they become


def changes(
    before: Skeleton, after: Skeleton, prefix: str, kept: Sequence[int], cuts: Mapping[str, tuple[int, ...]]
) -> tuple[Values, str]:
    """(attributes that modules get, by their new names; why it cannot be, or "").

    prefix: the name of the list of blocks, of which `kept` stay. cuts: by new name, the shapes that change.
    """
    old = {f"{prefix}.{new}.": f"{prefix}.{index}." for new, index in enumerate(kept)}

    def source(name: str) -> str:
        rest = name.removeprefix(f"{prefix}.")
        return name if rest == name else old.get(f"{prefix}.{rest.partition('.')[0]}.", "?") + rest.partition(".")[2]

    found: Values = {}
    for name, shape in after.shapes.items():
        want = cuts.get(name, before.shapes.get(source(name)))
        if shape != want:
            return {}, f"{name} would be {list(shape)}, not {list(want or ())}"
    gone = len(before.shapes) - sum(name.startswith(f"{prefix}.") for name in before.shapes)
    if gone != sum(not name.startswith(f"{prefix}.") for name in after.shapes):
        return {}, "parts outside of its layers depend on them"
    moved = {f"{prefix}.{new}": index for new, index in enumerate(kept)}
    for name, values in after.values.items():
        was = source(name).rstrip(".")
        if was not in before.types or before.types[was] is not after.types[name]:
            return {}, f"{name} would be a {after.types[name].__name__}"
        index = next((i for block, i in moved.items() if f"{name}.".startswith(f"{block}.")), None)
        for attribute, value in values.items():
            if value == (first := before.values[was].get(attribute)):
                continue
            if type(value) is not int or type(first) is not int or (not cuts and first != index and index is not None):
                return {}, f"{name}.{attribute} would be {value!r} in place of {first!r}"
            found.setdefault(name, {})[attribute] = value
    return found, ""
