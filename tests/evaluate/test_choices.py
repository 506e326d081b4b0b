"""Multiple choice: parity with lm-eval on the same tiny model, a hand-written oracle, reading answers, and the gap between modes."""

from __future__ import annotations

import json

import pytest
import torch

from tests.evaluate import subject as ours
from tests.evaluate import toys
from tests.evaluate.test_perplexity import records
from trivium.core.errors import DataError
from trivium.evaluate.choices import Choices, encode_pair, gap, parse_choice
from trivium.evaluate.results import summarize

TASK = Choices(data=("toy.jsonl",))


@pytest.mark.concept("X.97", part="evaluate/choices.py")
def test_equals_lm_eval_on_the_same_model_and_task():
    fixture = json.loads((ours.HERE / "lm_eval.json").read_text())
    rows = fixture["rows"]["choices"]
    assert rows == toys.questions()
    samples = TASK.run(ours.subject(), records(rows))
    for sample, scores in zip(samples, fixture["logprobs"], strict=True):
        assert sample.shown["logprobs"] == pytest.approx(scores, rel=1e-5)
    measured = summarize(samples, TASK.metrics())
    for name in ("acc", "acc_norm", "acc_bytes"):
        assert measured[name].value == pytest.approx(fixture["metrics"]["choices"][name], abs=1e-6)
    picks = [sample.shown["picks"] for sample in samples]
    assert any(pick["acc"] != pick["acc_norm"] for pick in picks) and any(pick["acc_norm"] != pick["acc_bytes"] for pick in picks)


@pytest.mark.concept("X.97", part="evaluate/choices.py")
def test_equals_a_loop_written_by_hand():
    model, tokenizer = ours.model(), ours.tokenizer()
    rows = toys.questions(15, seed=9)
    samples = TASK.run(ours.subject(), records(rows))
    for row, sample in zip(rows, samples, strict=True):
        context = tokenizer.encode(f"{row['question']}\nAnswer:")
        totals = []
        for choice in row["choices"]:
            whole = tokenizer.encode(f"{row['question']}\nAnswer: {choice}")
            whole[: len(context)] = context
            with torch.no_grad():
                table = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
            totals.append(sum(table[i - 1, whole[i]].item() for i in range(len(context), len(whole))))
        assert sample.shown["logprobs"] == pytest.approx(totals, abs=1e-4)
        best = {
            "acc": max(range(len(totals)), key=lambda i: totals[i]),
            "acc_norm": max(range(len(totals)), key=lambda i: totals[i] / len(row["choices"][i])),
            "acc_bytes": max(range(len(totals)), key=lambda i: totals[i] / len(row["choices"][i].encode())),
        }
        assert sample.shown["picks"] == best
        assert {name: term.numerator for name, term in sample.terms.items()} == {name: pick == row["answer"] for name, pick in best.items()}


def test_batch_size_changes_no_pick():
    rows = records(toys.questions(20, seed=4))
    one, many = (TASK.replace(generated=True).run(ours.subject(tokens=tokens, batch=batch), rows) for tokens, batch in ((1, 1), (4096, 20)))
    assert [sample.shown["picks"] for sample in one] == [sample.shown["picks"] for sample in many]
    assert [sample.shown["generated"] for sample in one] == [sample.shown["generated"] for sample in many]


@pytest.mark.parametrize("context", ["red star", "red star ", "", "  "])
def test_pairs_are_cut_without_losing_a_token(context):
    tokenizer = ours.tokenizer()
    ids, start = encode_pair(tokenizer, context, " the water")
    assert tokenizer.decode(ids) == context + " the water"
    if context.strip():
        assert tokenizer.decode(ids[:start]) == "red star"
    else:
        assert ids[0] == tokenizer.eos and start == 1


def test_where_a_token_spans_the_cut_the_context_keeps_its_own_ids():
    tokenizer = ours.tokenizer()
    assert tokenizer.decode(tokenizer.encode("a: red")[1:2]) == ": "
    ids, start = encode_pair(tokenizer, "a:", " red")
    assert ids[:start] == tokenizer.encode("a:") and tokenizer.decode(ids[start:]) == "red"


