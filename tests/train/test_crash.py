"""A run that was killed goes on as if it had not been: at every system call of a save, at random instants, and when the disk is full."""

from __future__ import annotations

import errno
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from trivium.core.errors import FileError
from trivium.train import checkpoint, history
from trivium.train.loop import TrainConfig

from .toys import Bigram, Signalled, model, one_thread, same, train, weights  # noqa: F401 - a fixture

CALLS = ("write", "fsync", "rename", "mkdir", "unlink", "rmdir", "ftruncate")
CONFIG = TrainConfig(steps=3, rows=4, micro=2, precision="bf16", seed=3, save_every=2, validate_every=2, keep_last=1, track=())

pytestmark = pytest.mark.usefixtures("one_thread", "no_waiting")


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process loses nothing that it wrote, so nothing here needs to reach the disk."""
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)


def run(directory: Path) -> dict:
    return weights(train(directory, config=CONFIG, of=Bigram())[0])


def ended(directory: Path) -> tuple:
    """All that a run leaves behind: checkpoints byte for byte, and metrics without what measures time."""
    files = {path.relative_to(directory): path.read_bytes() for path in directory.glob("*/*")}
    rows = [{name: value for name, value in row.items() if name not in history.TIMED} for row in history.read(directory)]
    return files, rows


@contextmanager
def patched(at: Callable[[str, Callable, tuple], None]) -> Iterator[None]:
    """Calls `at(name, original, arguments)` before each of the calls that change the disk."""
    before = {name: getattr(os, name) for name in CALLS}

    def wrap(name: str) -> Callable:
        def call(*arguments, **more):
            at(name, before[name], arguments)
            return before[name](*arguments, **more)

        return call

    for name in CALLS:
        setattr(os, name, wrap(name))
    try:
        yield
    finally:
        for name, original in before.items():
            setattr(os, name, original)


def count(directory: Path) -> list[str]:
    """The names of all such calls of a whole run."""
    seen: list[str] = []
    with patched(lambda name, _call, _arguments: seen.append(name)):
        run(directory)
    return seen


def forked(job: Callable[[], object]) -> int:
    """Runs `job` in a child; the process id."""
    child = os.fork()
    if child == 0:
        try:
            job()
        finally:
            os._exit(0)
    return child


def die_at(directory: Path, number: int) -> None:
    """A run that dies at its call `number`; a write dies halfway."""
    seen = 0

    def at(name: str, call: Callable, arguments: tuple) -> None:
        nonlocal seen
        if seen == number:
            if name == "write" and arguments[0] > 2:
                call(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1

    with patched(at):
        run(directory)


@pytest.mark.slow
def test_killed_at_each_call_that_changes_the_disk(tmp_path):
    whole, calls = run(tmp_path / "again"), count(tmp_path / "whole")
    left = ended(tmp_path / "whole")
    assert {"write", "fsync", "rename", "unlink", "rmdir"} <= set(calls) and calls.count("rename") == 2
    for number, name in enumerate(calls):
        directory = tmp_path / f"killed-{number}"
        _, status = os.waitpid(forked(lambda at=directory, n=number: die_at(at, n)), 0)
        assert os.WIFSIGNALED(status), f"call {number} was not reached"
        assert same(run(directory), whole), f"killed at call {number}, {name}"
        assert ended(directory) == left, f"killed at call {number}, {name}"
        assert not list(directory.glob(".checkpoint-*"))


def test_what_is_durable_before_what(tmp_path):
    """A power failure also loses what was written and not synced: the order of a save and of a deletion, call by call."""
    trace: list[tuple[str, str]] = []

    def at(name: str, _call: Callable, arguments: tuple) -> None:
        what = arguments[0]
        path = Path(os.readlink(f"/proc/self/fd/{what}")) if isinstance(what, int) else Path(what)
        if tmp_path in path.parents and (name, path.name) not in trace[-1:]:
            trace.append((name, path.name))

    with patched(at):
        run(tmp_path / "run")
    start = trace.index(("fsync", "metrics.jsonl"))
    files = ["parameters.safetensors", "optimizer.safetensors", "state.json", "complete.json"]
    assert trace[start + 1 : start + 13] == [
        ("mkdir", ".checkpoint-2"),
        *((name, file) for file in files for name in ("write", "fsync")),
        ("fsync", ".checkpoint-2"),
        ("rename", ".checkpoint-2"),
        ("fsync", "run"),
    ]
    gone = trace.index(("unlink", "complete.json"))
    assert trace[gone + 1] == ("fsync", "checkpoint-2")
    assert ("rename", ".checkpoint-3") in trace[:gone] and ("rmdir", "checkpoint-2") in trace[gone:]


@pytest.mark.slow
def test_killed_at_random_instants(tmp_path):
    """Killed again and again, without looking where, until it gets through."""
    began = time.perf_counter()
    whole, left = run(tmp_path / "whole"), ended(tmp_path / "whole")
    length = time.perf_counter() - began
    draws = random.Random(0)
    for round_ in range(4):
        directory = tmp_path / f"round-{round_}"
        for _ in range(8):
            child = forked(lambda at=directory: run(at))
            time.sleep(draws.uniform(0, 1.2 * length))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        assert same(run(directory), whole)
        assert ended(directory) == left


@pytest.mark.slow
def test_no_space_keeps_the_last_good_checkpoint(tmp_path):
    whole, calls = run(tmp_path / "again"), count(tmp_path / "whole")  # in this order: a first run may also write what a library caches
    left = ended(tmp_path / "whole")
    renamed = [number for number, name in enumerate(calls) if name == "rename"]
    for number, name in enumerate(calls):
        if name not in ("write", "fsync", "mkdir"):
            continue
        directory, seen = tmp_path / f"full-{number}", 0

        def fail(called: str, call: Callable, arguments: tuple, number: int = number) -> None:
            nonlocal seen
            seen += 1
            if seen > number and called in ("write", "fsync", "mkdir"):  # and from then on: a full disk stays full
                if called == "write" and len(arguments[1]) > 8:
                    call(arguments[0], bytes(arguments[1])[:8])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with patched(fail), pytest.raises(FileError, match="No space left"):
            run(directory)
        if saves := sum(done < number for done in renamed):
            found = checkpoint.latest(directory)
            assert found is not None and found.step >= (2, 3)[saves - 1]
        assert same(run(directory), whole)
        assert ended(directory) == left


@pytest.mark.slow
def test_resumed_after_an_end_at_every_step(tmp_path):
    """The real modules with LoRA, dropout, accumulation and validation, stopped after each step by a signal."""
    whole, done = train(tmp_path / "whole")
    assert done.resumed == 0
    for step in range(1, 6):
        directory = tmp_path / f"stopped-{step}"
        with pytest.raises(KeyboardInterrupt):
            train(directory, rows=Signalled(at=step - 1, number=signal.SIGTERM if step % 2 else signal.SIGINT))
        again, done = train(directory, of=model(lora=0.1))
        assert done.resumed == step
        assert same(weights(whole), weights(again))
        assert ended(directory)[1] == ended(tmp_path / "whole")[1]
