"""Safetensors, both ways: checked headers, lazy memory-mapped reading, sharded and atomic writing.

The header check is our own, so that a hostile or damaged file gets one clear error and costs bounded memory.
Tensors read are private views of the mapped file: nothing is copied until it is used, converted or written to.
Files are replaced by rename and never changed in place; a program that rewrites a file in place while a model
holds it changes that model's weights.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import FileError
from .files import atomic_file, parse_json, read_json, write_json

DTYPES = {  # in the order in which the safetensors package lays tensors out
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 25_000_000  # bytes; a quarter of a million tensors
SHARD_BYTES = 5_000_000_000
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class Lazy:
    """A tensor that is known by shape and dtype and comes when `load` is called."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> Lazy:
        """A tensor that is there already."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    def derive(self, shape: tuple[int, ...], change: Callable[[Tensor], Tensor]) -> Lazy:
        """What `change` makes of this tensor, later; of the same dtype."""
        return Lazy(shape, self.dtype, lambda: change(self.load()))

    def to(self, dtype: torch.dtype) -> Lazy:
        """The same values in `dtype`; what is no floating-point tensor stays as it is."""
        if not self.dtype.is_floating_point or dtype == self.dtype:
            return self
        return Lazy(self.shape, dtype, lambda: self.load().to(dtype))

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_file(path: Path) -> dict[str, Lazy]:
    """The tensors of one safetensors file, by name, in the file's order. Raises `FileError` on anything amiss."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else None
            if length is None or length > min(MAX_HEADER, size - 8):
                raise FileError(f"{path}: is cut short or no safetensors file: its header does not fit into its {size} bytes")
            header = parse_json(file.read(length), where=f"{path}: header")
        entries = _check_header(header, size - 8 - length, path)
        mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror or error}") from error
    except RuntimeError as error:  # torch's word for a file that cannot be mapped
        raise FileError(f"{path}: cannot be mapped into memory: {error}") from error
    return {name: _view(mapped, 8 + length + begin, dtype, shape) for name, (dtype, shape, begin) in entries.items()}


def _view(mapped: Tensor, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Lazy:
    def load() -> Tensor:
        raw = mapped[offset : offset + math.prod(shape) * dtype.itemsize]
        if offset % dtype.itemsize:  # allowed by the format; kernels want aligned addresses
            raw = raw.clone()
        return raw.view(dtype).view(shape)

    return Lazy(shape, dtype, load)


def _check_header(header: dict[str, Any], size: int, path: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], int]]:
    """Name -> (dtype, shape, first byte); `size` is that of the data, which the tensors must cover exactly once."""
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FileError(f"{path}: __metadata__ must map names to strings")
    entries, spans = {}, []
    for name, entry in header.items():
        where = f"{path}: tensor {name!r:.100}"
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise FileError(f"{where}: needs exactly dtype, shape and data_offsets")
        if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
            raise FileError(f"{where}: dtype {entry['dtype']!r:.40} is not known (known: {', '.join(DTYPES)})")
        dtype, shape, offsets = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        if not _sizes(shape) or len(shape) > 16 or not _sizes(offsets) or len(offsets) != 2:
            raise FileError(f"{where}: shape and data_offsets must be short lists of sizes, got {shape!r:.60}, {offsets!r:.60}")
        begin, end = offsets
        if not begin <= end <= size:
            raise FileError(
                f"{where}: its bytes {begin}..{end} lie outside the file's {size} bytes of data; the file is cut short or damaged"
            )
        if math.prod(shape) * dtype.itemsize != end - begin:
            raise FileError(f"{where}: shape {shape} of {entry['dtype']} does not take the {end - begin} bytes it claims")
        entries[name] = (dtype, tuple(shape), begin)
        spans.append((begin, end, name))
    spans.sort()
    edges = [(0, 0, "the header"), *spans, (size, size, "the end of the file")]
    for (_, end, before), (begin, _, after) in pairwise(edges):
        if end != begin:
            what = "overlap" if end > begin else "leave a hole"
            raise FileError(f"{path}: {before!r:.100} and {after!r:.100} {what}: one ends at byte {end}, the next begins at {begin}")
    return entries


