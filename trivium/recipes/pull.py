"""From a name to a model directory: fetch, and turn a GGUF file into Hugging Face's layout."""

from __future__ import annotations

from pathlib import Path

from ..core.log import log
from ..io.directory import read_record
from ..io.pull import pull
from .load import gguf_lineage, load


def pull_model(name: str, *, out: str | Path | None = None, dtype: str | None = None, overwrite: bool = False) -> Path:
    """Fetch `name` (see `io.pull`) and return a path that loads.

    With `out`, that is a model directory: a GGUF file is dequantized to `dtype` (bf16 if none is given) and written there;
    one that is there already from the same file is kept.
    """
    found = pull(name)
    log.say(
        f"{name}: {'fetched' if found.fetched else 'already here'}: {found.path}" + (f" (sha256 {found.sha256})" if found.sha256 else "")
    )
    return found.path if out is None else convert(found.path, out, dtype=dtype, overwrite=overwrite)


def convert(x: str | Path, out: str | Path, *, dtype: str | None = None, family: str | None = None, overwrite: bool = False) -> Path:
    """Load `x` and write it as a model directory, in `dtype` (as stored; bf16 for a GGUF) and as `family` (its own)."""
    out = Path(out)
    if Path(x).is_file() and not overwrite:
        record = read_record(out)
        if record is not None and record.lineage == (gguf_lineage(Path(x), dtype),):
            log.say(f"{out}: is there already, made from the same file")
            return out
    bundle = load(x, dtype=dtype)
    bundle.save(out, family=family, overwrite=overwrite)
    log.say(
        f"{out}: written ({sum(p.numel() for p in bundle.model.parameters()):,} parameters, {str(bundle.model.dtype).removeprefix('torch.')})"
    )
    return out
