"""Randomness by name: every stream of random numbers is derived from one seed and the path of what uses it.

`derive` is a pure function, so a stream does not depend on what was drawn before it, on other streams, or on how
many processes run. Nothing in the house touches a global generator.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive(seed: int, *path: int | str) -> int:
    """A 63-bit seed for the stream called `path` (`derive(0, "dropout", step)`); 1 and "1" are different names."""
    digest = hashlib.sha256(json.dumps([seed, *path]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, *path: int | str, device: str | torch.device = "cpu") -> torch.Generator:
    """A fresh torch generator on `device`, seeded with `derive(seed, *path)`."""
    import torch

    return torch.Generator(device=device).manual_seed(derive(seed, *path))