def _sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**62 for value in values)


def write_file(path: Path, tensors: Mapping[str, Lazy]) -> str:
    """Write one safetensors file atomically, tensor by tensor, byte for byte as the safetensors package would.

    Returns its SHA-256.
    """
    order = list(NAMES)
    ordered = sorted(tensors.items(), key=lambda item: (order.index(item[1].dtype), item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, lazy in ordered:
        header[name] = {"dtype": NAMES[lazy.dtype], "shape": list(lazy.shape), "data_offsets": [place, place + lazy.bytes]}
        place += lazy.bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, lazy in ordered:
            tensor = lazy.load()
            assert tuple(tensor.shape) == lazy.shape and tensor.dtype == lazy.dtype, f"{name}: not what was announced"
            if lazy.bytes:
                file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return file.sha256()


def write_weights(directory: Path, tensors: Mapping[str, Lazy], *, shard_bytes: int = SHARD_BYTES) -> dict[str, str]:
    """Write a model's tensors into `directory`: one file, or shards of at most `shard_bytes` with their index.

    A tensor larger than a shard gets one of its own. Returns the SHA-256 of each safetensors file.
    """
    shards: list[dict[str, Lazy]] = [{}]
    filled = 0
    for name, lazy in tensors.items():
        if shards[-1] and filled + lazy.bytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = lazy
        filled += lazy.bytes
    if len(shards) == 1:
        return {SINGLE: write_file(directory / SINGLE, tensors)}
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    hashes = {name: write_file(directory / name, shard) for name, shard in zip(names, shards, strict=True)}
    totals = {
        "total_parameters": sum(math.prod(lazy.shape) for lazy in tensors.values()),
        "total_size": sum(lazy.bytes for lazy in tensors.values()),
    }
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    write_json(directory / INDEX, {"metadata": totals, "weight_map": weight_map})
    return hashes


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that hold a directory's weights. Raises `FileError` where there are none, or only pickles."""
    if (directory / INDEX).exists():
        if (directory / SINGLE).exists():
            raise FileError(f"{directory}: holds both {SINGLE} and {INDEX}; remove the one that is not meant")
        return [directory / name for name in sorted(set(_weight_map(directory).values()))]
    if (directory / SINGLE).exists():
        return [directory / SINGLE]
    pickles = sorted(path.name for pattern in PICKLES for path in directory.glob(pattern))
    if pickles:
        raise FileError(
            f"{directory}: its weights are pickles ({pickles[0]}), which can run code and are never opened here; "
            "get the safetensors form of this model, or convert it where you trust the file"
        )
    raise FileError(f"{directory}: holds no weights ({SINGLE} or {INDEX})")


def read_weights(directory: Path) -> dict[str, Lazy]:
    """All tensors of a model directory, single or sharded. Shards must hold what the index says, no more and no less."""
    files = weight_files(directory)
    if files == [directory / SINGLE]:
        return read_file(files[0])
    weight_map = _weight_map(directory)
    found: dict[str, Lazy] = {}
    for path in files:
        shard = read_file(path)
        listed = {name for name, file in weight_map.items() if file == path.name}
        if odd := sorted(listed ^ set(shard)):
            side = "is listed there but not in it" if odd[0] in listed else "is in it but not listed there"
            raise FileError(f"{path}: does not match {INDEX}: {odd[0]!r} {side} ({len(odd)} in all)")
        found.update(shard)
    return found


def _weight_map(directory: Path) -> dict[str, str]:
    index = read_json(directory / INDEX)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FileError(f"{directory / INDEX}: needs a 'weight_map' from tensors to files")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise FileError(f"{directory / INDEX}: tensor {name!r:.100} is said to be in {file!r:.100}, which is no file of this directory")
    return weight_map
