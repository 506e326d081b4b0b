"""What a chat template can express, found by asking it: sentinels are rendered and looked for.

No template's text is searched for words: what is not in the output was dropped, wherever that happened. A template that
refuses a question (many insist on turns that alternate) cannot express what was asked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..core.errors import DataError
from .template import Stopped

SAID, ASKED, ANSWERED, CALLED, KEY, VALUE = "zqsaid", "zqasked", "zqanswered", "zqcalled", "zqkey", "zqvalue"
USER = {"role": "user", "content": ASKED}
ANSWER = {"role": "assistant", "content": ANSWERED}
TOOL = {
    "type": "function",
    "function": {
        "name": CALLED,
        "description": SAID,
        "parameters": {"type": "object", "properties": {KEY: {"type": "string", "description": SAID}}, "required": [KEY]},
    },
}
THOUGHT = {"thinking": SAID, "reasoning_content": SAID}
JSON = re.compile(rf'"{KEY}"\s*:\s*"{VALUE}"')

Write = Callable[..., str]  # (messages, *, tools, generate) -> text


class Forms(NamedTuple):
    """How a template wants a turn with tool calls: what stands for no content, and whether arguments are objects or JSON text."""

    content: str | None
    absent: bool
    objects: bool
    strings: bool


class Probe:
    """Asks one template. Answers are kept."""

    def __init__(self, write: Write):
        self._write = write
        self._answers: dict[str, bool] = {}
        self._forms: Forms | bool | None = False  # False: not asked yet

    def expresses(self, what: str) -> bool:
        """Whether the template writes `what`: tools, thoughts, calls (`parallel calls`, `calls with content`, `calls with thoughts`),
        results (`tool`), a role's turn at the start (`system`) or later (`later system`)."""
        if what not in self._answers:
            self._answers[what] = self._ask(what)
        return self._answers[what]

    def forms(self) -> Forms | None:
        """The first form of a call that the template writes, and what it takes as arguments; None if it writes no calls."""
        if isinstance(self._forms, bool):
            self._forms = self._find_forms()
        return self._forms

    def markup(self) -> str:
        """A plain conversation as the template writes it."""
        return self._text([USER, ANSWER, USER])

    def ending(self) -> str:
        """What the template writes after the content of an answer."""
        text = self._text([USER, ANSWER])
        return text[text.rindex(ANSWERED) + len(ANSWERED) :] if ANSWERED in text else ""

    def call_ending(self) -> str:
        """What it writes after the arguments of a call."""
        forms = self.forms()
        text = "" if forms is None else self._text([USER, call(forms)])
        return text[text.rindex(VALUE) + len(VALUE) :] if VALUE in text else ""

    def _ask(self, what: str) -> bool:
        said = [{"role": what.removeprefix("later "), "content": SAID}]
        match what:
            case "tools":
                return CALLED in self._text([USER], tools=[TOOL], generate=True)
            case "calls":
                return self.forms() is not None
            case "thoughts":
                return SAID in self._text([USER, {**ANSWER, **THOUGHT}])
            case "calls with content":
                return self._beside_a_call({"content": SAID}, SAID)
            case "calls with thoughts":
                return self._beside_a_call(THOUGHT, SAID)
            case "parallel calls":
                return self._beside_a_call({}, CALLED, calls=2)
            case "tool":
                forms = self.forms()
                turns = [
                    USER,
                    ANSWER if forms is None else call(forms),
                    {"role": "tool", "content": SAID, "name": CALLED, "tool_call_id": CALLED},
                ]
                return SAID in self._text(turns, generate=True)
            case _ if what.startswith("later "):
                return SAID in self._text([USER, ANSWER, *said, USER], generate=True)
        return SAID in self._text([*said, USER], generate=True)

    def _beside_a_call(self, more: dict[str, Any], found: str, *, calls: int = 1) -> bool:
        """Whether a turn of calls with `more` to it shows `found`, once for each call, and the arguments of each."""
        if (forms := self.forms()) is None:
            return False
        turn = call(forms)
        text = self._text([USER, {**turn, **more, "tool_calls": turn["tool_calls"] * calls}])
        return text.count(found) >= calls and text.count(VALUE) >= calls

    def _find_forms(self) -> Forms | None:
        contents: list[tuple[str | None, bool]] = [(None, True), ("", False), (None, False)]
        for content, absent in contents:
            text = self._text([USER, call(Forms(content, absent, objects=True, strings=False))])
            objects = CALLED in text and KEY in text and VALUE in text and f"'{KEY}'" not in text
            text = self._text([USER, call(Forms(content, absent, objects=False, strings=True))])
            strings = CALLED in text and JSON.search(text) is not None
            if objects or strings:
                return Forms(content, absent, objects, strings)
        return None

    def _text(self, messages: Sequence[dict[str, Any]], *, tools: list[dict[str, Any]] | None = None, generate: bool = False) -> str:
        """What the template writes; nothing if it refuses. One that does not end is no template to ask."""
        try:
            return self._write(messages, tools=tools, generate=generate)
        except Stopped:
            raise
        except DataError:
            return ""


def call(forms: Forms) -> dict[str, Any]:
    """A turn that calls the sentinel tool."""
    arguments = {KEY: VALUE} if forms.objects else f'{{"{KEY}": "{VALUE}"}}'
    turn = {"role": "assistant", "tool_calls": [{"id": CALLED, "type": "function", "function": {"name": CALLED, "arguments": arguments}}]}
    return turn if forms.absent else {**turn, "content": forms.content}
