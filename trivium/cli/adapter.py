"""`trivium adapter inspect`, `merge` and `unmerge`."""

from __future__ import annotations

from pathlib import Path

from .options import answer


def inspect(adapter: Path, /, *, maps: bool = False, json: bool = False) -> None:
    """Shows what an adapter directory (PEFT's LoRA) says and holds: its base, its settings, the maps that it changes.

    Try:
      trivium adapter inspect runs/first/adapter
      trivium adapter inspect runs/first/adapter --maps
      trivium adapter inspect runs/first/adapter --json

    Parameters
    ----------
    adapter
        The directory.
    maps
        List every map, with its rank, size and the norm of its update.
    json
        Answer as JSON: everything, every map included.
    """
    from ..core.config import dump
    from ..recipes.adapter import inspect_adapter

    found = inspect_adapter(adapter)
    if json:
        answer(found, as_json=True)
        return
    listed = found.pop("maps")
    answer(dump(found), as_json=False)
    answer(listed if maps else f"{len(listed)} maps; --maps lists them", as_json=False)


def merge(
    adapter: Path, /, *, out: Path, base: str | None = None, dtype: str | None = None, tolerance: float = 0.02,
    probe: str | None = None, accept: bool = False, overwrite: bool = False, json: bool = False,
) -> None:  # fmt: skip
    """Adds an adapter into its base's weights, measures by how much that moved the model, and writes a model directory.

    Above the tolerance nothing is written, and the status is 1. Sums are made in float32 and rounded once.

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
