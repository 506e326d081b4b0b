"""The token bank: a prepared data set as flat arrays, with an index of its rows and the bins that they are packed in.

Its fingerprint covers everything that decides what a batch holds. On disk it is npy files and one JSON that lists their
hashes; it appears whole or not at all, is verified when loaded, and is then read through memory maps.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import FileError
from .packing import Bins

INDEX = np.dtype([("offset", "<i8"), ("length", "<i4"), ("supervised", "<i4"), ("source", "<i4"), ("line", "<i8")])
VERSION = 1
META = "prepared.json"
TALLIES = ("empty", "dropped", "truncated", "split", "same")
VALUE = "value-"  # files of what rows have beside tokens


@dataclass(frozen=True)
class Tally:
    """How often something happened to a row, and the first few places where."""

    count: int = 0
    first: tuple[str, ...] = ()


@dataclass(frozen=True)
class Facts:
    """What was read, how, and what became of it. `sources` maps each file to its number of examples."""

    format: str
    packing: str
    prompt: str  # digest of the prompt contract
    examples: int
    sources: Mapping[str, int]
    empty: Tally
    dropped: Tally
    truncated: Tally
    split: Tally
    same: Tally = Tally()  # pairs whose two sides are the same


@dataclass(frozen=True, eq=False)
class Prepared:
    """A prepared data set. Made by `prepare` or `load`; two are the same data if their fingerprints are equal."""

    tokens: np.ndarray  # [tokens] uint32, the rows end to end
    targets: np.ndarray  # [ceil(tokens / 8)] uint8, one bit a token, lowest bit first: is it predicted?
    index: np.ndarray  # [rows] of INDEX
    bins: Bins
    length: int  # tokens that a bin can hold
    facts: Facts
    fingerprint: str  # SHA-256, hex
    values: Mapping[str, np.ndarray] = field(default_factory=dict)  # each [rows] float32: a number that came with each row

    @classmethod
    def of(
        cls, tokens: np.ndarray, targets: np.ndarray, index: np.ndarray, bins: Bins, *,
        length: int, facts: Facts, values: Mapping[str, np.ndarray] | None = None,
    ) -> Prepared:  # fmt: skip
        """From its arrays, as the fields describe them."""
        digest = hashlib.sha256(json.dumps([VERSION, len(tokens), len(index), len(bins), length, facts.prompt]).encode())
        columns = (index[name] for name in ("offset", "length", "supervised"))
        for array in (tokens, targets, *columns, bins.rows, bins.starts):
            digest.update(np.ascontiguousarray(array).data)
        values = {name: np.ascontiguousarray(value, np.float32) for name, value in sorted((values or {}).items())}
        for name, value in values.items():
            digest.update(name.encode())
            digest.update(value.data)
        return cls(tokens, targets, index, bins, length, facts, digest.hexdigest(), values)

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.index)

    def row(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """A row's ids, [length] uint32, and which of them are predicted, [length] bool."""
        start, length = int(self.index["offset"][row]), int(self.index["length"][row])
        end, skipped = start + length, start % 8
        bits = np.unpackbits(self.targets[start // 8 : -(-end // 8)], bitorder="little")
        return self.tokens[start:end], bits[skipped : skipped + length].astype(bool)

    def where(self, row: int) -> str:
        """The file and line that a row came from."""
        return f"{list(self.facts.sources)[self.index['source'][row]]}:{self.index['line'][row]}"

    @property
    def supervised(self) -> int:
        """The number of tokens that are predicted."""
        return int(self.index["supervised"].sum(dtype=np.int64))

    def save(self, directory: str | Path) -> Path:
        """Write to `directory`, whole or not at all. One that holds this same data is kept; any other is a `FileError`."""
        directory = Path(directory)
        if directory.exists():
            if _meta(directory)["fingerprint"] == self.fingerprint:
                return directory
            raise FileError(f"{directory}: holds other data; choose another directory, or remove this one", value=str(directory))
        partial = directory.with_name(f".{directory.name}.partial-{os.getpid()}")
        try:
            directory.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            self._write(partial)
            partial.rename(directory)
            _sync(directory.parent)
        except OSError as error:
            raise FileError(f"{directory}: cannot be written, nothing was left there ({error})", value=str(directory)) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return directory

    def _write(self, directory: Path) -> None:
        arrays = {"tokens": self.tokens, "targets": self.targets, "index": self.index, "rows": self.bins.rows, "starts": self.bins.starts}
        arrays |= {f"{VALUE}{name}": value for name, value in self.values.items()}
        files = {}
        for name, array in arrays.items():
            path = directory / f"{name}.npy"
            with path.open("wb") as file:
                np.save(file, array, allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
            files[path.name] = {"bytes": path.stat().st_size, "sha256": _hash(path)}
        facts = dataclasses.asdict(self.facts)
        meta = {"version": VERSION, "fingerprint": self.fingerprint, "length": self.length, "facts": facts, "files": files}
        with (directory / META).open("w", encoding="utf-8") as file:
            json.dump({**meta, "sha256": _digest(meta)}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        _sync(directory)

    @classmethod
    def load(cls, directory: str | Path) -> Prepared:
        """Read what `save` wrote, as memory maps, after checking every hash. Anything missing or changed is a `FileError`."""
        directory = Path(directory)
        meta = _meta(directory)
        for name, told in meta["files"].items():
            path = directory / name
            if not path.is_file() or path.stat().st_size != told["bytes"] or _hash(path) != told["sha256"]:
                raise FileError(f"{path}: missing or damaged; prepare the data again", value=str(path))
        try:
            tokens, targets, index = (np.load(directory / f"{name}.npy", mmap_mode="r") for name in ("tokens", "targets", "index"))
            bins = Bins(*(np.load(directory / f"{name}.npy") for name in ("rows", "starts")))
            kept = [name.removesuffix(".npy") for name in meta["files"] if name.startswith(VALUE)]
            values = {name.removeprefix(VALUE): np.load(directory / f"{name}.npy") for name in kept}
        except (ValueError, OSError, EOFError) as error:
            raise FileError(f"{directory}: holds an array that cannot be read ({error}); prepare the data again") from error
        return cls(tokens, targets, index, bins, meta["length"], _facts(meta["facts"]), meta["fingerprint"], values)


def _facts(told: Mapping[str, Any]) -> Facts:
    """`Facts` from its `dataclasses.asdict`."""
    fields: dict[str, Any] = {**told, **{name: Tally(told[name]["count"], tuple(told[name]["first"])) for name in TALLIES if name in told}}
    return Facts(**fields)


def _meta(directory: Path) -> dict[str, Any]:
    """The JSON beside the arrays, after checking that it is whole."""
    path = directory / META
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"{directory}: no prepared data here ({error.strerror}: {META})", value=str(directory)) from error
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: damaged ({error}); prepare the data again", value=str(path)) from error
    told = meta.pop("sha256", None) if isinstance(meta, dict) else None
    if told is None or told != _digest(meta):
        raise FileError(f"{path}: damaged or edited; prepare the data again", value=str(path))
    if meta["version"] != VERSION:
        raise FileError(f"{path}: format version {meta['version']}, this release reads {VERSION}; prepare the data again", value=str(path))
    return meta


def _digest(meta: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
