"""Rows from one format into another, with nothing changed in silence: each new row is read back, and must say the same.

What a row says is its `Meaning`: prompt, answers, tools, label or margin, in one spelling. A format writes a meaning, or names what
it has no place for. Loss flags, tools and further columns come along; what is to be left out is named with `drop`. Turns become
plain strings, or strings turns, only where `sides` says so: a chat template is then left out, or added.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..core.errors import DataError, unknown
from ..core.registry import Registry
from .formats import Conversation, Format, Message, Misfit, Text, choose, detect, formats, show
from .growing import PEEKED, numbered
from .pairs import sides as sides_of
from .rows import Record

Side = str | tuple[Message, ...]
Sides = Literal["messages", "strings"]
Kind = Literal["text", "classified", "answer", "pair", "judged", "question"]
HOLDS: dict[Kind, str] = {
    "text": "a document",
    "classified": "a text and its class",
    "answer": "a prompt and its answer",
    "pair": "a prompt, a chosen and a rejected answer",
    "judged": "a prompt, an answer and a label",
    "question": "a prompt without an answer",
}


@dataclass(frozen=True)
class Meaning:
    """What a row says. `prompt` and `answers` are strings, or messages in which nothing is null; in a prompt no turn is trained, in an
    answer each is that has no `train: False`. A document is its own answer."""

    kind: Kind
    prompt: Side
    answers: tuple[Side, ...] = ()
    tools: tuple[dict[str, Any], ...] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)  # a label or a margin


Writer = Callable[[Meaning], dict[str, Any]]
writers: Registry[Writer] = Registry("row writer")  # by the name of a format; raises `Misfit` for what it has no place for
KINDS: dict[str, Kind] = {
    "messages": "answer",
    "prompt_completion": "answer",
    "alpaca": "answer",
    "sharegpt": "answer",
    "text": "text",
    "classified": "classified",
    "preference": "pair",
    "labeled": "judged",
    "prompt": "question",
}


def reshape(
    rows: Iterable[Record | Mapping[str, Any]],
    to: str,
    *,
    format: str | None = None,
    sides: Sides | None = None,
    drop: Collection[str] = (),
) -> Iterator[dict[str, Any]]:
    """The rows in the format `to`, one by one.

    `format`: theirs, if their columns do not tell. `sides`: what prompts and answers become, turns (`messages`) or plain `strings`;
    None: what they are. `drop`: columns to leave out, before anything is read. Raises `DataError` for no rows, a column that no row
    has, and the first row that does not fit its format or that `to` cannot say, with the reason.
    """
    target = to.replace("-", "_")
    if target not in writers:
        raise DataError(unknown("row format", to, writers, field="to"), field="to", value=to, choices=writers)
    records = numbered(rows)
    head = list(itertools.islice(records, PEEKED))
    if head and (waiting := set(drop) - {key for record in head for key in record.value}):
        raise DataError(f"drop: none of the first {len(head)} rows has a column {sorted(waiting)[0]!r}", field="drop")
    source = told([_without(record, drop) for record in head], format)
    return (_reshaped(_without(record, drop), source, formats.get(target), sides) for record in itertools.chain(head, records))


def told(head: Sequence[Record], name: str | None) -> Format:
    """The format of the first rows, whatever it can feed. Raises `DataError`."""
    if not head:
        raise DataError("no rows: the data is empty")
    if name is not None:
        name = name.replace("-", "_")
        if name not in formats:
            raise DataError(unknown("row format", name, formats, field="format"), field="format", value=name, choices=formats)
        return formats.get(name)
    columns = {key for key, value in head[0].value.items() if value is not None}
    if {"chosen", "rejected"} <= columns:
        return choose(head, feeds="preference")
    if {"prompt", "completion", "label"} <= columns:
        return choose(head, feeds="labels")
    if {"text", "label"} <= columns:
        return choose(head, feeds="classes")
    trained = any(format.convert is not None and format.needs <= columns for _, format in formats.items())
    return choose(head, feeds="prompts" if "prompt" in columns and not trained else "tokens")


def _without(record: Record, drop: Collection[str]) -> Record:
    """The row without these columns, and without what is null, which stands for nothing."""
    return replace(record, value={key: value for key, value in record.value.items() if value is not None and key not in drop})


def _reshaped(record: Record, source: Format, target: Format, sides: Sides | None) -> dict[str, Any]:
    try:
        meaning = _with_sides(read(source, record.value), sides)
        if (kind := KINDS[target.name]) != meaning.kind:
            raise Misfit(f"{target.name!r} rows hold {HOLDS[kind]}, and this one {HOLDS[meaning.kind]}")
        made = writers.get(target.name)(meaning)
        if meaning.tools:
            if "tools" not in target.takes:
                raise Misfit(f"{target.name!r} rows have no place for 'tools'")
            made["tools"] = list(meaning.tools)
        if read(target, made) != meaning:  # what a writer overlooked
            raise Misfit(f"{target.name!r} rows cannot say this as it is")
        return _with_columns(made, record.value, source=source, target=target)
    except Misfit as error:
        raise DataError(f"{record.where}: {error}; the row: {show(record.value)}") from None


def read(format: Format, row: Mapping[str, Any]) -> Meaning:
    """What a row of this format says. Raises `Misfit`."""
    if missing := sorted(column for column in format.needs if row.get(column) is None):
        raise Misfit(f"does not fit the format {format.name!r}: it has no {missing[0]!r}")
    match KINDS[format.name]:
        case "pair":
            chosen, rejected = sides_of(row)
            prompt, good, tools = _answered(chosen)
            margin = {"margin": row["margin"]} if row.get("margin") is not None else {}
            return Meaning("pair", prompt, (good, _answered(rejected)[1]), tools, margin)
        case "judged":
            if row["label"] not in (0, 1):
                raise Misfit(f"'label' is {row['label']!r:.40}, not true or false (1 or 0)")
            prompt, answer, tools = _answered(row)
            return Meaning("judged", prompt, (answer,), tools, {"label": bool(row["label"])})
        case "classified":
            if not isinstance(row["text"], str):
                raise Misfit("'text' is not a string")
            return Meaning("classified", "", (row["text"],), facts={"label": row["label"]})
        case "question":
            if isinstance(row["prompt"], str):
                prompt, _, tools = _answered({**row, "completion": ""})
            else:
                prompt, tools = _turns({"messages": row["prompt"], "tools": row.get("tools")})
            return Meaning("question", prompt, (), tools)
    assert format.convert is not None
    example = format.convert(row)
    if isinstance(example, Text):
        return Meaning("text", "", (example.text,))
    if not isinstance(example, Conversation):
        return Meaning("answer", example.prompt, (example.completion,))
    turns = _spelled(example.messages)
    first = next((at for at, turn in enumerate(turns) if turn["role"] == "assistant" and turn.get("train") is not False), None)
    if first is None:
        raise Misfit("it has no assistant turn that is trained")
    return Meaning("answer", _untrained(turns[:first]), (turns[first:],), example.tools)


def _answered(row: Mapping[str, Any]) -> tuple[Side, Side, tuple[dict[str, Any], ...] | None]:
    """Prompt, answer and tools of a row {prompt, completion, tools?}."""
    convert = formats.get("prompt_completion").convert
    assert convert is not None
    example = convert(row)
    if not isinstance(example, Conversation):
        return row["prompt"], row["completion"], None
    turns, prompt = _spelled(example.messages), len(row["prompt"])
    return _untrained(turns[:prompt]), turns[prompt:], example.tools


def _turns(row: Mapping[str, Any]) -> tuple[tuple[Message, ...], tuple[dict[str, Any], ...] | None]:
    convert = formats.get("messages").convert
    assert convert is not None
    example = convert(row)
    assert isinstance(example, Conversation)
    return _untrained(_spelled(example.messages)), example.tools


def _spelled(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Messages without what is null or an empty list of calls, and calls in OpenAI's long form."""
    spelled = []
    for message in messages:
        kept = {key: value for key, value in message.items() if value is not None and not (key == "tool_calls" and not value)}
        if "tool_calls" in kept:
            calls = [call if "function" in call else {"function": call} for call in kept["tool_calls"]]
            kept["tool_calls"] = [{"type": "function", **call} for call in calls]
        spelled.append(kept)
    return tuple(spelled)


