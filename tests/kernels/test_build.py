"""The library is built where there is a compiler, renewed with its source, and never missed where there is none."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("hatchling")
from hatch_build import build

CODE = """
import torch
from trivium.kernels import native
from trivium.nn.norms import RMS
print(RMS().build(4)(torch.ones(1, 4)).shape, native.state())
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "native.cpp").write_text('extern "C" int answer() { return 42; }\n')
    return tmp_path


def test_without_a_compiler_there_is_a_word_and_no_library(folder, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    said: list[str] = []
    assert build(folder, warn=said.append) == []
    assert "no C++ compiler (no-such-compiler)" in said[0] and not list(folder.glob("*.so"))


def test_a_compiler_that_fails_leaves_nothing(folder, monkeypatch):
    monkeypatch.setenv("CXX", "false")
    said: list[str] = []
    assert build(folder, warn=said.append) == [] and said
    assert sorted(path.name for path in folder.iterdir()) == ["native.cpp"]


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_a_changed_source_is_built_anew_and_the_old_library_goes(folder):
    first = build(folder)
    assert ctypes.CDLL(str(next(path for path in first if "plain" in path.name))).answer() == 42
    assert len(first) == (4 if platform.machine() == "x86_64" else 1)
    times = [path.stat().st_mtime_ns for path in first]
    assert build(folder) == first and [path.stat().st_mtime_ns for path in first] == times
    with open(folder / "native.cpp", "a") as source:
        source.write("// changed\n")
    second = build(folder)
    assert not set(first) & set(second) and sorted(folder.glob("*.so")) == sorted(second)


@pytest.mark.slow
def test_the_environment_switches_it_off():
    environment = {**os.environ, "TRIVIUM_NATIVE": "0"}
    shown = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True).stdout
    assert shown == "torch.Size([1, 4]) off (TRIVIUM_NATIVE=0)\n"
