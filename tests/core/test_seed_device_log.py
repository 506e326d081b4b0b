"""Seeds by name, devices and dtypes by name, and a log that keeps stdout clean."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trivium.core import log as log_module
from trivium.core.device import device, dtype, let_go
from trivium.core.errors import ConfigError
from trivium.core.home import home
from trivium.core.log import layout, log
from trivium.core.seed import derive, generator

paths = st.lists(st.integers() | st.text(max_size=5), max_size=4)


def test_derived_seeds_never_change():
    assert derive(0, "a", 1) == 5352727647617221297  # a released seed is a promise: resumed runs depend on it


@given(st.integers(), paths, st.integers(), paths)
def test_streams_differ_where_their_names_differ(seed, path, other_seed, other_path):
    a, b = derive(seed, *path), derive(other_seed, *other_path)
    assert 0 <= a < 2**63
    assert (a == b) == ((seed, path) == (other_seed, other_path))


def test_generators_are_independent_of_what_was_drawn():
    first = torch.randn(4, generator=generator(1, "x"))
    torch.randn(3)
    assert torch.equal(first, torch.randn(4, generator=generator(1, "x")))
    assert not torch.equal(first, torch.randn(4, generator=generator(1, "y")))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_mapped_weights_that_are_let_go_leave_memory_and_come_back(tmp_path):
    def resident() -> float:
        """MB of mapped files."""
        found = re.search(r"RssFile:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None
        return int(found[1]) / 1e3

    torch.arange(2**24, dtype=torch.int32).numpy().tofile(tmp_path / "weights")
    mapped = torch.from_file(str(tmp_path / "weights"), size=2**24, dtype=torch.int32)
    first, second = mapped[: 2**23 + 5], mapped[2**23 + 5 :]  # not at the edge of a page
    first.sum(), second.sum()
    before = resident()
    let_go(first)
    assert 30 < before - resident() < 35  # of 33.6 and 33.6
    assert torch.equal(mapped, torch.arange(2**24, dtype=torch.int32))
    own = torch.ones(4)
    let_go(own)
    assert own.sum() == 4


def test_devices_and_dtypes_by_name():
    assert device("cpu") == torch.device("cpu") and device("meta").type == "meta"
    assert device().type == ("cuda" if torch.cuda.is_available() else "cpu") == device("auto").type
    assert dtype("bf16") == dtype("bfloat16") == dtype(torch.bfloat16) == torch.bfloat16 and dtype("fp32") == torch.float32
    for wrong, message in [("cpuu", "did you mean 'cpu'"), ("cuda:99", "torch sees")]:
        with pytest.raises(ConfigError, match=message):
            device(wrong)
    with pytest.raises(ConfigError, match="did you mean 'bf16'"):
        dtype("bf61")


def test_home_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TRIVIUM_HOME", raising=False)
    assert home() == tmp_path / "trivium"
    monkeypatch.setenv("TRIVIUM_HOME", str(tmp_path / "here"))
    assert home() == tmp_path / "here"


def test_log_leaves_stdout_alone(capsys):
    log.say("reading")
    log.warn("odd")
    log.error("bad")
    log.table("Results", ["name", "loss"], [["a", 0.123456], ["long name", 12.0]])
    with log.progress("training", 3) as bar:
        for _ in range(3):
            bar.advance(loss=0.5)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[:3] == ["reading", "warning: odd", "error: bad"]
    assert err.splitlines()[3:8] == ["Results", "name         loss", "---------  ------", "a          0.1235", "long name      12"]
    assert err.splitlines()[8].startswith("training: 3/3") and err.endswith("loss 0.5\n") and len(err.splitlines()) == 9


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_terminals_get_color_unless_refused(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    for refused, expected in [("", "\x1b[33mwarning: x\x1b[0m\n"), ("1", "warning: x\n")]:
        monkeypatch.setattr(sys, "stderr", Terminal())
        monkeypatch.setenv("NO_COLOR", refused)
        log.warn("x")
        assert sys.stderr.getvalue() == expected
    with log.progress("training", 2) as bar:
        bar.advance(2, loss=1.25)
    assert "training" in sys.stderr.getvalue() and "2/2" in sys.stderr.getvalue() and "loss 1.25" in sys.stderr.getvalue()


def test_plain_progress_is_sparse(monkeypatch, capsys):
    clock = iter(range(1000))
    monkeypatch.setattr(log_module.time, "monotonic", lambda: next(clock))
    with log.progress("training", 100) as bar:
        for _ in range(12):
            bar.advance()
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == ["5/100", "10/100"]


def test_layout_of_nothing():
    assert layout(["a", "bb"], []) == "a  bb\n-  --"
