"""Preference objectives against TRL's numbers (trl.json), formulas worked by hand, and what their papers prove of them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trivium.adapt.adapter import Adapter
from trivium.adapt.lora import LoRA, initialize_adapter
from trivium.adapt.noise import Noise
from trivium.adapt.prefix import Prefix
from trivium.adapt.prompt import Prompt
from trivium.core.errors import ConfigError
from trivium.core.seed import generator
from trivium.data.batch import Batch
from trivium.nn.heads_task import Reward
from trivium.nn.inputs import Inputs
from trivium.train import logprobs
from trivium.train.logprobs import can_fork, document_logprobs, forked, linear_logprobs, pairs_of
from trivium.train.objectives import NextToken
from trivium.train.preference import DPO, IPO, KTO, ORPO, Hinge, Preference, RobustDPO, Scaled, Sides, SimPO, log_odds, smoothed
from trivium.train.reference import reference_logprobs
from trivium.train.rewards import BradleyTerry, calibration_error, document_rewards, pessimistic, reliability

from .toys import CONFIG, VOCAB, Rows, model, train

TRL = json.loads(Path(__file__).with_name("trl.json").read_text())
NUMBERS = {name: torch.tensor(value) for name, value in TRL["numbers"].items()}


def sides(logps: Tensor, reference: Tensor | None, mask: Tensor) -> Sides:
    """Pairs of rows of tokens, chosen ones first."""
    given = None if reference is None else reference.sum(1).chunk(2)
    return Sides(*logps.sum(1).chunk(2), *mask.sum(1).chunk(2), *(given or (None, None)))


def off_trls(name: str, loss: Tensor, leaf: Tensor) -> float:
    """How far a loss and its gradients are from TRL's: the larger of the two, relative to what is above 1."""
    theirs = TRL["found"][name]
    (grad,) = torch.autograd.grad(loss, leaf)
    expected = torch.tensor(theirs["grad"])
    assert expected.abs().max() > 1e-2
    wrong = (
        (loss.detach() - theirs["loss"]).abs() / max(1, abs(theirs["loss"])),
        (grad - expected).abs().max() / max(1, expected.abs().max()),
    )
    return torch.stack(wrong).max().item()


def pairwise(name: str, objective: Preference) -> tuple[float, list[float]]:
    """How far loss and gradients are from TRL's, and the mean rewards of chosen and rejected."""
    leaf = NUMBERS["logps"].clone().requires_grad_()
    given = sides(leaf, NUMBERS["reference"], NUMBERS["mask"])
    off = off_trls(name, objective.loss(given).mean(), leaf)
    return off, [reward.mean().item() for reward in objective.rewards(given)]


@pytest.mark.concept("T07.03", part="train/preference.py")
def test_dpo_is_trls():
    off, rewards = pairwise("dpo", DPO(beta=0.3))
    assert off <= 1e-6 and rewards == pytest.approx(TRL["found"]["dpo"]["rewards"], rel=1e-5)
    assert pairwise("dpo_per_token", DPO(beta=2.0, per_token=True))[0] <= 1e-6


@pytest.mark.concept("X.71", part="train/preference.py")
def test_smoothed_dpo_is_trls():
    assert pairwise("cdpo", DPO(beta=0.3, label_smoothing=0.1))[0] <= 1e-6


@pytest.mark.concept("X.70", part="train/preference.py")
def test_ipo_is_trls():
    assert pairwise("ipo", IPO(beta=0.4))[0] <= 1e-6


def test_hinge_and_robust_dpo_are_trls():
    assert pairwise("hinge", Hinge(beta=0.2))[0] <= 1e-6
    assert pairwise("robust_dpo", RobustDPO(beta=0.3, flipped=0.2))[0] <= 1e-6


@pytest.mark.concept("T07.04", part="train/preference.py")
def test_simpo_is_trls():
    off, rewards = pairwise("simpo", SimPO(beta=2.0, gamma=0.5))
    assert off <= 1e-6 and rewards == pytest.approx(TRL["found"]["simpo"]["rewards"], rel=1e-5)
    assert pairwise("simpo_smoothed", SimPO(beta=2.0, gamma=0.5, label_smoothing=0.1))[0] <= 1e-6


