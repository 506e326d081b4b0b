"""The preference task of the experiments: what its gold reward counts, how its rows are laid out, what a policy is measured by."""

from __future__ import annotations

import pytest
import torch

from trivium.lab.experiments import preferences
from trivium.lab.experiments.preference_task import END, FIRST, ROOM, Answers, Rows, Task, asked, measured, sampled, setting
from trivium.train.logprobs import document_logprobs


def answers(*words: list[int]) -> Answers:
    rows = torch.tensor([[*each, *[END] * (ROOM - len(each))] for each in words])
    return Answers(torch.tensor([[1, 2]] * len(words)), rows)


def test_gold_is_a_mean_over_words():
    """So length earns nothing by itself, and saying a word again costs."""
    task = Task()
    value = task.values(torch.tensor([[1, 2]]))[0]
    given = answers([FIRST + 3], [FIRST + 3, FIRST + 5], [FIRST + 3] * 4, [])
    expected = [value[3], (value[3] + value[5]) / 2, value[3] - 3 / 4, 0.0]
    assert task.gold(given).tolist() == pytest.approx([float(x) for x in expected], abs=1e-6)
    assert given.sizes.tolist() == [1, 2, 4, 0]
    prompts = asked(4000, seed=0)
    means = [float(task.gold(task.written(prompts, skill=skill, seed=1)).mean()) for skill in (0.0, 0.5, 1.0)]
    assert means[0] < means[1] - 0.2 < means[2] - 0.4


def test_a_rater_may_be_swayed_by_length():
    task, prompts = Task(), asked(4000, seed=0)
    one, other = (task.written(prompts, skill=0.5, seed=seed) for seed in (1, 2))
    longer = one.sizes > other.sizes
    shares = [float(task.rated(one, other, seed=3, bias=bias)[longer].float().mean()) for bias in (0.0, 0.3)]
    assert 0.4 < shares[0] < 0.5 < shares[1] - 0.05  # longer ones say more words again
    sharp = task.rated(one, other, seed=3, sharp=1e6)
    assert torch.equal(sharp, task.gold(one) > task.gold(other))


def test_rows_hold_the_documents_and_an_epoch_holds_each_row_once():
    sides = answers([FIRST, FIRST + 1], [FIRST + 2], [FIRST + 4]), answers([FIRST + 7], [FIRST + 8] * 3, [FIRST + 9])
    rows = Rows(*sides, seed=0, rows=1)
    whole = rows.all()
    assert whole.tokens[1].tolist() == [1, 2, FIRST + 2, END, 1, 2, *[FIRST + 8] * 3, END]
    assert whole.segments[0].tolist() == [0] * 5 + [1] * 4 + [-1]
    assert whole.targets[1].tolist() == [False] * 2 + [True] * 2 + [False] * 2 + [True] * 4
    seen = [rows.batch(i).tokens[0, 2].item() for i in range(6)]
    assert sorted(seen[:3]) == sorted(seen[3:]) == [FIRST, FIRST + 2, FIRST + 4] and rows.steps(2) == 6


@pytest.fixture(scope="module")
def given():
    return setting(0, steps=3, pairs=64, held=40)


def test_a_policy_against_itself(given):
    made = measured(given, given.tuned)
    assert made["win rate"] == 0.5 and made["KL"] == 0 and made["accuracy"] == 0  # no log-ratio is above another
    assert measured(given, given.base)["KL"] != 0
    assert measured(given, given.tuned, per_token=True)["accuracy"] > 0.3
    held = given.held.all()
    torch.testing.assert_close(held.values["reference"], document_logprobs(given.tuned, held), rtol=1e-5, atol=1e-5)


def test_what_is_sampled_is_words_until_the_end(given):
    drawn = sampled(given.base, given.prompts[:50], seed=1)
    assert torch.equal(drawn.words, sampled(given.base, given.prompts[:50], seed=1).words)
    ended = (drawn.words == END).int().cummax(1).values.bool()
    assert (drawn.words[ended] == END).all() and (drawn.words[~ended] >= FIRST).all()


@pytest.mark.slow
def test_every_arm_gives_a_policy(given):
    for name, arm in preferences.ARMS.items():
        made = arm(given)
        found = measured(given, made.policy, per_token=made.per_token, answers=made.answers)
        assert 0 <= found["win rate"] <= 1 and made.steps >= 3, name
        assert ("accuracy" in found) == (made.answers is None)


def test_the_best_of_several_is_what_the_judge_likes(given):
    judge = preferences.rewarding(given)
    best = preferences.picked(given, judge, given.tuned, given.prompts[:20], seed=5)
    many = sampled(given.tuned, given.prompts[:20].repeat_interleave(preferences.TOGETHER, 0), seed=5)
    batch = [Rows(each, seed=0).all() for each in (best, many)]
    mine, all_ = (preferences.document_rewards(judge, one)[:, 0] for one in batch)
    assert torch.allclose(mine, all_.view(20, -1).amax(1), atol=1e-5)
