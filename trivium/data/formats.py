"""Row formats: what a row of a data set can look like, and what it becomes.

Each format is one entry of a registry: the columns that it uses, what it can feed, and a small converter to an example.
Formats are told apart by columns; where two fit equally well, the user is asked, never guessed for.
Preference and labeled rows are read by `data/pairs.py`; they and prompt-only rows are recognized here, so that using them where
they cannot serve is one clear error.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..core.errors import DataError, TriviumError, unknown
from ..core.registry import Registry
from .rows import Record

if TYPE_CHECKING:
    from ..text.prompt import Prompt, Row

Turns = Literal["all", "last"]
Message = dict[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool")
FEEDS = {
    "tokens": "next-token training",
    "preference": "preference training",
    "labels": "training on labels",
    "classes": "training of classifiers",
    "prompts": "rollouts",
}


class Misfit(TriviumError):
    """Why a row does not fit its format; the caller adds where the row stood."""


@dataclass(frozen=True)
class Text:
    """A document. Longer than a row, it is split."""

    text: str
    splits: ClassVar[bool] = True

    def rows(self, prompt: Prompt, *, turns: Turns, arguments: Mapping[str, Any] | None) -> list[Row]:
        return [prompt.text(self.text)]


@dataclass(frozen=True)
class Completion:
    """A prompt and what should follow it, as plain text without a template."""

    prompt: str
    completion: str
    splits: ClassVar[bool] = False

    def rows(self, prompt: Prompt, *, turns: Turns, arguments: Mapping[str, Any] | None) -> list[Row]:
        return [prompt.completion(self.prompt, self.completion)]


@dataclass(frozen=True)
class Conversation:
    """Messages and the tools on offer. An assistant turn with `train: False` is context, as the prompt contract reads it."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] | None = None
    splits: ClassVar[bool] = False

    def rows(self, prompt: Prompt, *, turns: Turns, arguments: Mapping[str, Any] | None) -> list[Row]:
        return prompt.rows(self.messages, tools=self.tools, arguments=arguments, turns=turns)


Example = Text | Completion | Conversation
Converter = Callable[[Mapping[str, Any]], Example]


@dataclass(frozen=True)
class Format:
    """One row format. `convert` turns a row into an example or raises `Misfit`; None: its rows make no example by themselves."""

    name: str
    summary: str
    feeds: frozenset[str]  # of FEEDS
    needs: frozenset[str]
    takes: frozenset[str]
    convert: Converter | None

    def used(self, row: Mapping[str, Any]) -> frozenset[str] | None:
        """The columns that this format would read from the row; None where it lacks one. A null column is absent."""
        present = {key for key, value in row.items() if value is not None}
        return self.needs | (self.takes & present) if self.needs <= present else None


formats: Registry[Format] = Registry("row format")


def _format(name: str, summary: str, *, feeds: Sequence[str], needs: str, takes: str = "", convert: Converter | None = None) -> None:
    assert set(feeds) <= FEEDS.keys()
    formats.add(name, Format(name, summary, frozenset(feeds), frozenset(needs.split()), frozenset(takes.split()), convert))


def detect(row: Mapping[str, Any], *, feeds: str = "tokens") -> Format:
    """The one format of a row that can feed `feeds` (of `FEEDS`).

    A format that would read only some of the columns that another one reads is no candidate: a row with a label is not
    trained on as if it had none. No candidate that serves, or more than one, raises `Misfit`.
    """
    fits = {format: used for _, format in formats.items() if (used := format.used(row)) is not None}
    if not fits:
        known = "; ".join(format.summary for _, format in formats.items())
        raise Misfit(f"no format fits the columns {_names(row)} (known: {known})")
    best = [format for format, used in fits.items() if not any(used < other for other in fits.values())]
    able = [format for format in best if feeds in format.feeds]
    if not able:
        raise Misfit(_cannot(best[0], feeds))
    if len(able) > 1:
        names = " and ".join(repr(format.name) for format in able)
        raise Misfit(f"the columns {_names(row)} fit the formats {names} equally well; say which one with --format")
    return able[0]


