"""What the demo's task yields to look-up alone: the nearest training text, its answer filled in with the words that stand in the same places.

The nearest text is the one whose character trigrams, weighted by rarity, have the highest cosine. Its tokens and the asked text's tokens are
aligned; each value of its answer is replaced by what stands in the same place. Addresses, numbers and capitalized words are compared by
shape, so that a phone number finds a phone number. A model that does no better than this has learned nothing.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any

from .demo_task import Example

TOKEN = re.compile(r"[\w@:'-]+(?:\.\w+)*|[^\w\s]")


class NearestTemplate:
    """Answers a text from the most similar of `known` examples."""

    def __init__(self, known: Sequence[Example]):
        self.known = list(known)
        self._words = {token for example in self.known for token in TOKEN.findall(example.text) if token.islower()}
        counts = [self._trigrams(example.text) for example in self.known]
        documents = Counter(gram for grams in counts for gram in grams)
        self._rarity = {gram: math.log(len(counts) / n) + 1 for gram, n in documents.items()}
        self._vectors = [self._weigh(grams) for grams in counts]
        self._postings: dict[str, list[int]] = {}
        for index, vector in enumerate(self._vectors):
            for gram in vector:
                self._postings.setdefault(gram, []).append(index)

    def nearest(self, text: str) -> Example:
        scores: defaultdict[int, float] = defaultdict(float)
        for gram, value in self._weigh(self._trigrams(text)).items():
            for index in self._postings[gram]:
                scores[index] += value * self._vectors[index][gram]
        return self.known[max(scores, key=lambda index: (scores[index], -index), default=0)]

    def answer(self, text: str) -> dict[str, Any]:
        """The nearest example's answer, its values exchanged for the aligned words of `text`."""
        example = self.nearest(text)
        old, new = TOKEN.findall(example.text), TOKEN.findall(text)
        blocks = SequenceMatcher(None, [*map(self._shape, old)], [*map(self._shape, new)], autojunk=False).get_opcodes()
        return {
            field: value if field == "type" else _fill(value, _aligned(TOKEN.findall(str(value)), old, new, blocks))
            for field, value in example.answer.items()
        }

    def _shape(self, token: str) -> str:
        """What kind of token this is: an address, a number's pattern, a name, or the word itself (also where it begins a sentence)."""
        if "@" in token:
            return "@"
        if any(character.isdigit() for character in token):
            return re.sub(r"\d+", "0", token)
        return "Aa" if token[:1].isupper() and token.lower() not in self._words else token.lower()

    def _trigrams(self, text: str) -> Counter[str]:
        text = f"  {' '.join(map(self._shape, TOKEN.findall(text)))} "
        return Counter(text[i : i + 3] for i in range(len(text) - 2))

    def _weigh(self, grams: Counter[str]) -> dict[str, float]:
        vector = {gram: n * self._rarity[gram] for gram, n in grams.items() if gram in self._rarity}
        norm = math.sqrt(sum(value * value for value in vector.values())) or 1.0
        return {gram: value / norm for gram, value in vector.items()}


def _aligned(value: list[str], old: list[str], new: list[str], blocks: Sequence[tuple[str, int, int, int, int]]) -> list[str]:
    """The tokens of `new` that stand where `value` stands in `old`: index for index in equal runs, everything in a replaced run."""
    start = next((i for i in range(len(old)) if old[i : i + len(value)] == value), None)
    if start is None:
        return []
    end, found = start + len(value), []
    for tag, i, j, k, m in blocks:
        low, high = max(i, start), min(j, end)
        if low < high:
            found += new[k + low - i : k + high - i] if tag == "equal" or j - i == m - k else new[k:m]
    return found


def _fill(value: str | int, tokens: list[str]) -> str | int:
    text = " ".join(tokens)
    return int(text) if isinstance(value, int) and text.isdigit() else text
