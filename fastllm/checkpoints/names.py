"""What weights are called on disk: transformers' own conversions, read backwards.

In memory the experts of a mixture are one 3-D parameter; in most checkpoints each expert has weights of its own.
"""

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Chunk, SplitModulelist, WeightConverter

from ..nn import QuantExperts
from ..nn.experts import is_experts, up_name


class Names:
    """The names that the weights of `model` have in a checkpoint."""

    def __init__(self, model: PreTrainedModel):
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        self.converters = [c for c in map(_reversed, conversions) if c is not None]

    def _split(self, key: str) -> tuple[Any, list[str]] | None:
        """(the conversion that `key` goes through when saved, the names that result), None if it keeps its name."""
        for converter in self.converters:
            renamed, pattern = converter.rename_source_key(key)
            if pattern is not None:
                first = converter.target_patterns[0]
                return converter, [renamed.replace(first, target) for target in converter.target_patterns]
        return None

    def converted(self, key: str) -> bool:
        """Whether the weight `key` has another form on disk."""
        return self._split(key) is not None

    def experts(self, name: str, which: str) -> list[str] | None:
        """The modules that `name.which` is made of, such as ["experts.*.w1", "experts.*.w3"], * being the expert.

        The rows of one expert's matrix are theirs in this order. None if the checkpoint has no such modules.
        """
        split = self._split(f"{name}.{which}")
        if split is None:
            return None
        converter, names = split
        *chunks, last = converter.operations
        rows = [op for op in chunks if type(op) is Chunk and op.dim == 1 and op.num_shards_attribute is None]
        plain = type(last) is SplitModulelist and last.dim == 0 and len(rows) == len(chunks) == (len(names) > 1)
        if not plain or not all(n.endswith(".weight") and n.count("*") == 1 for n in names):
            return None
        return [n.removesuffix(".weight") for n in names]


def _reversed(conversion: Any) -> Any:
    """The conversion that saves what `conversion` loads; None if it only renames, or cannot be reversed."""
    if not isinstance(conversion, WeightConverter):
        return None
    try:
        return conversion.reverse_transform()
    except NotImplementedError:
        return None


def expert_weights(name: str, module: nn.Module) -> list[str]:
    """The 3-D weights, in memory, of the experts `module`, dense or packed; empty if it is none."""
    shell = module.shell if isinstance(module, QuantExperts) else module
    if shell is module and not is_experts(module):
        return []
    return [f"{name}.{up_name(shell)}", f"{name}.down_proj"]


def without(conversions: list[Any], weights: list[str]) -> list[Any]:
    """`conversions` without those that would cut one of `weights` into experts when it is saved."""
    return [
        c
        for c in conversions
        if not any((r := _reversed(c)) and r.rename_source_key(w)[1] is not None for w in weights)
    ]
