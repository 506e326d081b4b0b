"""Rows from one format into another: what is said stays, round trips end where they began, and what cannot be said is named."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from tests.data.fakes import talk
from trivium.core.errors import DataError
from trivium.data.formats import formats
from trivium.data.reshape import KINDS, read, reshape, writers

CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
TOKENS = [name for name, kind in KINDS.items() if kind == "answer"]

words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=8)
names = st.sampled_from(["system", "developer", "user", "assistant", "tool"])
arguments = st.dictionaries(words, st.integers() | words | st.none(), max_size=2) | words
calls = st.lists(
    st.builds(
        lambda name, given, id: {"type": "function", "function": {"name": name, "arguments": given}, **({"id": id} if id else {})},
        words,
        arguments,
        st.sampled_from(["", "", "c1"]),
    ),
    min_size=1,
    max_size=2,
)


@st.composite
def turns(draw: Any, **fixed: str) -> dict[str, Any]:
    role = fixed.get("role") or draw(names)
    turn: dict[str, Any] = {"role": role, "content": draw(words)}
    if role == "assistant":
        turn |= draw(st.sampled_from([{}, {}, {"train": False}, {"train": True}, {"weight": 0}, {"reasoning_content": "hm"}]))
        if draw(st.integers(0, 4)) == 0:
            turn["tool_calls"] = draw(calls)
            if draw(st.booleans()):
                turn["content"] = None
    return turn


plain = st.lists(st.tuples(words, words), min_size=1, max_size=3).map(
    lambda pairs: [turn for asked, said in pairs for turn in ({"role": "user", "content": asked}, {"role": "assistant", "content": said})]
)
conversations = plain | st.lists(turns(), min_size=1, max_size=5).map(lambda said: [*said, {"role": "assistant", "content": "end"}])
extras = st.sampled_from([{}, {}, {"id": 7}, {"meta": {"a": [1, None]}}])
tools = st.sampled_from([{}, {}, {"tools": [TOOL]}, {"tools": json.dumps([TOOL])}, {"tools": []}])


@st.composite
def rows(draw: Any) -> tuple[str, dict[str, Any]]:
    """A row of some format, with tools and further columns now and then."""
    format = draw(st.sampled_from(sorted(KINDS)))
    more = draw(extras)
    said = draw(conversations)
    string = draw(st.booleans())
    prompt, answer = (draw(words), draw(words)) if string else (said[:-1], said[-1:])
    kit = {} if string else draw(tools)
    match format:
        case "text":
            row: dict[str, Any] = {"text": draw(words)}
        case "classified":
            row = {"text": draw(words), "label": draw(st.integers(0, 3) | words)}
        case "messages":
            row = {"messages": said, **draw(tools)}
        case "prompt_completion":
            row = {"prompt": prompt, "completion": answer, **kit}
        case "labeled":
            row = {"prompt": prompt, "completion": answer, "label": draw(st.booleans()), **kit}
        case "prompt":
            row = {"prompt": prompt or [{"role": "user", "content": "q"}], **kit}
        case "preference":
            other = draw(words) if string else [{"role": "assistant", "content": draw(words)}]
            row = {"prompt": prompt, "chosen": answer, "rejected": other, **kit, **draw(st.sampled_from([{}, {"margin": 0.5}]))}
        case "alpaca":
            row = {"instruction": draw(words), "output": draw(words), **draw(st.sampled_from([{}, {"system": "s"}, {"input": "i"}]))}
            row |= draw(st.sampled_from([{}, {"history": [["a", "b"], ["c", "d"]]}]))
        case _:
            speak = {"user": "human", "assistant": "gpt", "tool": "observation", "system": "system"}
            kept = [turn for turn in said if turn["role"] in speak and turn.get("content") is not None]
            row = {"conversations": [{"from": speak[turn["role"]], "value": turn["content"]} for turn in kept], **draw(tools)}
    return format, {**row, **more}


def one(row: dict[str, Any], to: str, **how: Any) -> dict[str, Any]:
    (made,) = reshape([row], to, **how)
    return made


@settings(max_examples=200)
@given(rows(), st.sampled_from(sorted(KINDS)))
@example(("messages", {"messages": [*talk("q", "a"), *talk("r", "b")], "tools": [TOOL], "id": 1}), "sharegpt")
def test_a_row_says_the_same_in_another_format_and_back(given_row, to):
    """Or it is refused; and what it trains is the same example, by the converters that training uses."""
    format, row = given_row
    try:
        before = read(formats.get(format), row)
    except ValueError:
        assume(False)
    made = refused = None
    try:
        made = one(row, to, format=format)
    except DataError as error:
        refused = str(error)
    if made is None:
        assert refused is not None and refused.startswith("rows:1: ") and "; the row: " in refused
        assert format != to, f"a row is refused by its own format: {refused}"
        return
    assert read(formats.get(to), made) == before
    if to in TOKENS:
        convert, own = formats.get(to).convert, formats.get(format).convert
        assert _trained(convert(made)) == _trained(own(row))
    back = one(made, format, format=to)
    assert read(formats.get(format), back) == before
    assert one(back, to, format=format) == made and one(made, to) == made
    for column in ("id", "meta"):
        assert made.get(column) == back.get(column) == row.get(column)
    assert json.loads(json.dumps(made)) == made


def _trained(example: Any) -> Any:
    """An example without the two spellings of nothing."""
    told = vars(example) if not hasattr(example, "__slots__") else example
    if "messages" in told:
        calls = ("content", "tool_calls")
        return told["tools"], [{k: v for k, v in turn.items() if not (k in calls and not v and v != "")} for turn in told["messages"]]
    return told


@settings(max_examples=200)
@given(words, words, words)
def test_strings_become_turns_and_turns_strings_where_asked(prompt, good, bad):
    row = {"prompt": prompt, "completion": good}
    asked = one(row, "messages", sides="messages")
    assert asked == {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": good}]}
    assert one(asked, "prompt-completion", sides="strings") == row
    assert one(one(asked, "alpaca"), "prompt_completion", sides="strings") == row
    pair = {"prompt": prompt, "chosen": good, "rejected": bad}
    assert one(one(pair, "preference", sides="messages"), "preference", sides="strings") == pair


SYSTEM = {"role": "system", "content": "s"}
REFUSED = [
    ({"prompt": "q", "completion": "a"}, "messages", "make them turns .sides: messages"),
    (
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        "messages",
        "hold a prompt and its answer, and this one a prompt, a chosen and a rej",
    ),
    ({"prompt": "q", "completion": "a", "label": True}, "prompt_completion", "and this one a prompt, an answer and a label"),
    ({"messages": talk("q", "a")}, "preference", "hold a prompt, a chosen and a rejected answer"),
    ({"text": "t"}, "messages", "and this one a document"),
    ({"text": "t", "label": 1}, "text", "and this one a text and its class"),
    ({"messages": talk("q", "a"), "tools": [TOOL]}, "alpaca", "'alpaca' rows have no place for 'tools'"),
    (
        {"messages": [*talk("q"), {"role": "assistant", "content": "a", "reasoning_content": "hm"}]},
        "alpaca",
        "'reasoning_content' of message 1",
    ),
    (
        {"messages": [*talk("q"), {"role": "assistant", "content": "a", "reasoning_content": "hm"}]},
        "sharegpt",
        "'reasoning_content' of message",
    ),
    ({"messages": [*talk("q", "a", "r"), {"role": "assistant", "content": "b", "train": False}]}, "alpaca", "'train' of message 3"),
    ({"messages": [SYSTEM, SYSTEM, *talk("q", "a")]}, "alpaca", "turns of user and assistant, and this one has system"),
    ({"messages": [{"role": "system", "content": ""}, *talk("q", "a")]}, "alpaca", "a system message that is empty"),
    ({"messages": [{"role": "developer", "content": "d"}, *talk("q", "a")]}, "sharegpt", "no speaker for the role 'developer'"),
    ({"messages": [*talk("q"), {"role": "assistant", "content": "so", "tool_calls": [CALL]}]}, "sharegpt", "'content' beside the calls"),
    ({"messages": [*talk("q"), {"role": "assistant", "tool_calls": [{**CALL, "id": "c"}]}]}, "sharegpt", "'id' of a call in message 1"),
    ({"messages": talk("q")}, "sharegpt", "no assistant turn that is trained"),
    ({"messages": talk("q", "a", "r", "b")}, "prompt_completion", None),
    ({"messages": talk("q", "a", "r", "b"), "n": 1}, "alpaca", None),
    ({"messages": talk("q", "a"), "instruction": "x"}, "alpaca", "its further column 'instruction' means something"),
    ({"messages": talk("q", "a"), "label": 1}, "prompt_completion", "its further columns .'label'. it would look like"),
    ({"messages": talk("q", "a"), "raw": b"x"}, "sharegpt", "what JSON cannot say"),
    ({"conversations": [{"from": "narrator", "value": "x"}]}, "messages", "is from 'narrator'"),
]


@pytest.mark.parametrize(("row", "to", "why"), REFUSED)
def test_what_a_format_cannot_carry_is_named(row, to, why):
    if why is None:
        assert read(formats.get(to), one(row, to)) == read(formats.get("messages"), row)
        return
    with pytest.raises(DataError, match=why) as told:
        one(row, to)
    assert "rows:1" in str(told.value)


def test_what_is_dropped_is_named():
    row = {"prompt": "q", "completion": "a", "label": True, "id": 3}
    assert one(row, "prompt_completion", drop=["label"]) == {"prompt": "q", "completion": "a", "id": 3}
    with pytest.raises(DataError, match="drop: none of the first 1 rows has a column 'lable'"):
        one(row, "labeled", drop=["lable"])


def test_bad_asking():
    with pytest.raises(DataError, match="unknown row format 'mesages'; did you mean 'messages'"):
        one({"text": "t"}, "mesages")
    with pytest.raises(DataError, match="no rows"):
        list(reshape([], "messages"))
    with pytest.raises(DataError, match="rows:2: looks like 'text', but rows:1 like 'messages'"):
        list(reshape([{"messages": talk("q", "a")}, {"text": "t"}], "messages"))
    late = [{"messages": talk("q", "a")}] * 20 + [{"text": "t"}]
    with pytest.raises(DataError, match="rows:21: does not fit the format 'messages': it has no 'messages'"):
        list(reshape(late, "sharegpt"))
    assert set(writers) == set(formats) == set(KINDS)


def test_known_spellings():
    row = {"instruction": "Translate", "input": "cat", "output": "Katze", "system": "s", "history": [["a", "b"]]}
    made = one(row, "sharegpt")
    assert [(turn["from"], turn["value"]) for turn in made["conversations"]] == [
        ("system", "s"), ("human", "a"), ("gpt", "b"), ("human", "Translate\ncat"), ("gpt", "Katze"),
    ]  # fmt: skip
    assert one(made, "alpaca") == {"system": "s", "history": [["a", "b"]], "instruction": "Translate\ncat", "input": "", "output": "Katze"}
    two = [
        *talk("q"),
        {"role": "assistant", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "a"},
    ]
    called = one({"messages": two, "tools": [TOOL]}, "sharegpt")
    assert called["conversations"][1] == {"from": "function_call", "value": json.dumps([CALL["function"]] * 2)}
    assert one(called, "messages") == {"messages": two, "tools": [TOOL]}
    flagged = one({"prompt": talk("q", "a", "r"), "completion": talk("q", "b")[1:]}, "messages")
    assert [turn.get("train") for turn in flagged["messages"]] == [None, False, None, None]
