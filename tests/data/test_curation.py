"""Curation: each step takes out what it says and names why, scorers rank planted noise, and nothing vanishes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.fakes import FakePrompt, FakeRow, talk
from trivium.core.errors import ConfigError, DataError
from trivium.core.seed import derive
from trivium.core.spec import validate
from trivium.data.curation import Best, Diverse, Exact, Length, Near, Step, centers, curate
from trivium.data.items import Means, read_items
from trivium.data.likeness import bags
from trivium.data.scorers import IFD, Blend, Features, Gain, Likelihood, Scorer, auc, losses, ranks


def pair(prompt: str, completion: str) -> dict:
    return {"prompt": prompt, "completion": completion}


class Tokens:
    bos, eos = 1, 2


class Prompted(FakePrompt):
    """A prompt with a tokenizer, as scorers ask for."""

    tokenizer = Tokens()


def counted(rows: list[FakeRow]) -> list[float]:
    """A model of sorts: a target costs 1 nat, and 3 where its id has not stood in the row before."""
    return [sum(1.0 if token in row.ids[:at] else 3.0 for at, token in enumerate(row.ids) if row.targets[at]) for row in rows]


MEANS = Means(Prompted(), counted, bags)


def removed(step: Step, rows: list[dict], means: Means = MEANS) -> dict[int, str]:
    return step.removed(read_items(rows), means)


def test_exact():
    rows = [pair("Is it far?", "No."), pair("is it far", "no"), pair("Is it far?", "Yes"), pair("?!", "#"), pair("!?", "#")]
    assert removed(Exact(), rows) == {1: "says the same as rows:1"}
    assert removed(Exact(spelling=True), rows) == {}
    assert removed(Exact(over="question"), rows) == {1: "says the same as rows:1", 2: "says the same as rows:1"}
    chats = [{"messages": talk("q", "a b")}, {"messages": talk("q", "a", "b")[:2]}, {"messages": talk("q", "a b")}]
    assert removed(Exact(), chats) == {2: "says the same as rows:1"}
    pairs = [{"prompt": "q", "chosen": "a", "rejected": x} for x in "bcb"]
    assert removed(Exact(), pairs) == {2: "says the same as rows:1"}


def test_near():
    text = "the quick brown fox jumps over the lazy dog while the small gray cat sleeps under the old wooden table near the door"
    rows = [{"text": text}, {"text": "something else entirely, about the sea and its tides"}, {"text": text.replace("door", "window")}]
    found = removed(Near(), rows)
    assert list(found) == [2] and found[2].endswith("like rows:1") and "% " in found[2]
    assert removed(Near(threshold=1.0), rows) == {}


def test_length_counts_what_training_sees():
    rows = [pair("q", "a" * n) for n in (1, 5, 50)]
    # ids of "q", "a": BOS q a STOP, and the stop id is trained
    assert removed(Length(min=3, max=20), rows) == {0: "2 trained tokens, fewer than 3", 2: "53 tokens, more than 20"}
    assert removed(Length(), [{"messages": talk("q")}, {"messages": talk("q", "a")}][1:]) == {}
    with pytest.raises(DataError, match="rows:1: tokens are counted of rows that can be trained on"):
        removed(Length(), [{"prompt": "q", "chosen": "a", "rejected": "b"}])


def test_best_keeps_share_count_or_score():
    rows = [pair("abc", text) for text in ("abc", "abx", "xyz", "abc", "axy")]
    scores = Likelihood().scores(read_items(rows), MEANS)
    assert scores == pytest.approx([-6 / 4, -8 / 4, -12 / 4, -6 / 4, -10 / 4])  # the stop id is new to each row, and costs 3
    assert set(removed(Best(by=Likelihood(), share=0.4), rows)) == {1, 2, 4}
    assert set(removed(Best(by=Likelihood(), count=1), rows)) == {1, 2, 3, 4}, "of equals the first stays"
    assert removed(Best(by=Likelihood(), at_least=-2.5), rows) == {2: "likelihood: -3, below -2.5"}
    for bad in ({}, {"share": 0.5, "count": 2}):
        with pytest.raises(ConfigError, match="say one of share, count and at_least"):
            validate(Step, {"kind": "best", **bad})


def test_ifd_is_the_ratio_of_two_perplexities():
    items = read_items([pair("ab", "ab"), pair("ab", "xy")]) + read_items([{"messages": talk("ab", "ab", "x", "xy")}])
    given, alone = losses(items, MEANS)
    # alone, after BOS: both letters and the stop id are new; given: letters of the prompt cost 1
    assert given == pytest.approx([5 / 3, 9 / 3, (1 + 1 + 1 + 1 + 3 + 1) / 6])
    assert alone == pytest.approx([9 / 3, 9 / 3, 9 / 3])
    assert IFD().scores(items, MEANS) == pytest.approx(np.exp(given - alone))
    assert IFD(of="loss").scores(items[:1], MEANS) == pytest.approx([5 / 9])
    assert Gain().scores(items, MEANS) == pytest.approx(alone - given)
    worse = Means(Prompted(), lambda rows: [(9.0 if len(row.ids) > sum(row.targets) + 1 else 3.0) for row in rows], bags)
    assert IFD().scores(items[:1], worse) == pytest.approx(-np.exp(2)), "above 1 a row comes last"
    with pytest.raises(DataError, match="rows:1: there is no answer to score"):
        losses(read_items([pair("q", "")]), Means(Silent(), counted, bags))


class Silent(Prompted):
    """Nothing in its rows is trained."""

    def completion(self, prompt: str, completion: str) -> FakeRow:
        row = super().completion(prompt, completion)
        return FakeRow(row.ids, [False] * len(row.ids))


@settings(max_examples=100)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=9), st.lists(st.integers(0, 5), min_size=1, max_size=9))
def test_auc_and_ranks(good, bad):
    pairs = [(a > b) + (a == b) / 2 for a in good for b in bad]
    assert auc(np.array(good, float), np.array(bad, float)) == pytest.approx(sum(pairs) / len(pairs))
    order = ranks(np.array(good, float))
    assert order.sum() == pytest.approx((len(good) / 2) if len(good) > 1 else 0.0)
    assert all((order[i] < order[j]) == (good[i] < good[j]) for i in range(len(good)) for j in range(len(good)))


NOUNS = ["river", "garden", "lamp", "violin", "bridge", "candle", "mirror", "forest", "harbor", "letter", "window", "engine", "pepper"]
DOES = ["shines", "grows", "breaks", "sings", "floats", "turns", "rests", "burns", "moves", "opens"]


def planted(count: int) -> tuple[list[dict], np.ndarray]:
    """Rows about something, of which every third was spoilt: letters shuffled, a word again and again, or an answer to another."""
    rows, spoilt = [], np.zeros(count, bool)
    for n in range(count):
        draw = np.random.default_rng(derive(0, "planted", n))
        noun, other = draw.choice(NOUNS, 2, replace=False)
        does = " and ".join(draw.choice(DOES, 3, replace=False))
        answer = f"The {noun} {does} every day."
        if n % 3 == 0:
            spoilt[n] = True
            answer = [
                "".join(draw.permutation(list(answer.replace(" ", "zq")))),
                " ".join([str(draw.choice(DOES))] * 12) + " #### ==== //// ####",
                f"The {other} {does} every day.",
            ][n // 3 % 3]
        rows.append(pair(f"What does the {noun} do?", f" {answer}"))
    return rows, spoilt


@pytest.mark.concept("X.45", part="data/scorers.py")
def test_scorers_rank_planted_noise_last():
    """Broken text is found without a model, answers to other questions by what the prompt tells about them; together, all of it."""
    rows, spoilt = planted(180)
    items = read_items(rows)
    kinds = np.arange(len(rows)) // 3 % 3
    broken, astray = spoilt & (kinds < 2), spoilt & (kinds == 2)
    features, gain = Features().scores(items, MEANS), Gain().scores(items, Means(Prompted(), word_model, bags))
    assert auc(features[~spoilt], features[broken]) > 0.9 and auc(gain[~spoilt], gain[astray]) > 0.9
    blend = Blend().scores(items, Means(Prompted(), word_model, bags))
    assert auc(blend[~spoilt], blend[spoilt]) > 0.9
    kept = curate(rows, [Best(by=Blend(), share=2 / 3)], means=Means(Prompted(), word_model, bags)).kept
    assert np.mean([spoilt[record.line - 1] for record in kept]) < 0.12 < np.mean(spoilt)


def word_model(rows: list[FakeRow]) -> list[float]:
    """Counts runs of four letters: a target that ends one which stood before costs little."""
    found = []
    for row in rows:
        grams = [tuple(row.ids[max(0, at - 3) : at + 1]) for at in range(len(row.ids))]
        found.append(sum(0.2 if gram in grams[:at] else 2.0 for at, gram in enumerate(grams) if row.targets[at]))
    return found


@settings(max_examples=50)
@given(st.integers(1, 30), st.integers(1, 8), st.integers(0, 99))
def test_centers_are_within_twice_the_best(rows, count, seed):
    points = np.random.default_rng(seed).integers(0, 6, (rows, 2)).astype(float)
    chosen, nearest, distance = centers(points, min(count, rows))
    assert len(set(chosen)) == len(chosen) == min(count, rows)
    apart = np.linalg.norm(points[:, None] - points[chosen][None], axis=2)
    assert np.allclose(distance, apart.min(1)) and np.allclose(apart[np.arange(rows), nearest], distance)
    # Gonzalez: any k + 1 points as far apart as the radius force two of them into one of k balls
    if len(chosen) < rows:
        far = points[[*chosen, int(distance.argmax())]]
        gaps = np.linalg.norm(far[:, None] - far[None], axis=2)[np.triu_indices(len(far), 1)]
        assert gaps.min() >= distance.max() - 1e-9


def test_diverse_covers_every_topic():
    topics = ["cats purr and cats sleep", "stocks rise and stocks fall", "rain and wind and snow"]
    rows = [{"text": f"{topics[n % 3]} {'indeed ' * (n % 2)}"} for n in range(30)]
    found = removed(Diverse(count=3), rows)
    kept = set(range(30)) - set(found)
    assert {n % 3 for n in kept} == {0, 1, 2} and all("close to rows:" in why for why in found.values())
    with pytest.raises(ConfigError, match="say one of share and count"):
        validate(Step, {"kind": "diverse"})


@pytest.mark.concept("X.45", part="data/curation.py")
def test_nothing_vanishes_and_the_report_counts():
    rows, _ = planted(60)
    rows += rows[:5] + [pair(row["prompt"], row["completion"].upper()) for row in rows[5:8]]
    steps = [Exact(), Near(threshold=0.9), Length(max=90), Best(by=Features(), share=0.8), Diverse(count=20)]
    found = curate(rows, steps, means=MEANS)
    again = curate(rows, steps, means=MEANS)
    assert found == again, "the same rows and steps give the same"
    lines = sorted([record.line for record in found.kept] + [out.record.line for out in found.removed])
    assert lines == list(range(1, len(rows) + 1)) and [record.line for record in found.kept] == sorted(r.line for r in found.kept)
    report = json.loads(json.dumps(found.report))
    assert (report["rows"], report["kept"]) == (68, 20)
    assert {out.record.line for out in found.removed if out.step == "exact"} >= set(range(61, 69))
    assert [step["step"]["kind"] for step in report["steps"]] == ["exact", "near", "length", "best", "diverse"]
    for step, after in zip(report["steps"], [*(s["rows"] for s in report["steps"][1:]), 20], strict=True):
        assert step["rows"] - step["removed"] == after and len(step["examples"]) == min(3, step["removed"])
    told = [out.to_dict() for out in found.removed]
    assert {"step": "exact", "why": "says the same as rows:1", "where": "rows:61", "row": rows[60]} in told
    assert [row["removed"] for row in found.table()] == [step["removed"] for step in report["steps"]]


def test_every_part_runs_on_its_tiny():
    rows, _ = planted(12)
    items = read_items(rows)
    for name, member in (*Step.registry.items(), *Scorer.registry.items()):
        part = member.tiny()
        assert part.kind == name and validate(Step if isinstance(part, Step) else Scorer, part.to_dict()) == part
        if isinstance(part, Step):
            assert all(0 <= place < 12 and why for place, why in part.removed(items, MEANS).items())
        else:
            assert part.scores(items, MEANS).shape == (12,) and np.isfinite(part.scores(items, MEANS)).all()


def test_what_is_missing_is_said():
    with pytest.raises(ConfigError, match="the step 'length' needs a model's tokenizer and template"):
        curate([pair("q", "a")], [Length()])
    with pytest.raises(ConfigError, match="the step 'best' needs a model's tokenizer"):
        curate([pair("q", "a")], [Best(by=Blend(), count=1)])
    with pytest.raises(DataError, match="the step 'length' would leave none of 2 rows; the first: rows:1: 2 trained tokens"):
        curate([pair("q", "a"), pair("q", "b")], [Length(min=9)], means=MEANS)
    with pytest.raises(DataError, match="no rows"):
        curate([], [Exact()])
    with pytest.raises(DataError, match="looks like 'text', but rows:1 like 'prompt_completion'"):
        curate([pair("q", "a"), {"text": "t"}], [Exact()])
    with pytest.raises(DataError, match="rows:18: .* it looks like text: keep rows of different formats in different files"):
        curate([*[pair("q", "a")] * 17, {"text": "t"}], [Exact()])
