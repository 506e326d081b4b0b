"""Reading a GGUF file (versions 2 and 3): metadata, tensor table, and the data as views of a memory map.

One cursor checks every length against what the file holds before anything is allocated, so that a damaged or hostile
file ends in one `FileError`, in bounded time and memory. Lists of strings (vocabularies) are skipped over when the file
is opened and decoded when first asked for. Big-endian files, version 1 and split files are refused.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from ...core.errors import FileError, unknown
from .dequantize import STORED, TYPES, TensorType, dequantize

# Far above what real files hold; they bound the time that a small hostile file can cost.
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 18
MAX_ITEMS = 1 << 24  # strings and nested lists in all metadata together
MAX_NAME = 1 << 16  # bytes of a key or a tensor's name
MAX_DIMS = 4
MAX_DEPTH = 4  # lists within lists
MAX_ALIGNMENT = 1 << 20

# Metadata types, as the file numbers them.
SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "<u1", 10: "<u8", 11: "<i8", 12: "<f8"}
BOOL, STRING, ARRAY = 7, 8, 9

_TYPES = {traits.id: traits for traits in TYPES.values()}
_LENGTH = struct.Struct("<Q")


class Metadata(Mapping[str, Any]):
    """The file's metadata: int, float, bool, str, numpy arrays of numbers, lists of str. Lists are decoded on first use."""

    def __init__(self, values: dict[str, Callable[[], Any]]):
        self._values = values
        self._decoded: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        if key not in self._decoded:
            self._decoded[key] = self._values[key]()
        return self._decoded[key]

    def __contains__(self, key: object) -> bool:
        return key in self._values  # Mapping's own would decode

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def under(self, prefix: str) -> Metadata:
        """The part whose keys start with `prefix`, still not decoded."""
        return Metadata({key: partial(self.__getitem__, key) for key in self._values if key.startswith(prefix)})


@dataclass(frozen=True)
class TensorInfo:
    """One row of the tensor table. `shape` counts rows first, as numpy does; `offset` is from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GGUFFile:
    """An open file. Tensors stay on disk until they are asked for; the map is closed with the last view of it."""

    path: Path
    version: int
    metadata: Metadata
    tensors: dict[str, TensorInfo]
    _buffer: mmap.mmap = field(repr=False)

    def info(self, name: str) -> TensorInfo:
        """The table's row for `name`; a `FileError` that names the nearest tensor if there is none."""
        if name not in self.tensors:
            raise FileError(f"{self.path}: {unknown('tensor', name, self.tensors)}", value=name)
        return self.tensors[name]

    def raw(self, name: str) -> np.ndarray:
        """The stored bytes, uint8 [nbytes]: a read-only view of the file."""
        info = self.info(name)
        return np.frombuffer(self._buffer, np.uint8, info.nbytes, info.offset)

    def array(self, name: str) -> np.ndarray:
        """The tensor as numbers: a read-only view where they are stored as such (BF16 is not), else decoded to float32."""
        info = self.info(name)
        if info.type in STORED:
            return self.raw(name).view(STORED[info.type]).reshape(info.shape)
        return dequantize(info.type, self.raw(name)).reshape(info.shape)


