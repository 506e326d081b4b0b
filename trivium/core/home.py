"""Where Trivium keeps what it fetches: TRIVIUM_HOME, else `trivium` under the user's cache directory."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """The cache directory, which may not exist yet."""
    if root := os.environ.get("TRIVIUM_HOME"):
        return Path(root).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trivium"