def choose(records: Sequence[Record], *, name: str | None = None, feeds: str = "tokens") -> Format:
    """The format called `name`, or else the one that all of `records`, the first rows, agree on. Raises `DataError`."""
    if name is not None:
        if name not in formats:
            raise DataError(unknown("row format", name, formats), field="format", value=name, choices=formats)
        chosen = formats.get(name)
        if feeds not in chosen.feeds:
            raise DataError(_cannot(chosen, feeds), field="format", value=name)
        return chosen
    first: Format | None = None
    for record in records:
        try:
            found = detect(record.value, feeds=feeds)
        except Misfit as error:
            raise DataError(f"{record.where}: {error}; the row: {show(record.value)}") from error
        if first is None:
            first = found
        if found is not first:
            other = f"{records[0].where} like {first.name!r}"
            raise DataError(f"{record.where}: looks like {found.name!r}, but {other}; say which with --format, or separate them")
    assert first is not None, "the first rows are needed to tell the format"
    return first


def convert(record: Record, format: Format) -> Example:
    """The example in a row, or a `DataError` that names file and line, the row and what does not fit."""
    assert format.convert is not None, f"nothing is trained on {format.name!r} rows"
    try:
        if missing := sorted(column for column in format.needs if record.value.get(column) is None):
            raise Misfit(f"it has no {missing[0]!r}")
        return format.convert(record.value)
    except Misfit as error:
        raise DataError(f"{record.where}: does not fit the format {format.name!r}: {error}; the row: {show(record.value)}") from error


def show(row: Mapping[str, Any]) -> str:
    """A row on one line, cut to a readable length."""
    line = json.dumps(row, ensure_ascii=False, default=str)
    return line if len(line) <= 200 else f"{line[:197]}..."


def _cannot(format: Format, feeds: str) -> str:
    able = ", ".join(other.name for _, other in formats.items() if feeds in other.feeds)
    serves = " and ".join(FEEDS[use] for use in sorted(format.feeds))
    return f"rows of the format {format.name!r} serve {serves}, not {FEEDS[feeds]} (which takes: {able})"


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, sorted(row, key=str))) or "(none)"


