"""The `quantization_config` of compressed-tensors: which layers, by groups of targets, have which scheme.

Source: https://github.com/vllm-project/compressed-tensors. What each scheme stores, `Scheme` says.
"""

import logging
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from transformers import PreTrainedModel

from .coding import CheckpointError, Source
from .scheme import FORMAT, METHOD, MIXED, ROUNDING, Scheme, rounding

EXPERTS = r"re:.*\.experts\..*"
CACHE_SCALES = r"\.[qkv]_(scale|zero_point)$", r"\.[qkv]_proj\.output_(scale|zero_point)$"  # newer and older names

logger = logging.getLogger("fastllm")


def build_config(
    layers: Mapping[str, Scheme], experts: Scheme | None, dense: Iterable[str], prefix: str
) -> dict[str, Any] | None:
    """The `quantization_config` of a checkpoint, None if nothing in it is packed.

    layers:  the scheme of each linear layer
    experts: the one scheme of all mixture experts, None if there are none
    dense:   names of linear layers that are not quantized
    prefix:  what a task model puts before the names of its base model, such as "model"; both can load the checkpoint

    The commonest scheme is that of every `Linear`; exceptions are named one by one, by patterns that never overlap.
    """
    schemes = list(layers.values())
    ranked = sorted(set(schemes), key=lambda s: (-schemes.count(s), str(s)))
    groups: list[tuple[list[str], Scheme]] = []
    if experts is not None:
        groups.append(([EXPERTS], experts))
    for scheme in ranked[1:]:
        groups.append(([_target(name, prefix) for name, s in layers.items() if s == scheme], scheme))
    if ranked:
        groups.append((["Linear"], ranked[0]))
    if not groups:
        return None
    formats = {scheme.file_format for _, scheme in groups}
    mixed = len(formats) > 1
    config: dict[str, Any] = {
        "quant_method": METHOD,
        "format": MIXED if mixed else groups[0][1].file_format,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {
                "targets": targets,
                **scheme.entries(),
                **({"format": scheme.file_format} if mixed else {}),
            }
            for i, (targets, scheme) in enumerate(groups)
        },
        "ignore": sorted(_target(name, prefix) for name in dense),
    }
    if len(groups) == 1 and not groups[0][1].symmetric:
        config["dequantize"] = True  # newer transformers refuse zero points otherwise
    return config


def _target(name: str, prefix: str) -> str:
    """What names the layer `name`, whether the reader loads the base model or one with a task's head."""
    if not prefix or not name.startswith(f"{prefix}."):
        return name
    return f"re:({re.escape(prefix)}\\.)?{re.escape(name.removeprefix(f'{prefix}.'))}$"


class Stored(Source):
    """What a checkpoint's `quantization_config` says, once it is known to be of the kind that can be read."""

    key = "weight_scale"

    def __init__(self, config: Mapping[str, Any]):
        """Raises CheckpointError naming what is not supported, and what to do."""
        _check_types(config)
        _refuse(config)
        self.cache = config.get("kv_cache_scheme") is not None
        self.ignore = list(config.get("ignore") or [])
        self.groups: list[tuple[list[str], Scheme]] = []
        for name, group in config["config_groups"].items():
            self.groups.append((list(group.get("targets") or []), _read_scheme(name, group, config)))

    def coding(self, name: str, parts: Collection[str]) -> Scheme | None:
        return self.scheme(name)

    def scheme(self, name: str) -> Scheme | None:
        """The scheme of the linear layer `name`, None if it is dense."""
        if any(_matches(name, target) for target in self.ignore):
            return None
        ranked = sorted((_rank(target), target, i) for i, (targets, _) in enumerate(self.groups) for target in targets)
        for _, target, i in ranked:
            if _matches(name, target):
                return self.groups[i][1]
        return None

    def experts(self) -> Scheme:
        """The scheme of all mixture experts: readers take the group with a pattern for experts, else the first."""
        for targets, scheme in self.groups:
            if any(t.startswith("re:") and "experts" in t for t in targets):
                return scheme
        return next(
            (s for targets, s in self.groups if any(not t.startswith("re:") for t in targets)), self.groups[0][1]
        )

    def leave_out(self, model: PreTrainedModel) -> None:
        """Let transformers pass over the scales with which servers round keys and values to 8 bits."""
        if self.cache:
            logger.info("kv_cache_scheme is not used: fastllm.KVCache has scales of its own for each token")
            known = model._keys_to_ignore_on_load_unexpected or ()
            model._keys_to_ignore_on_load_unexpected = {*known, *CACHE_SCALES}


def _rank(target: str) -> int:
    """Names before patterns before classes."""
    return 1 if target.startswith("re:") else 2 if target == "Linear" else 0


def _matches(name: str, target: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), name) is not None
    return target in (name, "Linear")


