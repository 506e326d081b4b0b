"""The made-up world of the experiments on data: what is spoilt is known, what is asked was never told that way, and what the rule
made up does not get past the judges."""

from __future__ import annotations

import pytest

from trivium.lab.experiments import curation


def test_half_of_a_pool_is_spoilt_and_the_way_of_asking_is_kept_back():
    rows, spoilt, asked = curation.noisy(0)
    assert (len(rows), len(asked)) == (720, 48) and 0.45 < sum(spoilt) / 720 < 0.55
    assert not {row["prompt"] for row in asked} & {row["prompt"] for row in rows}
    truth = {row["prompt"]: row["completion"] for row in asked}
    good = {row["prompt"]: row["completion"] for row, bad in zip(rows, spoilt, strict=True) if not bad}
    told = [completion for row, completion in truth.items() for prompt, said in good.items() if said == completion and prompt != row]
    assert len(set(truth.values())) > 8 and told, "the answers are there, asked for in other ways"
    assert curation.noisy(0) == (rows, spoilt, asked) != curation.noisy(1)


@pytest.mark.concept("X.44", part="data/synthesis.py")
def test_what_a_writer_makes_up_is_judged():
    """A rule that errs one time in ten each way: what it forms badly does not parse, and what it invents is not in the text."""
    pairs, became = curation.instructions(curation.lives(0), seed=0)
    assert 0.85 < became["parsed share"] < 0.95 and became["asked"] == 2 * 36 * 12
    assert became["accepted"] + sum(became["troubles"].values()) == became["asked"] and became["troubles"]["not about the text"] > 30
    assert became["kept"] == len(pairs) == len({pair["text"] for pair in pairs}) < became["accepted"], "pairs that came twice are left out"
    world = curation.people(36, 0)
    for pair in pairs:
        question, _, answer = pair["text"].removeprefix("Question: ").partition("\nAnswer: ")
        name = next(name for name in world if name in question)
        what = next(what for what, ways in curation.ASKED.items() if question in [way.format(name) for way in ways])
        assert world[name][what] == answer
