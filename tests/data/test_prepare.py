"""Preparing: what the bank holds is what the prompt contract gave; nothing is lost in silence; saving is whole and verified."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.fakes import BOS, STOP, FakePrompt, talk
from trivium.core.errors import ConfigError, DataError, FileError
from trivium.data import bank
from trivium.data.bank import Prepared
from trivium.data.prepare import prepare
from trivium.data.rows import Record, read

CHATS = [{"messages": talk(f"question {n}", "yes" * (n % 5 + 1), "more?", "no" * (n % 3 + 1))} for n in range(40)]


def prepared_rows(prepared: Prepared) -> list[tuple[list[int], list[bool]]]:
    return [(ids.tolist(), targets.tolist()) for ids, targets in map(prepared.row, range(len(prepared)))]


@pytest.mark.parametrize("turns", ["all", "last"])
@pytest.mark.parametrize("forgets", [False, True])
def test_ids_and_targets_are_those_of_the_prompt_contract(turns, forgets: bool):
    prompt = FakePrompt(forgets=forgets)
    chats = [{"messages": talk(f"q{n}", f"<thought>{n}", "r", "<x>b" * (n + 1))} for n in range(20)]
    prepared = prepare(chats, prompt, length=128, turns=turns)
    want = [(row.ids, row.targets) for chat in chats for row in prompt.rows(chat["messages"], turns=turns)]
    assert prepared_rows(prepared) == want
    assert len(prepared) == (40 if forgets and turns == "all" else 20)
    assert prepared.index["supervised"].tolist() == [sum(targets) for _, targets in want]
    assert prepared.supervised == sum(sum(targets) for _, targets in want)
    assert prepared.tokens.tolist() == [token for ids, _ in want for token in ids]


def test_facts_and_places(tmp_path: Path):
    path = tmp_path / "chats.jsonl"
    path.write_text("\n" + "\n".join(map(json.dumps, CHATS[:3])))
    prepared = prepare([*read(path), Record(CHATS[3], "other", 9), CHATS[4]], FakePrompt(), length=64)
    assert prepared.facts.sources == {str(path): 3, "other": 1, "rows": 1}
    assert [prepared.where(row) for row in range(5)] == [f"{path}:2", f"{path}:3", f"{path}:4", "other:9", "rows:5"]
    facts = prepared.facts
    assert (facts.format, facts.packing, facts.prompt, facts.examples) == ("messages", "best_fit", "fake-False", 5)
    assert facts.empty.count == facts.dropped.count == facts.truncated.count == facts.split.count == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("ab ", max_size=60), min_size=1, max_size=6), st.integers(2, 20))
def test_split_documents_lose_no_token_and_no_prediction(texts: list[str], length: int):
    prompt = FakePrompt()
    prepared = prepare([{"text": text + "!"} for text in texts], prompt, length=length)
    found: dict[int, list[int]] = {}
    predicted: dict[int, int] = {}
    for row, (ids, targets) in enumerate(prepared_rows(prepared)):
        line = int(prepared.index["line"][row])
        assert 2 <= len(ids) <= length and targets == [False] + [True] * (len(ids) - 1)
        assert line not in found or found[line][-1] == ids[0], "a chunk begins with the last token of the one before"
        found[line] = found.get(line, [])[:-1] + ids
        predicted[line] = predicted.get(line, 0) + sum(targets)
    want = {n: prompt.text(text + "!").ids for n, text in enumerate(texts, start=1)}
    assert found == want
    assert predicted == {n: len(ids) - 1 for n, ids in want.items()}
    assert prepared.facts.split.count == sum(len(ids) > length for ids in want.values())


def test_rows_with_nothing_to_learn_stop_before_the_first_step():
    rows = [
        *CHATS[:2],
        {"messages": talk("only a question")},
        {"messages": talk("q", "")},
        {"messages": [{**CHATS[0]["messages"][1], "train": False}]},
    ]
    with pytest.raises(DataError) as caught:
        prepare(rows, FakePrompt(), length=64)
    assert str(caught.value) == (
        "3 of 5 rows have no token to train on; mend them, or allow them with --max-empty 3: rows:3, rows:4, rows:5"
    )
    prepared = prepare(rows, FakePrompt(), length=64, max_empty=3)
    assert len(prepared) == 2 and prepared.facts.empty == bank.Tally(3, ("rows:3", "rows:4", "rows:5"))
    assert len(prepare(rows, FakePrompt(), length=64, max_empty=None)) == 2
    with pytest.raises(DataError, match="all 1 rows were empty or too long"):
        prepare(rows[2:3], FakePrompt(), length=64, max_empty=1)
    with pytest.raises(DataError, match="1 of 1 rows have no token to train on"):
        prepare([{"text": ""}], FakePrompt(), length=64)


def test_a_row_of_context_alone_is_left_out_without_alarm():
    """Templates that forget thoughts give each turn its own row; the row of a turn that is switched off trains nothing."""
    first, answer, *rest = talk("q", "<x>a", "r", "<y>b")
    prepared = prepare([{"messages": [first, {**answer, "train": False}, *rest]}], FakePrompt(forgets=True), length=64)
    want = FakePrompt(forgets=True).rows([first, answer, *rest])[1]
    assert prepared_rows(prepared) == [(want.ids, want.targets)] and prepared.facts.empty.count == 0


def test_rows_that_are_too_long_are_dropped_or_cut_by_order_only():
    long = {"messages": talk("q", "a" * 100)}
    late = {"messages": talk("q" * 100, "a")}
    with pytest.raises(
        DataError, match=r"2 of 4 rows are longer than 50 tokens; .*--max-dropped 2: rows:2 \(108 tokens\), rows:3 \(108 tokens\)"
    ):
        prepare([CHATS[0], long, late, CHATS[1]], FakePrompt(), length=50)
    dropped = prepare([CHATS[0], long, late, CHATS[1]], FakePrompt(), length=50, max_dropped=2)
    assert len(dropped) == 2 and dropped.facts.dropped.count == 2
    with pytest.raises(DataError, match="1 of 3 rows have no token to train on; .*: rows:3"):  # cutting left no target
        prepare([CHATS[0], long, late], FakePrompt(), length=50, too_long="truncate")
    cut = prepare([CHATS[0], long], FakePrompt(), length=50, too_long="truncate")
    want = FakePrompt().rows(long["messages"])[0]
    assert prepared_rows(cut)[1] == (want.ids[:50], want.targets[:50])
    assert cut.facts.truncated == bank.Tally(1, ("rows:2 (108 tokens)",))


def test_many_troubles_are_counted_and_the_first_are_listed():
    with pytest.raises(DataError, match="30 of 31 rows have no token .*: rows:2, rows:3, .* rows:10, rows:11, ...$"):
        prepare([CHATS[0]] + [{"messages": talk("q")}] * 30, FakePrompt(), length=64)


def test_errors_name_the_place():
    with pytest.raises(DataError, match="no rows: the data is empty"):
        prepare([], FakePrompt(), length=64)
    with pytest.raises(DataError, match="rows:2: a special token stands in the content"):
        prepare([CHATS[0], {"messages": talk("q", "<|im_end|>")}], FakePrompt(), length=64)
    with pytest.raises(DataError, match="rows:20: does not fit the format 'messages': it has no 'messages'; the row: {\"text\""):
        prepare([*CHATS[:19], {"text": "t"}], FakePrompt(), length=64)
    with pytest.raises(DataError, match="'preference' serve preference training"):
        prepare([{"chosen": "a", "rejected": "b"}], FakePrompt(), length=64)
    with pytest.raises(ConfigError, match="length: 1 leaves no room"):
        prepare(CHATS, FakePrompt(), length=1)


def test_the_first_token_of_a_row_is_never_a_target():
    class Eager(FakePrompt):
        def completion(self, prompt, completion):
            row = super().completion(prompt, completion)
            return dataclasses.replace(row, targets=[True] * len(row.ids))

    prepared = prepare([{"prompt": "", "completion": "ab"}], Eager(), length=8)
    (row,) = prepared_rows(prepared)
    assert prepared.supervised == 3
    assert row[0][0] == BOS and row[0][-1] == STOP and row[1] == [False, True, True, True]


def test_rows_may_come_one_at_a_time():
    rows = ({"text": f"document {n}"} for n in range(5000))
    prepared = prepare(rows, FakePrompt(), length=64)
    assert len(prepared) == 5000 and prepared.tokens.dtype == np.uint32 and prepared.targets.nbytes == -(-len(prepared.tokens) // 8)


def test_the_fingerprint_follows_what_a_batch_holds():
    base = prepare(CHATS, FakePrompt(), length=64).fingerprint
    assert prepare(CHATS, FakePrompt(), length=64).fingerprint == base
    assert prepare([Record(chat, "elsewhere", n) for n, chat in enumerate(CHATS)], FakePrompt(), length=64).fingerprint == base
    other = [
        prepare(CHATS, FakePrompt(), length=65),
        prepare(CHATS, FakePrompt(), length=64, turns="last"),
        prepare(CHATS, FakePrompt(), length=64, packing="none"),
        prepare(CHATS, FakePrompt(forgets=True), length=64),
        prepare(CHATS[::-1], FakePrompt(), length=64),
        prepare([{"messages": talk("question 0", "yeS", "more?", "no")}, *CHATS[1:]], FakePrompt(), length=64),
        prepare(
            [{"messages": [*CHATS[0]["messages"][:3], {**CHATS[0]["messages"][3], "train": False}]}, *CHATS[1:]], FakePrompt(), length=64
        ),
    ]
    assert len({base, *(prepared.fingerprint for prepared in other)}) == 8
    first, second = (
        [{**message, "train": k != off} if k % 2 else message for k, message in enumerate(talk("q", "a", "r", "b"))] for off in (1, 3)
    )
    one, two = (prepare([{"messages": messages}], FakePrompt(), length=64) for messages in (first, second))
    assert one.tokens.tolist() == two.tokens.tolist() and one.supervised == two.supervised and one.fingerprint != two.fingerprint


def test_save_and_load_are_the_same_data(tmp_path: Path):
    prepared = prepare(CHATS + [{"messages": talk("q")}], FakePrompt(), length=64, max_empty=1)
    path = prepared.save(tmp_path / "deep" / "data")
    loaded = Prepared.load(path)
    assert isinstance(loaded.tokens, np.memmap) and isinstance(loaded.targets, np.memmap)
    assert prepared_rows(loaded) == prepared_rows(prepared)
    assert loaded.facts == prepared.facts and loaded.length == 64
    assert [loaded.bins[i].tolist() for i in range(len(loaded.bins))] == [prepared.bins[i].tolist() for i in range(len(prepared.bins))]
    again = Prepared.of(loaded.tokens, loaded.targets, loaded.index, loaded.bins, length=loaded.length, facts=loaded.facts)
    assert again.fingerprint == loaded.fingerprint == prepared.fingerprint
    assert [file.name for file in path.parent.iterdir()] == ["data"], "nothing is left beside it"


def test_what_is_there_is_kept(tmp_path: Path):
    prepared, other = prepare(CHATS, FakePrompt(), length=64), prepare(CHATS, FakePrompt(), length=65)
    path = prepared.save(tmp_path / "data")
    before = {file.name: file.stat().st_mtime_ns for file in path.iterdir()}
    prepared.save(path)
    assert {file.name: file.stat().st_mtime_ns for file in path.iterdir()} == before
    with pytest.raises(FileError, match="holds other data"):
        other.save(path)
    (tmp_path / "notes").mkdir()
    with pytest.raises(FileError, match="no prepared data here"):
        prepared.save(tmp_path / "notes")


@pytest.mark.parametrize("name", ["tokens.npy", "targets.npy", "index.npy", "rows.npy", "starts.npy", "prepared.json"])
def test_any_damage_is_found(tmp_path: Path, name: str):
    path = prepare(CHATS, FakePrompt(), length=64).save(tmp_path / "data")
    file = path / name
    whole = file.read_bytes()
    for at in range(0, len(whole), max(1, len(whole) // 23)):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(FileError, match="damaged|no prepared data|edited"):
            Prepared.load(path)
    for size in (0, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(FileError):
            Prepared.load(path)
    file.unlink()
    with pytest.raises(FileError):
        Prepared.load(path)
    file.write_bytes(whole)
    assert len(Prepared.load(path)) == 40


def test_a_directory_of_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bank, "VERSION", 99)
    path = prepare(CHATS, FakePrompt(), length=64).save(tmp_path / "data")
    monkeypatch.undo()
    with pytest.raises(FileError, match="format version 99, this release reads 1"):
        Prepared.load(path)


@pytest.mark.parametrize("call", ["mkdir", "save", "fsync", "rename"])
def test_a_save_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str):
    prepared = prepare(CHATS, FakePrompt(), length=64)
    owner = {"mkdir": Path, "save": np, "fsync": os, "rename": Path}[call]
    whole, calls = getattr(owner, call), []

    def full(*args, **kwargs):
        calls.append(args)
        if len(calls) >= 2 or call == "rename":
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(*args, **kwargs)

    monkeypatch.setattr(owner, call, full)
    with pytest.raises(FileError, match="cannot be written, nothing was left there .*No space left"):
        prepared.save(tmp_path / "data")
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
    assert Prepared.load(prepared.save(tmp_path / "data")).fingerprint == prepared.fingerprint
