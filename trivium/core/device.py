"""Names to torch devices and dtypes, with errors for what this machine does not have; and memory that is not needed any more."""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch

from .errors import ConfigError, unknown

PAGEOUT = 21  # Linux's MADV_PAGEOUT, which the module mmap does not name
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


def let_go(tensor: torch.Tensor) -> None:
    """Tell the system that nobody will read `tensor` soon. A weight that was read from a file is a view of the whole mapped file, whose
    pages else stay resident for as long as any weight of it is held. No value changes: who reads on gets them from the file again."""
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes  # then it goes when it is dropped
    if whole or tensor.device.type != "cpu" or not tensor.is_contiguous() or not sys.platform.startswith("linux"):
        return
    first, last = -(-tensor.data_ptr() // mmap.PAGESIZE), (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE  # whole pages of its own
    if last > first:
        start, size = ctypes.c_void_p(first * mmap.PAGESIZE), ctypes.c_size_t((last - first) * mmap.PAGESIZE)
        ctypes.CDLL(None).madvise(start, size, PAGEOUT)  # advice: where a kernel does not take it, nothing is lost
