"""GGUF's tensor types: their sizes, and what their packed blocks say as float32.

One idea carries all of them: a block is a few scales beside bit fields in a fixed order, so one unpacking of fields and
one scaling of groups decode every type. Work goes in chunks that stay in the cache. Values equal `gguf.quants` bit for bit;
the code books of the IQ types are read from that package when first needed. Quantizing is left out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from ...core.errors import FileError, unknown

CHUNK = 1 << 17  # values decoded at a time: 512 KiB of float32 stay in the second-level cache


class TensorType(NamedTuple):
    """A tensor type as ggml numbers it: `block` values are stored in `size` bytes."""

    id: int
    name: str
    block: int
    size: int


TYPES = {
    name: TensorType(id, name, block, size)
    for id, name, block, size in (
        (0, "F32", 1, 4),
        (1, "F16", 1, 2),
        (2, "Q4_0", 32, 18),
        (3, "Q4_1", 32, 20),
        (6, "Q5_0", 32, 22),
        (7, "Q5_1", 32, 24),
        (8, "Q8_0", 32, 34),
        (10, "Q2_K", 256, 84),
        (11, "Q3_K", 256, 110),
        (12, "Q4_K", 256, 144),
        (13, "Q5_K", 256, 176),
        (14, "Q6_K", 256, 210),
        (16, "IQ2_XXS", 256, 66),
        (17, "IQ2_XS", 256, 74),
        (18, "IQ3_XXS", 256, 98),
        (19, "IQ1_S", 256, 50),
        (20, "IQ4_NL", 32, 18),
        (21, "IQ3_S", 256, 110),
        (22, "IQ2_S", 256, 82),
        (23, "IQ4_XS", 256, 136),
        (24, "I8", 1, 1),
        (25, "I16", 1, 2),
        (26, "I32", 1, 4),
        (27, "I64", 1, 8),
        (28, "F64", 1, 8),
        (29, "IQ1_M", 256, 56),
        (30, "BF16", 1, 2),
        (34, "TQ1_0", 256, 54),
        (35, "TQ2_0", 256, 66),
        (39, "MXFP4", 32, 17),
        (40, "NVFP4", 64, 36),
    )
}

# Types whose bytes already are numbers, as numpy knows them.
STORED = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I8": "<i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}

Blocks = np.ndarray  # uint8 [n, size], one row a block
Values = np.ndarray  # float32 [n, block]


def dequantize(kind: str, raw: np.ndarray) -> np.ndarray:
    """Packed rows, uint8 [..., bytes a row], as float32 [..., values a row]. An undecodable type is a `FileError`."""
    traits = _traits(kind, raw)
    out = np.empty(raw.size // traits.size * traits.block, np.float32)
    start = 0
    for chunk in chunks(kind, raw):
        out[start : start + chunk.size] = chunk
        start += chunk.size
    return out.reshape(*raw.shape[:-1], raw.shape[-1] // traits.size * traits.block)


def chunks(kind: str, raw: np.ndarray) -> Iterator[np.ndarray]:
    """The values of `raw` in order, as flat float32 arrays of at most `CHUNK` values, so that a cast needs no second full copy."""
    traits = _traits(kind, raw)
    blocks = raw.reshape(-1, traits.size)
    step = CHUNK // traits.block
    for start in range(0, len(blocks), step):
        with np.errstate(invalid="ignore", over="ignore"):  # a damaged scale decodes to what it says
            yield DECODERS[kind](blocks[start : start + step]).reshape(-1)


def _traits(kind: str, raw: np.ndarray) -> TensorType:
    if kind not in DECODERS:
        raise FileError(unknown("tensor type to decode", kind, DECODERS), value=kind, choices=DECODERS)
    traits = TYPES[kind]
    if raw.dtype != np.uint8 or raw.ndim == 0 or raw.shape[-1] % traits.size:
        raise FileError(f"{kind}: rows must be whole blocks of {traits.size} bytes, got {raw.dtype} of shape {raw.shape}")
    return traits


# Reading blocks


def _half(blocks: Blocks, at: int) -> Values:
    """The float16 stored at byte `at` of each block: [n, 1]."""
    return blocks[:, at : at + 2].copy().view("<f2").astype(np.float32)


def _fields(packed: np.ndarray, bits: int, run: int) -> np.ndarray:
    """Bit fields, uint8 [n, k * 8 / bits]: of each `run` bytes first the lowest field of every byte, then the next field, ..."""
    word = np.dtype("<u8" if run % 8 == 0 else "u1")  # eight bytes at once where a run allows it
    source = np.ascontiguousarray(packed).view(word).reshape(len(packed), -1, run // word.itemsize)
    planes = np.empty((len(packed), source.shape[1], 8 // bits, source.shape[2]), word)
    for plane in range(8 // bits):
        np.right_shift(source, word.type(plane * bits), out=planes[:, :, plane])
    planes &= np.frombuffer(bytes([(1 << bits) - 1]) * word.itemsize, word)
    return planes.view(np.uint8).reshape(len(packed), -1)


def _scaled(values: np.ndarray, scale: Values, minus: Values | None = None) -> Values:
    """`values * scale - minus`, where column g of [n, groups] belongs to the g-th of equally long groups of values."""
    out = values.astype(np.float32).reshape(len(values), scale.shape[1], -1)
    out *= scale[:, :, None]
    if minus is not None:
        out -= minus[:, :, None]
    return out.reshape(len(values), -1)


def _looked_up(table: tuple[int, ...], indices: np.ndarray) -> np.ndarray:
    """`table[indices]` as int8, through `bytes.translate`, which is far faster than a gather for tables of bytes."""
    book = np.array(table, np.int8).tobytes().ljust(256, b"\0")
    return np.frombuffer(indices.tobytes().translate(book), np.int8).reshape(indices.shape)


# Plain numbers


def _f32(blocks: Blocks) -> Values:
    return blocks.view("<f4").astype(np.float32)


def _f16(blocks: Blocks) -> Values:
    return blocks.view("<f2").astype(np.float32)


def _bf16(blocks: Blocks) -> Values:
    return (blocks.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)


# Blocks of 32: one scale, sometimes a minimum


def _q4_0(blocks: Blocks) -> Values:
    return _scaled(_fields(blocks[:, 2:], 4, 16).view(np.int8) - np.int8(8), _half(blocks, 0))


def _q4_1(blocks: Blocks) -> Values:
    out = _scaled(_fields(blocks[:, 4:], 4, 16), _half(blocks, 0))
    out += _half(blocks, 2)
    return out


def _q5_0(blocks: Blocks) -> Values:
    values = _fields(blocks[:, 6:], 4, 16) | (_fields(blocks[:, 2:6], 1, 1) << np.uint8(4))
    return _scaled(values.view(np.int8) - np.int8(16), _half(blocks, 0))


def _q5_1(blocks: Blocks) -> Values:
    values = _fields(blocks[:, 8:], 4, 16) | (_fields(blocks[:, 4:8], 1, 1) << np.uint8(4))
    out = _scaled(values, _half(blocks, 0))
    out += _half(blocks, 2)
    return out


def _q8_0(blocks: Blocks) -> Values:
    return _scaled(blocks[:, 2:].view(np.int8), _half(blocks, 0))


# K-quants: 256 values, and scales of the groups within, themselves quantized


def _q2_k(blocks: Blocks) -> Values:
    scales = blocks[:, :16]
    return _scaled(_fields(blocks[:, 16:80], 2, 32), _half(blocks, 80) * (scales & 15), _half(blocks, 82) * (scales >> 4))


def _q3_k(blocks: Blocks) -> Values:
    low, high = _fields(blocks[:, 96:104], 4, 8), _fields(blocks[:, 104:108], 2, 4)
    scales = (low | (high << np.uint8(4))).view(np.int8) - np.int8(32)
    values = _fields(blocks[:, 32:96], 2, 32) | (_fields(blocks[:, :32], 1, 32) << np.uint8(2))
    return _scaled(values.view(np.int8) - np.int8(4), _half(blocks, 108) * scales)  # a clear high bit means minus four


def _six_bits(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eight scales and eight minima of six bits each, from twelve bytes."""
    scale, minimum, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([scale & 63, (rest & 15) | ((scale >> 2) & 48)], axis=1)
    minima = np.concatenate([minimum & 63, (rest >> 4) | ((minimum >> 2) & 48)], axis=1)
    return scales, minima