def _check_types(config: Mapping[str, Any]) -> None:
    """Raise CheckpointError for a value of the wrong type, and for a pattern that is none."""

    def expect(good: bool, where: str, value: Any, what: str) -> None:
        if not good:
            raise CheckpointError(f"quantization_config.{where} is {value!r}, not {what}: the file is damaged")

    def patterns(where: str, value: Any) -> None:
        names = [] if value is None else value
        expect(isinstance(names, list) and all(isinstance(n, str) for n in names), where, value, "a list of names")
        for name in names:
            try:
                re.compile(name.removeprefix("re:") if name.startswith("re:") else "")
            except re.error:
                expect(False, where, name, "a regular expression")

    groups = config.get("config_groups") or {}
    for name in ("sparsity_config", "kv_cache_scheme"):
        expect(isinstance(config.get(name), (Mapping, type(None))), name, config.get(name), "a table")
    patterns("ignore", config.get("ignore"))
    expect(isinstance(groups, Mapping), "config_groups", groups, "a table")
    for key, group in groups.items():
        where = f"config_groups.{key}"
        expect(isinstance(group, Mapping), where, group, "a table")
        patterns(f"{where}.targets", group.get("targets"))
        for part in ("weights", "input_activations"):
            table = group.get(part) or {}
            expect(isinstance(table, Mapping), f"{where}.{part}", table, "a table")
            for name, kind in (("num_bits", int), ("symmetric", bool), ("strategy", str), ("type", str)):
                value, what = table.get(name), f"of type {kind.__name__}"
                expect(value is None or type(value) is kind, f"{where}.{part}.{name}", value, what)


def _refuse(config: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless `config` describes packed weights, or weights of 8 bits, and nothing else."""
    whole = config.get("format", FORMAT)
    found = [
        what
        for bad, what in (
            (whole not in (FORMAT, *ROUNDING.values(), MIXED), f"format {whole!r}"),
            ((config.get("sparsity_config") or {}).get("format", "dense") != "dense", "a sparsity_config"),
            (bool(config.get("transform_config")), "transforms (transform_config)"),
            (not isinstance(config.get("config_groups"), Mapping) or not config["config_groups"], "no config_groups"),
        )
        if bad
    ]
    if found:
        raise CheckpointError(
            f"compressed-tensors checkpoint with {' and '.join(found)}: only {FORMAT!r} (weights of 4 or 8 bits, by "
            f"group or channel) and {' and '.join(map(repr, ROUNDING.values()))} (weights and activations of 8 bits) "
            "are read; load it with transformers, which needs the compressed-tensors package"
        )


def _read_scheme(name: str, group: Mapping[str, Any], config: Mapping[str, Any]) -> Scheme:
    weights, activations = group.get("weights") or {}, group.get("input_activations") or {}
    bits: Any = weights.get("num_bits")
    strategy, size = weights.get("strategy"), weights.get("group_size")
    strategy = strategy or ("group" if isinstance(size, int) and size > 0 else "channel")
    symmetric = bool(weights.get("symmetric", True))
    whole = config.get("format", FORMAT)
    if whole == MIXED:
        floats = activations.get("type") == "float"
        whole = ROUNDING["fp8" if floats else "int8"] if activations else FORMAT
    file_format = group.get("format") or whole
    a8 = next((name for name, known in ROUNDING.items() if known == file_format), None)
    kind = "float" if a8 == "fp8" else "int"
    wanted = rounding(kind)
    rounds = {"type": "int", "symmetric": True, **{k: v for k, v in activations.items() if k in wanted}}
    found = [
        what
        for bad, what in (
            (not weights, "no weights"),
            (bool(group.get("output_activations")), "quantized activations (output_activations)"),
            (bool(activations) and a8 is None, "quantized activations (input_activations) of packed weights"),
            (a8 is not None and rounds != wanted, f"input_activations {rounds}"),
            (
                a8 is not None and (bits, strategy, symmetric) != (8, "channel", True),
                f"{file_format} weights of another kind",
            ),
            (file_format != FORMAT and a8 is None, f"format {file_format!r}"),
            (weights.get("type", "int") != kind, f"type {weights.get('type', 'int')!r}"),
            (bits not in (4, 8), f"num_bits {bits!r}"),
            (strategy not in ("group", "channel"), f"strategy {strategy!r}"),
            (strategy == "group" and not (type(size) is int and size > 0), f"group_size {size!r}"),
            (
                weights.get("actorder") not in (None, False, "weight", "static"),
                f"actorder {weights.get('actorder')!r}",
            ),
            (bool(weights.get("dynamic")), "dynamic weights"),
        )
        if bad
    ]
    if found:
        raise CheckpointError(
            f"config_groups.{name} has {' and '.join(found)}: only integer weights of 4 or 8 bits, by group or "
            "channel, in their original order are read, and symmetric ones of 8 bits, or floats of 8 bits, by channel "
            "with activations of the same kind, dynamic, by token; load it with transformers, or quantize the dense "
            "checkpoint"
        )
    return Scheme(bits, size if strategy == "group" else None, symmetric, a8)
