"""The header reader: agrees with the gguf package on good files, and ends in one clear error on bad ones."""

from __future__ import annotations

import struct
import time
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.assets import asset
from tests.io.gguf.files import entry, header, row, small, text
from trivium.core.errors import FileError
from trivium.io.gguf.reader import MAX_ITEMS, open_gguf

PAD = bytes(256)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small(tmp_path_factory.mktemp("gguf") / "small.gguf")


def differing(path: Path) -> list[str]:
    """What the gguf package reads otherwise: keys and tensors."""
    reader, ours = gguf.GGUFReader(path), open_gguf(path)
    keys = [key for key in reader.fields if not key.startswith("GGUF.")]
    assert list(ours.metadata) == keys
    values = {key: ours.metadata[key] for key in keys}
    plain = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in values.items()}
    odd = [key for key in keys if plain[key] != reader.fields[key].contents()]
    assert list(ours.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        info, shape = ours.tensors[tensor.name], tuple(tensor.shape.tolist()[::-1])
        place = (info.shape, info.type, info.offset, info.nbytes) == (shape, tensor.tensor_type.name, tensor.data_offset, tensor.n_bytes)
        stored = np.array_equal(ours.raw(tensor.name), tensor.data.reshape(-1).view(np.uint8))
        expected = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        if not (place and stored and np.array_equal(ours.array(tensor.name).astype(np.float32), expected)):
            odd.append(tensor.name)
    return odd


def test_agrees_with_the_gguf_package(good: Path):
    assert differing(good) == []
    file = open_gguf(good)
    assert file.version == 3 and file.path == good
    assert {key: type(file.metadata[key]) for key in ("a.u8", "a.f32", "a.yes", "a.text")} == {
        "a.u8": int, "a.f32": float, "a.yes": bool, "a.text": str
    }  # fmt: skip
    assert file.array("two").dtype == np.float16 and file.array("three").dtype == np.float32
    assert not file.raw("one").flags.writeable


def test_metadata_behaves_like_a_mapping(good: Path):
    metadata = open_gguf(good).metadata
    assert "l.text" in metadata and "nothing" not in metadata and metadata.get("nothing", 7) == 7
    lists = metadata.under("l.")
    assert sorted(lists) == ["l.bool", "l.float", "l.int", "l.text"] and len(lists) == 4
    assert lists["l.text"] == ["", "a", "grüße", "🙂" * 50]
    with pytest.raises(KeyError):
        metadata["nothing"]


@pytest.mark.slow
def test_agrees_on_a_real_file():
    assert differing(asset("smollm2")) == []


def test_a_real_file_opens_fast():
    path = asset("smollm2")
    assert min(_seconds(path) for _ in range(5)) < 0.15


def _seconds(path: Path) -> float:
    start = time.perf_counter()
    open_gguf(path)
    return time.perf_counter() - start


def write(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "odd.gguf"
    path.write_bytes(data)
    return path


def refused(tmp_path: Path, data: bytes) -> str:
    with pytest.raises(FileError) as caught:
        open_gguf(write(tmp_path, data))
    assert str(tmp_path) in str(caught.value)
    return str(caught.value)


STRINGS = struct.pack("<I", 8)

BAD = {
    "empty": (b"", "is empty"),
    "another format": (b"PK\x03\x04" + PAD, "not a GGUF file: it starts with"),
    "two bytes": (b"GG", "not a GGUF file"),
    "version 1": (header(version=1), "version 1; versions 2 and 3"),
    "version 4": (header(version=4), "version 4"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "giant counts": (header(tensors=2**63, keys=5) + PAD, "more than any real file"),
    "giant key": (header(keys=1) + struct.pack("<Q", 2**60) + PAD, "more than the 65536 allowed"),
    "giant string": (header(keys=1) + entry("k", 8, struct.pack("<Q", 2**60)) + PAD, "'k' needs 1152921504606846976 bytes"),
    "giant list": (header(keys=1) + entry("k", 9, struct.pack("<IQ", 6, 2**62)) + PAD, "but the file ends after"),
    "giant list of strings": (header(keys=1) + entry("k", 9, struct.pack("<IQ", 8, 2**62)) + PAD, "claims .* strings"),
    "string in a list too long": (header(keys=1) + entry("k", 9, struct.pack("<IQQ", 8, 2, 2**62)) + PAD, "reaches past the end"),
    "unknown type": (header(keys=1) + entry("k", 13, b"") + PAD, "'k' has the unknown type 13"),
    "list of unknown type": (header(keys=1) + entry("k", 9, struct.pack("<IQ", 99, 0)) + PAD, "unknown type 99"),
    "deep lists": (header(keys=1) + entry("k", 9, struct.pack("<IQ", 9, 1) * 9) + PAD, "nested deeper"),
    "wide lists": (header(keys=1) + entry("k", 9, struct.pack("<IQ", 9, 2**62)) + PAD, "items of the metadata"),
    "key twice": (header(keys=2) + entry("k", 7, b"\1") * 2, "'k' stands twice"),
    "key not UTF-8": (header(keys=1) + text(b"\xff\xfe") + PAD, "not UTF-8"),
    "text not UTF-8": (header(keys=1) + entry("k", 8, text(b"\xff")), "'k' is not UTF-8"),
    "alignment 0": (header(keys=1) + entry("general.alignment", 4, struct.pack("<I", 0)), "power of two"),
    "alignment 24": (header(keys=1) + entry("general.alignment", 4, struct.pack("<I", 24)), "power of two"),
    "alignment a text": (header(keys=1) + entry("general.alignment", 8, text("32")), "power of two"),
    "giant alignment": (header(keys=1) + entry("general.alignment", 10, struct.pack("<Q", 2**40)), "power of two"),
    "split": (header(keys=1) + entry("split.count", 2, struct.pack("<H", 3)), "one of 3 parts of a split GGUF"),
    "tensor twice": (header(tensors=2) + row("t", (4,), 0, 0) + row("t", (4,), 0, 32) + PAD, "'t' stands twice"),
    "five dimensions": (header(tensors=1) + row("t", (1,) * 5, 0, 0) + PAD, "5 dimensions"),
    "giant shape": (header(tensors=1) + row("t", (2**63, 2**63), 0, 0) + PAD, "ends at byte"),
    "empty shape": (header(tensors=1) + row("t", (2**63, 0), 0, 0) + PAD, "empty shape"),
    "half a block": (header(tensors=1) + row("t", (2, 33), 2, 0) + PAD, "not whole blocks of 32"),
    "unknown tensor type": (header(tensors=1) + row("t", (4,), 77, 0) + PAD, "type 77, which is unknown"),
    "odd offset": (header(tensors=1) + row("t", (4,), 0, 8) + PAD, "multiple of the alignment"),
    "giant offset": (header(tensors=1) + row("t", (4,), 0, 2**64 - 32) + PAD, "ends at byte"),
    "out of range": (header(tensors=1) + row("t", (4,), 0, 4096) + PAD, "ends at byte"),
    "overlap": (header(tensors=2) + row("s", (16,), 0, 0) + row("t", (4,), 0, 32) + PAD, "'s' and 't' overlap"),
    "same place": (header(tensors=2) + row("s", (4,), 0, 0) + row("t", (4,), 0, 0) + PAD, "overlap"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused(tmp_path: Path, case: str):
    data, message = BAD[case]
    with pytest.raises(FileError, match=message):
        open_gguf(write(tmp_path, data))


def test_odd_but_good_files_are_read(tmp_path: Path):
    nested = struct.pack("<IQ", 9, 2) + struct.pack("<IQ", 8, 1) + text("a") + struct.pack("<IQ", 4, 2) + struct.pack("<II", 5, 6)
    keys = entry("general.alignment", 4, struct.pack("<I", 64)) + entry("nested", 9, nested) + entry("none", 9, struct.pack("<IQ", 8, 0))
    data = header(tensors=1, keys=3, version=2) + keys + row("scalar", (), 26, 64)
    data += bytes(-len(data) % 64 + 64) + struct.pack("<i", -7)
    file = open_gguf(write(tmp_path, data))
    assert file.version == 2 and file.metadata["none"] == []
    strings, numbers = file.metadata["nested"]
    assert strings == ["a"] and numbers.tolist() == [5, 6]
    assert file.array("scalar").shape == () and file.array("scalar") == -7


def test_a_word_that_is_not_utf8_fails_when_it_is_read(tmp_path: Path):
    file = open_gguf(write(tmp_path, header(keys=1) + entry("words", 9, struct.pack("<IQ", 8, 1) + text(b"\xff"))))
    with pytest.raises(FileError, match="'words' is not UTF-8"):
        file.metadata["words"]


def test_missing_files_and_tensors_are_named(tmp_path: Path, good: Path):
    with pytest.raises(FileError, match="cannot be read: No such file"):
        open_gguf(tmp_path / "nowhere.gguf")
    with pytest.raises(FileError, match="cannot be read: Is a directory"):
        open_gguf(tmp_path)
    with pytest.raises(FileError, match="unknown tensor 'thre'; did you mean 'three'"):
        open_gguf(good).array("thre")


def test_a_file_cut_anywhere_is_refused(good: Path, tmp_path: Path):
    data = good.read_bytes()
    last = max(info.offset + info.nbytes for info in open_gguf(good).tensors.values())
    for end in [*range(0, last, 3), last - 1]:
        assert refused(tmp_path, data[:end]), end


@pytest.mark.slow
def test_any_mutation_ends_well(good: Path, tmp_path_factory: pytest.TempPathFactory):
    """Whatever bytes are changed, a file is read or refused with our own error; never slowly."""
    data, folder = good.read_bytes(), tmp_path_factory.mktemp("mutations")

    said: list[bool] = []

    @settings(max_examples=400, deadline=None, derandomize=True)
    @given(st.lists(st.tuples(st.integers(0, 1600), st.binary(min_size=1, max_size=9)), min_size=1, max_size=3))
    def check(changes: list[tuple[int, bytes]]) -> None:
        mutated = bytearray(data)
        for at, new in changes:
            mutated[at : at + len(new)] = new
        path = write(folder, bytes(mutated))
        try:
            file = open_gguf(path)
            for key in file.metadata:
                file.metadata[key]
            for name in file.tensors:
                file.array(name)
        except FileError as error:
            said.append(str(path) in str(error))

    check()
    assert said and all(said)


def test_hostile_lists_cost_bounded_memory(tmp_path: Path):
    """A list of many empty strings costs its bytes in the file, and none in memory until it is read."""
    count = 200_000
    path = write(tmp_path, header(keys=1) + entry("k", 9, struct.pack("<IQ", 8, count) + bytes(8 * count)))
    tracemalloc.start()
    open_gguf(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000
    assert count < MAX_ITEMS
