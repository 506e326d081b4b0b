"""Every tensor type decodes to what the gguf package decodes it to, bit for bit."""

from __future__ import annotations

import gguf
import gguf.quants
import numpy as np
import pytest

from trivium.core.errors import FileError
from trivium.io.gguf.dequantize import CHUNK, DECODERS, STORED, TYPES, chunks, dequantize

CODECS = gguf.quants._type_traits
KINDS = {kind.name: kind for kind in (*CODECS, gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)}
WRITABLE = sorted(kind.name for kind, codec in CODECS.items() if "quantize_blocks" in vars(codec))
# Where a block keeps its float16 scales; the IQ1_M type spreads one over four nibbles, the others have none.
HALVES = {
    "F16": (0,),
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    **dict.fromkeys(("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), (0,)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
}


def bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(np.uint32)


def random_blocks(kind: str, rows: int, blocks: int, seed: int = 0) -> np.ndarray:
    """Random bytes whose scales are finite numbers: uint8 [rows, bytes]."""
    generator = np.random.default_rng(seed)
    raw = generator.integers(0, 256, (rows * blocks, TYPES[kind].size), dtype=np.uint8)
    for at in HALVES.get(kind, ()):
        scales = (generator.normal(size=len(raw)) * 10.0 ** generator.integers(-6, 3, len(raw))).astype(np.float16)
        raw[:, at : at + 2] = scales[:, None].view(np.uint8)
    if kind == "IQ1_M":
        raw[:, 55] &= 0x3F  # the highest nibble of the scale: a small positive one
    if kind == "MXFP4":
        raw[:, 0] &= 0x7F  # a power of two up to 1
    if kind in ("F32", "BF16"):
        raw[:, -1] &= 0xBF  # exponents below those of infinity
    return raw.reshape(rows, -1)


def test_every_type_that_the_package_decodes_is_decoded():
    assert set(DECODERS) == set(KINDS)
    for name, traits in TYPES.items():
        kind = gguf.GGMLQuantizationType[name]
        assert (traits.id, (traits.block, traits.size)) == (kind.value, gguf.GGML_QUANT_SIZES[kind])
        assert name in DECODERS or name in STORED


@pytest.mark.concept("X.35", part="io/gguf/dequantize.py")
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_random_bytes(kind: str):
    raw = random_blocks(kind, rows=7, blocks=12)
    with np.errstate(over="ignore"):
        expected = gguf.dequantize(raw, KINDS[kind])
    assert np.isfinite(expected).all() and expected.std() > 0
    found = dequantize(kind, raw)
    assert found.dtype == np.float32 and found.shape == expected.shape
    assert np.array_equal(bits(found), bits(expected))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_any_bytes_at_all(kind: str):
    """Scales that are infinite or not numbers decode too: to the same values where those are numbers."""
    raw = np.random.default_rng(1).integers(0, 256, (5, TYPES[kind].size * 16), dtype=np.uint8)
    with np.errstate(all="ignore"):
        assert np.array_equal(dequantize(kind, raw), gguf.dequantize(raw, KINDS[kind]), equal_nan=True)


@pytest.mark.parametrize("kind", WRITABLE)
def test_quantized_data(kind: str):
    """What the gguf package can quantize comes back near what went in, and exactly as the package reads it."""
    values = np.random.default_rng(2).normal(size=(4, 512)).astype(np.float32)
    raw = gguf.quantize(values, KINDS[kind]).view(np.uint8).reshape(4, -1)
    found = dequantize(kind, raw)
    assert np.array_equal(bits(found), bits(gguf.dequantize(raw, KINDS[kind])))
    assert np.corrcoef(found.ravel(), values.ravel())[0, 1] > (0.65 if kind.startswith("TQ") else 0.98)  # ternary types are coarse


@pytest.mark.parametrize("kind", ["Q4_1", "Q6_K", "F16", "IQ2_XS"])
def test_chunks_are_bounded_and_whole(kind: str):
    traits = TYPES[kind]
    raw = random_blocks(kind, rows=3, blocks=CHUNK // traits.block // 2 + 5)
    parts = list(chunks(kind, raw))
    assert len(parts) == 2 and max(part.size for part in parts) <= CHUNK
    assert np.array_equal(bits(np.concatenate(parts)), bits(gguf.dequantize(raw, KINDS[kind]).ravel()))
    assert np.array_equal(bits(dequantize(kind, raw).ravel()), bits(np.concatenate(parts)))


def test_leading_dimensions_stay_and_nothing_is_something():
    raw = random_blocks("Q4_0", rows=6, blocks=2).reshape(2, 3, -1)
    assert dequantize("Q4_0", raw).shape == (2, 3, 64)
    assert dequantize("Q4_0", raw[:, :0]).shape == (2, 0, 64)


def test_unknown_types_and_half_blocks_are_refused():
    with pytest.raises(FileError, match="'Q4_2'; did you mean"):
        dequantize("Q4_2", np.zeros(18, np.uint8))
    with pytest.raises(FileError, match="whole blocks of 18 bytes"):
        dequantize("Q4_0", np.zeros(17, np.uint8))
    with pytest.raises(FileError, match="got float32 of shape"):
        dequantize("Q4_0", np.zeros(18, np.float32))
