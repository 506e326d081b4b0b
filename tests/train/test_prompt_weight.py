"""Prompts that are learned, a little or as much as answers: TRL's masks, the formula, and what is logged of each kind."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from tests.recipes import toys
from trivium.data.batch import Batch
from trivium.data.batches import ordered
from trivium.data.prepare import prepare
from trivium.nn.heads import LMHead
from trivium.nn.inputs import Inputs
from trivium.text.prompt import Prompt
from trivium.train import history
from trivium.train.objectives import NextToken, prompts

from .make_trl_masks import MARKED, ROWS, TARGET
from .toys import CONFIG, Rows, model, train

TRL = json.loads(TARGET.read_text())["found"]


@pytest.mark.concept("X.63", part="train/objectives.py")
@pytest.mark.parametrize("setting", ROWS)
def test_masks_are_trls(setting: str):
    """Ids and masks as far as the answer's end; TRL has the template's line break behind it as well, and does not train it in the
    first form. Its second form trains that too, which no answer that stops there ever says."""
    text = toys.tokenizer()
    bank = prepare(ROWS[setting], Prompt.of(text, MARKED, {"eos_token_id": text.eos}), length=512, packing="none")
    assert len(bank) == len(TRL[setting]) == 3
    for row, theirs in enumerate(TRL[setting]):
        ids, targets = bank.row(row)
        size = len(ids)
        assert theirs["ids"][:size] == ids.tolist() and theirs["trained"][:size] == targets.tolist()
        assert text.decode(theirs["ids"][size:]) == "\n" and theirs["trained"][size:] == [setting == "completion_only_loss"]
        batch = next(ordered(bank, rows=3))
        own = prompts(batch)[row, :size]
        assert own.tolist() == [at > 0 and not on for at, on in enumerate(targets.tolist())]


def reference(of: torch.nn.Module, batch: Batch, weight: float, smoothing: float) -> dict[str, torch.Tensor]:
    """Document by document, as Hugging Face computes it: shifted logits, -100 where nothing is learned."""
    sums = {"answer_loss": torch.zeros(()), "prompt_loss": torch.zeros(())}
    for row in range(len(batch.tokens)):
        for document in range(int(batch.segments[row].max()) + 1):
            there = batch.segments[row] == document
            ids, targets = batch.tokens[row][there], batch.targets[row][there]
            logits = of(Inputs(ids[None])).logits[0, :-1]
            for name, chosen in (("answer_loss", targets), ("prompt_loss", ~targets)):
                labels = ids[1:].masked_fill(~chosen[1:], -100)
                sums[name] = sums[name] + F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    return {"loss": sums["answer_loss"] + weight * sums["prompt_loss"], **sums}


@pytest.mark.concept("X.63", part="train/objectives.py")
@pytest.mark.parametrize("weight", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradients_are_the_formulas(weight: float, tied: bool, smoothing: float):
    batch = Rows().batch(0)
    one, two = (model(head=LMHead(tied=tied, bias=not tied)) for _ in range(2))  # with a bias, the head is more than its table
    objective = NextToken(prompt_weight=weight, label_smoothing=smoothing)
    found, expected = objective.terms(one, batch), reference(two, batch, weight, smoothing)
    weights = objective.weights(batch)
    documents = int((batch.segments.amax(1) + 1).sum())
    answers, asked = int(batch.targets.sum()), int((batch.segments >= 0).sum()) - int(batch.targets.sum()) - documents
    assert weights["loss"] == pytest.approx(answers + weight * asked) and objective.positions(batch) == answers + (asked if weight else 0)
    assert (set(found) == {"loss"}) == (weight == 0)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name].detach() if name != "loss" else expected[name], rtol=1e-5, atol=1e-4)
        assert value.requires_grad == (name == "loss")
    found["loss"].backward()
    expected["loss"].backward()
    for (name, ours), theirs in zip(one.named_parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.concept("X.63", part="train/loop.py")
def test_both_losses_are_logged_whatever_the_micro_batches(tmp_path):
    rows = {}
    for micro in (4, 1):
        config = CONFIG.replace(steps=2, micro=micro, save_every=None)
        train(tmp_path / str(micro), config=config, of=model(), objective=NextToken(prompt_weight=0.5))
        rows[micro] = history.read(tmp_path / str(micro))
    for whole, parts in zip(rows[4], rows[1], strict=True):
        for name in ("loss", "answer_loss", "prompt_loss"):
            assert whole[name] == pytest.approx(parts[name], rel=1e-4)
        assert whole["answer_loss"] != whole["prompt_loss"]


def test_a_batch_without_prompts_is_no_error(tmp_path):
    class Texts(Rows):
        def batch(self, i: int) -> Batch:
            batch = super().batch(i)
            return Batch(batch.tokens, batch.segments, batch.targets | prompts(batch))

    plain, modelled = ({}, {})
    for name, weight in (("a", 0.0), ("b", 0.7)):
        _, done = train(
            tmp_path / name, config=CONFIG.replace(steps=2), of=model(), rows=Texts(), objective=NextToken(prompt_weight=weight)
        )
        (plain if weight == 0 else modelled).update(done.metrics)
    assert plain["loss"] == modelled["loss"] == modelled["answer_loss"] and "prompt_loss" not in modelled
