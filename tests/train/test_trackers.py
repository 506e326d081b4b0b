"""Tracking: TensorBoard's files read by TensorBoard where it is installed and by hand elsewhere; a tracker that fails."""

from __future__ import annotations

import struct
from types import SimpleNamespace

import pytest

from trivium.train import trackers
from trivium.train.tensorboard import EventFile, crc32c
from trivium.train.trackers import Mlflow, TensorBoard, Tracker, Trackers, Trackio, Wandb, numbers

ROWS = [{"step": i, "loss": 3.0 / i, "validation": {"loss": 4.0 / i}, "word": "x", "tokens": 7} for i in (1, 2, 300)]


def records(path):
    """The records of a TFRecord file, with both checksums checked."""
    data, at, found = path.read_bytes(), 0, []
    while at < len(data):
        head = data[at : at + 8]
        (size,) = struct.unpack("<Q", head)
        body = data[at + 12 : at + 12 + size]
        for part, stored in ((head, data[at + 8 : at + 12]), (body, data[at + 12 + size : at + 16 + size])):
            crc = crc32c(part)
            assert struct.unpack("<I", stored)[0] == ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
        found.append(body)
        at += 16 + size
    return found


def test_crc32c_is_the_published_one():
    assert crc32c(b"123456789") == 0xE3069283 and crc32c(b"") == 0 and crc32c(bytes(32)) == 0x8A9136AA


@pytest.mark.concept("X.60", part="train/trackers.py")
def test_event_files_hold_every_number(tmp_path):
    sink = TensorBoard().open(tmp_path, step=0, config={})
    for row in ROWS:
        sink.row(row["step"], numbers(row))
    sink.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    found = records(path)
    assert len(found) == 4 and b"brain.Event:2" in found[0]
    for row, record in zip(ROWS, found[1:], strict=True):
        for name, value in (("loss", row["loss"]), ("validation.loss", row["validation"]["loss"]), ("tokens", 7)):
            assert name.encode() + b"\x15" + struct.pack("<f", value) in record
        assert b"word" not in record


@pytest.mark.concept("X.60", part="train/trackers.py")
def test_tensorboard_reads_them(tmp_path):
    """By TensorBoard itself; rows made again after a crash replace those of before."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    first = EventFile(tmp_path, step=0)
    for step in (1, 2, 3):
        first.scalars(step, {"loss": 10.0 + step})
    first.close()
    second = EventFile(tmp_path, step=2)
    second.scalars(3, {"loss": 99.0})
    second.close()
    events = reader.EventAccumulator(str(tmp_path))
    events.Reload()
    assert {event.step: event.value for event in events.Scalars("loss")} == {1: 11.0, 2: 12.0, 3: 99.0}


@pytest.mark.slow
@pytest.mark.concept("X.60", part="train/trackers.py")
def test_wandb_offline_holds_the_same_numbers(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    sink = Wandb().open(tmp_path, step=0, config={"a": {"b": 1}})
    for row in ROWS:
        sink.row(row["step"], numbers(row))
    assert {name: sink.run.summary[name] for name in ("loss", "validation.loss")} == {"loss": 0.01, "validation.loss": 4 / 300}
    assert sink.run.config["a"] == {"b": 1} and wandb.run.settings.mode == "offline"
    sink.close()


def test_mlflow_holds_the_same_numbers(tmp_path):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    sink = Mlflow().open(tmp_path, step=0, config={"optim": {"lr": 0.1}})
    for row in ROWS:
        sink.row(row["step"], numbers(row))
    sink.close()
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert [(m.step, m.value) for m in client.get_metric_history(sink.run, "validation.loss")] == [
        (r["step"], r["validation"]["loss"]) for r in ROWS
    ]
    assert client.get_run(sink.run).data.params == {"optim.lr": "0.1"}


@pytest.mark.parametrize("tracker", [Wandb(), Mlflow(), Trackio()], ids=lambda tracker: tracker.kind)
def test_a_tracker_that_is_not_installed_says_so(tracker, tmp_path, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(trackers.importlib, "import_module", missing)
    with pytest.raises(ValueError, match=rf"pip install 'trivium\[{tracker.kind}\]'"):
        Trackers((tracker,), tmp_path, step=0, config={})


@pytest.mark.concept("X.60", part="train/trackers.py")
def test_a_tracker_that_breaks_costs_a_warning_and_not_the_run(tmp_path, monkeypatch, capsys):
    seen = []

    def broken(step, values):
        seen.append(step)
        raise OSError("gone")

    monkeypatch.setattr(TensorBoard, "open", lambda *_args, **_named: SimpleNamespace(row=broken, close=lambda: None))
    tracked = Trackers((TensorBoard(),), tmp_path, step=0, config={})
    for row in ROWS:
        tracked.row(row)
    tracked.close()
    assert seen == [1] and "tensorboard failed and is over for this run: gone" in capsys.readouterr().err


def test_every_tracker_is_registered():
    assert Tracker.registry.names() == ["mlflow", "tensorboard", "trackio", "wandb"]
