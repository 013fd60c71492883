"""The headers of safetensors files, read before anything is allocated."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from .coding import CheckpointError

INDEX = "model.safetensors.index.json"


class Header(NamedTuple):
    """What a file says of one of its tensors."""

    dtype: str  # as safetensors spells it: "BF16", "I32"
    shape: tuple[int, ...]
    file: str
    key: str


def read_headers(files: Iterable[str]) -> dict[str, Header]:
    """The header of every tensor in `files`. Raises CheckpointError for a file that is truncated or none at all."""
    headers = {}
    for file in files:
        try:
            with safe_open(file, framework="np") as opened:
                for key in opened.keys():
                    part = opened.get_slice(key)
                    headers[key] = Header(part.get_dtype(), tuple(part.get_shape()), str(file), key)
        except SafetensorError as error:
            raise CheckpointError(f"{file} is truncated or damaged ({error}); download or save it again") from error
    return headers


def find_files(folder: Path) -> list[str]:
    """The safetensors files of the checkpoint in `folder`; empty if it has none.

    Raises CheckpointError naming the files that the index lists and the folder lacks, and those outside of it.
    """
    index = folder / INDEX
    if (folder / "model.safetensors").is_file():
        return [str(folder / "model.safetensors")]
    if not index.is_file():
        return []
    try:
        names = sorted({os.fspath(name) for name in json.loads(index.read_text())["weight_map"].values()})
    except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} is damaged: {error!r}") from error
    if outside := [name for name in names if not name or Path(name).name != name or name == ".." or "\\" in name]:
        raise CheckpointError(f"{index} names {outside[0]!r}, which is no file of that folder: files lie next to it")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} of its {len(names)} files: {', '.join(missing[:4])}")
    return [str(folder / name) for name in names]