@pytest.mark.concept("T07.05", part="train/preference.py")
def test_orpos_odds_are_trls():
    assert pairwise("orpo", ORPO(weight=0.5))[0] <= 1e-6


@pytest.mark.concept("T07.06", part="train/preference.py")
def test_kto_is_trls():
    """With a point of reference that is above 0, and both weights."""
    leaf = NUMBERS["logps"].clone().requires_grad_()
    own, other = (leaf - NUMBERS["reference"]).sum(1).chunk(2)
    point = other.detach().mean().clamp(min=0)
    assert point > 0
    liked = torch.tensor([True, False, True, True, False, False])
    assert off_trls("kto", KTO(beta=0.3, desirable=1.2, undesirable=0.7).loss(own, liked, point).mean(), leaf) <= 1e-6
    rewards = [0.3 * own[chosen].mean().item() for chosen in (liked, ~liked)]
    assert rewards == pytest.approx(TRL["found"]["kto"]["rewards"], rel=1e-5)


@pytest.mark.concept("T07.11", part="train/rewards.py")
def test_reward_loss_is_trls():
    for name, objective, margin in (
        ("reward", BradleyTerry(), None),
        ("reward_margin", BradleyTerry(), NUMBERS["margin"]),
        ("reward_centered", BradleyTerry(center=0.01), None),
    ):
        leaf = NUMBERS["rewards"].clone().requires_grad_()
        assert off_trls(name, objective.loss(*leaf.chunk(2), margin).mean(), leaf) <= 1e-6


def one(chosen: float, rejected: float, *, reference: tuple[float, float] = (0.0, 0.0), sizes: tuple[int, int] = (1, 1)) -> Sides:
    return Sides(*(torch.tensor([x], dtype=torch.float64) for x in (chosen, rejected, *sizes, *reference)))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (DPO(beta=0.5), -math.log(sigmoid(0.5 * 3))),
        (DPO(beta=0.5, label_smoothing=0.2), -0.8 * math.log(sigmoid(1.5)) - 0.2 * math.log(sigmoid(-1.5))),
        (DPO(beta=0.5, per_token=True), -math.log(sigmoid(0.5 * (1 / 4 + 2 / 2)))),
        (RobustDPO(beta=0.5, flipped=0.2), (-0.8 * math.log(sigmoid(1.5)) + 0.2 * math.log(sigmoid(-1.5))) / 0.6),
        (Hinge(beta=0.2), 1 - 0.2 * 3),
        (Hinge(beta=0.5), 0.0),
        (IPO(beta=0.5), (1 / 4 + 2 / 2 - 1) ** 2),
        (IPO(beta=0.5, per_token=False), (3 - 1) ** 2),
        (SimPO(beta=2.0, gamma=0.5), -math.log(sigmoid(2 * (-5 / 4 + 8 / 2) - 0.5))),
        (
            ORPO(weight=0.3),
            -0.3 * math.log(sigmoid(math.log(math.exp(-1.25) / (1 - math.exp(-1.25))) - math.log(math.exp(-4) / (1 - math.exp(-4))))),
        ),
    ],
    ids=str,
)
def test_losses_by_hand(objective, expected):
    """Chosen has 4 tokens and a log-ratio of 1, rejected 2 tokens and a log-ratio of -2."""
    loss = objective.loss(one(-5, -8, reference=(-6, -6), sizes=(4, 2)))
    assert loss.item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("objective", [DPO(label_smoothing=0.1), DPO(per_token=True), RobustDPO(), IPO(), SimPO(), ORPO()], ids=str)
