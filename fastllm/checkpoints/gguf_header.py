"""Reading the header of a GGUF file: metadata and tensor table, as hostile input, in well under a second.

Layout (little endian; https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): magic "GGUF", version u32, tensor
count u64, key count u64; per key: name, value type u32, value; per tensor: name, dimension count u32, dimensions u64
(fastest first), ggml type u32, offset u64 from the data section; padding to `general.alignment`; the data section. A
string is u64 length + UTF-8.
"""

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

VERSIONS = (2, 3)
STRING, ARRAY, UINT32 = 8, 9, 4
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
MAX_DIMS = 4
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 16


class TensorInfo(NamedTuple):
    """Where one tensor lives: `shape` in torch order, `offset` in bytes from the start of the file."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset: int


@dataclass(frozen=True)
class Header:
    """What precedes the weights. `raw` keeps each key's bytes as they stand in the file, the vocabulary's excepted."""

    path: Path
    size: int
    metadata: dict[str, Any]
    raw: dict[str, bytes]
    tensors: tuple[TensorInfo, ...]

    @property
    def architecture(self) -> str:
        return self.metadata["general.architecture"]

    @property
    def alignment(self) -> int:
        return self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)


def read_header(path: str | PathLike[str]) -> Header:
    """The header of the GGUF file `path`; no weight is read.

    Raises FileNotFoundError, and ValueError for what is not a GGUF file of version 2 or 3, is cut short, or
    contradicts itself.
    """
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        magic = file.read(4)
        if magic != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file: it starts with {magic!r} instead of b'GGUF'")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
            return _Cursor(buffer, path, size).header()


class _Cursor:
    """A position in the mapped file; every read is checked against the end of the file first."""

    def __init__(self, buffer: mmap.mmap, path: Path, size: int) -> None:
        self.buffer, self.path, self.size, self.position = buffer, path, size, 4

    def header(self) -> Header:
        (version,) = self.unpack("I", "the version")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            hint = " (big endian, unsupported)" if swapped in VERSIONS else ""
            raise ValueError(f"{self.path}: GGUF version {version}{hint}; supported versions are {VERSIONS}")
        tensor_count, key_count = self.unpack("QQ", "the counts")
        metadata: dict[str, Any] = {}
        raw: dict[str, bytes] = {}
        for index in range(key_count):
            start = self.position
            key = self.string(f"key {index} of {key_count}")
            if key in metadata:
                raise ValueError(f"{self.path}: the key {key!r} appears twice")
            (kind,) = self.unpack("I", key)
            metadata[key] = self.value(kind, key)
            if not (kind == ARRAY and key.startswith("tokenizer.")):
                raw[key] = self.buffer[start : self.position]
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            limit = f"not a power of two up to {MAX_ALIGNMENT}"
            raise ValueError(f"{self.path}: general.alignment is {alignment!r}, {limit}")
        if not isinstance(metadata.get("general.architecture"), str):
            raise ValueError(f"{self.path}: no general.architecture in the metadata")
        tensors = self.tensors(tensor_count, alignment)
        return Header(self.path, self.size, metadata, raw, tensors)

    def tensors(self, count: int, alignment: int) -> tuple[TensorInfo, ...]:
        entries: list[TensorInfo] = []
        for index in range(count):
            name = self.string(f"tensor {index} of {count}")
            (dims,) = self.unpack("I", name)
            if dims > MAX_DIMS:
                raise ValueError(f"{self.path}: tensor {name!r} has {dims} dimensions, at most {MAX_DIMS} are allowed")
            shape = self.unpack(f"{dims}Q", name)
            ggml_type, offset = self.unpack("IQ", name)
            entries.append(TensorInfo(name, tuple(reversed(shape)), ggml_type, offset))
        if len({entry.name for entry in entries}) != count:
            raise ValueError(f"{self.path}: two tensors have the same name")
        data = -(-self.position // alignment) * alignment
        return tuple(entry._replace(offset=data + entry.offset) for entry in entries)

    def claim(self, length: int, what: str) -> int:
        """Advance by `length` bytes and return where they start."""
        start = self.position
        if start + length > self.size:
            raise ValueError(
                f"{self.path} is truncated: {what!r} needs bytes up to {start + length}, the file has {self.size}"
            )
        self.position = start + length
        return start

    def unpack(self, layout: str, what: str) -> tuple[Any, ...]:
        layout = "<" + layout
        return struct.unpack_from(layout, self.buffer, self.claim(struct.calcsize(layout), what))

    def string(self, what: str) -> str:
        (length,) = self.unpack("Q", what)
        start = self.claim(length, what)
        try:
            return self.buffer[start : self.position].decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: a string of {what!r} is not UTF-8 ({error})") from error

    def value(self, kind: int, key: str) -> Any:
        if kind in SCALARS:
            return self.unpack(SCALARS[kind], key)[0]
        if kind == STRING:
            return self.string(key)
        if kind == ARRAY:
            element, count = self.unpack("IQ", key)
            if element in SCALARS:
                start = self.claim(count * struct.calcsize("<" + SCALARS[element]), key)  # before the format is built
                return list(struct.unpack_from(f"<{count}{SCALARS[element]}", self.buffer, start))
            if element == STRING:
                return self.strings(count, key)
            raise ValueError(f"{self.path}: {key!r} is an array of type {element}, which is not supported")
        raise ValueError(f"{self.path}: {key!r} has the unknown value type {kind}")

    def strings(self, count: int, key: str) -> list[str]:
        """`count` strings; the loop of `string` unrolled, since a vocabulary has hundreds of thousands of them."""
        buffer, size, position = self.buffer, self.size, self.position
        length_at: Callable[[Any, int], tuple[int]] = struct.Struct("<Q").unpack_from
        values: list[str] = []
        for _ in range(count):
            if position + 8 > size:
                self.claim(position + 8 - self.position, key)  # raises
            start = position + 8
            position = start + length_at(buffer, position)[0]
            if position > size:
                self.claim(position - self.position, key)  # raises
            try:
                values.append(buffer[start:position].decode())
            except UnicodeDecodeError as error:
                raise ValueError(f"{self.path}: string {len(values)} of {key!r} is not UTF-8 ({error})") from error
        self.position = position
        return values
