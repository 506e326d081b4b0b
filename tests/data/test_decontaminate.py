"""Decontamination: what was planted is found, what was not is left, and boilerplate proves nothing."""

from __future__ import annotations

import json

import pytest

from trivium.core.errors import ConfigError, DataError
from trivium.core.seed import derive
from trivium.data.decontaminate import decontaminate

WORDS = [f"w{n}" for n in range(400)]


def text(*path: int | str, count: int = 30) -> str:
    return " ".join(WORDS[derive(0, *path, at) % len(WORDS)] for at in range(count))


EVALUATION = [{"question": text("q", n), "choices": ["yes", "no"], "answer": 0} for n in range(40)]
CLEAN = [
    {"messages": [{"role": "user", "content": text("clean", n)}, {"role": "assistant", "content": text("answer", n)}]} for n in range(60)
]


def test_planted_rows_are_found_and_no_others():
    """Inside longer text, in other case and punctuation, in any turn; 12 words of 13 are not enough."""
    planted = []
    for n in range(20):
        words = EVALUATION[n]["question"].split()
        at = derive(1, n) % (len(words) - 13)
        shared = ", ".join(words[at : at + 13]).upper()
        said = f"{text('before', n, count=9)}. {shared}! {text('after', n, count=9)}"
        planted.append({"messages": [{"role": "user", "content": "hm"}, {"role": "assistant", "content": said}]})
    short = [
        {"text": f"{text('x', n, count=5)} {' '.join(EVALUATION[n]['question'].split()[:12])} {text('y', n, count=5)}"} for n in range(20)
    ]
    found = decontaminate([*CLEAN, *planted, *short], EVALUATION)
    assert [hit.record.line for hit in found.hits] == list(range(61, 81))
    assert [hit.other for hit in found.hits] == [f"rows:{n + 1}" for n in range(20)]
    assert all(len(hit.shared.split()) == 13 and not hit.whole for hit in found.hits)
    assert [record.line for record in found.kept] == [*range(1, 61), *range(81, 101)]
    report = json.loads(json.dumps(found.report))
    assert (report["rows"], report["kept"], report["contaminated"], report["evaluation rows"]) == (100, 80, 20, 40)
    assert report["evaluation rows named in the hits"] == 20 and report["examples"][0]["why"].startswith("shares words with rows:1: w")


def test_short_texts_are_found_as_a_whole():
    evaluation = [{"question": "How many legs has a spider?", "answer": "Eight"}, {"question": "Why?", "answer": "So."}]
    rows = [
        {"prompt": "how many legs has a spider", "completion": "8"},
        {"prompt": "Tell me: how many legs has a spider, or two?", "completion": "8"},
        {"prompt": "Why?", "completion": "Eight"},
    ]
    found = decontaminate(rows, evaluation)
    assert [hit.record.line for hit in found.hits] == [1] and found.hits[0].whole
    assert found.hits[0].to_dict()["why"] == "says the same as rows:1: how many legs has a spider"
    assert found.report["evaluation rows too short to be found"] == 1
    assert [hit.record.line for hit in decontaminate(rows, evaluation, size=5).hits] == [1, 2]
    assert [hit.record.line for hit in decontaminate(rows, evaluation, least=1).hits] == [1, 3]
    said = [{"messages": [{"role": "user", "content": text}]} for text in ("Who?", "Why?")]
    assert [hit.record.line for hit in decontaminate(said, said[1:], least=1).hits] == [2], "a role is nothing that is said"


def test_boilerplate_proves_nothing():
    head = text("instruction", count=20)
    evaluation = [{"prompt": f"{head} {text('e', n, count=14)}", "system": head} for n in range(11)]
    rows = [{"text": f"{head} {text('own', n)}"} for n in range(5)] + [{"text": head}, {"text": text("e", 3, count=14)}]
    found = decontaminate(rows, evaluation)
    assert [hit.record.line for hit in found.hits] == [7] and found.report["boilerplate runs"] >= 8
    assert len(decontaminate(rows, evaluation, common=11).hits) == 7


def test_bad_asking():
    rows = [{"text": "a b c d e"}]
    with pytest.raises(DataError, match="the evaluation is empty"):
        decontaminate(rows, [])
    with pytest.raises(DataError, match="the data is empty"):
        decontaminate([], rows)
    with pytest.raises(DataError, match="none of 2 rows of the evaluation has a text of 4 words"):
        decontaminate(rows, [{"answer": 4}, {"answer": "four"}])
    with pytest.raises(ConfigError, match="least: 14 is not from 1 to the 13 words"):
        decontaminate(rows, rows, least=14)
