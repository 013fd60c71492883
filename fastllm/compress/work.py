"""What calibration has done so far, in a folder: blocks leave memory when they are done, and work can go on later."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from ..checkpoints.mapped import Mapped
from ..formats import QuantizedWeight
from ..nn import QuantLinear
from .calibrate import Layer, Put
from .samples import Batch

VERSION = 1  # of how blocks are made and stored: those of two versions are not mixed
PARTS = ("weight_packed", "weight_scale", "weight_zero_point")


class Work:
    """The blocks that are done, each in a file of its own.

    A block's parameters lie in its file as soon as it is done, and its packed layers are at rest: they do not run.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], source: Mapped | None = None):
        """settings: all that the result depends on, values of JSON. source: of the dense weights.

        ValueError if `folder` has the work of other settings, or another process is at work there.
        """
        self.folder, self.source = folder, source
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(folder / "lock")
        state = folder / "settings.json"
        told = json.loads(json.dumps(settings))
        before = json.loads(state.read_text(encoding="utf-8")) if state.is_file() else told
        if before != told:
            other = sorted(key for key in {*before, *told} if before.get(key) != told.get(key))
            raise ValueError(
                f"{folder} has the beginning of other work (it differs in {', '.join(other)}); go on with that, or "
                "delete the folder"
            )
        if not state.is_file():
            begun = state.with_suffix(".begun")
            begun.write_text(json.dumps(told, indent=1), encoding="utf-8")
            os.replace(begun, state)

    def file(self, index: int) -> Path:
        """Of a block."""
        return self.folder / f"block-{index:05}.safetensors"

    def has(self, index: int) -> bool:
        """Whether a block is done."""
        return self.file(index).is_file()

    def give(self, index: int, block: nn.Module, layers: Mapping[str, Layer], prefix: str, put: Put) -> list[str]:
        """Put what was made of a block into it: the names of the layers that are quantized."""
        tensors = Mapped([self.file(index)]).tensors

        def weight(name: str) -> QuantizedWeight:
            packed, scale, zero = (tensors.pop(f"{name}.{part}", None) for part in PARTS)
            assert packed is not None and scale is not None
            return QuantizedWeight(packed.clone(), scale, zero)

        def expert(own: str, which: str, number: int, w: Tensor) -> QuantizedWeight:
            return weight(f"{own}.{which}.{number}")

        done = []
        for name in layers:
            own = name.removeprefix(prefix)
            if f"{own}.weight_packed" in tensors:
                put(name, weight(own))
            elif f"{own}.up.0.weight_packed" in tensors:
                put(name, partial(expert, own))
            else:
                continue
            done.append(name)
        _point(block, tensors)
        return done

    def keep(self, index: int, block: nn.Module) -> None:
        """A block is done: write it, unless it was taken from here, and let it have its parameters from its file."""
        file = self.file(index)
        if not self.has(index):
            begun = file.with_suffix(".begun")
            save_file({name: t.contiguous() for name, t in block.state_dict().items()}, begun)
            os.replace(begun, file)
        for module in block.modules():
            if isinstance(module, QuantLinear):
                module.to_rest()
        _point(block, Mapped([file]).tensors)
        if self.source is not None:
            self.source.release()


def _lock(file: Path) -> Any:
    """The file, open, and nobody else's for as long; where the system has no locks for files, just open."""
    opened = file.open("w")
    if find_spec("fcntl"):
        import fcntl

        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            opened.close()
            raise ValueError(
                f"another process is at work in {file.parent}; wait for it, or name another out="
            ) from error
    return opened


def _point(block: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Let the parameters and buffers of these names be these tensors."""
    for name, tensor in tensors.items():
        owner, _, part = name.rpartition(".")
        module = block.get_submodule(owner)
        if part in module._parameters:
            module._parameters[part] = nn.Parameter(tensor, requires_grad=False)
        elif part in module._buffers:
            module._buffers[part] = tensor


def digest(batches: Iterable[Batch]) -> str:
    """Of calibration data."""
    seen = hashlib.sha256()
    for ids, mask in batches:
        seen.update(repr(ids.shape).encode() + ids.numpy().tobytes())
        seen.update(b"" if mask is None else mask.numpy().tobytes())
    return seen.hexdigest()
