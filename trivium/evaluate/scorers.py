"""What makes a written answer right: scorers, registered parts that turn (answer, expected) into terms of their metrics.

Answers are read as they are, or through the first JSON object in them; judges that are models are left out here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from ..checks import metrics
from ..checks.metrics import Term
from ..core.errors import DataError
from ..core.registry import Registry
from ..core.spec import Part
from .task import Finish


class Scorer(Part, registry=Registry("scorer", "trivium.evaluate.scorers")):
    """The root of scorers."""

    metrics: ClassVar[Mapping[str, Finish]]
    """Every metric's name, the main one first."""

    def read(self, expected: str) -> Any:
        """What `expected` means; raises `DataError` if this scorer cannot use it."""
        return expected

    def terms(self, answer: str, expected: Any) -> dict[str, Term]:
        raise NotImplementedError


class Exact(Scorer):
    """The same text, up to white space at both ends."""

    kind: Literal["exact"] = "exact"
    metrics: ClassVar[dict[str, Finish]] = {"exact_match": "ratio"}

    def terms(self, answer: str, expected: str) -> dict[str, Term]:
        return {"exact_match": Term(metrics.exact(answer, expected), 1)}


class Normalized(Scorer):
    """The same text, up to case, punctuation, articles and white space."""

    kind: Literal["normalized"] = "normalized"
    metrics: ClassVar[dict[str, Finish]] = {"normalized_exact_match": "ratio"}

    def terms(self, answer: str, expected: str) -> dict[str, Term]:
        return {"normalized_exact_match": Term(metrics.normalized_exact(answer, expected), 1)}


class Json(Scorer):
    """The first JSON object of the answer: equal as a value, and how many of its fields are right."""

    kind: Literal["json"] = "json"
    metrics: ClassVar[dict[str, Finish]] = {
        "exact_match": "ratio",
        "field_f1": "ratio",
        "field_precision": "ratio",
        "field_recall": "ratio",
        "parsed": "ratio",
    }

    def read(self, expected: str) -> Any:
        try:
            return json.loads(expected)
        except ValueError as error:
            raise DataError(f"the expected answer is not JSON: {error}") from None

    def terms(self, answer: str, expected: Any) -> dict[str, Term]:
        found = metrics.first_json(answer)
        return {
            "exact_match": Term(found is not None and metrics.same_json(found, expected), 1),
            **metrics.field_terms(found, expected),
            "parsed": Term(found is not None, 1),
        }
