"""Rows of preferences as banks of pairs: what a prompt is, what is found wrong, and that no batch takes a pair apart."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.fakes import STOP, FakePrompt, encode
from trivium.core.errors import DataError
from trivium.data.bank import Prepared
from trivium.data.batches import Batches, ordered
from trivium.data.formats import Misfit
from trivium.data.pairs import sides
from trivium.data.prepare import prepare
from trivium.data.rows import read

prepare_pairs, prepare_judged, prepare_answers = (partial(prepare, feeds=feeds) for feeds in ("preference", "labels", "answers"))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def rows(count: int) -> list[dict]:
    return [{"prompt": f"q{n}?", "chosen": f"yes {'x' * (n % 7)}", "rejected": f"no {'y' * (n % 4)}!"} for n in range(count)]


def text(ids: np.ndarray) -> str:
    return "".join({1: "^", STOP: "$"}.get(int(token)) or chr(int(token) - 3) for token in ids)


def both(prepared: Prepared, pair: int = 0) -> tuple[str, str]:
    """The two sides of a pair, what is predicted in brackets."""
    found = []
    for row in (2 * pair, 2 * pair + 1):
        ids, targets = prepared.row(row)
        at = int(targets.argmax())
        assert targets[at:].all() and not targets[:at].any()
        found.append(f"{text(ids[:at])}[{text(ids[at:])}]")
    return found[0], found[1]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "1+1=", "chosen": "2", "rejected": "3"}, ("^1+1=[2$]", "^1+1=[3$]")),
        ({"chosen": "is 1+1 2", "rejected": "is 1+1 3"}, ("^is 1+1[ 2$]", "^is 1+1[ 3$]")),  # TRL leaves the space to the answers too
        ({"chosen": "a: x", "rejected": "a: yz"}, ("^a:[ x$]", "^a:[ yz$]")),
        ({"prompt": [user("q")], "chosen": [says("a")], "rejected": [says("b")]}, ("^u:q$a:[a$]", "^u:q$a:[b$]")),
        ({"chosen": [user("q"), says("a")], "rejected": [user("q"), says("b")]}, ("^u:q$a:[a$]", "^u:q$a:[b$]")),
        ({"prompt": "q", "chosen": [user("q"), says("a")], "rejected": [user("q"), says("b")]}, ("^u:q$a:[a$]", "^u:q$a:[b$]")),
        ({"instruction": "do", "input": "it", "output": "a", "chosen": "a", "rejected": "b"}, ("^u:do\nit$a:[a$]", "^u:do\nit$a:[b$]")),
        ({"instruction": "do", "input": "", "chosen": "a", "rejected": "b"}, ("^u:do$a:[a$]", "^u:do$a:[b$]")),
        (
            {"instruction": "do", "system": "be", "chosen": "a", "rejected": "b"},
            ("^s:be$u:do$a:[a$]", "^s:be$u:do$a:[b$]"),
        ),
        (
            {"chosen": [user("q"), says("h"), user("r"), says("a")], "rejected": [user("q"), says("h"), user("r"), says("b")]},
            ("^u:q$a:h$u:r$a:[a$]", "^u:q$a:h$u:r$a:[b$]"),  # earlier answers are context
        ),
    ],
)
def test_what_the_prompt_is(row, expected):
    assert both(prepare_pairs([row], FakePrompt(), length=64)) == expected


@pytest.mark.parametrize(
    ("row", "says_"),
    [
        ({"chosen": "a", "rejected": [says("b")]}, "not both strings"),
        ({"chosen": [user("q"), says("a")], "rejected": [user("r"), says("b")]}, "do not begin with the same messages"),
        ({"prompt": "z", "chosen": [user("q"), says("a")], "rejected": [user("q"), says("b")]}, "not the last message before the answers"),
        ({"instruction": "i", "prompt": "p", "chosen": "a", "rejected": "b"}, "there is no 'prompt'"),
    ],
)
def test_what_no_pair_can_be_made_of(row, says_):
    with pytest.raises(Misfit, match=says_):
        sides(row)
    with pytest.raises(DataError, match=f"rows:1: .*{says_}.*; the row: "):
        prepare_pairs([row], FakePrompt(), length=64)


def test_a_side_that_is_missing():
    for row, name in (({"prompt": "q", "chosen": "a"}, "rejected"), ({"prompt": "q", "rejected": "b", "chosen": None}, "chosen")):
        for number in (1, 3, 40):
            given = [*rows(number - 1), row]
            with pytest.raises(DataError, match=f"rows:{number}: it has no '{name}'"):
                prepare_pairs(given, FakePrompt(), length=64)


def test_what_cannot_be_learned_from_is_counted_and_named():
    given = [
        *rows(2),
        {"prompt": "q", "chosen": "same", "rejected": "same"},
        {"prompt": "q", "chosen": "", "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": ""},
        {"prompt": "q" * 40, "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": "b" * 40},
    ]
    with pytest.raises(DataError) as caught:
        prepare_pairs(given, FakePrompt(), length=20)
    assert "1 of 7 rows have the same answer as chosen and as rejected" in str(caught.value) and "rows:3" in str(caught.value)
    assert "2 of 7 rows have no token to train on" in str(caught.value) and "rows:4, rows:5" in str(caught.value)
    assert "2 of 7 rows are longer than 20 tokens" in str(caught.value)
    assert "rows:6 (its prompt alone fills 41 tokens), rows:7 (43 tokens)" in str(caught.value)
    kept = prepare_pairs(given, FakePrompt(), length=20, max_same=1, max_empty=2, max_dropped=2)
    assert len(kept) == 4 and kept.facts.examples == 7
    assert kept.facts.same.count == 1 and kept.facts.same.first == ("rows:3",)
    assert kept.facts.empty.count == kept.facts.dropped.count == 2
    with pytest.raises(DataError, match="allow --max-same 2"):
        prepare_pairs([given[2], given[2], *rows(1)], FakePrompt(), length=20, max_same=1)
    cut = prepare_pairs(given, FakePrompt(), length=20, max_same=1, max_empty=2, max_dropped=1, too_long="truncate")
    assert len(cut) == 6 and cut.facts.truncated.count == 1 and cut.facts.dropped.count == 1
    assert both(cut, 2)[1] == f"^q[{'b' * 18}]"


def test_every_one_of_a_few_is_named():
    given = rows(30)
    alike = [3, 8, 9, 14, 20, 29]
    for n in alike:
        given[n]["rejected"] = given[n]["chosen"]
    with pytest.raises(DataError, match=f"6 of 30 rows .*: {', '.join(f'rows:{n + 1}' for n in alike)}$"):
        prepare_pairs(given, FakePrompt(), length=64)
    many = [{"prompt": "q", "chosen": "a", "rejected": "a"}] * 12
    with pytest.raises(DataError, match=r"12 of 12 rows .*: rows:1, .*, rows:10, \.\.\.$"):
        prepare_pairs(many, FakePrompt(), length=64)


def test_sides_that_only_the_template_makes_the_same():
    """Thoughts that it drops."""
    row = {"prompt": [user("q")], "chosen": [says("a"), user("r"), says("b")], "rejected": [says("<t>a"), user("r"), says("b")]}
    with pytest.raises(DataError, match="as 2 rows, and only one can be compared"):
        prepare_pairs([row], FakePrompt(forgets=True), length=64)
    with pytest.raises(DataError, match="the same answer as chosen and as rejected"):
        prepare_pairs([row, *rows(1)], FakePrompt(forgets=True), length=64, turns="last", format="preference")


def test_no_rows_and_other_rows():
    with pytest.raises(DataError, match="no rows"):
        prepare_pairs([], FakePrompt(), length=64)
    with pytest.raises(DataError, match="'text' serve next-token training, not preference training"):
        prepare_pairs([{"text": "t"}], FakePrompt(), length=64)
    with pytest.raises(DataError, match="nothing to train on: all 1 rows were empty or too long, or the same on both sides"):
        prepare_pairs([{"prompt": "q", "chosen": "a", "rejected": "a"}], FakePrompt(), length=64, max_same=None)


def test_pairs_stay_together_in_every_batch():
    """In each packed row documents come as chosen, rejected; each pair once an epoch; micro-batches hold whole ones."""
    prepared = prepare_pairs(rows(23), FakePrompt(), length=30)
    assert prepared.length == 60 and 1 < len(prepared.bins) < 23
    for bin_ in range(len(prepared.bins)):
        own = prepared.bins[bin_]
        assert (own[0::2] % 2 == 0).all() and (own[1::2] == own[0::2] + 1).all()
        assert prepared.index["length"][own].sum() <= 60
    batches = Batches([(prepared, 1)], seed=3, rows=4)
    seen: list[str] = []
    for i in range(batches.steps(1)):
        for micro in batches.batch(i).split(3):
            for tokens, segments in zip(micro.tokens, micro.segments, strict=True):
                documents = [text(tokens[segments == d].numpy()) for d in range(int(segments.max()) + 1)]
                for chosen, rejected in zip(documents[::2], documents[1::2], strict=True):
                    assert chosen.split("?")[0] == rejected.split("?")[0] and "yes" in chosen and "no" in rejected
                    seen.append(chosen)
    assert len(set(seen)) == 23
    again = Batches([(prepare_pairs(rows(23), FakePrompt(), length=30), 1)], seed=3, rows=4)
    assert again.fingerprint == batches.fingerprint and torch.equal(again.batch(5).tokens, batches.batch(5).tokens)


def test_margins_come_along_and_are_kept(tmp_path):
    given = [{**row, "margin": n / 4} for n, row in enumerate(rows(5))]
    prepared = prepare_pairs(given, FakePrompt(), length=16)
    assert prepared.values["margin"].tolist() == [0, 0, 0.25, 0, 0.5, 0, 0.75, 0, 1, 0]
    assert prepared.fingerprint != prepare_pairs(rows(5), FakePrompt(), length=16).fingerprint
    assert "margin" not in prepare_pairs(rows(5), FakePrompt(), length=16).values
    loaded = Prepared.load(prepared.save(tmp_path / "bank"))
    assert loaded.fingerprint == prepared.fingerprint and loaded.values["margin"].tolist() == prepared.values["margin"].tolist()
    for bank in (prepared, loaded):
        batch = next(ordered(bank, rows=2))
        margins = {text(batch.tokens[row, batch.segments[row] == d].numpy()): float(batch.values["margin"][row, d])
                   for row in range(2) for d in range(int(batch.segments[row].max()) + 1)}  # fmt: skip
        assert all(value == (int(said[2]) / 4 if "yes" in said else 0) for said, value in margins.items())
        (last,) = [micro.values["margin"] for micro in batch.split(2)][1:]
        assert torch.equal(last, batch.values["margin"][1:])
    with pytest.raises(DataError, match="rows:1: 'margin' is 'much'"):
        prepare_pairs([{**given[0], "margin": "much"}], FakePrompt(), length=16)


@pytest.mark.parametrize("flag", [(True, False), (1, 0)])
def test_judged_answers_stand_beside_the_answer_to_another_prompt(flag):
    good, bad = flag
    given = [
        {"prompt": "p", "completion": "one", "label": good},
        {"prompt": "p", "completion": "two", "label": bad},
        {"prompt": "q", "completion": "three", "label": good},
    ]
    prepared = prepare_judged(given, FakePrompt(), length=32)
    assert [both(prepared, n) for n in range(3)] == [
        ("^p[one$]", "^p[three$]"),
        ("^p[two$]", "^p[three$]"),
        ("^q[three$]", "^q[one$]"),
    ]
    assert prepared.values["label"].tolist() == [1, 0, -1, 0, 1, 0]
    messages = [{**row, "prompt": [user(row["prompt"])], "completion": [says(row["completion"])]} for row in given]
    assert both(prepare_judged(messages, FakePrompt(), length=32), 1) == ("^u:p$a:[two$]", "^u:p$a:[three$]")


def test_pairs_are_judged_side_by_side():
    given = [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "c", "rejected": "d"}]
    prepared = prepare_judged(given, FakePrompt(), length=32)
    assert prepared.values["label"].tolist() == [1, 0, -1, 0, 1, 0, -1, 0]
    assert [both(prepared, n) for n in (0, 1, 3)] == [("^p[a$]", "^p[c$]"), ("^p[b$]", "^p[c$]"), ("^q[d$]", "^q[a$]")]
    with pytest.raises(DataError, match="the same answer as chosen and as rejected"):
        prepare_judged([{"prompt": "p", "chosen": "a", "rejected": "a"}, *rows(1)], FakePrompt(), length=32)


def test_a_mismatch_is_cut_where_it_is_too_long():
    given = [{"prompt": "p" * 10, "completion": "a", "label": True}, {"prompt": "q", "completion": "b" * 10, "label": False}]
    assert both(prepare_judged(given, FakePrompt(), length=14)) == ("^pppppppppp[a$]", "^pppppppppp[bbb]")


@pytest.mark.parametrize(
    ("rows_", "says_"),
    [
        ([{"prompt": "p", "completion": "a", "label": "good"}], "rows:1: 'label' is 'good', not true or false"),
        ([{"prompt": "p", "completion": "a", "label": True}] * 2, "all 2 rows have the same prompt"),
        ([{"prompt": "p", "completion": "", "label": True}], "1 of 1 rows have no token to train on"),
        ([{"prompt": "p", "completion": "a"}], "serve next-token training, not training on labels"),
        ([{"prompt": "p", "completion": "a", "label": True}] * 20 + [{"prompt": "p", "completion": "a"}], "rows:21: it has no 'label'"),
    ],
)
def test_judged_rows_that_cannot_be_used(rows_, says_):
    with pytest.raises(DataError, match=says_):
        prepare_judged(rows_, FakePrompt(), length=32)


def test_real_rows_with_the_same_answer_twice_are_found(tmp_path):
    """As they stand in a public set: its answer is given as chosen, and sometimes as rejected too."""
    path: Path = tmp_path / "pairs.jsonl"
    path.write_text(
        '{"instruction": "i", "input": "", "output": "o", "rejected": "r", "chosen": "o"}\n'
        '{"instruction": "i", "input": "", "output": "o", "rejected": "o", "chosen": "o"}\n'
    )
    with pytest.raises(DataError, match=r"1 of 2 rows have the same answer.*pairs.jsonl:2"):
        prepare_pairs(read([path]), FakePrompt(), length=32)
    assert encode("o")[0] == prepare_pairs(read([path]), FakePrompt(), length=32, max_same=1).row(0)[0][-2]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "completion": "a"}, ["^p[a$]"]),
        ({"prompt": "p", "completion": "a", "label": True}, ["^p[a$]"]),
        ({"messages": [user("q"), says("h"), user("r"), says("a")]}, ["^u:q$a:h$u:r$a:[a$]"]),
        ({"instruction": "i", "output": "o"}, ["^u:i$a:[o$]"]),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, ["^p[a$]", "^p[b$]"]),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, ["^p[a$]", "^p[a$]"]),
        ({"prompt": "p", "completion": ""}, ["^p[$]"]),
    ],
)
def test_answers_to_be_scored_are_all_there_in_order(row, expected):
    prepared = prepare_answers([row, row], FakePrompt(), length=32, turns="last", packing="none")
    assert len(prepared) == 2 * len(expected) == len(prepared.bins)
    assert [both(prepared, n // 2)[n % 2] for n in range(len(prepared))] == 2 * expected


def test_answers_that_cannot_be_scored():
    with pytest.raises(DataError, match="rows:2: 43 tokens, and there is room for 32"):
        prepare_answers([{"prompt": "p", "completion": "a"}, {"prompt": "p", "completion": "a" * 40}], FakePrompt(), length=32)
    with pytest.raises(DataError, match="no rows"):
        prepare_answers([], FakePrompt(), length=32)
    with pytest.raises(DataError, match="rows:1: it has no 'rejected'"):
        prepare_answers([{"prompt": "p", "chosen": "a"}], FakePrompt(), length=32)
