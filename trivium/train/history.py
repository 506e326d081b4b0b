"""`metrics.jsonl`: one row a step, appended as training goes, and cut back on resume to what the checkpoint has seen.

After a crash and a resume the file is what an uninterrupted run would have written, apart from the fields in `TIMED`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from .checkpoint import write_all, writing

NAME = "metrics.jsonl"
TIMED = ("seconds", "targets_per_second", "tokens_per_second")


class History:
    """The open file. Rows after `step`, and a row that a crash cut short, are dropped at opening."""

    def __init__(self, directory: Path, *, step: int):
        self.path = directory / NAME
        with writing(self.path):
            self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        end = sum(size for size, row in _rows(self.path) if row["step"] <= step)
        os.ftruncate(self.descriptor, end)
        os.lseek(self.descriptor, end, os.SEEK_SET)

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds one row; it outlives this process at once, and a power failure after `sync`."""
        with writing(self.path):
            write_all(self.descriptor, (json.dumps(row) + "\n").encode())

    def sync(self) -> None:
        """Makes every row durable."""
        with writing(self.path):
            os.fsync(self.descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        os.close(self.descriptor)


def read(directory: Path) -> list[dict[str, Any]]:
    """The rows of a run, oldest first."""
    path = directory / NAME
    return [row for _, row in _rows(path)] if path.exists() else []


def _rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Whole rows and their sizes in bytes, up to the first that is not whole."""
    found = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or not isinstance(row, dict) or "step" not in row:
            break
        found.append((len(line), row))
    return found