def _untrained(turns: Sequence[Message]) -> tuple[Message, ...]:
    return tuple({key: value for key, value in turn.items() if key != "train"} for turn in turns)


def _with_sides(meaning: Meaning, sides: Sides | None) -> Meaning:
    """Prompt and answers as `sides` says."""
    if sides is None or meaning.kind in ("text", "classified"):
        return meaning
    change = _as_turn if sides == "messages" else _as_string
    answers = tuple(change(answer, "assistant", "the answer") for answer in meaning.answers)
    return replace(meaning, prompt=change(meaning.prompt, "user", "the prompt"), answers=answers)


def _as_turn(side: Side, role: str, _what: str) -> Side:
    return ({"role": role, "content": side},) if isinstance(side, str) else side


def _as_string(side: Side, role: str, what: str) -> Side:
    if isinstance(side, str):
        return side
    if len(side) == 1 and side[0]["role"] == role and side[0].keys() == {"role", "content"}:
        return side[0]["content"]
    others = [f"{key!r}" for turn in side for key in turn if key not in ("role", "content")]
    why = f"it has {others[0]}" if others else f"it is of the turns {[turn['role'] for turn in side]}, not one of {role!r}"
    raise Misfit(f"{what} cannot be a plain string: {why}")


def _with_columns(made: dict[str, Any], row: Mapping[str, Any], *, source: Format, target: Format) -> dict[str, Any]:
    """The new row with the columns that nothing was read from, as long as it is still told to be what it is."""
    used = source.used(row) or frozenset()
    more = {key: value for key, value in row.items() if key not in used}
    for key in more:
        if key in made or key in target.needs | target.takes:
            raise Misfit(f"its further column {key!r} means something in {target.name!r} rows; leave it out (drop: {key})")
    whole = {**made, **more}
    try:
        found = detect(whole, feeds=sorted(target.feeds)[0]).name
    except Misfit:
        found = "something else"
    if more and found != target.name:
        raise Misfit(f"with its further columns ({', '.join(map(repr, more))}) it would look like {found}; leave some out (drop)")
    try:
        json.dumps(whole)
    except (TypeError, ValueError) as error:
        raise Misfit(f"it holds what JSON cannot say ({error}); leave that column out (drop)") from None
    return whole


