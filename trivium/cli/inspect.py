"""`trivium inspect`: what a model is."""

from __future__ import annotations

from typing import Any

from .options import answer


def inspect(
    model: str, other: str | None = None, /, *, accept: bool = False, allow_unknown: tuple[str, ...] = (), json: bool = False
) -> None:
    """Shows a model's spec, its layers with their parameters and cache, what it takes at its context length, hashes, prompt
    settings, and what it was made from.

    With a second model, shows what differs between the two. A directory whose files were edited since trivium.json was
    written does not load until the edit is accepted.

    Try:
      trivium inspect smollm2
      trivium inspect models/a models/b
      trivium inspect models/smollm2 --accept
      trivium inspect smollm2 --json

    Parameters
    ----------
    model
        What to look at: a known name, a model directory, a GGUF file, an adapter directory.
    other
        A model to compare it with.
    accept
        Adopt files that were edited since trivium.json was written, and record them.
    allow_unknown
        A key of config.json to carry although its family does not know it; may be given more than once.
    json
        Answer as JSON: everything; for two models, a list of what, a, b.
    """
    from ..recipes.inspect import differences
    from ..recipes.inspect import inspect as look

    found = look(model, accept=accept, allow_unknown=allow_unknown)
    if other is not None:
        rows = differences(found, look(other, accept=accept, allow_unknown=allow_unknown))
        answer([{"what": what, "a": a, "b": b} for what, a, b in rows] or ([] if json else "nothing differs"), as_json=json)
    elif json:
        answer(found, as_json=True)
    else:
        _show(found)


def _show(found: dict[str, Any]) -> None:
    from ..core.config import dump

    answer(dump({"spec": found["spec"], **({"passes": found["passes"]} if found["passes"] else {})}), as_json=False)
    answer(found["layers"], as_json=False)
    weights, cache = found["weight_bytes"] / (1 << 20), found["cache_bytes_per_token"]
    answer(
        f"\n{found['parameters']:,} parameters, {weights:,.1f} MiB as {found['dtype']}; {cache:,} bytes of cache per token\n", as_json=False
    )
    full = found["at"]
    answer(
        f"one row of {full['context']:,} tokens: {full['cache_bytes'] / (1 << 20):,.1f} MiB of cache beside the weights, "
        f"{full['read_flops'] / 1e9:,.2f} GFLOP to read it whole, {full['token_flops'] / 1e9:,.3f} GFLOP for one more token\n",
        as_json=False,
    )
    for part in ("tokenizer", "prompt", "hashes"):
        answer(dump({part: found[part]}), as_json=False)
    answer(dump({"lineage": found["lineage"]}), as_json=False)
