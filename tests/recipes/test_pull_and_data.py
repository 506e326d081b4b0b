"""Conversion that is not done twice, and the text side without weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recipes.toys import bundle, write_rows
from trivium.core.errors import DataError, FileError
from trivium.io.gguf import reader
from trivium.recipes import load as loading
from trivium.recipes.data import bank, text_side
from trivium.recipes.load import load
from trivium.recipes.pull import convert


def test_a_conversion_is_kept_only_if_it_is_the_same(toy: Path, tmp_path: Path):
    out = convert(toy, tmp_path / "out")
    stamp = (out / "model.safetensors").stat().st_mtime_ns
    assert convert(toy, out) == out and (out / "model.safetensors").stat().st_mtime_ns == stamp
    other = bundle(seed=5).save(tmp_path / "other")
    for source, dtype in ((other, None), (toy, "bf16")):
        with pytest.raises(FileError, match="already holds files"):
            convert(source, out, dtype=dtype)
    convert(toy, out, dtype="bf16", overwrite=True)
    assert str(load(out).model.dtype) == "torch.bfloat16"


def test_the_text_side_needs_no_weights(toy: Path, tmp_path: Path, monkeypatch):
    from tests.journeys.test_main_job import write_gguf

    path = write_gguf(tmp_path / "toy.gguf", toy)
    whole = load(path).prompt.digest()
    monkeypatch.setattr(loading, "directory", None)
    monkeypatch.setattr(reader.GGUFFile, "__getitem__", None, raising=False)
    for source, expected in ((toy, text_side(toy)[1].digest()), (path, whole)):
        tokenizer, prompt = text_side(source)
        assert prompt.digest() == expected and prompt.tokenizer is tokenizer


def test_a_prepared_folder_belongs_to_its_model(toy: Path, tmp_path: Path):
    rows = write_rows(tmp_path / "rows.jsonl")
    _, prompt = text_side(toy)
    made = bank([rows], prompt, length=160)
    made.save(tmp_path / "bank")
    assert bank([tmp_path / "bank"], prompt, length=160).fingerprint == made.fingerprint
    with pytest.raises(DataError, match="prepared for rows of 160 tokens, not 200"):
        bank([tmp_path / "bank"], prompt, length=200)
    prompt.template += " "
    with pytest.raises(DataError, match="another tokenizer or chat template"):
        bank([tmp_path / "bank"], prompt, length=160)