def test_gradients_are_those_of_the_loss(objective):
    draws = torch.Generator().manual_seed(1)
    given = [-5 * torch.rand(4, generator=draws, dtype=torch.float64) - 0.1 for _ in range(4)]
    sizes = [torch.randint(1, 9, (4,), generator=draws).double() for _ in range(2)]
    leaves = [x.requires_grad_() for x in given[:2]]
    assert torch.autograd.gradcheck(lambda a, b: objective.loss(Sides(a, b, *sizes, *given[2:])), leaves)


@pytest.mark.concept("T07.03", part="train/preference.py")
def test_the_optimum_of_dpo_is_the_tilted_reference():
    """On a bandit whose answers are compared as Bradley and Terry say: pi = pi_ref exp(r / beta) / Z (arXiv:2305.18290, eq. 4)."""
    draws = torch.Generator().manual_seed(0)
    rewards, reference = torch.randn(5, generator=draws, dtype=torch.float64), torch.randn(5, generator=draws, dtype=torch.float64)
    reference, beta = reference.log_softmax(0), 0.7
    first, second = (~torch.eye(5, dtype=torch.bool)).nonzero(as_tuple=True)
    share = torch.sigmoid(rewards[first] - rewards[second])
    policy = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([policy], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logp, size = policy.log_softmax(0), torch.ones(len(first), dtype=torch.float64)
        pairs = Sides(logp[first], logp[second], size, size, reference[first], reference[second])
        loss = (share * DPO(beta=beta).loss(pairs)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    optimum, found = (reference + rewards / beta).log_softmax(0), policy.detach().log_softmax(0)
    assert (optimum.exp() * (optimum - found)).sum() < 1e-3
    assert (reference.exp() * (reference - found)).sum() > 0.1


@pytest.mark.concept("X.70", part="train/preference.py")
def test_ipo_stops_at_its_target_where_dpo_does_not():
    """One pair that is always told the same way: IPO's margin comes to 1 / (2 beta) and stays, DPO's grows as long as it is trained."""

    def margins(objective: Scaled) -> list[float]:
        logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        zero, size = torch.full((1,), -math.log(2), dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        seen = []
        for step in range(3000):
            logp = logits.log_softmax(0)
            (grad,) = torch.autograd.grad(objective.loss(Sides(logp[:1], logp[1:], size, size, zero, zero)).sum(), logits)
            with torch.no_grad():
                logits -= 0.05 * grad
            if step % 1000 == 999:
                seen.append((logp[0] - logp[1]).item())
        return seen

    ipo, dpo = margins(IPO(beta=0.2)), margins(DPO(beta=0.2))
    assert all(margin == pytest.approx(1 / 0.4, abs=1e-6) for margin in ipo)
    assert dpo[0] > 2.5 and dpo[1] > dpo[0] + 0.5 and dpo[2] > dpo[1] + 0.5


def test_smoothing_has_an_optimum():
    """At the margin whose sigmoid is the share that is right."""
    margin = torch.tensor(math.log(0.9 / 0.1), dtype=torch.float64, requires_grad=True)
    smoothed(margin, 0.1).backward()
    assert abs(margin.grad) < 1e-12


@pytest.mark.concept("T07.05", part="train/preference.py")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_log_odds_near_certainty(dtype):
    """Against 1 - p in its own terms, where p itself rounds to 1; finite at p = 1, with finite gradients."""
    small = torch.tensor([1e-30, 1e-12, 1e-6, 1e-3, 0.5, 5.0, 50.0], dtype=torch.float64)
    expected = [math.log(math.exp(-x) / -math.expm1(-x)) for x in small.tolist()]
    given = (-small).to(dtype).requires_grad_()
    found = log_odds(given)
    assert torch.allclose(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6 if dtype == torch.float32 else 1e-12)
    found.sum().backward()
    assert given.grad.isfinite().all()
    certain = torch.zeros(1, dtype=dtype, requires_grad=True)
    log_odds(certain).backward()
    assert log_odds(certain).isfinite() and certain.grad.isfinite()


# Through a model


def naive(trained: torch.nn.Module, batch: Batch) -> Tensor:
    """Each document in a row of its own, its tokens' log-probabilities summed one by one."""
    found = torch.zeros(len(batch.tokens), 2)
    for row in range(len(batch.tokens)):
        for document in range(2):
            own = batch.segments[row] == document
            ids, targets = batch.tokens[row, own], batch.targets[row, own]
            logp = trained(ids[None]).logits[0].float().log_softmax(-1)
            found[row, document] = sum(logp[at - 1, ids[at]] for at in range(1, len(ids)) if targets[at])
    return found


@pytest.mark.parametrize("lora", [None, 0.0], ids=["full", "lora"])
@pytest.mark.parametrize("at_once", [60, 1 << 24])
def test_log_probabilities_of_packed_documents(lora, at_once, monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK", at_once)
    trained, batch = model(lora=lora), Rows().batch(0)
    leaves = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    scale = torch.linspace(-1, 1, 8).view(4, 2)
    results = []
    for found in (document_logprobs(trained, batch), naive(trained, batch)):
        results.append([found, *torch.autograd.grad((scale * found).sum(), leaves)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5 * expected.detach().abs().max().item())


def prompted(start: int = 0) -> Batch:
    """Rows of two pairs whose sides have 4 and 0 tokens in common before what is predicted, and padding."""
    found = Rows(rows=2, length=40).batch(start)
    tokens, segments, targets = torch.zeros_like(found.tokens), torch.full_like(found.tokens, -1), torch.zeros_like(found.targets)
    draws = torch.Generator().manual_seed(start)
    for row in range(2):
        at = 0
        for document, (prompt, answer) in enumerate(((4, 3), (4, 6), (3, 5), (2, 4))):
            span = slice(at, at + prompt + answer)
            tokens[row, span] = torch.randint(VOCAB, (prompt + answer,), generator=draws)
            if document == 1:
                tokens[row, at : at + prompt] = tokens[row, :prompt]
            elif document == 3:
                tokens[row, at] = (tokens[row, at - 8] + 1) % VOCAB  # apart from the first token on
            segments[row, span] = document
            targets[row, at + prompt : at + prompt + answer] = True
            at += prompt + answer
    return Batch(tokens, segments, targets)


@pytest.mark.parametrize("lora", [None, 0.0], ids=["full", "lora"])
def test_a_prompt_of_both_sides_is_computed_once(lora):
    trained, batch = model(lora=lora), prompted()
    assert can_fork(trained)
    leaves = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    scale = torch.linspace(-1, 1, 8).view(2, 4)
    results = []
    for pairs in (False, True):
        found = document_logprobs(trained, batch, pairs=pairs)
        results.append([found, *torch.autograd.grad((scale * found).sum(), leaves)])
    for expected, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5 * expected.detach().abs().max().item())


def test_what_both_sides_begin_with_is_left_out_of_the_second():
    batch = prompted()
    short, forks = forked(batch)
    assert short.tokens.shape[1] == batch.tokens[0, batch.segments[0] >= 0].numel() - 3  # the last token of the prompt stays
    assert forks[0].tolist() == [0] * 7 + [3] * 7 + [0] * 14
    assert torch.equal(short.tokens[short.targets], batch.tokens[batch.targets])
    for document in range(4):
        expected = batch.tokens[1, batch.segments[1] == document][3 if document == 1 else 0 :]
        assert torch.equal(short.tokens[1, short.segments[1] == document], expected)


@pytest.mark.parametrize("adapter", [Prompt(length=2), Prefix(length=2)], ids=["prompt", "prefix"])
def test_virtual_tokens_stand_before_every_side(adapter):
    trained, batch = model(), prompted()
    adapter.apply(trained)
    initialize_adapter(trained, seed=0)
    assert not can_fork(trained) and not can_fork(Noise().apply(model()))
    assert torch.equal(document_logprobs(trained, batch, pairs=True), document_logprobs(trained, batch))


def test_a_head_that_does_more_goes_through_it():
    trained, batch = model(), Rows().batch(0)
    LoRA(rank=2, targets=("head.out",)).apply(trained)
    with torch.no_grad():
        for parameter in trained.head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(document_logprobs(trained, batch), naive(trained, batch), rtol=1e-4, atol=1e-4)


def test_log_probabilities_in_fp64(monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK", 12)
    draws = torch.Generator().manual_seed(0)
    hidden, table = (torch.randn(n, 3, generator=draws, dtype=torch.float64, requires_grad=True) for n in (5, 7))
    labels = torch.randint(7, (5,), generator=draws)
    expected = (hidden @ table.t()).log_softmax(1).gather(1, labels[:, None])[:, 0]
    assert torch.allclose(linear_logprobs(hidden, table, labels), expected, rtol=1e-12)
    assert torch.autograd.gradcheck(lambda h, t: linear_logprobs(h, t, labels), [hidden, table])
    assert torch.autograd.gradcheck(lambda h: linear_logprobs(h, table.detach(), labels), [hidden])  # made in the forward
    assert torch.autograd.gradcheck(lambda t: linear_logprobs(hidden.detach(), t, labels), [table])


def test_pairs_are_found_in_rows_of_several():
    segments = torch.tensor([[0, 0, 1, 2, 3, -1], [0, 1, 1, -1, -1, -1]])
    batch = Batch(torch.zeros_like(segments), segments, torch.zeros_like(segments, dtype=torch.bool))
    first, second = pairs_of(torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]]), batch)
    assert first.tolist() == [1, 3, 5] and second.tolist() == [2, 4, 6]


METHODS = [DPO(), RobustDPO(), Hinge(), IPO(), KTO()]


def rest(batch: Batch) -> Batch:
    """Without the reference that came with it."""
    return replace(batch, values={name: value for name, value in batch.values.items() if name != "reference"})


@pytest.mark.parametrize("objective", METHODS, ids=lambda spec: spec.kind)
def test_the_adapter_off_is_the_reference(objective):
    """Its log-probabilities are the base's; the same as given ones; and nothing is learned through them."""
    trained, batch = model(lora=0.3), rest(Rows().batch(0))
    base = model()
    base.load_state_dict({name.replace(".base.", "."): value for name, value in trained.state_dict().items() if ".lora." not in name})
    expected = document_logprobs(base, batch).detach()
    trained.train()
    found = reference_logprobs(trained, batch)
    assert not found.requires_grad and trained.training
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)  # whatever the adapter and its dropout are
    leaves = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    grads = []
    for given in (batch, replace(batch, values={**batch.values, "reference": found})):
        torch.manual_seed(0)
        grads.append(torch.autograd.grad(objective.terms(trained, given)["loss"], leaves))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True)) and any(grad.any() for grad in grads[0])


