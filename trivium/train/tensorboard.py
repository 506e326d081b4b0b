"""TensorBoard's event files, written without TensorBoard: length-framed records of hand-encoded protocol buffers.

Only what scalars need: a version record, a start record (so that steps made again after a crash replace the old ones),
and one record a step. The format is TensorFlow's TFRecord with masked CRC-32C checksums.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Mapping
from pathlib import Path

_POLYNOMIAL = 0x82F63B78
_TABLE = []
for _byte in range(256):
    _value = _byte
    for _ in range(8):
        _value = (_value >> 1) ^ (_POLYNOMIAL if _value & 1 else 0)
    _TABLE.append(_value)


def crc32c(data: bytes) -> int:
    value = 0xFFFFFFFF
    for byte in data:
        value = (value >> 8) ^ _TABLE[(value ^ byte) & 0xFF]
    return value ^ 0xFFFFFFFF


class EventFile:
    """An append-only event file in `directory`; each record is on its way to disk when the call returns."""

    def __init__(self, directory: Path, *, step: int):
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / f"events.out.tfevents.{int(time.time())}.{os.uname().nodename}.{os.getpid()}.{time.monotonic_ns()}"
        self._file = self.path.open("xb")
        self._write(_number(1, time.time()) + _bytes(3, b"brain.Event:2"))
        if step:
            self._write(_number(1, time.time()) + _varint(2, step + 1) + _bytes(7, _varint(1, 1)))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        summary = b"".join(_bytes(1, _bytes(1, name.encode()) + _field(2, 5) + struct.pack("<f", value)) for name, value in values.items())
        self._write(_number(1, time.time()) + _varint(2, step) + _bytes(5, summary))

    def close(self) -> None:
        self._file.close()

    def _write(self, record: bytes) -> None:
        length = struct.pack("<Q", len(record))
        self._file.write(length + _masked(length) + record + _masked(record))
        self._file.flush()


def _masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _field(number: int, kind: int) -> bytes:
    return bytes([number << 3 | kind])


def _number(number: int, value: float) -> bytes:
    return _field(number, 1) + struct.pack("<d", value)


def _varint(number: int, value: int) -> bytes:
    return _field(number, 0) + _size(value)


def _bytes(number: int, value: bytes) -> bytes:
    return _field(number, 2) + _size(len(value)) + value


def _size(value: int) -> bytes:
    out = bytearray()
    while True:
        out.append(value & 0x7F | (0x80 if value > 0x7F else 0))
        value >>= 7
        if not value:
            return bytes(out)
