"""What the lines of the ledger say: a table for each question, and differences that are paired over seeds and held-out rows.

Intervals draw both anew (`checks.bootstrap.crossed`); all draws are the same, so that any two ways can be compared. With three seeds
the spread over seeds is known only roughly. A claim holds if the whole interval agrees with it, does not if none of it does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ....checks.bootstrap import Crossed, crossed
from .runs import Line
from .ways import UNTAUGHT, Way

Lines = Mapping[str, Sequence[Line]]
"""By way, its lines, one for each seed in order; of `UNTAUGHT` one line, which stands for every seed."""
POINT = 0.01
COLUMNS = (  # in the order that they are shown in: a claim's file has them sorted by name
    "way",
    "rate",
    "exact match",
    "fields right",
    "pairs told apart",
    "better side likelier per token",
    "nats per token of the answer",
    "log-probability per token of chosen",
    "tokens of an answer",
    "forgotten, nats per token of general text",
    "trained",
    "share",
    "tokens per second",
    "peak MB",
)


def rows_of(lines: Sequence[Line], values: str, seeds: int) -> np.ndarray:
    """[S, N]: a number for each seed and held-out row; one line stands for all seeds."""
    found = np.array([line[values] for line in lines], dtype=np.float64)
    return np.repeat(found, seeds, 0) if len(found) == 1 else found


def exact(lines: Sequence[Line], *, seeds: int) -> Crossed:
    """The share of held-out texts whose answer is right as a whole."""
    found = rows_of(lines, "exact", seeds)
    return crossed(found, np.ones(found.shape[1]))


def fields(lines: Sequence[Line], *, seeds: int) -> Crossed:
    """The share of the fields asked for that are right."""
    return crossed(rows_of(lines, "fields", seeds), np.array(lines[0]["fields wanted"]))


def nats(lines: Sequence[Line], of: str, *, seeds: int) -> Crossed:
    """Nats per token: of the right answers ("answer") or of general text ("general")."""
    return crossed(-rows_of(lines, f"{of} logprobs", seeds), np.array(lines[0][f"{of} tokens"]))


def chosen(lines: Sequence[Line], *, seeds: int) -> Crossed:
    """Log-probability per token of the better answers."""
    return crossed(rows_of(lines, "pair logprobs", seeds)[:, 0::2], np.array(lines[0]["pair tokens"])[0::2])


def told_apart(lines: Sequence[Line], untaught: Line, *, seeds: int) -> Crossed:
    """The share of held-out pairs whose better answer gained more log-probability than the worse one did: rewards as DPO has them,
    which can be asked of every way."""
    gained = rows_of(lines, "pair logprobs", seeds) - np.array(untaught["pair logprobs"])
    right = (gained[:, 0::2] > gained[:, 1::2]).astype(float)
    return crossed(right, np.ones(right.shape[1]))


def likelier(lines: Sequence[Line], *, seeds: int) -> Crossed:
    """The share of held-out pairs whose better answer is likelier per token."""
    each = rows_of(lines, "pair logprobs", seeds) / np.array(lines[0]["pair tokens"])
    right = (each[:, 0::2] > each[:, 1::2]).astype(float)
    return crossed(right, np.ones(right.shape[1]))


def spoken(lines: Sequence[Line], *, seeds: int) -> Crossed:
    """Tokens of the model's own answers."""
    found = rows_of(lines, "spoken", seeds)
    return crossed(found, np.ones(found.shape[1]))


def told(found: Crossed) -> dict[str, float]:
    """A value with its interval, as JSON."""
    whole = found.interval()
    return {"value": round(whole.value, 4), "low": round(whole.low, 4), "high": round(whole.high, 4)}


def words(found: Crossed, *, percent: bool = True) -> str:
    """The same in words."""
    whole = found.interval()
    if percent:
        return f"{whole.value:.1%} ({whole.low:.1%} to {whole.high:.1%})"
    return f"{whole.value:.3f} ({whole.low:.3f} to {whole.high:.3f})"


def standing(difference: Crossed, *, above: float) -> str:
    """Whether a difference is above a limit."""
    whole = difference.interval()
    return "holds" if whole.low > above else "does not hold" if whole.high < above else "is not settled"


def costs(lines: Sequence[Line]) -> dict[str, Any]:
    """What training took: the fastest seed's rate, since what else runs on a machine only slows, and the largest peak. Nothing of what
    was not trained."""
    if "trained" not in lines[0]:
        return {"trained": 0, "share": 0.0, "tokens per second": None, "peak MB": None}
    rate = max(line["tokens per second"] for line in lines)
    peaks = [line["peak MB"] for line in lines if line["peak MB"] is not None]
    return {
        "trained": lines[0]["trained"],
        "share": round(lines[0]["trained"] / lines[0]["parameters"], 6),
        "tokens per second": round(rate, 1),
        "peak MB": round(max(peaks)) if peaks else None,
    }


def teaching(lines: Lines, ways: Mapping[str, Way], *, seeds: int) -> list[dict[str, Any]]:
    """A row for each way on the demo's task."""
    found = []
    for name, way in ways.items():
        own, base = lines[name], lines[UNTAUGHT]
        forgotten = nats(own, "general", seeds=seeds) - nats(base, "general", seeds=seeds)
        found.append(
            {
                "way": name,
                "rate": way.rate,
                "exact match": told(exact(own, seeds=seeds)),
                "fields right": told(fields(own, seeds=seeds)),
                "nats per token of the answer": told(nats(own, "answer", seeds=seeds)),
                "forgotten, nats per token of general text": told(forgotten),
                **costs(own),
            }
        )
    return found


def preferring(lines: Lines, ways: Mapping[str, Way], *, seeds: int) -> list[dict[str, Any]]:
    """A row for each way on the pairs."""
    found = []
    for name, way in ways.items():
        own, base = lines[name], lines[UNTAUGHT]
        found.append(
            {
                "way": name,
                "rate": way.rate,
                "pairs told apart": told(told_apart(own, base[0], seeds=seeds)),
                "better side likelier per token": told(likelier(own, seeds=seeds)),
                "log-probability per token of chosen": told(chosen(own, seeds=seeds)),
                "tokens of an answer": told(spoken(own, seeds=seeds)),
                "forgotten, nats per token of general text": told(nats(own, "general", seeds=seeds) - nats(base, "general", seeds=seeds)),
                **costs(own),
            }
        )
    return found


def markdown(table: Sequence[Mapping[str, Any]]) -> str:
    """A table for the documentation."""
    head = sorted(table[0], key=COLUMNS.index)
    lines = [head, ["---"] * len(head), *([_cell(name, row[name]) for name in head] for row in table)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(name: str, value: Any) -> str:
    if isinstance(value, Mapping):
        low, high = value["low"], value["high"]
        if name in ("exact match", "fields right", "pairs told apart", "better side likelier per token"):
            return f"{value['value']:.1%} ({low:.1%} to {high:.1%})"
        return f"{value['value']:.3f} ({low:.3f} to {high:.3f})"
    if value is None:
        return ""
    if name == "share":
        return f"{value:.3%}"
    if name == "rate":
        return f"{value:g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
