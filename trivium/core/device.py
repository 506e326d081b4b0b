"""Names to torch devices and dtypes, with errors for what this machine does not have."""

from __future__ import annotations

import torch

from .errors import ConfigError, unknown

DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "fp64": torch.float64,
    "float64": torch.float64,
}


def device(name: str | torch.device | None = None) -> torch.device:
    """The device called `name`; None and "auto" mean cuda where there is one, else cpu."""
    if name is None or name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
    except RuntimeError:
        kinds = ("auto", "cpu", "cuda", "meta")
        raise ConfigError(unknown("device", str(name), kinds, field="device"), field="device", value=name, choices=kinds) from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices", field="device", value=name)
    return found


def dtype(name: str | torch.dtype) -> torch.dtype:
    """The dtype called `name`: "fp32" or "float32", "bf16" or "bfloat16", ..."""
    if isinstance(name, torch.dtype):
        return name
    if name not in DTYPES:
        raise ConfigError(unknown("dtype", name, DTYPES, field="dtype"), field="dtype", value=name, choices=DTYPES)
    return DTYPES[name]
