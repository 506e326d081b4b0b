"""What `data inspect` shows: counted by hand on a small set, and the trained tokens of real rows set apart."""

from __future__ import annotations

import json

import pytest

from tests.data.fakes import FakePrompt, FakeTokenizer, talk
from trivium.data.inspect import Span, inspect, paint, spans
from trivium.data.prepare import prepare


def test_the_numbers():
    rows = [{"messages": talk("q", "a")}] * 3 + [
        {"messages": talk("q", "aaaa")},
        {"messages": talk("q")},
        {"messages": talk("q", "a" * 50)},
    ]
    prepared = prepare(rows, FakePrompt(), length=20, max_empty=1, max_dropped=1)
    got = inspect(prepared)  # a row of "q", "a": BOS u : q STOP a : a STOP
    assert (got.rows, got.tokens, got.supervised) == (4, 3 * 9 + 12, 3 * 2 + 5)
    assert got.coverage == 11 / 39
    assert (got.lengths.min, got.lengths.median, got.lengths.p95, got.lengths.max) == (9, 9, pytest.approx(11.55), 12)
    assert (got.duplicates, got.bins, got.length, got.fill) == (2, 3, 20, 39 / 60)
    assert json.loads(json.dumps(got.to_dict()))["facts"]["dropped"] == {"count": 1, "first": ["rows:6 (58 tokens)"]}
    table = dict(got.table())
    assert table["examples"] == "6, as 4 rows, from rows (6)"
    assert table["tokens"] == "39, 11 of them trained (28.2%)"
    assert table["nothing to train on"] == "1: rows:5" and table["too long, dropped"] == "1: rows:6 (58 tokens)"
    assert table["too long, cut"] == "0"


def test_trained_tokens_are_set_apart():
    prepared = prepare([{"messages": talk("hi", "yes", "and", "no\x1b[2J")}], FakePrompt(), length=64)
    row = spans(prepared, 0, FakeTokenizer())
    assert row == [Span("<s>u:hi</s>a:", False), Span("yes</s>", True), Span("u:and</s>a:", False), Span("no\x1b[2J</s>", True)]
    assert paint(row, color=False) == "<s>u:hi</s>a:⟦yes</s>⟧u:and</s>a:⟦no\\x1b[2J</s>⟧"
    assert paint(row, color=True) == (
        "\x1b[2m<s>u:hi</s>a:\x1b[0m\x1b[1;32myes</s>\x1b[0m\x1b[2mu:and</s>a:\x1b[0m\x1b[1;32mno\\x1b[2J</s>\x1b[0m"
    )


def test_color_needs_a_terminal_and_no_no_color(monkeypatch: pytest.MonkeyPatch):
    row = [Span("a\n\tb", True)]
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert paint(row).startswith("\x1b")
    monkeypatch.setenv("NO_COLOR", "1")
    assert paint(row) == "⟦a\n\tb⟧"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setattr("sys.stdout.isatty", lambda: False)
    assert paint(row) == "⟦a\n\tb⟧"


def test_a_character_of_several_tokens_belongs_to_the_token_that_completes_it():
    class Halves(FakeTokenizer):
        special = frozenset()

        def stream(self):
            class Stream:
                def __init__(self):
                    self.kept = ""

                def push(self, token: int) -> str:
                    self.kept += chr(token - 3)
                    done, self.kept = (self.kept, "") if len(self.kept) == 2 else ("", self.kept)
                    return done

                def finish(self) -> str:
                    return self.kept

            return Stream()

    class Bare(FakePrompt):
        def completion(self, prompt, completion):
            row = super().completion(prompt, completion)
            return type(row)(row.ids[1:-1], row.targets[1:-1])

    prepared = prepare([{"prompt": "abc", "completion": "def"}], Bare(), length=8)
    assert spans(prepared, 0, Halves()) == [Span("ab", False), Span("cdef", True)]