def _q4_k(blocks: Blocks) -> Values:
    scales, minima = _six_bits(blocks[:, 4:16])
    return _scaled(_fields(blocks[:, 16:], 4, 32), _half(blocks, 0) * scales, _half(blocks, 2) * minima)


def _q5_k(blocks: Blocks) -> Values:
    scales, minima = _six_bits(blocks[:, 4:16])
    values = _fields(blocks[:, 48:], 4, 32) | (_fields(blocks[:, 16:48], 1, 32) << np.uint8(4))
    return _scaled(values, _half(blocks, 0) * scales, _half(blocks, 2) * minima)


def _q6_k(blocks: Blocks) -> Values:
    values = _fields(blocks[:, :128], 4, 64) | (_fields(blocks[:, 128:192], 2, 32) << np.uint8(4))
    return _scaled(values.view(np.int8) - np.int8(32), _half(blocks, 208) * blocks[:, 192:208].view(np.int8))


# Ternary


def _tq1_0(blocks: Blocks) -> Values:
    """Five base-3 digits a byte, as the fraction x / 256: times 3 ** i, overflowing, then times 3 gives digit i."""
    digits = []
    for part, run, count in ((blocks[:, :32], 32, 5), (blocks[:, 32:48], 16, 5), (blocks[:, 48:52], 4, 4)):
        powers = np.array([1, 3, 9, 27, 81][:count], np.uint8)[:, None]
        digits.append((part.reshape(len(part), -1, 1, run) * powers).reshape(len(part), -1))
    values = (np.concatenate(digits, axis=1).astype(np.uint16) * np.uint16(3)) >> np.uint16(8)
    return _scaled(values.astype(np.int8) - np.int8(1), _half(blocks, 52))


