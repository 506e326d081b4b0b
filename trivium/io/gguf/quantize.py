"""Float32 values as GGUF stores them: F32, F16, BF16 and Q8_0, equal to `gguf.quants` bit for bit.

A value that is lost altogether (too large for float16, or not finite where a block shares a scale) is an error and not
an infinity. K-quants and smaller types are left to llama.cpp's own tool, which measures what they cost.
"""

from __future__ import annotations

import numpy as np

from ...core.errors import FileError
from .dequantize import TYPES

WRITTEN = ("F32", "F16", "BF16", "Q8_0")


def quantize(kind: str, values: np.ndarray) -> np.ndarray:
    """Flat float32 `values`, a whole number of blocks, as uint8. Raises `FileError` for a value that `kind` cannot hold."""
    assert kind in WRITTEN and values.dtype == np.float32 and values.ndim == 1 and values.size % TYPES[kind].block == 0
    match kind:
        case "F32":
            return values.view(np.uint8)
        case "F16":
            with np.errstate(over="ignore"):
                half = values.astype("<f2")
            _refuse_infinities(half, values, "float16 ends at 65504")
            return half.view(np.uint8)
        case "BF16":
            return _bf16(values).view(np.uint8)
        case _:
            return _q8_0(values.reshape(-1, TYPES[kind].block)).reshape(-1)


def _refuse_infinities(stored: np.ndarray, values: np.ndarray, why: str) -> None:
    lost = np.isinf(stored) & np.isfinite(values)
    if lost.any():
        raise FileError(f"{int(lost.sum())} values cannot be held, the largest {np.abs(values[lost]).max():g}: {why}; choose bf16 or f32")


def _bf16(values: np.ndarray) -> np.ndarray:
    """The upper halves, rounded to nearest, ties to even; NaNs stay NaNs. uint16."""
    bits = values.view(np.uint32)
    upper = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint64(16)).astype(np.uint16)
    nan = np.isnan(values)
    upper[nan] = (bits[nan] >> np.uint32(16)).astype(np.uint16) | np.uint16(64)
    return upper


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    """Blocks [n, 32] as [n, 34]: a float16 scale, and 32 integers rounded half away from zero."""
    if not np.isfinite(blocks).all():
        raise FileError("a block with a value that is not finite has no scale; choose bf16 or f32")
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
        half = scale.astype("<f2")
    inverse[np.isinf(inverse)] = 0  # all of the block rounds to zero
    _refuse_infinities(half, scale, "a block's scale is a float16")
    scaled = blocks * inverse
    size = np.abs(scaled)
    whole = np.floor(size)
    rounded = np.copysign(whole + np.floor(2 * (size - whole)), scaled).astype(np.int8)
    return np.concatenate([half.view(np.uint8), rounded.view(np.uint8)], axis=1)
