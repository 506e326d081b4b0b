"""Safetensors: what the safetensors package writes we read, and byte for byte the other way; hostile files get one error."""

from __future__ import annotations

import json
import random
import resource
import signal
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trivium.core.errors import FileError
from trivium.io import files
from trivium.io.tensors import DTYPES, INDEX, SINGLE, Lazy, read_file, read_weights, write_file, write_weights


def some_tensors() -> dict[str, torch.Tensor]:
    """One tensor of every dtype, with odd sizes, an empty one and a scalar."""
    generator = torch.Generator().manual_seed(0)
    out = {}
    for name, dtype in DTYPES.items():
        raw = torch.randint(0, 2 if dtype == torch.bool else 120, (3 * dtype.itemsize,), generator=generator, dtype=torch.uint8)
        out[f"b.{name}"] = raw.view(dtype)
    out["a.scalar"] = torch.tensor(2.5)
    out["a.empty"] = torch.empty(0, 4)
    out["a.strided"] = torch.arange(12.0).reshape(3, 4).T
    return out


def lazily(tensors: dict[str, torch.Tensor]) -> dict[str, Lazy]:
    return {name: Lazy.of(tensor) for name, tensor in tensors.items()}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Name, shape, dtype and bytes."""
    raw = [x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(*raw)


def header(path: Path, entries: dict | bytes, data: bytes = bytes(16)) -> Path:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_file_is_byte_for_byte_what_the_package_writes(tmp_path):
    tensors = some_tensors()
    written = write_file(tmp_path / "ours.safetensors", lazily(tensors))
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(contiguous, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    assert written == files.sha256(tmp_path / "ours.safetensors")
    found = read_file(tmp_path / "theirs.safetensors")
    assert set(found) == set(tensors)
    assert all(same(found[name].load(), tensors[name]) for name in tensors)


def test_reading_is_lazy_and_private(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(4)}, path)
    before = path.read_bytes()
    loaded = read_file(path)["x"].load()
    loaded += 1
    assert path.read_bytes() == before


def test_misaligned_tensor_is_read(tmp_path):
    entries = {"a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}, "b": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]}}
    path = header(tmp_path / "x.safetensors", entries, b"abc" + struct.pack("<2f", 1.5, -2.0))
    assert read_file(path)["b"].load().tolist() == [1.5, -2.0]


@pytest.mark.parametrize("shard_bytes", [1, 40, 100, 10**9])
def test_shards_both_ways(tmp_path, shard_bytes):
    tensors = {f"layer.{i}": torch.arange(float(i + 1)) for i in range(9)}
    hashes = write_weights(tmp_path, lazily(tensors), shard_bytes=shard_bytes)
    found = read_weights(tmp_path)
    assert all(same(found[name].load(), tensors[name]) for name in tensors) and set(found) == set(tensors)
    assert all(files.sha256(tmp_path / name) == value for name, value in hashes.items())
    if shard_bytes == 10**9:
        assert list(hashes) == [SINGLE]
    else:
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["metadata"] == {"total_size": 4 * 45, "total_parameters": 45}
        assert set(index["weight_map"]) == set(tensors)
        for name, file in index["weight_map"].items():
            with safetensors.safe_open(tmp_path / file, "pt") as shard:
                assert same(shard.get_tensor(name), tensors[name])


ONE = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
BAD = {
    "overlap": {"a": ONE, "b": {"dtype": "F32", "shape": [1], "data_offsets": [12, 16]}},
    "hole": {"a": {"dtype": "F32", "shape": [3], "data_offsets": [4, 16]}},
    "unused tail": {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}},
    "out of range": {"a": {"dtype": "F32", "shape": [5], "data_offsets": [0, 20]}},
    "product": {"a": {**ONE, "shape": [5]}},
    "dtype": {"a": {**ONE, "dtype": "F4"}},
    "dtype type": {"a": {**ONE, "dtype": ["F32"]}},
    "negative": {"a": {**ONE, "shape": [-2, -2]}},
    "boolean": {"a": {**ONE, "shape": [True, 4]}},
    "fraction": {"a": {**ONE, "data_offsets": [0.0, 16]}},
    "reversed": {"a": {**ONE, "data_offsets": [16, 0]}},
    "huge": {"a": {"dtype": "F32", "shape": [2**62, 2**62, 0], "data_offsets": [0, 0]}, "b": ONE},
    "no shape": {"a": {"dtype": "F32", "data_offsets": [0, 16]}},
    "no entry": {"a": 3},
    "metadata": {"__metadata__": {"x": 1}, "a": ONE},
    "list": b"[]",
    "twice": b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
    "twice inside": b'{"a":{"dtype":"F32","dtype":"F16","shape":[4],"data_offsets":[0,16]}}',
    "not json": b"{'a'",
    "not utf-8": b'{"\xff": 1}',
    "deep": b"[" * 100_000,
    "long number": b'{"a":' + b"9" * 10_000 + b"}",
}


@pytest.mark.parametrize("name", BAD)
def test_bad_headers_are_refused(tmp_path, name):
    path = header(tmp_path / "x.safetensors", BAD[name])
    with pytest.raises(FileError, match="x.safetensors"):
        read_file(path)


@pytest.mark.parametrize("length", [9, 10**6, 2**40, 2**64 - 1])
def test_header_size_is_bounded(tmp_path, length):
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", length) + bytes(8))
    with pytest.raises(FileError, match="cut short or no safetensors"):
        read_file(tmp_path / "x.safetensors")


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("sound") / "x.safetensors"
    write_file(path, lazily({"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}))
    return path.read_bytes()


def outcome(path: Path, data: bytes) -> str:
    """Reads, or raises our error; any other error comes through."""
    path.write_bytes(data)
    try:
        found = read_file(path)
    except FileError:
        return "refused"
    inside = sum(lazy.bytes for lazy in found.values()) < len(data)
    return "read" if inside and all(lazy.load().shape == lazy.shape for lazy in found.values()) else "read what is not there"


def test_every_truncation_is_refused(tmp_path, sound):
    for length in range(len(sound)):
        (tmp_path / "x.safetensors").write_bytes(sound[:length])
        with pytest.raises(FileError):
            read_file(tmp_path / "x.safetensors")


@pytest.mark.slow
def test_mutated_files_read_or_are_refused(tmp_path, sound):
    chance, ends = random.Random(0), set()
    for _ in range(1500):
        data = bytearray(sound)
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data) - 30)] = chance.choice(b'0123456789[]{},:"F \x00\xff' + bytes([chance.randrange(256)]))
        ends.add(outcome(tmp_path / "x.safetensors", bytes(data)))
    assert ends == {"read", "refused"}


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=200), text=st.text(max_size=100))
def test_any_bytes_read_or_are_refused(tmp_path_factory, data, text):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    assert outcome(path, data) in ("read", "refused")
    encoded = text.encode("utf-8", "surrogatepass")
    assert outcome(path, struct.pack("<Q", len(encoded)) + encoded + data) in ("read", "refused")


def test_index_that_lies_is_refused(tmp_path):
    write_weights(tmp_path, lazily({"a": torch.ones(2), "b": torch.ones(3)}), shard_bytes=1)
    index = json.loads((tmp_path / INDEX).read_text())
    shard = index["weight_map"]["a"]
    lies = [{"a": shard, "b": shard}, {**index["weight_map"], "c": shard}, {"a": "../x.safetensors"}, {"a": 3}, {}, []]
    for lie in [*lies, {"a": "gone.safetensors"}, {"a": "model.bin"}]:
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": lie}))
        with pytest.raises(FileError):
            read_weights(tmp_path)
    (tmp_path / SINGLE).write_bytes(b"")
    with pytest.raises(FileError, match="both"):
        read_weights(tmp_path)


def test_pickles_are_refused(tmp_path):
    with pytest.raises(FileError, match="no weights"):
        read_weights(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(FileError, match="pickles.*pytorch_model.bin"):
        read_weights(tmp_path)


def test_full_disk_leaves_what_was_there(tmp_path):
    path = tmp_path / "x.safetensors"
    write_file(path, lazily({"a": torch.ones(4)}))
    before = path.read_bytes()
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(FileError, match="cannot be written"):
            write_file(path, lazily({"a": torch.zeros(100_000)}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_interrupt_while_writing_leaves_what_was_there(tmp_path):
    path = tmp_path / "x.safetensors"
    write_file(path, lazily({"a": torch.ones(4)}))
    before = path.read_bytes()

    def interrupt() -> torch.Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_file(path, {"a": Lazy.of(torch.ones(4)), "b": Lazy((2,), torch.float32, interrupt)})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_directory_is_replaced_whole_or_not_at_all(tmp_path):
    place = tmp_path / "model"
    with files.atomic_directory(place, overwrite=False) as partial:
        (partial / "old").write_text("1")
    with pytest.raises(FileError, match="already holds files"), files.atomic_directory(place, overwrite=False):
        pass
    with pytest.raises(RuntimeError), files.atomic_directory(place, overwrite=True) as partial:
        (partial / "new").write_text("2")
        raise RuntimeError
    assert [path.name for path in place.iterdir()] == ["old"] and list(tmp_path.iterdir()) == [place]
    with files.atomic_directory(place, overwrite=True) as partial:
        (partial / "new").write_text("2")
    assert [path.name for path in place.iterdir()] == ["new"] and list(tmp_path.iterdir()) == [place]


@pytest.mark.parametrize("error, seen", [(OSError(28, "No space left on device"), FileError), (KeyboardInterrupt(), KeyboardInterrupt)])
def test_failing_last_rename_puts_the_old_directory_back(tmp_path, monkeypatch, error, seen):
    place = tmp_path / "model"
    with files.atomic_directory(place, overwrite=False) as partial:
        (partial / "old").write_text("1")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(seen), files.atomic_directory(place, overwrite=True) as partial:
        (partial / "new").write_text("2")
    assert [path.name for path in place.iterdir()] == ["old"] and list(tmp_path.iterdir()) == [place]
