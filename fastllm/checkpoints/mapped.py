"""Dense checkpoints whose weights stay in their files until they are used, and leave memory when told to."""

import json
import mmap
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from .coding import CheckpointError
from .headers import read_headers
from .loading import check_files, model_class, read_config, refuse_missing, take_stored, without_bars

NORESERVE = 0x4000  # of Linux, for which Python 3.11 has no name
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
}  # as safetensors spells them


class Mapped:
    """The tensors of safetensors files, read from there when they are looked at.

    What is written to them stays in memory, the files are as they were. Raises CheckpointError for damaged files.
    """

    def __init__(self, files: Iterable[str | os.PathLike[str]]):
        paths = [os.fspath(file) for file in files]
        read_headers(paths)  # complains of what is truncated or none at all
        self.tensors: dict[str, Tensor] = {}
        self._maps: list[mmap.mmap] = []
        for path in paths:
            self._open(path)

    def _open(self, path: str) -> None:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            memory = _map(file.fileno())
        self._maps.append(memory)
        header.pop("__metadata__", None)
        for name, about in header.items():
            if about["dtype"] not in DTYPES:
                raise CheckpointError(f"{path}: {name} is of type {about['dtype']}, which is not read")
            dtype, (begin, end) = DTYPES[about["dtype"]], about["data_offsets"]
            count = (end - begin) // dtype.itemsize
            flat = torch.frombuffer(memory, dtype=dtype, count=count, offset=8 + length + begin) if count else None
            self.tensors[name] = (torch.empty(0, dtype=dtype) if flat is None else flat).view(about["shape"])

    def release(self) -> None:
        """Give the memory of what was read back; it is read again when it is needed. What was written is lost."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for memory in self._maps:
                memory.madvise(mmap.MADV_DONTNEED)


def _exact(chosen: Any, config: Any) -> Any:
    """The class behind an automatic one, which would look for files."""
    return getattr(chosen, "_model_mapping", {type(config): chosen})[type(config)]


def _map(file: int) -> mmap.mmap:
    """The file, to be read, and written to in memory alone."""
    if sys.platform != "linux":
        return mmap.mmap(file, 0, access=mmap.ACCESS_COPY)
    # otherwise Linux refuses files that are larger than its memory, as if all of them might be written to
    return mmap.mmap(file, 0, flags=mmap.MAP_PRIVATE | NORESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def load_mapped(path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> tuple[Any, Mapped | None]:
    """The model of the dense checkpoint `path` in evaluation mode on the CPU, and what its weights are read from.

    None in place of the latter if the checkpoint has no safetensors files: the model is then in memory. So are
    weights that are not stored as the model has them, such as the experts of a mixture, or in another dtype.

    Raises what `load` raises, and ValueError for a quantized checkpoint.
    """
    folder = Path(path)
    config = read_config(folder)
    if (stored := take_stored(config)) is not None:
        raise ValueError(
            f"{folder} is quantized already, by {stored.get('quant_method')!r}; name the dense checkpoint"
        )
    given: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    files = check_files(folder, packed=False)
    mapped = Mapped(files) if files else None
    source, state = (folder, None) if mapped is None else (None, dict(mapped.tensors))
    with without_bars(True):
        model, info = _exact(model_class(config), config).from_pretrained(
            source, config=config, state_dict=state, output_loading_info=True, **given
        )
    refuse_missing(folder, model, info["missing_keys"])
    if mapped is not None and model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval(), mapped
