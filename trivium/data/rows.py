"""Rows from files, one at a time: JSONL, CSV, Parquet and plain text, compressed or not.

Every row knows the file and line that it came from, and every error says so. Reading is streamed: what is held is one line
of JSONL, one slice of a Parquet row group, or one text document. Hub data sets are left out.
"""

from __future__ import annotations

import glob
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import DataError

JSON_LINES = (".jsonl", ".ndjson", ".json")
PARQUET = (".parquet",)
TABLES = {".csv": ",", ".tsv": "\t"}  # by what separates their cells
TEXT = (".txt", ".md", ".py")
COMPRESSED = (".gz", ".xz", ".bz2", ".zst")
MAX_BYTES = 256 << 20  # of one line or one text document, after decompression: a bound on memory, far above any real row
PARQUET_SLICE = 256  # rows that are turned into Python objects at a time
UTF8_BOM = b"\xef\xbb\xbf"
UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")

Paths = str | Path | Sequence[str | Path]


@dataclass(frozen=True, slots=True)
class Record:
    """One row and where it stood. `line` counts from 1: lines of JSONL, rows of Parquet; a text document is line 1."""

    value: dict[str, Any]
    path: str
    line: int

    @property
    def where(self) -> str:
        return f"{self.path}:{self.line}"


def read(paths: Paths) -> Iterator[Record]:
    """The rows of files, folders and globs, in the order given; what a folder or glob matches comes sorted.

    JSONL (`.jsonl`, `.ndjson`, `.json`) gives one row a line, skipping blank lines; a table (`.csv`, `.tsv`) one a record, named
    by its first line, all cells strings, an empty one absent; Parquet one a row, where a null column or struct field means
    "absent"; text (`.txt`, `.md`, `.py`) one `{"text": ...}` a file. All but Parquet may be compressed
    (`.gz`, `.xz`, `.bz2`, `.zst`). The paths are checked at once, contents as they are read. Raises `DataError`.
    """
    return _records(files(paths))


def files(paths: Paths) -> list[Path]:
    """The files that `paths` stand for, each once. An unknown suffix, no match, or a file named twice is a `DataError`."""
    found: list[Path] = []
    for path in [paths] if isinstance(paths, str | Path) else paths:
        found += _expand(Path(path))
    seen: set[Path] = set()
    for path in found:
        if path.resolve() in seen:
            raise DataError(f"{path}: named twice; name each data file once (mixture weights repeat a set)", value=str(path))
        seen.add(path.resolve())
    if not found:
        raise DataError("no data file was named")
    return found


def _expand(path: Path) -> list[Path]:
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        _kind(path)
        return [path]
    if not glob.has_magic(str(path)):
        raise DataError(f"{path}: no such file or folder", value=str(path))
    matched = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
    matched = [match for match in matched if match.is_file()]
    if not matched:
        raise DataError(f"{path}: no file matches", value=str(path))
    for match in matched:
        _kind(match)
    return matched


