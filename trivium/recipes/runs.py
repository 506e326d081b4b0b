"""The runs on this machine: what each was, where it stands, and their curves side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core import config as configs
from ..core.errors import FileError
from ..io import files
from ..train import history
from ..train.trackers import flat
from .report import curves

CONFIG = "config.yaml"


@dataclass(frozen=True)
class Found:
    """A run's folder, its resolved config and its rows."""

    path: Path
    config: dict[str, Any]
    rows: list[dict[str, Any]]

    def summary(self) -> dict[str, Any]:
        """One line of the list: where it stands, and its last numbers."""
        last = self.rows[-1] if self.rows else {}
        validated = [row["validation"] for row in self.rows if "validation" in row]
        return {
            "run": str(self.path),
            "steps": last.get("step", 0),
            "loss": last.get("loss"),
            "best validation": min((found["loss"] for found in validated if "loss" in found), default=None),
            "minutes": round(sum(row.get("seconds", 0.0) for row in self.rows) / 60, 1),
        }


def find(root: str | Path = "runs") -> list[Found]:
    """Every run at or below `root`, by path. Raises `FileError` if there is no such folder."""
    root = Path(root)
    if not root.is_dir():
        raise FileError(f"{root}: is no folder of runs")
    return [read(path.parent) for path in sorted(root.rglob(history.NAME))]


def read(path: str | Path) -> Found:
    """The run in folder `path`. Raises `FileError` if it holds none."""
    path = Path(path)
    if not (path / history.NAME).is_file():
        raise FileError(f"{path}: holds no run (no {history.NAME})")
    config = configs.load(path / CONFIG).data if (path / CONFIG).is_file() else {}
    return Found(path, config, history.read(path))


def compare(paths: Sequence[str | Path]) -> list[dict[str, Any]]:
    """What differs between runs: each setting that is not the same in all, and their last numbers."""
    found = [read(path) for path in paths]
    rows = []
    sides = [flat(run.config) for run in found]
    for name in sorted({name for side in sides for name in side}):
        values = [side.get(name, "(default)") for side in sides]
        if any(value != values[0] for value in values) and name != "out":
            rows.append({"what": name, **{str(run.path): value for run, value in zip(found, values, strict=True)}})
    for name in ("steps", "loss", "best validation", "minutes"):
        rows.append({"what": name, **{str(run.path): run.summary()[name] for run in found}})
    return rows


def plot(paths: Sequence[str | Path], out: str | Path, *, metric: str = "loss") -> Path:
    """An SVG of `metric` (a dotted name, such as validation.loss) by step for several runs. Raises `FileError` if none has it."""
    lines = {}
    for path in paths:
        points = [(row["step"], numbers[metric]) for row in read(path).rows if metric in (numbers := flat(row))]
        if points:
            lines[str(path)] = points
    if not lines:
        raise FileError(f"none of these runs has a metric {metric!r}")
    with files.atomic_file(Path(out)) as sink:
        sink.write(curves(lines, "step", metric).encode())
    return Path(out)