# How each format says a meaning of its kind


@writers.register("text")
def _text(meaning: Meaning) -> dict[str, Any]:
    return {"text": meaning.answers[0]}


@writers.register("classified")
def _classified(meaning: Meaning) -> dict[str, Any]:
    return {**_text(meaning), **meaning.facts}


@writers.register("messages")
def _messages(meaning: Meaning) -> dict[str, Any]:
    return {"messages": [dict(turn) for turn in _flagged(meaning, "messages")]}


@writers.register("prompt_completion")
def _prompt_completion(meaning: Meaning) -> dict[str, Any]:
    return {"prompt": _plain(meaning.prompt), "completion": _plain(meaning.answers[0])}


@writers.register("preference")
def _preference(meaning: Meaning) -> dict[str, Any]:
    chosen, rejected = meaning.answers
    return {"prompt": _plain(meaning.prompt), "chosen": _plain(chosen), "rejected": _plain(rejected), **meaning.facts}


@writers.register("labeled")
def _labeled(meaning: Meaning) -> dict[str, Any]:
    return {**_prompt_completion(meaning), **meaning.facts}


@writers.register("prompt")
def _prompt(meaning: Meaning) -> dict[str, Any]:
    return {"prompt": _plain(meaning.prompt)}


@writers.register("alpaca")
def _alpaca(meaning: Meaning) -> dict[str, Any]:
    turns = _flagged(meaning, "alpaca")
    system = ""
    for at, turn in enumerate(turns):
        if other := sorted(turn.keys() - {"role", "content"}):
            raise Misfit(f"'alpaca' rows have no place for {other[0]!r} of message {at}")
    if turns[0]["role"] == "system":
        system, turns = turns[0]["content"], turns[1:]
        if not system:
            raise Misfit("'alpaca' rows have no place for a system message that is empty")
    roles = [turn["role"] for turn in turns]
    if roles != ["user", "assistant"] * (len(roles) // 2):
        raise Misfit(f"'alpaca' rows are turns of user and assistant, and this one has {', '.join(roles)}")
    said = [turn["content"] for turn in turns]
    row = {"system": system} if system else {}
    if len(said) > 2:
        row["history"] = [list(pair) for pair in zip(said[:-2:2], said[1:-2:2], strict=True)]
    return {**row, "instruction": said[-2], "input": "", "output": said[-1]}


@writers.register("sharegpt")
def _sharegpt(meaning: Meaning) -> dict[str, Any]:
    speakers = {"system": "system", "user": "human", "assistant": "gpt", "tool": "tool"}
    turns = []
    for at, turn in enumerate(_flagged(meaning, "sharegpt")):
        if turn["role"] not in speakers:
            raise Misfit(f"'sharegpt' rows have no speaker for the role {turn['role']!r} of message {at}")
        if other := sorted(turn.keys() - {"role", "content", "train", "tool_calls"}):
            raise Misfit(f"'sharegpt' rows have no place for {other[0]!r} of message {at}")
        flag = {"train": False} if turn.get("train") is False else {}
        if calls := turn.get("tool_calls"):
            turns.append({"from": "function_call", "value": _function_call(turn, calls, at), **flag})
        else:
            turns.append({"from": speakers[turn["role"]], "value": turn["content"], **flag})
    return {"conversations": turns}


def _function_call(turn: Message, calls: Sequence[Mapping[str, Any]], at: int) -> str:
    if "content" in turn:
        raise Misfit(f"'sharegpt' rows have no place for 'content' beside the calls of message {at}")
    for call in calls:
        other = sorted(call.keys() - {"type", "function"}) or sorted(call["function"].keys() - {"name", "arguments"})
        if other or call["type"] != "function":
            raise Misfit(f"'sharegpt' rows have no place for {(other or ['type'])[0]!r} of a call in message {at}")
    functions = [call["function"] for call in calls]
    return json.dumps(functions[0] if len(functions) == 1 else functions, ensure_ascii=False)


def _flagged(meaning: Meaning, name: str) -> tuple[Message, ...]:
    """All turns of a prompt and its answer; earlier assistant turns are marked as not trained."""
    answer = meaning.answers[0]
    if isinstance(meaning.prompt, str) or isinstance(answer, str):
        raise Misfit(
            f"{name!r} rows are turns, and this one is plain strings, which no template renders; make them turns (sides: messages)"
        )
    before = ({**turn, "train": False} if turn["role"] == "assistant" else turn for turn in meaning.prompt)
    return (*before, *answer)


def _plain(side: Side) -> Any:
    return side if isinstance(side, str) else [dict(turn) for turn in side]