def _string(row: Mapping[str, Any], key: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise Misfit(f"{key!r} is {_kind(value)}, not a string")
    return value


def _kind(value: object) -> str:
    kinds: dict[type, str] = {
        type(None): "null",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return kinds.get(type(value), f"a {type(value).__name__}")


def _list(value: object, what: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise Misfit(f"{what} is {_kind(value)}, not a list")
    return list(value)


def _text(row: Mapping[str, Any]) -> Text:
    return Text(_string(row, "text"))


def _messages(row: Mapping[str, Any]) -> Conversation:
    return _conversation(_list(row["messages"], "'messages'"), _tools(row))


def _conversation(messages: Iterable[Any], tools: tuple[dict[str, Any], ...] | None, *, trained_from: int = 0) -> Conversation:
    """Checks messages and brings loss flags to one spelling; assistant turns before `trained_from` are context, not targets."""
    checked = []
    for index, message in enumerate(messages):
        name = f"message {index}"
        if not isinstance(message, Mapping):
            raise Misfit(f"{name} is {_kind(message)}, not an object")
        message = dict(message)
        if (role := message.get("role")) not in ROLES:
            raise Misfit(f"{name} has the role {role!r} (known: {', '.join(ROLES)})")
        calls = message.get("tool_calls")
        if calls is not None:
            _list(calls, f"'tool_calls' of {name}")
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and calls):
            raise Misfit(f"the content of {name} is {_kind(content)}, not a string")
        loss = _loss_flag(message, name)
        if loss and role != "assistant":
            raise Misfit(f"{name} asks for a loss, but its role is {role!r}; only assistant turns are trained")
        if role == "assistant" and (loss is False or index < trained_from):
            message["train"] = False
        checked.append(message)
    if not checked:
        raise Misfit("there are no messages")
    return Conversation(tuple(checked), tools)


def _loss_flag(message: Message, name: str) -> bool | None:
    """Takes a turn's loss flag out of the message: `train` (true or false), or OpenAI's `weight` (0 or 1)."""
    flags = {key: value for key in ("train", "weight") if (value := message.pop(key, None)) is not None}
    for key, value in flags.items():
        if value not in (0, 1):
            raise Misfit(f"{key!r} of {name} is {value!r}; a turn's loss is on (true, 1) or off (false, 0)")
    if len({bool(value) for value in flags.values()}) > 1:
        raise Misfit(f"'train' and 'weight' of {name} contradict each other")
    return bool(next(iter(flags.values()))) if flags else None


def _tools(row: Mapping[str, Any]) -> tuple[dict[str, Any], ...] | None:
    """The `tools` column: a list of objects, or the same as a JSON string, since Parquet cannot hold open schemas."""
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = _parse(tools, "'tools'") if tools.strip() else None
    if not tools:
        return None
    for tool in _list(tools, "'tools'"):
        if not isinstance(tool, Mapping):
            raise Misfit(f"a tool is {_kind(tool)}, not an object")
    return tuple(dict(tool) for tool in tools)


def _parse(value: str, what: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise Misfit(f"{what} is a string, but not JSON ({error})") from error


def _prompt_completion(row: Mapping[str, Any]) -> Example:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        if row.get("tools"):
            raise Misfit("'tools' need messages, but 'prompt' and 'completion' are plain strings, which no template renders")
        return Completion(prompt, completion)
    if isinstance(prompt, str) != isinstance(completion, str):
        raise Misfit(f"'prompt' is {_kind(prompt)} and 'completion' {_kind(completion)}; both are strings, or both lists of messages")
    before, after = _list(prompt, "'prompt'"), _list(completion, "'completion'")
    return _conversation(before + after, _tools(row), trained_from=len(before))


def _alpaca(row: Mapping[str, Any]) -> Conversation:
    messages: list[Message] = []
    if row.get("system") not in (None, ""):
        messages.append({"role": "system", "content": _string(row, "system")})
    for turn in _list([] if row.get("history") is None else row["history"], "'history'"):
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise Misfit("an entry of 'history' is not a pair of instruction and answer")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    asked = _string(row, "instruction")
    if row.get("input") not in (None, ""):
        asked = f"{asked}\n{_string(row, 'input')}"
    messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": _string(row, "output")}]
    return _conversation(messages, None)


SPEAKERS = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
}


def _sharegpt(row: Mapping[str, Any]) -> Conversation:
    turns = _list(row["conversations"], "'conversations'")
    messages: list[Message] = []
    if row.get("system") not in (None, ""):
        messages.append({"role": "system", "content": _string(row, "system")})
    for index, turn in enumerate(turns):
        if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
            hint = "; with 'role' and 'content', name the column 'messages'" if isinstance(turn, Mapping) and "role" in turn else ""
            raise Misfit(f"turn {index} has no 'from' and 'value'{hint}")
        speaker = turn["from"]
        if speaker not in SPEAKERS:
            raise Misfit(f"turn {index} is from {speaker!r} (known: {', '.join(sorted(SPEAKERS))})")
        flags = {key: turn[key] for key in ("train", "weight") if key in turn}
        if speaker == "function_call":
            messages.append({"role": "assistant", "tool_calls": _called(_string(turn, "value"), index), **flags})
        else:
            messages.append({"role": SPEAKERS[speaker], "content": _string(turn, "value"), **flags})
    return _conversation(messages, _tools(row))


def _called(value: str, index: int) -> list[dict[str, Any]]:
    """A `function_call` turn, `{"name": ..., "arguments": {...}}` or a list of them, as tool calls."""
    calls = _parse(value, f"the function call of turn {index}")
    for call in calls if isinstance(calls, list) else [calls]:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or "arguments" not in call:
            raise Misfit(f"the function call of turn {index} has no 'name' and 'arguments'")
    calls = calls if isinstance(calls, list) else [calls]
    return [{"type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}} for call in calls]


_format("text", "text: {text}", feeds=["tokens"], needs="text", convert=_text)
_format("messages", "messages: {messages: [{role, content}], tools?}", feeds=["tokens"], needs="messages", takes="tools", convert=_messages)
_format(
    "prompt_completion",
    "prompt_completion: {prompt, completion}, strings or messages",
    feeds=["tokens"],
    needs="prompt completion",
    takes="tools",
    convert=_prompt_completion,
)
_format(
    "alpaca",
    "alpaca: {instruction, output, input?, system?, history?}",
    feeds=["tokens"],
    needs="instruction output",
    takes="input system history",
    convert=_alpaca,
)
_format(
    "sharegpt",
    "sharegpt: {conversations: [{from, value}], system?, tools?}",
    feeds=["tokens"],
    needs="conversations",
    takes="system tools",
    convert=_sharegpt,
)
_format(
    "preference",
    "preference: {chosen, rejected, prompt?}, strings or messages; or {chosen, rejected, instruction, input?, system?}",
    feeds=["preference"],
    needs="chosen rejected",
    takes="prompt tools instruction input system margin",
)
_format("labeled", "labeled: {prompt, completion, label}", feeds=["labels"], needs="prompt completion label", takes="tools")
_format("classified", "classified: {text, label}", feeds=["classes"], needs="text label")
_format("prompt", "prompt: {prompt}, further columns reach the reward", feeds=["prompts"], needs="prompt", takes="tools")
