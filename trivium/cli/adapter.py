"""`trivium adapter inspect`, `merge`, `unmerge` and `convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from .options import answer


def inspect(adapter: Path, /, *, maps: bool = False, json: bool = False) -> None:
    """Shows what an adapter directory says and holds: its base, its settings, the maps that it changes, its other tensors.

    Try:
      trivium adapter inspect runs/first/adapter
      trivium adapter inspect runs/first/adapter --maps
      trivium adapter inspect runs/first/adapter --json

    Parameters
    ----------
    adapter
        The directory.
    maps
        List every map, with its rank, size and the norm of its update, and every other tensor with its shape and norm.
    json
        Answer as JSON: everything, every map and tensor included.
    """
    from ..core.config import dump
    from ..recipes.adapter import inspect_adapter

    found = inspect_adapter(adapter)
    if json:
        answer(found, as_json=True)
        return
    listed, others = found.pop("maps"), found.pop("tensors")
    answer(dump(found), as_json=False)
    if not maps:
        answer(f"{len(listed)} maps and {len(others)} other tensors; --maps lists them", as_json=False)
    for rows in (listed, others) if maps else ():
        if rows:
            answer(rows, as_json=False)


def merge(
    adapter: Path, /, *, out: Path, base: str | None = None, dtype: str | None = None, tolerance: float = 0.02,
    probe: str | None = None, accept: bool = False, overwrite: bool = False, json: bool = False,
) -> None:  # fmt: skip
    """Adds an adapter into its base's weights, measures by how much that moved the model, and writes a model directory.

    Above the tolerance nothing is written, and the status is 1. Sums are made in float32 and rounded once. Where the base is packed
    in few bits, what is written is not, and what that costs is said.

    Try:
      trivium adapter merge runs/first/adapter --out models/taught
      trivium adapter merge runs/first/adapter --base models/smollm2 --dtype fp32 --out models/taught

    Parameters
    ----------
    adapter
        The adapter's directory.
    out
        The directory to write.
    base
        The base model, if it is not where the adapter says.
    dtype
        What to merge and save in; otherwise as the base is stored.
    tolerance
        Largest mean KL divergence, in nats, between the model before and after.
    probe
        The text to measure on, instead of a short conversation.
    accept
        Merge into other base weights than the adapter was trained on, or into edited files.
    overwrite
        Replace what --out holds.
    json
        Answer as JSON: path, and what merging changed.
    """
    from dataclasses import asdict

    from ..recipes.adapter import merge_adapter

    found = merge_adapter(
        adapter, out, base=base, dtype=dtype, tolerance=tolerance, probe=probe, accept=accept, overwrite=overwrite
    )  # fmt: skip
    answer({"path": str(out), **asdict(found)} if json else str(out), as_json=json)


def unmerge(
    model: str, adapter: Path, /, *, out: Path, dtype: str | None = None, probe: str | None = None, overwrite: bool = False,
    json: bool = False,
) -> None:  # fmt: skip
    """Takes an adapter out of a model that it was merged into: the base again, up to the rounding of its dtype.

    DoRA needs the norms that merging divided by, which adapters saved here keep; what was trained whole cannot be taken out.

    Try:
      trivium adapter unmerge models/taught runs/first/adapter --out models/base-again

    Parameters
    ----------
    model
        The model that the adapter was merged into.
    adapter
        The adapter's directory.
    out
        The directory to write.
    dtype
        What to compute and save in; otherwise as stored.
    probe
        The text to measure on, instead of a short conversation.
    overwrite
        Replace what --out holds.
    json
        Answer as JSON: path, and by how much computing and rounding moved the result.
    """
    from dataclasses import asdict

    from ..recipes.adapter import unmerge_adapter

    found = unmerge_adapter(model, adapter, out, dtype=dtype, probe=probe, overwrite=overwrite)
    answer({"path": str(out), **asdict(found)} if json else str(out), as_json=json)


def convert(
    adapter: Path, /, *, out: Path, kind: Literal["lora", "dora"] | None = None, rank: int | None = None, dtype: str | None = None,
    onto: str | None = None, base: str | None = None, tolerance: float = 0.02, probe: str | None = None, accept: bool = False,
    overwrite: bool = False, json: bool = False,
) -> None:  # fmt: skip
    """Writes an adapter in another form, and measures by how much that moved the model; above the tolerance nothing is written.

    One that started from the base's own weights (PiSSA, OLoRA) becomes plain LoRA on the base as it was.

    Try:
      trivium adapter convert runs/first/adapter --rank 4 --out adapters/small
      trivium adapter convert runs/first/adapter --dtype fp16 --out adapters/half
      trivium adapter convert runs/first/adapter --out taught-lora.gguf
      trivium adapter convert runs/dora/adapter --kind lora --rank 16 --out adapters/plain

    Parameters
    ----------
    adapter
        The adapter's directory.
    out
        The directory to write; a name that ends in .gguf makes a GGUF file, which llama.cpp takes with --lora.
    kind
        Make it LoRA or DoRA, whatever it was, if weights of the base can express it.
    rank
        Cut every map's update to this rank, by its largest singular values.
    dtype
        What to store: fp32, bf16 or fp16; otherwise fp32.
    onto
        The same base in another layout, whose names the result takes: a model directory.
    base
        The base model, if it is not where the adapter says.
    tolerance
        Largest mean KL divergence, in nats, between the model before and after.
    probe
        The text to measure on, instead of a short conversation.
    accept
        Take other base weights than the adapter was trained on, or edited files.
    overwrite
        Replace what --out holds.
    json
        Answer as JSON: path, kind, parameters, and what converting changed.
    """
    from dataclasses import asdict

    from ..recipes.adapter_convert import convert_adapter

    found = convert_adapter(
        adapter, out, base=base, onto=onto, kind=kind, rank=rank, dtype=dtype, tolerance=tolerance, probe=probe, accept=accept,
        overwrite=overwrite,
    )  # fmt: skip
    answer(asdict(found) if json else found.path, as_json=json)
