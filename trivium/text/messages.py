"""Messages, tools and template arguments as a template may see them: plain JSON values, in one spelling.

Whatever a user wrote is also searched here for the strings that control a model: they are refused, or marked, so that they
can be encoded as the text that they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from ..core.errors import DataError

Message = Mapping[str, Any]
Special = Literal["refuse", "text"]

THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # names under which data sets and servers pass them
FLAGS = ("train", "weight")  # of a turn: whether it is trained; never shown to a template
LEFT, RIGHT = "\ufdd2", "\ufdd3"  # noncharacters around a marked string
RESERVED = re.compile("[\ufdd0-\ufdd3\ud800-\udfff]")  # our marks, and halves of surrogate pairs


def plain(value: Any, where: str) -> Any:
    """A copy made of JSON's own types. Raises `DataError` for anything else, and for characters that are used as marks."""
    match value:
        case str():
            if found := RESERVED.search(value):
                raise DataError(
                    f"{where}: holds U+{ord(found[0]):04X}, which is no character and cannot stand in a conversation", field=where
                )
            return str(value)
        case None | bool() | int() | float():
            return value
        case Mapping():
            return {plain(str(key), where): plain(item, f"{where}.{key}") for key, item in value.items()}
        case list() | tuple():
            return [plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise DataError(f"{where}: is a {type(value).__name__}; messages, tools and arguments are made of JSON values", field=where)


def spelled(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as templates expect them: nothing that is null, no flags, thoughts under both names that templates read."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise DataError(f"messages: is a {type(messages).__name__}, not a list of messages")
    spelled = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(f"{where}: is no object with a 'role'", field=where)
        clean = {key: plain(value, f"{where}.{key}") for key, value in message.items() if value is not None and key not in FLAGS}
        if not isinstance(clean.get("content", ""), str):
            raise DataError(f"{where}.content: is no string; parts and images are not supported yet", field=f"{where}.content")
        if thoughts := thoughts_of(clean):
            clean = {"thinking": thoughts, **clean, "reasoning_content": thoughts}
        spelled.append(clean)
    return spelled


def thoughts_of(message: Message) -> str:
    """The thoughts of a turn, whatever name they have; empty if there are none."""
    return next((str(message[name]) for name in THOUGHTS if message.get(name)), "")


def trained(message: Message) -> bool:
    """Whether a turn's own flag leaves its loss on."""
    return message.get("train") is not False and message.get("weight") != 0


def is_empty(message: Message) -> bool:
    """Whether a turn says nothing: no content, no calls, no thoughts."""
    return not (str(message.get("content") or "").strip() or message.get("tool_calls") or thoughts_of(message))


def with_calls(message: dict[str, Any], *, content: str | None, absent: bool, objects: bool, strings: bool) -> dict[str, Any]:
    """A turn with tool calls in the form that a template reads.

    Without content of its own it gets `content`, or none at all if `absent`. The arguments of a call are kept as they are if
    the template reads that form (`objects`, `strings`), else turned from JSON text to an object or back.
    """
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or "name" not in function:
            raise DataError(f"tool_calls: {json.dumps(call, ensure_ascii=False):.200} has no function with a name", field="tool_calls")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str) and not strings:
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                raise DataError(f"tool_calls: the arguments {arguments!r:.200} are not JSON", field="tool_calls") from None
        elif not isinstance(arguments, str) and not objects:
            arguments = json.dumps(arguments, ensure_ascii=False)
        function = {**function, "arguments": arguments}
        calls.append({**call, "function": function} if "function" in call else function)
    shaped = {**message, "tool_calls": calls}
    if "content" not in message and not absent:
        shaped["content"] = content
    return shaped


def another(message: dict[str, Any]) -> dict[str, Any]:
    """An answer of the same form that says something else."""
    other = {**message, **{name: f"zq{name}" for name in ("content", *THOUGHTS) if message.get(name)}}
    if calls := message.get("tool_calls"):
        other["tool_calls"] = [_renamed(call) for call in calls]
    return other


def _renamed(call: dict[str, Any]) -> dict[str, Any]:
    return {**call, "function": _renamed(call["function"])} if "function" in call else {**call, "name": "zqname"}


class Guard:
    """What to do with control strings in what a user wrote. `control` are the strings; `special` refuses them or marks them as text."""

    def __init__(self, control: frozenset[str], special: Special):
        self._pattern = re.compile("|".join(map(re.escape, sorted(control, key=lambda text: (-len(text), text)))) or "(?!)")
        self._special = special

    def __call__(self, value: Any, where: str) -> Any:
        """`value` with every control string marked. Raises `DataError` where they are refused."""
        return _mapped(value, where, self._mark)

    def _mark(self, text: str, where: str) -> str:
        if (found := self._pattern.search(text)) and self._special == "refuse":
            raise DataError(
                f"{where}: holds {found[0]!r}, which controls the model; take it out, or have it encoded as plain text (special: text)",
                field=where,
            )
        return self._pattern.sub(f"{LEFT}\\g<0>{RIGHT}", text) if found else text


def unmarked(text: str) -> Iterator[tuple[int, str, bool]]:
    """The pieces of a text by their first character's place, and whether what looks like markup in them is markup.

    A template can take a pair of marks apart (`split`); a mark that is alone is left out.
    """
    at = 0
    for match in re.finditer(f"{LEFT}([^{LEFT}{RIGHT}]*){RIGHT}|[{LEFT}{RIGHT}]", text):
        if match.start() > at:
            yield at, text[at : match.start()], True
        if match[1]:
            yield match.start(1), match[1], False
        at = match.end()
    if at < len(text):
        yield at, text[at:], True


def _mapped(value: Any, where: str, change: Callable[[str, str], str]) -> Any:
    if isinstance(value, str):
        return change(value, where)
    if isinstance(value, dict):
        for key in value:
            if change(key, where) != key:
                raise DataError(f"{where}: the key {key!r} holds a string that controls the model; rename it", field=where)
        return {key: _mapped(item, f"{where}.{key}", change) for key, item in value.items()}
    if isinstance(value, list):
        return [_mapped(item, f"{where}[{index}]", change) for index, item in enumerate(value)]
    return value
