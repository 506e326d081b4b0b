"""Formats: a table of rows and what they are, what each becomes, and one clear error for what does not fit."""

from __future__ import annotations

import json

import pytest

from tests.data.fakes import FakePrompt, talk
from trivium.core.errors import DataError
from trivium.data.formats import FEEDS, Completion, Conversation, Misfit, Text, choose, convert, detect, formats
from trivium.data.rows import Record

PAIR = talk("q", "a")
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
USER, ANSWER = PAIR

DETECTED = [
    ({"text": "t"}, "tokens", "text"),
    ({"text": "t", "url": "u", "score": 1}, "tokens", "text"),
    ({"messages": PAIR}, "tokens", "messages"),
    ({"messages": PAIR, "tools": [TOOL], "id": 1}, "tokens", "messages"),
    ({"messages": PAIR, "prompt": "q", "prompt_id": "x"}, "tokens", "messages"),
    ({"messages": PAIR, "prompt": "q"}, "prompts", "prompt"),
    ({"messages": PAIR, "prompt": "q", "chosen": PAIR, "rejected": PAIR}, "tokens", "messages"),
    ({"messages": PAIR, "prompt": "q", "chosen": PAIR, "rejected": PAIR}, "preference", "preference"),
    ({"messages": PAIR, "text": None}, "tokens", "messages"),
    ({"prompt": "q", "completion": "a"}, "tokens", "prompt_completion"),
    ({"prompt": PAIR[:1], "completion": PAIR[1:], "label": None}, "tokens", "prompt_completion"),
    ({"prompt": "q", "completion": "a", "label": False}, "labels", "labeled"),
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, "preference", "preference"),
    ({"chosen": PAIR, "rejected": PAIR}, "preference", "preference"),
    ({"prompt": "q", "answer": 42}, "prompts", "prompt"),
    ({"text": "t", "label": 1, "id": 7}, "classes", "classified"),
    ({"instruction": "i", "input": "", "output": "o"}, "tokens", "alpaca"),
    ({"instruction": "i", "output": "o", "history": []}, "tokens", "alpaca"),
    ({"conversations": [{"from": "human", "value": "q"}], "system": "s"}, "tokens", "sharegpt"),
]


@pytest.mark.parametrize(("row", "feeds", "name"), DETECTED)
def test_detection(row: dict, feeds: str, name: str):
    assert detect(row, feeds=feeds).name == name


REFUSED = [
    ({"question": "q", "answer": "a"}, "tokens", r"no format fits the columns 'answer', 'question' \(known: "),
    ({}, "tokens", r"no format fits the columns \(none\)"),
    ({"text": "t", "messages": PAIR}, "tokens", "fit the formats 'messages' and 'text' equally well; say which one with --format"),
    ({"instruction": "i", "input": "", "output": "o", "text": "t"}, "tokens", "fit the formats 'alpaca' and 'text' equally well"),
    (
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        "tokens",
        "'preference' serve preference training, not next-token training .which takes: alpaca",
    ),
    ({"prompt": "q", "completion": "a", "label": False}, "tokens", "'labeled' serve training on labels, not next-token"),
    ({"text": "t", "label": "spam"}, "tokens", "'classified' serve training of classifiers, not next-token"),
    ({"prompt": "q"}, "tokens", "'prompt' serve rollouts, not next-token"),
    ({"text": "t"}, "preference", "'text' serve next-token training, not preference training .which takes: preference"),
]


@pytest.mark.parametrize(("row", "feeds", "message"), REFUSED)
def test_what_cannot_be_told_or_cannot_serve_is_said(row: dict, feeds: str, message: str):
    with pytest.raises(Misfit, match=message):
        detect(row, feeds=feeds)


def test_every_format_is_declared_whole():
    assert {name for name, _ in formats.items()} == {name for _, _, name in DETECTED}
    for name, format in formats.items():
        assert format.name == name and format.summary.startswith(f"{name}: ") and format.feeds <= FEEDS.keys()
        assert (format.convert is not None) == ("tokens" in format.feeds)


def records(*rows: dict) -> list[Record]:
    return [Record(row, "data.jsonl", number) for number, row in enumerate(rows, start=1)]


def test_the_first_rows_must_agree_and_the_name_overrides_them():
    both = {"text": "t", "messages": PAIR}
    assert choose(records({"text": "a"}, {"text": "b"})).name == "text"
    assert choose(records(both), name="messages").name == "messages"
    with pytest.raises(DataError, match="data.jsonl:2: looks like 'messages', but data.jsonl:1 like 'text'; say which with --format"):
        choose(records({"text": "a"}, {"messages": PAIR}))
    with pytest.raises(DataError, match="data.jsonl:1: the columns .* the row: "):
        choose(records(both))
    with pytest.raises(DataError, match="unknown row format 'mesages'; did you mean 'messages'"):
        choose(records(both), name="mesages")
    with pytest.raises(DataError, match="'preference' serve preference training, not next-token"):
        choose(records(both), name="preference")


def example(row: dict, name: str):
    return convert(Record(row, "data.jsonl", 7), formats.get(name))


def test_text_and_plain_completion():
    assert example({"text": "t"}, "text") == Text("t")
    assert example({"prompt": "q", "completion": "a"}, "prompt_completion") == Completion("q", "a")


