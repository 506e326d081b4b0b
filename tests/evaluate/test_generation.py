"""Generate and score: parity with lm-eval, prompts as serving sends them, few shots, scorers."""

from __future__ import annotations

import json

import pytest

from tests.evaluate import subject as ours
from tests.evaluate import toys
from tests.evaluate.test_perplexity import records
from trivium.core.errors import ConfigError, DataError
from trivium.core.spec import validate
from trivium.evaluate.generation import Generate
from trivium.evaluate.results import summarize
from trivium.evaluate.scorers import Exact, Json, Normalized, Scorer
from trivium.evaluate.task import Sample
from trivium.infer.sampling import Sampling

GREEDY = Sampling(temperature=0, max_tokens=3)
TASK = Generate(data=("toy.jsonl",), sampling=GREEDY)


def chats(count: int) -> list[dict]:
    rows = toys.questions(count, seed=6)
    return [
        {"messages": [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["choices"][0]}]} for row in rows
    ]


def turns(sample: Sample) -> list[dict]:
    """The messages that a prompt of the toy template was rendered from."""
    *lines, last = ours.tokenizer().decode(sample.prompt).split("\n")
    assert last == "assistant:"
    return [{"role": line.split(": ", 1)[0], "content": line.split(": ", 1)[1]} for line in lines]


@pytest.mark.concept("X.97", part="evaluate/generation.py")
def test_equals_lm_evals_exact_match():
    fixture = json.loads((ours.HERE / "lm_eval.json").read_text())
    samples = TASK.run(ours.subject(), records(fixture["rows"]["generate"]))
    assert [sample.shown["answer"] for sample in samples] == fixture["generated"]
    measured = summarize(samples, TASK.metrics())["exact_match"]
    assert measured.value == pytest.approx(fixture["metrics"]["generate"]["exact_match"], abs=1e-6)
    assert 0 < measured.value < 1


def test_the_model_is_asked_as_serving_would_and_never_shown_the_answer():
    subject, rows = ours.subject(), chats(3)
    samples = TASK.run(subject, records(rows))
    assert [turns(sample) for sample in samples] == [row["messages"][:-1] for row in rows]
    assert [sample.prompt for sample in samples] == [tuple(subject.prompt.generation(row["messages"][:-1])) for row in rows]
    assert [sample.shown["expected"] for sample in samples] == [row["messages"][-1]["content"] for row in rows]


def test_prompts_are_those_of_training():
    subject = ours.subject()
    plain = {"prompt": "red star:", "completion": " moon"}
    for row, trained in (
        (chats(1)[0], subject.prompt.rows(chats(1)[0]["messages"])[-1]),
        (plain, subject.prompt.completion(plain["prompt"], plain["completion"])),
    ):
        (sample,) = TASK.run(subject, records([row]))
        assert list(sample.prompt) == trained.ids[: trained.targets.index(True)]


def test_what_the_model_writes_is_right_when_it_is_expected():
    rows = chats(6)
    written = [sample.shown["answer"] for sample in TASK.run(ours.subject(), records(rows))]
    for row, text in zip(rows[:4], written, strict=False):
        row["messages"][-1]["content"] = f"{text} "
    measured = summarize(TASK.run(ours.subject(batch=2), records(rows)), TASK.metrics())
    assert measured["exact_match"].value == pytest.approx(4 / 6)


def test_shots_are_earlier_turns_after_the_system_turn():
    rows = chats(4)
    rows[2]["messages"].insert(0, {"role": "system", "content": "be brief"})
    samples = TASK.replace(shots=2).run(ours.subject(), records(rows))
    for row, asked in zip(rows, map(turns, samples), strict=True):
        system = [turn for turn in row["messages"] if turn["role"] == "system"]
        assert asked[: len(system)] == system
        assert [turn["role"] for turn in asked[len(system) :]] == ["user", "assistant"] * 2 + ["user"]
        assert asked[-1] == row["messages"][-2]
        solved = [asked[i : i + 2] for i in range(len(system), len(asked) - 1, 2)]
        assert all(pair in [other["messages"][-2:] for other in rows if other is not row] for pair in solved)


def test_shots_of_plain_rows_stand_before_the_prompt():
    rows = [{"prompt": f"{name}:", "completion": f" {name}"} for name in ("red", "star", "moon")]
    subject = ours.subject()
    samples = TASK.replace(shots=1).run(subject, records(rows))
    for row, sample in zip(rows, samples, strict=True):
        text = subject.tokenizer.decode(list(sample.prompt))
        shown, asked = text.split("\n\n")
        assert asked == row["prompt"]
        assert shown in [f"{other['prompt']}{other['completion']}" for other in rows if other is not row]


def test_sampled_answers_depend_on_the_row_and_the_seed_alone():
    rows = records(chats(6))
    hot = TASK.replace(sampling=Sampling(max_tokens=6, seed=3))

    def answers(task: Generate, rows: list, batch: int) -> list[str]:
        return [sample.shown["answer"] for sample in task.run(ours.subject(batch=batch), rows)]

    first = answers(hot, rows, 6)
    assert answers(hot, rows[::-1], 2)[::-1] == first
    assert answers(hot.replace(sampling=Sampling(max_tokens=6, seed=4)), rows, 6) != first


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"text": "a"}, "a text has no answer to expect"),
        ({"messages": [{"role": "user", "content": "q"}]}, "toy.jsonl:1: "),
        ({"prompt": "q", "completion": "no json"}, "toy.jsonl:1: the expected answer is not JSON"),
    ],
)
def test_rows_that_do_not_fit(row, error):
    with pytest.raises(DataError, match=error):
        TASK.replace(scorer=Json()).run(ours.subject(), records([row]))


def test_scorers():
    wanted = Json().read('{"type":"order","count":3}')
    right = Json().terms('Here: {"count": 3, "type": "order"} done', wanted)
    assert {name: tuple(term) for name, term in right.items()} == {
        "exact_match": (1, 1),
        "field_precision": (2, 2),
        "field_recall": (2, 2),
        "field_f1": (4, 4),
        "parsed": (1, 1),
    }
    assert right.keys() == Json.metrics.keys()
    half = Json().terms('{"type":"order","count":"3"}', wanted)
    assert half["exact_match"] == (0, 1) and half["field_f1"] == (2, 4) and half["parsed"] == (1, 1)
    none = Json().terms("sorry", wanted)
    assert none["exact_match"] == (0, 1) and none["field_recall"] == (0, 2) and none["parsed"] == (0, 1)
    assert Normalized().terms("The Answer!", "answer")["normalized_exact_match"] == (1, 1)
    assert Exact().terms("The answer", "answer")["exact_match"] == (0, 1)
    with pytest.raises(ConfigError, match="did you mean 'normalized'"):
        validate(Scorer, {"kind": "normalised"})