def _tq2_0(blocks: Blocks) -> Values:
    return _scaled(_fields(blocks[:, :64], 2, 32).view(np.int8) - np.int8(1), _half(blocks, 64))


# Four-bit floats and non-linear code books of 16

_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # doubled, so that they are integers
_NONLINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@functools.cache
def _e8m0_halved() -> np.ndarray:
    return np.ldexp(np.float32(1), np.arange(256) - 128).astype(np.float32)


@functools.cache
def _ue4m3_halved() -> np.ndarray:
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    values = np.where(exponent == 0, np.ldexp(mantissa, -9), np.ldexp(8.0 + mantissa, exponent - 10)) / 2
    values[0x7F] = 0  # not a number
    return values.astype(np.float32)


def _mxfp4(blocks: Blocks) -> Values:
    return _scaled(_looked_up(_E2M1, _fields(blocks[:, 1:], 4, 16)), _e8m0_halved()[blocks[:, :1]])


def _nvfp4(blocks: Blocks) -> Values:
    return _scaled(_looked_up(_E2M1, _fields(blocks[:, 4:], 4, 8)), _ue4m3_halved()[blocks[:, :4]])


def _iq4_nl(blocks: Blocks) -> Values:
    return _scaled(_looked_up(_NONLINEAR, _fields(blocks[:, 2:], 4, 16)), _half(blocks, 0))


def _iq4_xs(blocks: Blocks) -> Values:
    scales = _fields(blocks[:, 4:8], 4, 1) | (_fields(blocks[:, 2:4], 2, 1) << np.uint8(4))
    values = _looked_up(_NONLINEAR, _fields(blocks[:, 8:], 4, 16))
    return _scaled(values, _half(blocks, 0) * (scales.view(np.int8) - np.int8(32)))


# Code books of whole groups of 4 or 8 values


@functools.cache
def _grid(kind: str) -> np.ndarray:
    """The code book of an IQ type, one word (4 or 8 int8 values) an entry."""
    from gguf import quants

    traits = vars(quants)[kind]
    traits.init_grid()
    book = traits.grid.reshape(traits.grid_shape).astype(np.int8)
    return book.view(f"<u{book.shape[1]}").reshape(-1)