def open_gguf(path: str | Path) -> GGUFFile:
    """Read the header of the GGUF file at `path` and check that every tensor lies inside the file, apart from all others."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:
        raise FileError(f"{path}: the file is empty") from None
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror}") from None
    cursor = _Cursor(buffer, path)
    version = _version(cursor)
    tensor_count, key_count = cursor.length("count of tensors"), cursor.length("count of metadata keys")
    if tensor_count > MAX_TENSORS or key_count > MAX_KEYS:
        cursor.fail(f"claims {tensor_count} tensors and {key_count} metadata keys, more than any real file holds")
    metadata = _metadata(cursor, key_count)
    if (parts := metadata.get("split.count", 1)) not in (0, 1):
        raise FileError(f"{path}: one of {parts} parts of a split GGUF; join them with llama.cpp's `llama-gguf-split --merge` first")
    tensors = _tensors(cursor, tensor_count, _alignment(cursor, metadata))
    return GGUFFile(path, version, metadata, tensors, buffer)


class _Cursor:
    """A position in the file that never passes its end."""

    def __init__(self, buffer: mmap.mmap, path: Path):
        self.buffer = buffer
        self.path = path
        self.at = 0
        self.size = len(buffer)
        self.items = 0

    def fail(self, problem: str) -> NoReturn:
        raise FileError(f"{self.path}: at byte {self.at}: {problem}; the file is damaged, or not a GGUF file: fetch it again")

    def take(self, count: int, what: str) -> int:
        """Step over `count` bytes and return where they start."""
        if count > self.size - self.at:
            self.fail(f"{what} needs {count} bytes, but the file ends after {self.size - self.at}")
        self.at += count
        return self.at - count

    def number(self, layout: str, what: str) -> Any:
        (value,) = struct.unpack_from(layout, self.buffer, self.take(struct.calcsize(layout), what))
        return value

    def length(self, what: str) -> int:
        return self.number("<Q", what)

    def text(self, what: str, limit: int | None = None) -> str:
        count = self.length(what)
        if limit is not None and count > limit:
            self.fail(f"{what} claims {count} bytes, more than the {limit} allowed")
        start = self.take(count, what)
        return self.decode(self.buffer[start : start + count], what)

    def decode(self, data: bytes, what: str) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError:
            self.fail(f"{what} is not UTF-8: {data[:40]!r}")

    def spend(self, count: int, what: str) -> None:
        """Count items that cost time each, whatever their size."""
        self.items += count
        if self.items > MAX_ITEMS:
            self.fail(f"{what} brings the items of the metadata to {self.items}, more than the {MAX_ITEMS} allowed")


def _version(cursor: _Cursor) -> int:
    magic = cursor.buffer[: min(4, cursor.size)]
    if magic != b"GGUF":
        raise FileError(f"{cursor.path}: not a GGUF file: it starts with {magic!r}, not b'GGUF'")
    cursor.take(4, "magic")
    version = cursor.number("<I", "version")
    if version in (2, 3):
        return version
    if version & 0xFFFF == 0 and version:
        raise FileError(f"{cursor.path}: a big-endian GGUF file; only little-endian ones are read")
    raise FileError(f"{cursor.path}: GGUF version {version}; versions 2 and 3 are read")


def _metadata(cursor: _Cursor, count: int) -> Metadata:
    values: dict[str, Callable[[], Any]] = {}
    for index in range(count):
        key = cursor.text(f"metadata key {index}", MAX_NAME)
        if key in values:
            cursor.fail(f"metadata key {key!r} stands twice")
        values[key] = _value(cursor, cursor.number("<I", f"type of {key!r}"), repr(key), depth=0)
    return Metadata(values)


def _value(cursor: _Cursor, kind: int, what: str, *, depth: int) -> Callable[[], Any]:
    """Step over one value and return what decodes it. All but lists are decoded, and so checked, at once."""
    if kind == STRING:
        text = cursor.text(what)
        return lambda: text
    if kind == ARRAY:
        return _list(cursor, what, depth=depth + 1)
    if kind not in SCALARS:
        cursor.fail(f"{what} has the unknown type {kind}")
    layout = np.dtype(SCALARS[kind])
    start = cursor.take(layout.itemsize, what)
    scalar = np.frombuffer(cursor.buffer, layout, 1, start)[0].item()
    return lambda: bool(scalar) if kind == BOOL else scalar


def _list(cursor: _Cursor, what: str, *, depth: int) -> Callable[[], Any]:
    if depth > MAX_DEPTH:
        cursor.fail(f"{what} holds lists nested deeper than {MAX_DEPTH}")
    kind, count = cursor.number("<I", what), cursor.length(what)
    if kind in SCALARS:
        layout = np.dtype(SCALARS[kind])
        start = cursor.take(count * layout.itemsize, what)
        return lambda: np.frombuffer(cursor.buffer, layout, count, start).astype(bool if kind == BOOL else layout)
    if kind == STRING:
        start = cursor.at
        _skip_strings(cursor, count, what)
        return lambda: _strings(cursor, start, count, what)
    if kind != ARRAY:
        cursor.fail(f"{what} is a list of the unknown type {kind}")
    cursor.spend(count, what)
    inner = [_list(cursor, what, depth=depth + 1) for _ in range(count)]
    return lambda: [decode() for decode in inner]


def _skip_strings(cursor: _Cursor, count: int, what: str) -> None:
    """Find the end of `count` strings. The loop runs once for each word of a vocabulary, so it does nothing else."""
    if count > (cursor.size - cursor.at) // _LENGTH.size:
        cursor.fail(f"{what} claims {count} strings, more than the file can hold")
    cursor.spend(count, what)
    at, size, buffer, unpack = cursor.at, cursor.size, cursor.buffer, _LENGTH.unpack_from
    for _ in range(count):
        if at + 8 > size:
            break
        at += 8 + unpack(buffer, at)[0]
    if at > size or (at + 8 > size and at != size):
        cursor.fail(f"a string of {what} reaches past the end of the file")
    cursor.at = at


def _strings(cursor: _Cursor, start: int, count: int, what: str) -> list[str]:
    texts, at = [], start
    for _ in range(count):
        (length,) = _LENGTH.unpack_from(cursor.buffer, at)
        texts.append(cursor.decode(cursor.buffer[at + 8 : at + 8 + length], what))
        at += 8 + length
    return texts


def _alignment(cursor: _Cursor, metadata: Metadata) -> int:
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        cursor.fail(f"'general.alignment' must be a power of two up to {MAX_ALIGNMENT}, not {alignment!r:.40}")
    return alignment


def _tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, TensorInfo]:
    rows: dict[str, tuple[tuple[int, ...], TensorType, int]] = {}
    for index in range(count):
        name = cursor.text(f"name of tensor {index}", MAX_NAME)
        if name in rows:
            cursor.fail(f"tensor {name!r} stands twice")
        rows[name] = _tensor(cursor, repr(name), alignment)
    data = -(-cursor.at // alignment) * alignment
    tensors = {
        name: TensorInfo(name, shape, traits.name, data + offset, math.prod(shape) // traits.block * traits.size)
        for name, (shape, traits, offset) in rows.items()
    }
    _check_places(cursor, tensors)
    return tensors


def _tensor(cursor: _Cursor, what: str, alignment: int) -> tuple[tuple[int, ...], TensorType, int]:
    dims = cursor.number("<I", f"rank of {what}")
    if dims > MAX_DIMS:
        cursor.fail(f"tensor {what} claims {dims} dimensions, more than the {MAX_DIMS} allowed")
    shape = tuple(cursor.length(f"shape of {what}") for _ in range(dims))[::-1]
    kind, offset = cursor.number("<I", f"type of {what}"), cursor.length(f"offset of {what}")
    if kind not in _TYPES:
        cursor.fail(f"tensor {what} has type {kind}, which is unknown (known: {', '.join(TYPES)})")
    traits = _TYPES[kind]
    if 0 in shape:
        cursor.fail(f"tensor {what} has the empty shape {shape}")
    if (shape[-1] if shape else 1) % traits.block:
        cursor.fail(f"tensor {what} of shape {shape} cannot be {traits.name}: its rows are not whole blocks of {traits.block}")
    if offset % alignment:
        cursor.fail(f"tensor {what} starts at {offset}, which is no multiple of the alignment {alignment}")
    return shape, traits, offset


def _check_places(cursor: _Cursor, tensors: dict[str, TensorInfo]) -> None:
    end, before = 0, ""
    for info in sorted(tensors.values(), key=lambda info: info.offset):
        if info.offset < end:
            cursor.fail(f"tensors {before!r} and {info.name!r} overlap")
        end, before = info.offset + info.nbytes, info.name
        if end > cursor.size:
            cursor.fail(f"tensor {info.name!r} ends at byte {end}, but the file has {cursor.size}")