def test_messages_with_tools_calls_and_loss_flags():
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
    messages = [
        {"role": "system", "content": "s"},
        USER,
        {**call, "weight": 0},
        {"role": "tool", "content": "r"},
        {**ANSWER, "train": True},
    ]
    want = Conversation(
        ({"role": "system", "content": "s"}, USER, {**call, "train": False}, {"role": "tool", "content": "r"}, ANSWER), (TOOL,)
    )
    assert example({"messages": messages, "tools": [TOOL]}, "messages") == want
    assert example({"messages": messages, "tools": json.dumps([TOOL])}, "messages") == want
    assert example({"messages": PAIR, "tools": []}, "messages").tools is None
    assert "weight" in messages[2], "the row that was given is left as it is"


def test_prompt_and_completion_of_messages_train_only_the_completion():
    got = example({"prompt": talk("q", "a", "q2"), "completion": [{"role": "assistant", "content": "a2"}]}, "prompt_completion")
    first, answer, *rest = talk("q", "a", "q2", "a2")
    assert got == Conversation((first, {**answer, "train": False}, *rest))


def test_alpaca():
    row = {"instruction": "i", "input": "x", "output": "o", "system": "s", "history": [["h", "g"]]}
    assert example(row, "alpaca").messages == ({"role": "system", "content": "s"}, *talk("h", "g", "i\nx", "o"))
    assert example({"instruction": "i", "input": "", "output": "o"}, "alpaca").messages == tuple(talk("i", "o"))


def test_sharegpt():
    turns = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}', "weight": 0},
        {"from": "observation", "value": "r"},
        {"from": "gpt", "value": "a", "weight": None},
    ]
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}], "train": False}
    want = ({"role": "system", "content": "s"}, USER, call, {"role": "tool", "content": "r"}, ANSWER)
    assert example({"conversations": turns}, "sharegpt") == Conversation(want)
    assert example({"conversations": turns[1:2], "system": "s"}, "sharegpt").messages == want[:2]


MISFITS = [
    ("text", {"txt": "t"}, "it has no 'text'"),
    ("text", {"text": 3}, "'text' is a number, not a string"),
    ("messages", {"messages": "hello"}, "'messages' is a string, not a list"),
    ("messages", {"messages": []}, "there are no messages"),
    ("messages", {"messages": ["hello"]}, "message 0 is a string, not an object"),
    ("messages", {"messages": [USER, {"role": "robot", "content": "a"}]}, "message 1 has the role 'robot' .known: system, "),
    ("messages", {"messages": [{"content": "a"}]}, "message 0 has the role None"),
    ("messages", {"messages": [USER, {"role": "assistant"}]}, "the content of message 1 is null, not a string"),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "the content of message 0 is a list, not a string"),
    ("messages", {"messages": [{**USER, "train": True}]}, "message 0 asks for a loss, but its role is 'user'"),
    ("messages", {"messages": [USER, {**ANSWER, "weight": 0.5}]}, "'weight' of message 1 is 0.5"),
    ("messages", {"messages": [USER, {**ANSWER, "weight": 1, "train": False}]}, "contradict each other"),
    ("messages", {"messages": [USER, {**ANSWER, "tool_calls": "f()"}]}, "'tool_calls' of message 1 is a string, not a list"),
    ("messages", {"messages": PAIR, "tools": "f("}, "'tools' is a string, but not JSON"),
    ("messages", {"messages": PAIR, "tools": [3]}, "a tool is a number, not an object"),
    ("prompt_completion", {"prompt": "q", "completion": PAIR[1:]}, "'prompt' is a string and 'completion' a list"),
    ("prompt_completion", {"prompt": "q", "completion": "a", "tools": [TOOL]}, "'tools' need messages"),
    ("alpaca", {"instruction": "i", "output": None}, "it has no 'output'"),
    ("alpaca", {"instruction": "i", "output": "o", "input": 3}, "'input' is a number"),
    ("alpaca", {"instruction": "i", "output": "o", "history": [["a"]]}, "is not a pair"),
    ("sharegpt", {"conversations": PAIR}, "turn 0 has no 'from' and 'value'; with 'role' and 'content', name the column 'messages'"),
    ("sharegpt", {"conversations": [{"from": "alien", "value": "a"}]}, "turn 0 is from 'alien'"),
    ("sharegpt", {"conversations": [{"from": "function_call", "value": "f()"}]}, "the function call of turn 0 is a string, but not JSON"),
    ("sharegpt", {"conversations": [{"from": "function_call", "value": '["f"]'}]}, "has no 'name' and 'arguments'"),
]


@pytest.mark.parametrize(("name", "row", "reason"), MISFITS)
def test_a_row_that_does_not_fit_names_place_format_reason_and_row(name: str, row: dict, reason: str):
    with pytest.raises(DataError, match=f"^data.jsonl:7: does not fit the format '{name}': .*{reason}.*; the row: {{"):
        example(row, name)


def test_tools_and_arguments_reach_the_template():
    prompt = FakePrompt()
    Conversation(tuple(PAIR), (TOOL,)).rows(prompt, turns="last", arguments={"date": "today"})
    assert prompt.calls == [{"tools": (TOOL,), "arguments": {"date": "today"}, "turns": "last"}]
