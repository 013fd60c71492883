"""What a reader of packed checkpoints has to say: which tensors a layer is stored as, and what they mean.

A `Source` stands for a checkpoint's `quantization_config`. It gives each packed layer a `Coding`; from the shapes and
types that this declares, the headers of the files are checked before anything is loaded.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..formats import Format, QuantizedWeight

DTYPES = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
}
FLOATS = ("BF16", "F16", "F32")


class CheckpointError(ValueError):
    """A checkpoint is damaged, or of a kind that cannot be read; the message names the layer and the numbers."""


class Part(NamedTuple):
    """A tensor that a layer is stored as. `shape` is None where only its value can tell: `Coding.look` then checks."""

    shape: tuple[int, ...] | None
    dtypes: tuple[str, ...]  # as safetensors spells them; FLOATS: it is loaded in the model's own
    optional: bool = False

    def empty(self, dtype: torch.dtype) -> Tensor:
        """A tensor on the meta device; `dtype` is the model's."""
        own = dtype if self.dtypes == FLOATS else DTYPES[self.dtypes[0]]
        return torch.empty(self.shape or (0,), dtype=own, device="meta")


class Coding(ABC):
    """How one layer [N, K] is stored. Its text describes it in messages."""

    bits: int
    seen: tuple[str, ...] = ()  # parts that are small, and looked at before anything is loaded

    @abstractmethod
    def parts(self, N: int, K: int) -> dict[str, Part]:
        """What the checkpoint has for it, by the name that follows the layer's."""

    @abstractmethod
    def read(self, name: str, parts: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Any:
        """The `QuantizedWeight` at rest, in memory of its own: integers as they are, scales in `dtype`.

        parts: those of `parts`, of the shapes and types declared there. Raises CheckpointError, naming the layer
        `name`, for values that make no sense.
        """

    @abstractmethod
    def layer(self, weight: QuantizedWeight, K: int, name: str) -> tuple[QuantizedWeight, Format]:
        """What `read` gave, for one layer or several below each other, in a format that kernels know; and that."""

    def fits(self, name: str, N: int, K: int) -> None:
        """Raise CheckpointError if no layer [N, K] can be stored so."""
        return

    def look(self, name: str, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> None:
        """Raise CheckpointError if values of parts in `seen` contradict the layer; optional ones may be absent."""
        return

    def expert(self, name: str) -> "Coding":
        """The same for experts of a mixture. Raises CheckpointError if they cannot be read."""
        return self


class Source(ABC):
    """What a checkpoint says of its packed layers."""

    key = "qweight"  # a part that every packed layer has, and no other
    names: tuple[str, ...] = ()  # the parts by which a packed layer is known; empty: the config alone tells

    @abstractmethod
    def coding(self, name: str, parts: Collection[str]) -> Coding | None:
        """How the linear layer `name` is stored, None if dense. parts: those of `names` that the files have of it."""

    @abstractmethod
    def experts(self) -> Coding:
        """How all experts of mixtures are stored, where they are packed."""

    def renamings(self) -> list[Any]:
        """Conversions of transformers, for names that cannot be those of parameters."""
        return []


def scales(name: str, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` in `dtype`, in memory of its own. Raises CheckpointError unless every value is finite, and stays so."""
    if bad := scale.numel() - int(scale.isfinite().sum()):
        raise CheckpointError(f"{name} has {bad} values that are NaN or infinite: the file is damaged")
    kept = scale.to(dtype).clone(memory_format=torch.contiguous_format)
    if bad := kept.numel() - int(kept.isfinite().sum()):
        raise CheckpointError(f"{name} has {bad} values that {dtype} cannot hold; load it with dtype=torch.bfloat16")
    return kept
