"""Checkpoints: what is saved comes back, what is damaged is passed over."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from trivium.core.errors import FileError
from trivium.train import checkpoint

TENSORS = {
    "parameters": {"a": torch.randn(3, 4), "empty": torch.zeros(0, 2), "b.half": torch.randn(5).bfloat16()},
    "optimizer": {"a.step": torch.tensor(3.0), "a.long": torch.arange(4), "a.double": torch.randn(2, dtype=torch.float64)},
}


def save(directory, step):
    return checkpoint.save(directory, step, state={"step": step, "about": {"näme": [1, None]}}, tensors=TENSORS)


def test_what_is_saved_comes_back(tmp_path):
    path = save(tmp_path, 7)
    found = checkpoint.latest(tmp_path)
    assert (found.path, found.step, found.state) == (path, 7, {"step": 7, "about": {"näme": [1, None]}})
    for name, group in TENSORS.items():
        for read in (found.tensors(name), load_file(path / f"{name}.safetensors")):
            assert read.keys() == group.keys()
            assert all(torch.equal(read[key], tensor) and read[key].dtype == tensor.dtype for key, tensor in group.items())
    assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors"}
    assert json.loads((path / checkpoint.MARKER).read_text())["format"] == checkpoint.FORMAT


def test_nothing_there(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "nowhere") is None


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


DAMAGE = {
    "a flipped bit": lambda path: flip(path / "parameters.safetensors"),
    "a short file": lambda path: (path / "optimizer.safetensors").write_bytes((path / "optimizer.safetensors").read_bytes()[:-1]),
    "a missing file": lambda path: (path / "state.json").unlink(),
    "a broken marker": lambda path: (path / checkpoint.MARKER).write_text('{"format": 1'),
    "a strange marker": lambda path: (path / checkpoint.MARKER).write_text('{"format": 1, "files": {"state.json": 5}}'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_one_is_passed_over_with_a_warning_and_written_anew(tmp_path, capsys, damage):
    save(tmp_path, 2)
    newest = save(tmp_path, 10)
    DAMAGE[damage](newest)
    assert checkpoint.latest(tmp_path).step == 2
    assert "checkpoint-10 is damaged" in capsys.readouterr().err
    checkpoint.prune(tmp_path, 2, keep=1)
    assert newest.exists() and (tmp_path / "checkpoint-2").exists()
    save(tmp_path, 10)
    assert checkpoint.latest(tmp_path).step == 10


def test_without_its_marker_it_is_no_checkpoint(tmp_path, capsys):
    save(tmp_path, 2)
    (save(tmp_path, 3) / checkpoint.MARKER).unlink()
    (tmp_path / ".checkpoint-5").mkdir()
    assert checkpoint.latest(tmp_path).step == 2
    assert not capsys.readouterr().err
    checkpoint.clean(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_a_complete_step_is_kept(tmp_path):
    path = save(tmp_path, 2)
    before = {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in path.iterdir()}
    save(tmp_path, 2)
    assert before == {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in path.iterdir()}


def test_pruning(tmp_path):
    for step in (1, 2, 10, 20):
        save(tmp_path, step)
    checkpoint.prune(tmp_path, 20, keep=None)
    assert len(list(tmp_path.iterdir())) == 4
    checkpoint.prune(tmp_path, 20, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-20"]


def test_a_format_from_the_future_is_an_error(tmp_path):
    marker = save(tmp_path, 2) / checkpoint.MARKER
    marker.write_text(marker.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(FileError, match="format 99.*upgrade"):
        checkpoint.latest(tmp_path)


def test_locked(tmp_path):
    with checkpoint.locked(tmp_path / "new" / "run"):
        with pytest.raises(FileError, match="another run"), checkpoint.locked(tmp_path / "new" / "run"):
            pass
    with checkpoint.locked(tmp_path / "new" / "run"):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot be written"), checkpoint.locked(tmp_path / "file"):
        pass
