"""Reading: every kind of file and compression, streaming, and one clear error with file and line for every kind of damage."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from trivium.core.errors import DataError
from trivium.data import rows
from trivium.data.rows import files, read

ROWS = [{"text": "one"}, {"text": "zwei ü"}, {"n": 3, "nested": {"a": [1, None]}}]


def jsonl(values=ROWS) -> bytes:
    return b"".join(json.dumps(value, ensure_ascii=False).encode() + b"\n" for value in values)


def zst(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


PACK = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": zst}


def values(paths) -> list[dict]:
    return [record.value for record in read(paths)]


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("suffix", PACK)
def test_jsonl_in_every_compression(tmp_path: Path, suffix: str):
    path = write(tmp_path / f"a.jsonl{suffix}", PACK[suffix](jsonl()))
    assert values(path) == ROWS
    assert [record.where for record in read(path)] == [f"{path}:{n}" for n in (1, 2, 3)]


def test_blank_lines_are_skipped_and_counted(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", b'{"text": "a"}\r\n\n  \n{"text": "b"}')
    assert [(record.value["text"], record.line) for record in read(str(path))] == [("a", 1), ("b", 4)]


@pytest.mark.parametrize("suffix", PACK)
def test_text_is_one_document_a_file_byte_for_byte(tmp_path: Path, suffix: str):
    text = "# Title\r\n\n  ünï\n\n"
    path = write(tmp_path / f"a.md{suffix}", PACK[suffix](text.encode()))
    assert [(record.value, record.line) for record in read(path)] == [({"text": text}, 1)]


def test_an_empty_text_file_is_an_empty_document(tmp_path: Path):
    assert values(write(tmp_path / "a.txt", b"")) == [{"text": ""}]


def test_parquet_gives_rows_in_order_and_nulls_are_absent(tmp_path: Path):
    path = tmp_path / "a.parquet"
    given = [
        {
            "messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a", "train": n % 2 == 0 or None}],
            "tools": None,
        }
        for n in range(700)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(given), path, row_group_size=300)
    got = list(read(path))
    assert [record.line for record in got] == list(range(1, 701))
    assert got[0].value == {"messages": [{"role": "user", "content": "q0"}, {"role": "assistant", "content": "a", "train": True}]}
    assert got[699].value == {"messages": [{"role": "user", "content": "q699"}, {"role": "assistant", "content": "a"}]}


def test_folders_globs_and_several_paths(tmp_path: Path):
    for name in ("b.txt", "a.py", "sub/c.md", ".hidden/d.txt", "e.png"):
        write(tmp_path / "docs" / name, name.encode())
    assert [value["text"] for value in values(tmp_path / "docs")] == ["a.py", "b.txt", "sub/c.md"]
    assert [value["text"] for value in values([tmp_path / "docs/sub", str(tmp_path / "docs/*.txt")])] == ["sub/c.md", "b.txt"]
    assert [path.name for path in files(str(tmp_path / "docs/**/*.[mt]*"))] == ["b.txt", "c.md"]


def test_paths_that_cannot_be_meant_are_errors_at_once(tmp_path: Path):
    write(tmp_path / "mixed/data.jsonl", jsonl())
    write(tmp_path / "mixed/README.md", b"about")
    write(tmp_path / "empty/picture.png", b"x")
    table = {
        "nothing.jsonl": "no such file",
        "*.jsonl": "no file matches",
        "empty": "no data file in this folder",
        "empty/picture.png": "unknown kind of data file",
        "empty/*.png": "unknown kind of data file",
        "mixed": r"holds both rows \(data.jsonl\) and text documents \(README.md\); say which with a glob",
    }
    for name, message in table.items():
        with pytest.raises(DataError, match=message):
            read(tmp_path / name)
    with pytest.raises(DataError, match="named twice"):
        read([tmp_path / "mixed/data.jsonl", tmp_path / "mixed/*.jsonl"])
    with pytest.raises(DataError, match="no data file was named"):
        read([])
    with pytest.raises(DataError, match="compressed inside"):
        read(write(tmp_path / "a.parquet.gz", b""))


GOOD = b'{"text": "fine"}\n'
BAD_LINES = {
    "bad JSON": (b'{"text": "a",}', "a.jsonl:2: not valid JSON: .* at column 1[34]"),
    "spread over lines": (b'{\n"text": "a"}', "a.jsonl:2: not valid JSON.*each line holds one whole JSON object"),
    "not an object": (b'["text"]', "a.jsonl:2: a row is a JSON object, this is a list"),
    "a number": (b"12", "a.jsonl:2: a row is a JSON object, this is a int"),
    "invalid UTF-8": (b'{"text": "\xff"}', "a.jsonl:2: not valid UTF-8 at byte 11"),
    "NUL": (b"\0\0\0\0", "a.jsonl:2: NUL byte at byte 1"),
    "half a surrogate pair": (b'{"text": "\\ud83d"}', "a.jsonl:2: holds half of a surrogate pair"),
    "too deep": (b'{"text": ' + b"[" * 200_000, "a.jsonl:2: nested too deeply"),
    "a number of 10,000 digits": (b'{"text": ' + b"1" * 10_000 + b"}", "a.jsonl:2: not valid JSON: .*digits"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_bad_line_is_one_error_with_file_and_line(tmp_path: Path, kind: str):
    line, message = BAD_LINES[kind]
    got = read(write(tmp_path / "a.jsonl", GOOD + line + b"\n" + GOOD))
    assert next(got).value == {"text": "fine"}
    with pytest.raises(DataError, match=message) as caught:
        next(got)
    assert len(str(caught.value)) < 500


def test_a_whole_surrogate_pair_is_a_character(tmp_path: Path):
    assert values(write(tmp_path / "a.jsonl", b'{"text": "\\ud83d\\ude00"}')) == [{"text": "\U0001f600"}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_byte_order_marks_are_refused(tmp_path: Path, name: str):
    with pytest.raises(DataError, match=f"{name}:1: begins with a byte-order mark"):
        list(read(write(tmp_path / name, b"\xef\xbb\xbf" + GOOD)))
    with pytest.raises(DataError, match=f"{name}:1: is UTF-16"):
        list(read(write(tmp_path / name, GOOD.decode().encode("utf-16"))))


def test_text_that_is_not_text_names_the_line(tmp_path: Path):
    with pytest.raises(DataError, match="a.txt:3: NUL byte at byte 2"):
        list(read(write(tmp_path / "a.txt", b"one\ntwo\nx\0\n")))
    with pytest.raises(DataError, match="a.txt:2: not valid UTF-8 at byte 1"):
        list(read(write(tmp_path / "a.txt", b"one\n\xc3(\n")))


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".bz2", ".zst"])
@pytest.mark.parametrize("damage", ["truncated", "garbage"])
def test_damaged_compression_names_where_reading_broke_off(tmp_path: Path, suffix: str, damage: str):
    noise = random.Random(0)
    data = PACK[suffix](jsonl([{"text": "".join(noise.choices("abcdefghijklmnop", k=200))} for _ in range(2000)]))
    path = write(tmp_path / f"a.jsonl{suffix}", data[: len(data) * 2 // 3] if damage == "truncated" else b"no archive at all" * 99)
    with pytest.raises(DataError, match=rf"a.jsonl{suffix}:\d+: cannot be read on from here"):
        list(read(path))


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_damaged_parquet_is_one_error(tmp_path: Path, keep: float):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": f"row {n}"} for n in range(1000)]), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data) if 0 < keep < 1 else keep)])
    with pytest.raises(DataError, match="a.parquet:1: cannot be read on from here, not Parquet or damaged"):
        list(read(path))


def test_parquet_damaged_inside_a_page_is_our_error_or_reads(tmp_path: Path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": f"row {n}"} for n in range(1000)]), path, compression="zstd")
    whole, choice = path.read_bytes(), random.Random(1)
    refused = 0
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(8):
            data[choice.randrange(4, len(data) - 4)] = choice.randrange(256)
        path.write_bytes(data)
        try:
            list(read(path))
        except DataError:
            refused += 1
    assert refused > 20


def test_a_line_without_end_stops_at_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rows, "MAX_BYTES", 1 << 20)
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(GOOD + b'{"text": "' + b"x" * (20 << 20)))
    got = read(path)
    next(got)
    tracemalloc.start()
    with pytest.raises(DataError, match="a.jsonl.gz:2: longer than 1 MiB"):
        next(got)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 << 20
    with pytest.raises(DataError, match="one document of more than 1 MiB"):
        list(read(write(tmp_path / "b.txt.gz", gzip.compress(b"line\n" * (1 << 19)))))


def test_memory_does_not_grow_with_the_file(tmp_path: Path):
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(jsonl([{"text": "x" * 1000}]) * 10_000))
    tracemalloc.start()
    assert sum(len(record.value["text"]) for record in read(path)) == 10_000_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_tables(tmp_path):
    """Cells may hold what separates them, and lines; an empty one is absent; records are numbered by their last line."""
    (tmp_path / "a.csv").write_text('text,label\n"a, ""b""",x\n\n"two\nlines",\n', encoding="utf-8")
    (tmp_path / "b.tsv").write_text("text\tlabel\na, b\ty\n", encoding="utf-8")
    found = list(read(tmp_path))
    assert [record.value for record in found] == [{"text": 'a, "b"', "label": "x"}, {"text": "two\nlines"}, {"text": "a, b", "label": "y"}]
    assert [record.line for record in found] == [2, 5, 2]


@pytest.mark.parametrize(
    "text, message",
    [
        ("text,label\na\n", r"a\.csv:2: has 1 cells, and the first line names 2 columns"),
        ("text,text\na,b\n", r"a\.csv:1: the first line names the columns, each once"),
        ('text,label\n"a,b\n', r"a\.csv:2: not a table that can be read"),
        ("text,label\na,\0\n", "NUL byte"),
    ],
)
def test_tables_that_are_none(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        list(read(tmp_path / "a.csv"))