@functools.cache
def _sign_masks() -> np.ndarray:
    """For each byte, eight bytes of 0 or -1: one for each of its bits, lowest first."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return (-bits.view(np.int8)).view("<u8").reshape(-1)


@functools.cache
def _even_parity() -> np.ndarray:
    """Seven stored signs and the eighth, which makes the number of minus signs even."""
    seven = np.arange(128, dtype=np.uint8)
    odd = np.unpackbits(seven[:, None], axis=1).sum(axis=1).astype(np.uint8) & np.uint8(1)
    return seven | (odd << np.uint8(7))


def _signed(kind: str, indices: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """Entries of the code book [n, 256], negative where a bit of `signs`, uint8 [n, 32], is set."""
    values = _grid(kind)[indices].view(np.int8)
    minus = _sign_masks()[signs].view(np.int8)
    return (values ^ minus) - minus


def _seven_bits(words: np.ndarray) -> np.ndarray:
    """Four sign bytes from the low 28 bits of each of [n, g] words: [n, 4 g]."""
    fields = (words[:, :, None] >> np.arange(0, 28, 7, dtype=np.uint32)) & np.uint32(127)
    return _even_parity()[fields.reshape(len(words), -1)]


def _iq2_xxs(blocks: Blocks) -> Values:
    pairs = blocks[:, 2:].copy().view("<u4").reshape(len(blocks), 8, 2)  # four indices, then signs and scale
    indices = np.ascontiguousarray(pairs[:, :, 0]).view(np.uint8)
    scales = _half(blocks, 0) * ((pairs[:, :, 1] >> np.uint32(28)).astype(np.float32) + np.float32(0.5)) * np.float32(0.25)
    return _scaled(_signed("IQ2_XXS", indices, _seven_bits(pairs[:, :, 1])), scales)


def _iq2_xs(blocks: Blocks) -> Values:
    words = blocks[:, 2:66].copy().view("<u2")
    scales = _half(blocks, 0) * (_fields(blocks[:, 66:], 4, 1) + np.float32(0.5)) * np.float32(0.25)
    return _scaled(_signed("IQ2_XS", words & np.uint16(511), _even_parity()[words >> np.uint16(9)]), scales)


def _iq2_s(blocks: Blocks) -> Values:
    indices = blocks[:, 2:34] | (_fields(blocks[:, 66:74], 2, 1).astype(np.uint16) << np.uint16(8))
    scales = _half(blocks, 0) * (_fields(blocks[:, 74:], 4, 1) + np.float32(0.5)) * np.float32(0.25)
    return _scaled(_signed("IQ2_S", indices, blocks[:, 34:66]), scales)


def _iq3_xxs(blocks: Blocks) -> Values:
    words = blocks[:, 66:].copy().view("<u4")  # signs and scale
    scales = _half(blocks, 0) * ((words >> np.uint32(28)).astype(np.float32) + np.float32(0.5)) * np.float32(0.5)
    return _scaled(_signed("IQ3_XXS", blocks[:, 2:66], _seven_bits(words)), scales)


def _iq3_s(blocks: Blocks) -> Values:
    indices = blocks[:, 2:66] | (_fields(blocks[:, 66:74], 1, 1).astype(np.uint16) << np.uint16(8))
    scales = _half(blocks, 0) * (np.uint8(2) * _fields(blocks[:, 106:], 4, 1) + np.uint8(1))
    return _scaled(_signed("IQ3_S", indices, blocks[:, 74:106]), scales)


def _shifted(indices: np.ndarray, minus: np.ndarray, scale: Values) -> Values:
    """`(entry + 1/8) * scale`, or with minus an eighth where `minus` says so: the one-bit types; one shift for each scale or part of it."""
    out = _grid("IQ1_S")[indices].view(np.int8).astype(np.float32).reshape(len(indices), minus.shape[1], -1)
    out += np.where(minus, np.float32(-0.125), np.float32(0.125))[:, :, None]
    return _scaled(out.reshape(len(indices), -1), scale)


def _three_bits(words: np.ndarray) -> np.ndarray:
    """Four fields of three bits from the low 12 bits of each of [n, g] words: uint16 [n, 4 g]."""
    return ((words[:, :, None] >> np.arange(0, 12, 3, dtype=np.uint16)) & np.uint16(7)).reshape(len(words), -1)


def _iq1_s(blocks: Blocks) -> Values:
    words = blocks[:, 34:].copy().view("<u2")  # four times three high bits, a scale of three bits, the sign of the shift
    scales = _half(blocks, 0) * (np.uint16(2) * ((words >> np.uint16(12)) & np.uint16(7)) + np.uint16(1))
    return _shifted(blocks[:, 2:34] | (_three_bits(words) << np.uint16(8)), words >> np.uint16(15) != 0, scales)


def _iq1_m(blocks: Blocks) -> Values:
    words = blocks[:, 48:].copy().view("<u2")  # four times three bits of scale; the high nibbles make one float16
    nibbles = (words & np.uint16(0xF000)) >> np.array([12, 8, 4, 0], np.uint16)
    whole = np.bitwise_or.reduce(nibbles, axis=1, keepdims=True).view("<f2").astype(np.float32)
    high = _fields(blocks[:, 32:48], 4, 1)
    indices = blocks[:, :32] | ((high & np.uint8(7)).astype(np.uint16) << np.uint16(8))
    return _shifted(indices, high & np.uint8(8) != 0, whole * (np.uint16(2) * _three_bits(words) + np.uint16(1)))


DECODERS: dict[str, Callable[[Blocks], Values]] = {
    "F32": _f32,
    "F16": _f16,
    "BF16": _bf16,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
    "MXFP4": _mxfp4,
    "NVFP4": _nvfp4,
    "IQ1_S": _iq1_s,
    "IQ1_M": _iq1_m,
    "IQ2_XXS": _iq2_xxs,
    "IQ2_XS": _iq2_xs,
    "IQ2_S": _iq2_s,
    "IQ3_XXS": _iq3_xxs,
    "IQ3_S": _iq3_s,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}
