"""From a name to a model directory or a GGUF file: fetch, and turn one into the other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..core.errors import ConfigError
from ..core.log import log
from ..io.directory import CONFIG, read_record, weights_digest
from ..io.pull import pull
from .gguf import export_gguf
from .load import gguf_lineage, load, locate


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


def convert(
    x: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    family: str | None = None,
    extend: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Load `x` and write it as a model directory, in `dtype` (as stored; bf16 for a GGUF) and as `family` (its own), its context
    made longer by `extend` (KIND:FACTOR, as `load` takes it).

    Without `overwrite`, a directory that was made so from the same file or model directory is kept. An `out` that ends in
    .gguf becomes a GGUF file instead: see `export_gguf`.
    """
    out, source = Path(out), locate(x)
    if out.suffix == ".gguf":
        if family is not None:
            raise ConfigError(f"{out}: a GGUF file has an architecture of its own and takes no family ({family})", field="family")
        if extend is not None:
            raise ConfigError(f"{out}: extend the context in a model directory first, and convert that", field="extend", value=extend)
        return export_gguf(source, out, dtype=dtype, overwrite=overwrite)
    step = None if source.is_file() else {"step": "convert", "dtype": dtype, "family": family}
    if step is not None and extend is not None:
        step["extend"] = extend
    if step is not None and (source / CONFIG).is_file():
        step["weights"] = weights_digest(source)
    record = None if overwrite else read_record(out)
    if record is not None and record.lineage[-1:] == (step or gguf_lineage(source, dtype),):
        log.say(f"{out}: is there already, made from the same {'file' if step is None else 'weights'}")
        return out
    bundle = load(source, dtype=dtype, extend=extend)
    (bundle if step is None else replace(bundle, lineage=(*bundle.lineage, step))).save(out, family=family, overwrite=overwrite)
    count, stored = sum(p.numel() for p in bundle.model.parameters()), str(bundle.model.dtype).removeprefix("torch.")
    log.say(f"{out}: written ({count:,} parameters, {stored})")
    return out
