"""Text metrics as pure functions: exact match, normalized exact match, the fields of JSON answers, spans of tags.

A metric gives each row a term (numerator, denominator); its value over a set is the sum of numerators over the sum of denominators. So micro
precision, recall, F1 and accuracy are one statistic, `checks.bootstrap.ratio`, and their intervals come from resampling rows.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

_DECODER = json.JSONDecoder(parse_constant=lambda name: _refuse(name))
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Term(NamedTuple):
    """One row's share of a metric."""

    numerator: float
    denominator: float


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def first_json(text: str) -> dict[str, Any] | None:
    """The first JSON object that stands in `text`, whatever surrounds it; None if there is none."""
    for match in re.finditer(r"\{", text):
        try:
            return _DECODER.raw_decode(text, match.start())[0]
        except (ValueError, RecursionError):
            continue
    return None


def same_json(one: Any, other: Any) -> bool:
    """Equality of JSON values: keys in any order, 1 equal to 1.0, but true not equal to 1 and "1" not equal to 1."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_json(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(same_json(a, b) for a, b in zip(one, other, strict=True))
    return one == other


def fields(value: Any) -> Counter[tuple[str, str]]:
    """Every leaf of a JSON value as (path, value), counted; an empty object or list is a leaf, and items of a list share one path."""
    return Counter(_leaves(value, ""))


def _leaves(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}/{key.replace('~', '~0').replace('/', '~1')}")
    elif isinstance(value, list) and value:
        for item in value:
            yield from _leaves(item, f"{path}/*")
    else:
        whole = isinstance(value, float) and value.is_integer()
        yield path, json.dumps(int(value) if whole else value, ensure_ascii=False)


def field_terms(answer: Any, expected: Any) -> dict[str, Term]:
    """Terms of field precision, recall and F1. `answer` None means that no answer could be read: it has no fields."""
    given = fields(answer) if answer is not None else Counter()
    wanted = fields(expected)
    hits = (given & wanted).total()
    return {
        "field_precision": Term(hits, given.total()),
        "field_recall": Term(hits, wanted.total()),
        "field_f1": Term(2 * hits, given.total() + wanted.total()),
    }


def spans(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """The spans (kind, first, end) that tags such as B-place, I-place, O say. As conlleval and seqeval read them, an I- that does not
    go on with a span of its kind begins one."""
    found, kind, first = set(), "", 0
    for i, tag in enumerate((*tags, "O")):
        mark, _, of = tag.partition("-")
        if kind and (mark != "I" or of != kind):
            found.add((kind, first, i))
            kind = ""
        if mark != "O" and not kind:
            kind, first = of, i
    return found


def span_terms(answer: Sequence[str], expected: Sequence[str]) -> dict[str, Term]:
    """Terms of a row's precision, recall and F1 of whole spans: one counts if its kind and both its ends are right."""
    given, wanted = spans(answer), spans(expected)
    hits = len(given & wanted)
    return {
        "span_precision": Term(hits, len(given)),
        "span_recall": Term(hits, len(wanted)),
        "span_f1": Term(2 * hits, len(given) + len(wanted)),
    }


def exact(answer: str, expected: str) -> bool:
    """The same text, up to white space at both ends."""
    return answer.strip() == expected.strip()


def normalize(text: str) -> str:
    """Lower case, no punctuation, no English articles, single spaces (SQuAD's normalization)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def normalized_exact(answer: str, expected: str) -> bool:
    return normalize(answer) == normalize(expected)


def value(terms: Iterable[tuple[float, float]]) -> float:
    """The metric over all rows: sum of numerators over sum of denominators; 0 where nothing was counted."""
    numerator, denominator = (sum(column) for column in zip(*terms, strict=True))
    return numerator / denominator if denominator else 0.0


def accuracy(answers: Iterable[Any], expected: Iterable[Any]) -> float:
    """The share of answers equal to what was expected; both must have the same length."""
    return value((float(a == b), 1.0) for a, b in zip(answers, expected, strict=True))
