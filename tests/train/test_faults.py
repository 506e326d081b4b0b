"""What else happens to a long run: its folder is removed, the clock jumps, the terminal goes away, numbers go nowhere.

Killed processes, full disks, damaged checkpoints and two runs in one folder: test_crash.py, test_checkpoint.py."""

from __future__ import annotations

import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from trivium.core.errors import FileError
from trivium.data.batch import Batch
from trivium.train import history
from trivium.train.loop import Interrupted

from .toys import CONFIG, Rows, Signalled, one_thread, same, train, weights  # noqa: F401 - a fixture

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Removing(Rows):
    """Removes a folder while batch `at` is made."""

    folder: Path = Path()
    at: int = 3

    def batch(self, i: int) -> Batch:
        if i == self.at:
            shutil.rmtree(self.folder)
        return super().batch(i)


def test_a_removed_folder_is_one_clear_error(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(FileError, match=str(folder)):
        train(folder, rows=Removing(folder=folder))
    done = train(folder)[1]
    assert done.resumed == 0 and done.step == CONFIG.steps, "what is gone is gone: the run starts anew, and ends"


def test_a_jumping_clock_changes_nothing(tmp_path, monkeypatch):
    plain = weights(train(tmp_path / "plain")[0])
    jumps = iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: 1e9 - 1e6 * next(jumps))
    model, done = train(tmp_path / "jumping", config=CONFIG.replace(track=({"kind": "tensorboard"},)))
    assert same(plain, weights(model)) and done.step == CONFIG.steps
    assert all(row["seconds"] >= 0 for row in history.read(tmp_path / "jumping"))


class Gone:
    """A stderr whose terminal has hung up."""

    def write(self, _text: str) -> int:
        raise OSError(5, "Input/output error")

    def flush(self) -> None:
        raise OSError(5, "Input/output error")

    def isatty(self) -> bool:
        return False


def test_a_terminal_that_goes_away_costs_only_its_lines(tmp_path, monkeypatch):
    plain = weights(train(tmp_path / "plain")[0])
    monkeypatch.setattr(sys, "stderr", Gone())
    model, done = train(tmp_path / "run")
    assert same(plain, weights(model)) and done.step == CONFIG.steps


def test_a_hangup_saves_and_the_run_goes_on_later(tmp_path):
    plain = weights(train(tmp_path / "plain")[0])
    with pytest.raises(Interrupted) as stopped:
        train(tmp_path / "run", rows=Signalled(at=2, number=signal.SIGHUP))
    assert stopped.value.step == 3 and stopped.value.checkpoint.is_dir()
    model, done = train(tmp_path / "run")
    assert done.resumed == 3 and same(plain, weights(model))
