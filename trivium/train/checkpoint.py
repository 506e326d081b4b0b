"""Checkpoints that are whole or not there: `checkpoint-<step>/` of safetensors and JSON, written so that a crash at any instant loses nothing.

Files are written beside the final name and fsynced; a marker with every file's size and SHA-256 is written and fsynced; the
directory is fsynced, renamed, and its parent fsynced. Deleting takes the marker away first. What has no marker, or does not
agree with it, is no checkpoint.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from ..core.errors import FileError
from ..core.log import log

FORMAT = 1
MARKER = "complete.json"
STATE = "state.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8",
}  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A complete, verified checkpoint: `step` updates were made; `state` is what the run said about itself."""

    path: Path
    step: int
    state: dict[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The set of tensors saved as `name`, on the CPU."""
        try:
            return load_file(self.path / f"{name}.safetensors")
        except (OSError, safetensors.SafetensorError) as error:
            raise FileError(f"{self.path / name}.safetensors cannot be read: {error}") from error


def save(directory: Path, step: int, *, state: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """Writes `checkpoint-<step>` into `directory` and returns its path; a complete one of that step is left as it is.

    `state` is JSON, `tensors` holds sets of tensors by file name.
    Raises `FileError` if it cannot be written; what was there before is then still there.
    """
    final = directory / f"checkpoint-{step}"
    if _damage(final) is not None:
        with writing(final):
            _write(directory, final, state, tensors)
    return final


def prune(directory: Path, step: int, *, keep: int | None) -> None:
    """Of the checkpoints up to the whole one of `step`, leaves the last `keep`; None: all. Later ones are damaged, and left as they are."""
    upto = [path for number, path in _found(directory) if number <= step]
    for older in upto[len(upto) if keep is None else keep :]:
        delete(older)


def latest(directory: Path) -> Checkpoint | None:
    """The newest checkpoint in `directory` that is complete and whole; damaged ones are passed over with a warning."""
    for step, path in _found(directory):
        damage = _damage(path)
        if damage is None:
            return Checkpoint(path, step, json.loads((path / STATE).read_text()))
        log.warn(f"{path} is damaged ({damage}); trying the one before")
    return None


def delete(path: Path) -> None:
    """Removes a checkpoint, its marker first, so that half a deletion never looks like a checkpoint."""
    with writing(path):
        (path / MARKER).unlink(missing_ok=True)
        _sync(path)
        shutil.rmtree(path)


def clean(directory: Path) -> None:
    """Removes what interrupted saves and deletions left behind. Only for the holder of the lock."""
    for path in directory.iterdir():
        if path.is_dir() and (path.name.startswith(".checkpoint-") or (_NAME.fullmatch(path.name) and not (path / MARKER).exists())):
            shutil.rmtree(path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Says what could not be written, and that nothing is lost, in place of an `OSError`."""
    try:
        yield
    except OSError as error:
        raise FileError(f"{path} cannot be written: {error}; what was saved before is whole, and the same run goes on from it") from error


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Holds `directory` for this process; raises `FileError` where another run holds it. The lock ends with the process."""
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / ".lock").open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise FileError(f"another run is writing to {directory}; wait for it, or choose another directory") from None
        yield


def _found(directory: Path) -> list[tuple[int, Path]]:
    """Checkpoints that have a marker, newest first."""
    names = [(match, path) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))] if directory.is_dir() else []
    return sorted(((int(match[1]), path) for match, path in names if (path / MARKER).exists()), reverse=True)


def _damage(path: Path) -> str | None:
    """What is wrong with the checkpoint, None if nothing is. A format that this version cannot read is an error."""
    try:
        marker = json.loads((path / MARKER).read_text())
        version = int(marker["format"])
        files = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in marker["files"].items()}
    except FileNotFoundError:
        return "it has no marker"
    except (ValueError, KeyError, AttributeError, TypeError):
        return f"{MARKER} cannot be read"
    if version > FORMAT:
        raise FileError(f"{path} has format {version}, and this version of trivium reads up to {FORMAT}: upgrade trivium")
    for name, (size, digest) in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, not {size}"
        with file.open("rb") as content:
            if hashlib.file_digest(content, "sha256").hexdigest() != digest:
                return f"{name} does not have the hash that was written"
    return None


def _write(directory: Path, final: Path, state: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    partial = directory / f".{final.name}"
    for old in (partial, final):
        if old.exists():
            delete(old)
    partial.mkdir()
    try:
        files = {f"{name}.safetensors": _file(partial / f"{name}.safetensors", _safetensors(group)) for name, group in tensors.items()}
        files[STATE] = _file(partial / STATE, [_json(state)])
        _file(partial / MARKER, [_json({"format": FORMAT, "files": files})])
        _sync(partial)
        os.rename(partial, final)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)  # gives the space back
        raise
    _sync(directory)


def _file(path: Path, chunks: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Writes and fsyncs a new file; returns its size and hash for the marker."""
    digest, size = hashlib.sha256(), 0
    with path.open("xb", buffering=0) as file:
        for chunk in chunks:
            write_all(file.fileno(), chunk)
            digest.update(chunk)
            size += len(chunk)
        os.fsync(file.fileno())
    return {"size": size, "sha256": digest.hexdigest()}


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """All of `data`; `os.write` alone may stop halfway."""
    rest = memoryview(data)
    while len(rest):
        rest = rest[os.write(descriptor, rest) :]


def _safetensors(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, one tensor at a time, so that nothing is held twice."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())  # stable; keeps every tensor aligned
    for name, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in ordered:
        yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _sync(directory: Path) -> None:
    """Makes the directory's entries durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