def test_shots_come_first_are_drawn_by_the_seed_and_never_the_row_itself():
    rows = records(toys.questions(8, seed=5))
    asked = [sample.shown["context"] for sample in TASK.replace(shots=3).run(ours.subject(), rows)]
    again = [sample.shown["context"] for sample in TASK.replace(shots=3).run(ours.subject(), rows[::-1])][::-1]
    other = [sample.shown["context"] for sample in TASK.replace(shots=3, seed=1).run(ours.subject(), rows)]
    assert asked == again != other
    for record, context in zip(rows, asked, strict=True):
        *solved, last = context.split("\n\n")
        assert len(solved) == 3 and len(set(solved)) == 3
        assert last == f"{record.value['question']}\nAnswer:"
        for text in solved:
            (found,) = [
                row.value for row in rows if text == f"{row.value['question']}\nAnswer: {row.value['choices'][row.value['answer']]}"
            ]
            assert found != record.value
    with pytest.raises(DataError, match="8 solved examples were asked for, but there are only 7 other rows"):
        TASK.replace(shots=8).run(ours.subject(), rows)


def test_shots_from_another_file(tmp_path):
    (tmp_path / "dev.jsonl").write_text('{"question": "moon", "choices": ["x", "y"], "answer": "B"}\n')
    rows = records(toys.questions(2, seed=5))
    (sample, _) = TASK.replace(shots=1, shots_from=(str(tmp_path / "dev.jsonl"),)).run(ours.subject(), rows)
    assert sample.shown["context"].startswith("moon\nAnswer: y\n\n")


def test_a_row_longer_than_the_context_is_an_error():
    rows = records([{"question": "the star " * 200, "choices": ["a", "b"], "answer": 0}])
    with pytest.raises(DataError, match=r"toy.jsonl:1: \d+ tokens with its examples, but the model's context is 256"):
        TASK.run(ours.subject(), rows)


@pytest.mark.parametrize("answer", [1, "B", "b", "two words"])
def test_forms_of_the_right_answer(answer):
    (sample,) = TASK.run(ours.subject(), records([{"question": "q", "choices": ["one", "two words"], "answer": answer}]))
    assert sample.shown["gold"] == 1


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"choices": ["a", "b"], "answer": 0}, "toy.jsonl:1: it has no 'question'"),
        ({"question": "q", "answer": 0}, "it has no 'choices'"),
        ({"question": "q", "choices": ["a"], "answer": 0}, "at least two texts"),
        ({"question": "q", "choices": "ab", "answer": 0}, "at least two texts"),
        ({"question": "q", "choices": ["a", ""], "answer": 0}, "at least two texts"),
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, "the answer 2 is no index"),
        ({"question": "q", "choices": ["a", "b"], "answer": True}, "the answer True is no index"),
        ({"question": "q", "choices": ["a", "b"], "answer": "C"}, "no index from 0, letter or text of its 2 choices"),
    ],
)
def test_rows_that_do_not_fit(row, error):
    with pytest.raises(DataError, match=error):
        TASK.run(ours.subject(), records([row]))


@pytest.mark.parametrize(
    ("text", "pick"),
    [
        (" The red star.", 0),
        ("B", 1),
        ("(c) because", 2),
        ("B) the red star", 1),
        ("It is water, I think", 1),
        ("fire and water", None),
        ("Z", None),
        ("", None),
        ("watering", None),
    ],
)
def test_choices_are_read_from_what_was_written(text, pick):
    assert parse_choice(text, ["red star", "water", "fire"]) == pick


@pytest.mark.concept("X.97", part="evaluate/choices.py")
def test_gap_counted_by_hand():
    found = gap({"raw": [0, 1, 2, 0], "norm": [0, 1, 1, 1], "written": [0, None, None, 0]}, [0, 1, 1, 1])
    assert {mode: one.value for mode, one in found.accuracy.items()} == {"raw": 0.5, "norm": 1.0, "written": 0.25}
    assert found.unread == {"raw": 0, "norm": 0, "written": 0.5}
    pairs = {(pair.a, pair.b): (pair.difference.value, pair.disagreement.value) for pair in found.pairs}
    assert pairs == {("raw", "norm"): (0.5, 0.5), ("raw", "written"): (-0.25, 0.5), ("norm", "written"): (-0.75, 0.75)}


@pytest.mark.concept("X.97", part="evaluate/choices.py")
def test_modes_are_reported_together():
    rows = toys.questions(12, seed=7)
    task = TASK.replace(generated=True, max_tokens=4)
    samples = task.run(ours.subject(), records(rows))
    assert all(set(sample.terms) == set(task.metrics()) for sample in samples)
    report = task.report(samples)["gap"]
    json.dumps(report)
    assert {pair["b"] for pair in report["pairs"]} == {"acc_norm", "acc_bytes", "acc_generated"}
    for mode, one in report["accuracy"].items():
        assert one["value"] == pytest.approx(sum(sample.terms[mode].numerator for sample in samples) / 12)
