"""Files that are either there whole or not there: atomic writing, hashing while writing, bounded JSON.

A file or directory is written beside its place under a temporary name, flushed to the disk, and renamed into place;
whatever goes wrong before the rename (no space left, Ctrl-C, a crash) leaves what was there.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ..core.errors import FileError

MAX_JSON = 64_000_000  # bytes; the largest index of a public model is a few megabytes


class HashingWriter:
    """A binary file that hashes what goes through it."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes | memoryview) -> None:
        self._hash.update(data)
        self._file.write(data)
        self.size += len(data)

    def sha256(self) -> str:
        """SHA-256, in hex, of everything written so far."""
        return self._hash.hexdigest()


@contextmanager
def atomic_file(path: Path) -> Iterator[HashingWriter]:
    """Write `path` whole or not at all: a temporary sibling, fsync, rename, fsync of the directory."""
    partial = path.with_name(f"{path.name}.partial-{secrets.token_hex(4)}")
    try:
        with partial.open("xb") as file:
            yield HashingWriter(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        fsync_directory(path.parent)
    except OSError as error:
        raise FileError(f"{path}: cannot be written: {error.strerror or error}; what was there is untouched") from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary sibling to fill, which becomes `path` when the block ends well and vanishes when it does not.

    A directory that holds something is refused unless `overwrite`; then it stays until the new one is complete on the
    disk. (A machine that dies between the two renames leaves both, complete, as `path.partial-*` and `path.old-*`.)
    """
    path = path.absolute()
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise FileError(f"{path}: already holds files; choose another place, or allow overwriting")
    if path.exists() and not path.is_dir():
        raise FileError(f"{path}: is a file, not a directory")
    tag = secrets.token_hex(4)
    partial, old = path.with_name(f"{path.name}.partial-{tag}"), path.with_name(f"{path.name}.old-{tag}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        _fsync_tree(partial)
        if path.exists():
            path.rename(old)
        partial.rename(path)
        fsync_directory(path.parent)
    except OSError as error:
        raise FileError(f"{path}: cannot be written: {error.strerror or error}; what was there is untouched") from error
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def fsync_directory(path: Path) -> None:
    """Make renames and new names inside `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync_tree(root: Path) -> None:
    for folder, _, names in os.walk(root):
        for name in names:
            with (Path(folder) / name).open("rb") as file:
                os.fsync(file.fileno())
        fsync_directory(Path(folder))


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; anything else, a key given twice included, is a `FileError`."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise FileError(f"{path}: {path.stat().st_size} bytes of JSON; more than {MAX_JSON} are not read")
        return parse_json(path.read_bytes(), where=str(path))
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror or error}") from error


def parse_json(data: bytes, *, where: str) -> dict[str, Any]:
    """The JSON object in `data`; `where` names it in errors."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise FileError(f"{where}: the key {twice!r} stands there twice")
        return found

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=once)
    except FileError:
        raise
    except (ValueError, RecursionError) as error:
        raise FileError(f"{where}: is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise FileError(f"{where}: holds a JSON {type(value).__name__}, expected an object")
    return value


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write rows atomically, one JSON object a line, into a folder that is made where it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        for row in rows:
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
    return path


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` atomically, as Hugging Face's files look: two spaces, sorted keys, a final newline."""
    with atomic_file(path) as file:
        file.write((json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode())
