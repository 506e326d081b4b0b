"""Stop strings over a stream of text: what may be the start of one is held back, and nothing of it ever leaves.

The answer ends where the first stop string is complete, character by character, so that how text falls into tokens
changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Feed pieces of text to `push`; it returns what can be let go. Once `hit`, nothing more comes."""

    def __init__(self, stops: Sequence[str]):
        assert all(stops), "an empty stop string would end every answer"
        self.stops = tuple(stops)
        self.hit = False
        self._held = ""

    def push(self, piece: str) -> str:
        """The text that is now certain to belong to the answer."""
        if self.hit:
            return ""
        text = self._held + piece
        found = [(start + len(stop), start) for stop in self.stops if (start := text.find(stop)) >= 0]
        if found:
            self.hit, self._held = True, ""
            return text[: min(found)[1]]
        keep = max((n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """The text held back when the answer ends without a stop string."""
        held, self._held = self._held, ""
        return held
