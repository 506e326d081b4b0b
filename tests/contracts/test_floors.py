"""The floors hold for every folder: import-linter checks those that its contract names, this checks that it names all."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_folder_stands_on_a_floor():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    named = [name for contract in settings["contracts"] for layer in contract.get("layers", []) for name in re.findall(r"[\w.]+", layer)]
    folders = [f"trivium.{path.parent.name}" for path in (ROOT / "trivium").glob("*/__init__.py")]
    assert len(named) == len(set(named)) and set(folders) <= set(named)


def test_pins_cover_every_direct_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    direct = [*project["dependencies"], *(item for extra in project["optional-dependencies"].values() for item in extra)]
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert {re.split(r"[<>=\[;]", item)[0] for item in direct} == set(pinned)