def _folder(folder: Path) -> list[Path]:
    """The data files below a folder: rows, or text documents. A folder that mixes both has no one meaning."""
    entries = sorted(path for path in folder.rglob("*") if path.is_file())
    visible = [path for path in entries if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    known = [path for path in visible if _suffix(path) in (*JSON_LINES, *PARQUET, *TABLES, *TEXT)]
    if not known:
        raise DataError(f"{folder}: no data file in this folder (known: {_known()})", value=str(folder))
    text = [path for path in known if _suffix(path) in TEXT]
    if text and len(text) < len(known):
        rows = next(path for path in known if path not in text)
        raise DataError(
            f"{folder}: holds both rows ({rows.relative_to(folder)}) and text documents ({text[0].relative_to(folder)}); "
            f"say which with a glob such as '{folder}/**/*{_suffix(rows)}'",
            value=str(folder),
        )
    for path in known:
        _kind(path)
    return known


def _suffix(path: Path) -> str:
    """What the file holds, by its name, with the suffix of a compression taken off."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _known() -> str:
    return f"{', '.join((*JSON_LINES, *PARQUET, *TABLES, *TEXT))}; with {', '.join(COMPRESSED)} where compressed"


def _kind(path: Path) -> Callable[[Path], Iterator[Record]]:
    """The reader of a file, by its suffix."""
    suffix = _suffix(path)
    if suffix in JSON_LINES:
        return _json_lines
    if suffix in TEXT:
        return _document
    if suffix in TABLES:
        return _table
    if suffix in PARQUET:
        if path.suffix.lower() in COMPRESSED:
            raise DataError(f"{path}: Parquet is compressed inside; decompress the file first", value=str(path))
        return _parquet
    raise DataError(f"{path}: unknown kind of data file (known: {_known()})", value=str(path))


def _records(paths: list[Path]) -> Iterator[Record]:
    for path in paths:
        yield from _kind(path)(path)


def _open(path: Path) -> io.BufferedIOBase:
    match path.suffix.lower():
        case ".gz":
            import gzip

            return gzip.open(path, "rb")
        case ".xz":
            import lzma

            return lzma.open(path, "rb")
        case ".bz2":
            import bz2

            return bz2.open(path, "rb")
        case ".zst":
            import pyarrow

            return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _lines(path: Path, size: int) -> Iterator[tuple[int, bytes]]:
    """Lines of at most `size` bytes with their numbers, from 1; `DataError` where a line is longer or reading breaks off."""
    import lzma

    number = 1
    try:
        with _open(path) as file:
            while line := file.readline(size + 1):
                if len(line) > size:
                    raise DataError(f"{path}:{number}: longer than {size >> 20} MiB")
                yield number, line
                number += 1
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path}:{number}: cannot be read on from here, the file is truncated or damaged ({error})") from error


def _decode(raw: bytes, where: str, *, first: bool) -> str:
    """UTF-8 without a byte-order mark and without NUL bytes, or a `DataError`."""
    if first and raw.startswith(UTF8_BOM):
        raise DataError(f"{where}: begins with a byte-order mark; save the file as UTF-8 without BOM")
    if first and raw.startswith(UTF16_BOMS):
        raise DataError(f"{where}: is UTF-16; save the file as UTF-8")
    if (at := raw.find(b"\0")) >= 0:
        raise DataError(f"{where}: NUL byte at byte {at + 1}; the file is binary, or was never fully written")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not valid UTF-8 at byte {error.start + 1} ({error.reason})") from error


def _json_lines(path: Path) -> Iterator[Record]:
    for number, raw in _lines(path, MAX_BYTES):
        where = f"{path}:{number}"
        line = _decode(raw, where, first=number == 1)
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            if "\\u" in line:  # an escape can spell half a surrogate pair, which no tokenizer can take
                json.dumps(value, ensure_ascii=False).encode()
        except json.JSONDecodeError as error:
            hint = "; each line holds one whole JSON object, none is spread over lines" if line.strip() in ("[", "{") else ""
            raise DataError(f"{where}: not valid JSON: {error.msg} at column {error.colno}: {_short(line)}{hint}") from error
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: holds half of a surrogate pair, which is no character: {_short(line)}") from error
        except RecursionError as error:
            raise DataError(f"{where}: nested too deeply: {_short(line)}") from error
        except ValueError as error:
            raise DataError(f"{where}: not valid JSON: {error}: {_short(line)}") from error
        if not isinstance(value, dict):
            raise DataError(f"{where}: a row is a JSON object, this is a {type(value).__name__}: {_short(line)}")
        yield Record(value, str(path), number)


def _table(path: Path) -> Iterator[Record]:
    import csv

    lines = (_decode(raw, f"{path}:{number}", first=number == 1) for number, raw in _lines(path, MAX_BYTES))
    csv.field_size_limit(MAX_BYTES)
    reader = csv.reader(lines, delimiter=TABLES[_suffix(path)], strict=True)
    names: list[str] = []
    try:
        for cells in reader:
            if not cells:  # a blank line
                continue
            where = f"{path}:{reader.line_num}"
            if not names:
                names = cells
                if len(set(names)) < len(names) or not all(names):
                    raise DataError(f"{where}: the first line names the columns, each once, and this one does not: {_short(str(cells))}")
            elif len(cells) != len(names):
                raise DataError(f"{where}: has {len(cells)} cells, and the first line names {len(names)} columns: {_short(str(cells))}")
            else:
                yield Record({name: cell for name, cell in zip(names, cells, strict=True) if cell}, str(path), reader.line_num)
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not a table that can be read: {error}") from None


def _document(path: Path) -> Iterator[Record]:
    parts, size = [], 0
    for number, raw in _lines(path, MAX_BYTES):
        parts.append(_decode(raw, f"{path}:{number}", first=number == 1))
        size += len(raw)
        if size > MAX_BYTES:
            raise DataError(f"{path}:{number}: one document of more than {MAX_BYTES >> 20} MiB; split it")
    yield Record({"text": "".join(parts)}, str(path), 1)


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for slice_ in file.iter_batches(batch_size=PARQUET_SLICE):
                for value in slice_.to_pylist():
                    number += 1
                    yield Record(_without_nulls(value), str(path), number)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}:{number + 1}: cannot be read on from here, not Parquet or damaged ({error})") from error


def _without_nulls(value: Any) -> Any:
    """Parquet gives every struct the union of all fields; a null there stands for a key that the row did not have."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _short(line: str) -> str:
    line = line.strip()
    return line if len(line) <= 120 else f"{line[:117]}..."
