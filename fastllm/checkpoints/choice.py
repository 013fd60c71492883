"""Which weights get which format: the rule behind `weights=`, `lm_head=`, `include=` and `exclude=`."""

import inspect
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from ..formats import Format, IntFormat, Nf4Format, parse_format

Patterns = str | Iterable[str]
SMALLEST = 16  # outputs; a classifier of a few classes is nothing to read and much to lose


class Choice:
    """The arguments of `fastllm.optimize` and `fastllm.load`; raises ValueError for an unknown format."""

    def __init__(
        self,
        weights: str | Format | Mapping[str, str | Format | None],
        group_size: int | None = None,
        lm_head: str | Format | bool | None = None,
        include: Patterns = "*",
        exclude: Patterns = (),
        activations: str | None = None,
    ):
        self.include, self.exclude = include, exclude
        self.mapped = isinstance(weights, Mapping)
        table = dict(weights) if isinstance(weights, Mapping) else {"*": weights}
        self.table = {
            pattern: None if f is None else parse_format(f, group_size, activations=activations)
            for pattern, f in table.items()
        }
        self.lm_head = parse_format(lm_head) if isinstance(lm_head, str | Format) else lm_head

    def format(self, name: str, N: int, head_of: Any = None) -> tuple[Format | None, str, str]:
        """(the format of the module `name` with N outputs or None, why there is none, what to do about it).

        head_of: the model whose output head it is, if it is one.
        """
        format, reason, remedy = self._format(name, head_of is not None)
        if format is not None and asks_if_tied(head_of):
            return None, f"{type(head_of).__name__} computes something else when its head is not tied", "untie it"
        if format is not None and N < SMALLEST and self.table.get(name) is None:
            return None, f"{N} outputs: too small to matter", "name it in weights={...} to insist"
        return format, reason, remedy

    def experts(self, name: str, N: int) -> tuple[IntFormat | None, str, str]:
        """As `format`, for the experts of a mixture: of them only the weights are quantized."""
        format, reason, remedy = self.format(name, N)
        if format is not None and format.weight_only is None:
            why = f"of experts only the weights are quantized, and {format.name} is a format of activations too"
            return None, why, 'give them another one: weights={"*.experts": "int8", "*": "fp8"}'
        weight_only = None if format is None else format.weight_only
        assert not isinstance(weight_only, Nf4Format), "parse_format refuses it"
        return weight_only, reason, remedy

    def _format(self, name: str, is_head: bool) -> tuple[Format | None, str, str]:
        if not matches(name, self.include):
            return None, f"does not match include={self.include!r}", "widen include="
        if matches(name, self.exclude):
            return None, f"matches exclude={self.exclude!r}", "narrow exclude="
        if is_head and self.lm_head is False:
            return None, "lm_head=False", 'pass lm_head="int8"'
        if is_head and isinstance(self.lm_head, Format):
            return self.lm_head, "", ""
        for pattern, format in self.table.items():
            if fnmatchcase(name, pattern):
                # the head decides between all words at once: one scale per word at 8 bits, and activations as they
                # are, is the safe choice
                small_head = is_head and not self.mapped and format is not None and self.lm_head is None
                return (IntFormat(8) if small_head else format), "weights= says to leave it", "change weights="
        return None, "matches no pattern of weights=", "add one, or '*'"


def matches(name: str, patterns: Patterns) -> bool:
    """Whether `name` matches one of `patterns`, as file names do."""
    return any(fnmatchcase(name, p) for p in ([patterns] if isinstance(patterns, str) else patterns))


def asks_if_tied(model: Any) -> bool:
    """Whether the forward pass depends on the head being tied, as T5's descendants do: a quantized copy is not."""
    code = getattr(inspect.unwrap(type(model).forward), "__code__", None) if model is not None else None
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    return bool(tied) and code is not None and "tie_word_embeddings" in code.co_names
