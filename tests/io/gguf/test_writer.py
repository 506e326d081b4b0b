"""What is written is, byte for byte, what the gguf package would write; or nothing is there."""

from __future__ import annotations

import hashlib
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from tests.io.gguf.files import finish
from trivium.core.errors import FileError
from trivium.io.gguf.dequantize import CHUNK, dequantize
from trivium.io.gguf.quantize import WRITTEN, quantize
from trivium.io.gguf.reader import open_gguf
from trivium.io.gguf.writer import Stored, write_gguf

METADATA = {
    "general.architecture": "llama",
    "a.int": 4_000_000_000,
    "a.float": 1e-5,
    "a.yes": True,
    "a.text": "grüße 🙂",
    "l.text": ["", "a", "grüße", "🙂" * 50],
    "l.int": [1, -2, 3],
    "l.float": [0.5, 1.5],
    "l.bool": [True, False, True],
}


def stored(values: np.ndarray, kind: str) -> Stored:
    def pieces() -> Iterator[np.ndarray]:
        for start in range(0, values.size, 64):
            yield quantize(kind, values.reshape(-1)[start : start + 64])

    return Stored(values.shape, kind, pieces)


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_file_is_byte_for_byte_what_the_package_writes(tmp_path: Path):
    values = {kind: drawn(3, 64, seed=seed) for seed, kind in enumerate(WRITTEN)} | {"odd": drawn(5)}
    kinds = {name: "F32" if name == "odd" else name for name in values}
    sha256 = write_gguf(tmp_path / "ours.gguf", METADATA, {name: stored(value, kinds[name]) for name, value in values.items()})
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "llama")
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
    for key, value in list(METADATA.items())[1:]:
        add[type(value)](key, value)
    for name, value in values.items():
        kind = gguf.GGMLQuantizationType[kinds[name]]
        writer.add_tensor(name, gguf.quantize(value, kind), raw_dtype=kind)
    expected = finish(writer, tmp_path / "theirs.gguf").read_bytes()
    assert (tmp_path / "ours.gguf").read_bytes() == expected
    assert sha256 == hashlib.sha256(expected).hexdigest()
    file = open_gguf(tmp_path / "ours.gguf")
    assert {key: list(value) if isinstance(value, np.ndarray) else value for key, value in file.metadata.items()} == {
        **METADATA,
        "a.float": float(np.float32(1e-5)),
    }
    for name, value in values.items():
        assert np.array_equal(file.array(name), dequantize(kinds[name], quantize(kinds[name], value.reshape(-1))).reshape(value.shape))


@pytest.mark.concept("X.35", part="io/gguf/quantize.py")
@pytest.mark.parametrize("kind", WRITTEN)
def test_values_are_packed_as_the_package_packs_them(kind: str):
    wide = npst.arrays(np.float32, 64, elements=st.floats(-6e4, 6e4, width=32))
    tiny = npst.arrays(np.float32, 64, elements=st.floats(-(2.0**-13), 2.0**-13, width=32))
    ties = npst.arrays(np.float32, 64, elements=st.integers(-254, 254).map(lambda half: half / 2))

    @given(st.one_of(wide, tiny, ties))
    @example(np.zeros(64, np.float32))
    @example(np.full(64, -0.0, np.float32))
    @example(
        np.array([high << 16 | low for high in range(0x3F7E, 0x3F8E) for low in (0x7FFF, 0x8000, 0x8001, 0xFFFF)], np.uint32).view(
            np.float32
        )
    )
    def check(values: np.ndarray) -> None:
        scale = np.abs(values.reshape(-1, 32)).max(axis=1) / 127
        if kind == "Q8_0" and ((scale > 0) & (scale < 1e-37)).any():
            return  # the package divides by it and casts infinity
        expected = gguf.quantize(values, gguf.GGMLQuantizationType[kind])
        assert np.array_equal(quantize(kind, values), expected.view(np.uint8).reshape(-1))

    check()
    many = drawn(CHUNK) * 10.0 ** np.random.default_rng(1).integers(-6, 3, CHUNK).astype(np.float32)
    assert np.array_equal(quantize(kind, many), gguf.quantize(many, gguf.GGMLQuantizationType[kind]).view(np.uint8))


def test_odd_numbers_stay_what_they_are_or_are_refused():
    odd = np.array([np.inf, -np.inf, np.nan, -np.nan] * 8, np.float32)
    odd.view(np.uint32)[2] = 0x7F800001  # a NaN whose upper half is an infinity
    for kind in ("F32", "F16", "BF16"):
        assert np.array_equal(dequantize(kind, quantize(kind, odd)), odd, equal_nan=True), kind
    assert np.array_equal(quantize("BF16", odd), gguf.quantize(odd, gguf.GGMLQuantizationType.BF16).view(np.uint8))
    with pytest.raises(FileError, match="not finite has no scale"):
        quantize("Q8_0", odd)
    big = np.full(32, 65519.0, np.float32)
    assert dequantize("F16", quantize("F16", big)).max() == 65504
    big[3] = 65520
    with pytest.raises(FileError, match="1 values cannot be held, the largest 65520: float16 ends at 65504"):
        quantize("F16", big)
    with pytest.raises(FileError, match="a block's scale is a float16"):
        quantize("Q8_0", np.full(32, 1e7, np.float32))
    least = np.full(32, 1e-40, np.float32)
    assert (dequantize("Q8_0", quantize("Q8_0", least)) == 0).all()


def test_q8_0_error_is_at_most_half_a_step():
    values = drawn(320)
    error = np.abs(dequantize("Q8_0", quantize("Q8_0", values)) - values).reshape(-1, 32)
    step = np.abs(values.reshape(-1, 32)).max(axis=1) / 127
    assert (error.max(axis=1) <= step * (0.5 + 127 * 2**-11)).all() and error.max() > 0


@pytest.mark.parametrize(
    ("value", "message"),
    [(-1, "a.b: -1 does not fit"), (2**32, "does not fit"), (1e39, "does not fit"), ("\ud800", "UTF-8"), ([2**31], "does not fit")],
)
def test_values_that_do_not_fit_are_refused(tmp_path: Path, value: object, message: str):
    with pytest.raises(FileError, match=message):
        write_gguf(tmp_path / "a.gguf", {"a.b": value}, {})
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way_is_kept(tmp_path: Path):
    path = tmp_path / "a.gguf"
    write_gguf(path, {"a.b": 1}, {})
    with pytest.raises(FileError, match="is there already"):
        write_gguf(path, {"a.b": 2}, {})
    assert open_gguf(path).metadata["a.b"] == 1
    write_gguf(path, {"a.b": 2}, {}, overwrite=True)
    assert open_gguf(path).metadata["a.b"] == 2


def test_full_disk_leaves_what_was_there(tmp_path: Path):
    path = tmp_path / "a.gguf"
    write_gguf(path, {"a.b": 1}, {})
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(FileError, match=r"a.gguf: cannot be written: File too large; what was there is untouched"):
            write_gguf(path, {}, {"x": stored(drawn(64, 1024), "F32")}, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert open_gguf(path).metadata["a.b"] == 1 and [p.name for p in tmp_path.iterdir()] == ["a.gguf"]


def test_interrupt_while_writing_leaves_nothing(tmp_path: Path):
    def pieces() -> Iterator[np.ndarray]:
        yield np.zeros(64, np.uint8)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_gguf(tmp_path / "a.gguf", {}, {"x": Stored((32,), "F32", pieces)})
    assert not list(tmp_path.iterdir())
