"""`trivium inspect`: what a model is."""

from __future__ import annotations

from typing import Any

from .options import answer


def inspect(
    model: str,
    other: str | None = None,
    /,
    *,
    context: int | None = None,
    accept: bool = False,
    allow_unknown: tuple[str, ...] = (),
    json: bool = False,
) -> None:
    """Shows a model's reference sheet: its layers and what they are made of, parameters, cache per token, operations; then its
    spec, its layers one by one, hashes, prompt settings, and what it was made from.

    A preset, a bare config.json, or a model directory without weights has a sheet too: nothing is fetched, and sizes of any
    kind take no memory. With a second model, shows what differs between the two. A directory whose files were edited since
    trivium.json was written does not load until the edit is accepted.

    Try:
      trivium inspect smollm2
      trivium inspect gpt2-xl --context 1024
      trivium inspect downloads/config.json --json
      trivium inspect models/a models/b
      trivium inspect models/smollm2 --accept

    Parameters
    ----------
    model
        What to look at: a known name, a model directory, a GGUF file, an adapter directory; a preset, a config.json, a file
        with a spec.
    other
        A model to compare it with.
    context
        The length in tokens that costs are told at; the model's own if none is given.
    accept
        Adopt files that were edited since trivium.json was written, and record them.
    allow_unknown
        A key of config.json to carry although its family does not know it; may be given more than once.
    json
        Answer as JSON: everything; for two models, a list of what, a, b.
    """
    from ..recipes.inspect import differences
    from ..recipes.inspect import inspect as look

    found = look(model, context=context, accept=accept, allow_unknown=allow_unknown)
    if other is not None:
        rows = differences(found, look(other, context=context, accept=accept, allow_unknown=allow_unknown))
        answer([{"what": what, "a": a, "b": b} for what, a, b in rows] or ([] if json else "nothing differs"), as_json=json)
    elif json:
        answer(found, as_json=True)
    else:
        _show(found)


def _show(found: dict[str, Any]) -> None:
    from ..core.config import dump
    from ..recipes.sheet import tables

    for title, rows in tables(found["sheet"]):
        answer(f"{title}\n", as_json=False)
        answer(rows, as_json=False)
        answer("", as_json=False)
    answer(dump({"spec": found["spec"], **({"passes": found["passes"]} if found["passes"] else {})}), as_json=False)
    answer(found["layers"], as_json=False)
    answer("", as_json=False)
    for part in ("tokenizer", "prompt", "hashes", "lineage"):
        if part in found:
            answer(dump({part: found[part]}), as_json=False)
