"""Reading the small text files of a model directory, with one error for whatever is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..core.errors import FileError

MAX_BYTES = 1 << 28


def read_text(file: Path) -> str:
    """The file's text, byte for byte. Raises `FileError`."""
    try:
        if file.stat().st_size > MAX_BYTES:
            raise FileError(f"{file}: larger than {MAX_BYTES >> 20} MiB, which no tokenizer is")
        return file.read_bytes().decode()
    except OSError as error:
        raise FileError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise FileError(f"{file}: not UTF-8 at byte {error.start}; the file is damaged: fetch it again") from None


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file. Raises `FileError`."""
    if not file.exists():
        return {}
    try:
        data = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise error if isinstance(error, FileError) else FileError(f"{file}: not JSON: {error}") from None
    if not isinstance(data, dict):
        raise FileError(f"{file}: not a JSON object")
    return data