@pytest.mark.parametrize("adapter", [part.tiny() for _, part in Adapter.registry.items()], ids=lambda spec: spec.kind)
def test_every_kind_of_adapter_can_be_off(adapter):
    trained, batch = model(), rest(Rows().batch(0))
    expected = document_logprobs(trained, batch).detach()
    adapter.apply(trained)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator(1, name)))
    assert (document_logprobs(trained, batch) - expected).abs().max() > 1e-2
    torch.testing.assert_close(reference_logprobs(trained, batch), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.concept("T07.03", part="train/preference.py")
@pytest.mark.parametrize(
    ("objective", "expected"),
    [(DPO(), math.log(2)), (DPO(label_smoothing=0.2), math.log(2)), (RobustDPO(), math.log(2)), (Hinge(), 1), (IPO(), 25), (KTO(), 0.5)],
    ids=str,
)
def test_at_step_0_the_model_is_its_reference(objective, expected):
    trained, batch = model(lora=0.0), rest(Rows().batch(0))
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if name.endswith(".B"):
                parameter.zero_()
    found, weights = objective.terms(trained, batch), objective.weights(batch)
    assert found["loss"].item() / weights["loss"] == pytest.approx(expected, rel=1e-6)
    assert found["kl"] == 0 and found["chosen_reward"] == found["rejected_reward"] == 0


@pytest.mark.concept("T07.04", part="train/preference.py")
def test_methods_without_a_reference_run_the_model_once():
    """So what they hold is what fine-tuning on the same rows holds."""
    trained, batch = model(lora=0.0), rest(Rows().batch(0))
    calls: list[Inputs] = []
    trained.register_forward_pre_hook(lambda _, given: calls.append(given[0]))
    for objective, count in ((SimPO(), 1), (ORPO(), 1), (NextToken(), 1), (DPO(), 2), (KTO(), 2)):
        calls.clear()
        objective.terms(trained, batch)
        assert len(calls) == count
    assert not SimPO().refers and "kl" not in SimPO().measured


def test_orpo_learns_the_chosen_answers_too():
    batch, trained = Rows().batch(0), model()
    batch_chosen = replace(batch, targets=batch.targets & (batch.segments == 0))
    found, weights = ORPO().terms(trained, batch), ORPO().weights(batch)
    expected = NextToken().terms(trained, batch_chosen)["loss"]
    assert found["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert weights["loss"] == batch_chosen.targets.sum() and weights["odds"] == 4


def test_what_is_measured():
    """By hand, on four pairs; accuracy is also told apart by which side is the longer."""
    trained, batch = model(), Rows().batch(0)
    logp, objective = naive(trained, batch).detach(), DPO(beta=0.5)
    size = torch.tensor([[(batch.targets[row] & (batch.segments[row] == d)).sum() for d in range(2)] for row in range(4)])
    reward = 0.5 * (logp - batch.values["reference"])
    right = (reward[:, 0] > reward[:, 1]).float()
    longer = size[:, 0] > size[:, 1]
    expected = {
        "chosen_reward": reward[:, 0].sum(),
        "margin": (reward[:, 0] - reward[:, 1]).sum(),
        "accuracy": right.sum(),
        "rejected_logprob": logp[:, 1].sum(),
        "chosen_length": size[:, 0].sum(),
        "accuracy_longer": right[longer].sum(),
        "kl": (logp - batch.values["reference"]).mean(1).sum(),
        "chosen_gain": (logp - batch.values["reference"])[:, 0].sum(),
    }
    found, weights = objective.terms(trained, batch), objective.weights(batch)
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-4), name
    assert weights["accuracy_longer"] == longer.sum() and weights["accuracy_shorter"] == (size[:, 0] < size[:, 1]).sum()
    assert all(weights[name] == 4 for name in ("loss", "margin", "accuracy", "chosen_length"))


def test_what_is_measured_is_not_learned_and_may_be_missing(tmp_path):
    """`accuracy_longer` has no pair in some updates; those rows of metrics leave it out."""
    _, done = train(tmp_path, objective=DPO(), config=CONFIG.replace(rows=1, micro=None), rows=Rows(rows=1), validate=None)
    assert done.step == 6
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    there = [("accuracy_longer" in row, "accuracy_shorter" in row) for row in rows]
    assert (True, False) in there and (False, True) in there


def test_kto_is_not_taken_apart(tmp_path):
    with pytest.raises(ConfigError, match="train.micro: .* share KTO's point of reference"):
        train(tmp_path, objective=KTO())
    _, done = train(tmp_path, objective=KTO(), config=CONFIG.replace(micro=None), validate=None)
    assert done.step == 6 and done.metrics["kl"] >= 0


def test_without_a_reference_it_says_so():
    with pytest.raises(ConfigError, match="there is none: train an adapter"):
        DPO().terms(model(), rest(Rows().batch(0)))


# Reward models


def test_rewards_are_read_at_the_last_token():
    trained, batch = model(head=Reward()), Rows().batch(0)
    found = document_rewards(trained, batch)
    for row in range(4):
        for document in range(2):
            ids = batch.tokens[row, batch.segments[row] == document]
            assert found[row, document].item() == pytest.approx(trained(ids[None]).logits[0, -1].item(), abs=1e-5)
    with pytest.raises(ConfigError, match="no reward head"):
        document_rewards(model(), batch)


@pytest.mark.concept("T07.11", part="train/rewards.py")
def test_only_differences_of_rewards_count():
    chosen, rejected = NUMBERS["rewards"].double().chunk(2)
    assert torch.allclose(BradleyTerry().loss(chosen, rejected), BradleyTerry().loss(chosen + 3, rejected + 3), rtol=1e-12)
    assert not torch.allclose(BradleyTerry(center=0.01).loss(chosen, rejected), BradleyTerry(center=0.01).loss(chosen + 3, rejected + 3))


@pytest.mark.concept("T07.11", part="train/rewards.py")
def test_a_reward_model_recovers_what_the_rater_values():
    """Twenty answers with utilities, compared by a rater who errs as Bradley and Terry say; the chances of new pairs are calibrated."""
    draws = torch.Generator().manual_seed(0)
    answers = torch.randint(VOCAB, (20, 6), generator=draws)
    utilities = 1.5 * torch.randn(20, generator=draws)

    def compared(count: int) -> tuple[Tensor, Tensor]:
        first = torch.randint(20, (count,), generator=draws)
        second = (first + torch.randint(1, 20, (count,), generator=draws)) % 20
        wins = torch.rand(count, generator=draws) < torch.sigmoid(utilities[first] - utilities[second])
        return torch.where(wins, first, second), torch.where(wins, second, first)

    trained, objective = model(head=Reward()), BradleyTerry()
    whole = Batch(answers, torch.zeros_like(answers), torch.ones_like(answers, dtype=torch.bool))
    optimizer = torch.optim.Adam(trained.parameters(), lr=3e-3)
    chosen, rejected = compared(6000)
    for _ in range(150):  # each answer is read once for all of its pairs
        rewards = document_rewards(trained, whole)[:, 0]
        optimizer.zero_grad()
        objective.loss(rewards[chosen], rewards[rejected]).mean().backward()
        optimizer.step()
    rewards = document_rewards(trained, whole)[:, 0].detach()
    ranks = torch.stack([rewards, utilities]).argsort().argsort().double()
    assert torch.corrcoef(ranks)[0, 1] > 0.95
    good, bad = compared(6000)
    margins = rewards[good] - rewards[bad]
    assert calibration_error(margins) < 0.05 and calibration_error(4 * margins) > 0.05
    best = (utilities[good] > utilities[bad]).double().mean()
    assert (margins > 0).double().mean() > best - 0.02


def test_calibration_error_by_hand():
    """Two pairs at 0.75 of which one is right, one at 0.95 that is: (|1 - 1.5| + |1 - 0.95|) / 3."""
    margins = torch.tensor([math.log(3), -math.log(3), math.log(19)])
    assert calibration_error(margins) == pytest.approx((0.5 + 0.05) / 3, abs=1e-6)


def test_reliability_by_hand():
    """Confidences of 0.5, 0.77 twice, and 0.975, of ten rows; a tie is no right choice."""
    odds = math.log(0.77 / 0.23)
    found = reliability(torch.tensor([0.0, odds, -odds, math.log(39)]))
    assert [(round(row.low, 2), round(row.high, 2), row.pairs, row.accuracy) for row in found] == [
        (0.5, 0.55, 1, 0.0),
        (0.75, 0.8, 2, 0.5),
        (0.95, 1.0, 1, 1.0),
    ]
    assert [row.confidence for row in found] == pytest.approx([0.5, 0.77, 0.975], abs=1e-6)
    margins = torch.tensor([0.0, odds, -odds, math.log(39)])
    assert calibration_error(margins) == pytest.approx((0.5 + 2 * 0.27 + 0.025) / 4, abs=1e-6)


def test_several_models_are_worth_less_where_they_disagree():
    rewards = torch.tensor([[1.0, 3.0], [1.0, -1.0]])
    assert pessimistic(rewards).tolist() == [1.0, -1.0] and pessimistic(rewards, caution=0).tolist() == [1.0, 1.0]
