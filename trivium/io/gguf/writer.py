"""Writing a GGUF file (version 3, little-endian): metadata, tensor table, data; byte for byte as the gguf package would.

The table is known before any tensor is: sizes follow from shapes and types. So tensors stream, one piece at a time, and
the file appears whole or not at all.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...core.errors import FileError
from ..files import HashingWriter, atomic_file
from .dequantize import TYPES
from .reader import ARRAY, BOOL, STRING

VERSION, ALIGNMENT = 3, 32
UINT32, INT32, FLOAT32 = 4, 5, 6
_LAYOUTS = {BOOL: "<?", UINT32: "<I", INT32: "<i", FLOAT32: "<f"}


@dataclass(frozen=True)
class Stored:
    """A tensor to write: `shape` rows first, `type` as ggml names it; `pieces` yields its bytes in order when called."""

    shape: tuple[int, ...]
    type: str
    pieces: Callable[[], Iterator[np.ndarray]]

    @property
    def nbytes(self) -> int:
        traits = TYPES[self.type]
        return math.prod(self.shape) // traits.block * traits.size


def write_gguf(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Stored], *, overwrite: bool = False) -> str:
    """Write the file at `path` and return its SHA-256. Raises `FileError`.

    Metadata values: bool, int (as uint32), float (as float32), str, and lists of one of them (of int as int32).
    """
    if path.exists() and not overwrite:
        raise FileError(f"{path}: is there already; choose another place, or allow overwriting")
    header = [b"GGUF", struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    header += [_text(key) + _value(value, key) for key, value in metadata.items()]
    offset = 0
    for name, tensor in tensors.items():
        dims = tensor.shape[::-1]
        header.append(_text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, TYPES[tensor.type].id, offset))
        offset += _aligned(tensor.nbytes)
    with atomic_file(path) as file:
        file.write(b"".join(header))
        _pad(file)
        for name, tensor in tensors.items():
            _stream(file, name, tensor)
        return file.sha256()


def _stream(file: HashingWriter, name: str, tensor: Stored) -> None:
    """One tensor's bytes; a function of its own, so that nothing of a tensor is held while the next one loads."""
    start = file.size
    for piece in tensor.pieces():
        file.write(piece.data)
    assert file.size - start == tensor.nbytes, f"{name}: not what was announced"
    _pad(file)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _pad(file: HashingWriter) -> None:
    file.write(bytes(_aligned(file.size) - file.size))


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any, key: str) -> bytes:
    """A value with its type before it."""
    if not isinstance(value, list):
        kind = UINT32 if type(value) is int else _kind(value)
        return struct.pack("<I", kind) + _packed(value, kind, key)
    kind = _kind(value[0]) if value else STRING
    assert all(_kind(item) == kind for item in value), f"{key}: a list of several types"
    return struct.pack("<IIQ", ARRAY, kind, len(value)) + b"".join(_packed(item, kind, key) for item in value)


def _kind(value: object) -> int:
    kinds: dict[type, int] = {bool: BOOL, int: INT32, float: FLOAT32, str: STRING}
    return kinds[type(value)]


def _packed(value: Any, kind: int, key: str) -> bytes:
    try:
        return _text(value) if kind == STRING else struct.pack(_LAYOUTS[kind], value)
    except (struct.error, OverflowError):
        raise FileError(f"{key}: {value!r:.60} does not fit into its 32 bits") from None
    except UnicodeEncodeError:
        raise FileError(f"{key}: {value!r:.60} is not a text that UTF-8 can hold") from None
