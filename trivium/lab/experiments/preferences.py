"""Preference methods on a task whose gold reward is known (see `preference_task`): against each other, with wrong labels, and with labels
that never vary. Policies that are trained online join `ARMS`; PPO is not here yet."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...models.transformer import TransformerModel, with_head
from ...nn.heads_task import Reward
from ...optim.schedules import Constant
from ...train.objectives import NextToken
from ...train.preference import DPO, IPO, KTO, ORPO, RobustDPO, SimPO
from ...train.reference import at_rest
from ...train.rewards import BradleyTerry, document_rewards
from . import Result, experiment, small
from .preference_task import Answers, Rows, Setting, learn, measured, sampled, setting

STEPS, TOGETHER = 150, 4  # updates of each method; answers of which the best is taken
BETA, RATE = 0.1, 2e-3  # of all methods that have a reference; of all that start from the tuned model


@dataclass(frozen=True)
class Arm:
    """What was made of a `Setting`: a policy, or answers that were picked; `per_token`: what it judges pairs by; `steps` after the
    base model."""

    policy: TransformerModel
    steps: int
    per_token: bool = False
    answers: Answers | None = None


def dpo(given: Setting) -> Arm:
    return Arm(learn(given.tuned, given.rows(), DPO(beta=BETA), steps=given.steps, lr=RATE, seed=given.seed)[0], 2 * given.steps)


def simpo(given: Setting) -> Arm:
    made, _ = learn(given.tuned, given.rows(), SimPO(beta=2.0, gamma=1.0), steps=given.steps, lr=RATE, seed=given.seed)
    return Arm(made, 2 * given.steps, per_token=True)


def orpo(given: Setting) -> Arm:
    """From the base in one pass of three quarters of the steps that fine-tuning and DPO take together."""
    steps = 3 * given.steps // 2
    return Arm(learn(given.base, given.rows(), ORPO(weight=1.0), steps=steps, lr=3e-3, seed=given.seed)[0], steps, per_token=True)


def kto(given: Setting, *, keep: float = 1.0, weight: float = 1.0) -> Arm:
    """Both sides of the pairs as thumbs by themselves, in twice the rows; the share `keep` of the thumbs down is left."""
    liked, disliked = given.chosen, given.rejected
    disliked = disliked.at(torch.arange(round(keep * len(disliked.prompts))))
    prompts, words = (torch.cat([getattr(side, part) for side in (liked, disliked)]) for part in ("prompts", "words"))
    label = torch.cat([torch.ones(len(liked.prompts)), -torch.ones(len(disliked.prompts))])
    order = torch.randperm(len(label), generator=torch.Generator().manual_seed(given.seed))
    own, mismatch = Answers(prompts[order], words[order]), Answers(prompts[order], words[order].roll(1, 0))
    rows = Rows(own, mismatch, seed=given.seed, rows=64, values={"label": torch.stack([label[order], torch.zeros(len(label))], 1)})
    objective = KTO(beta=BETA, undesirable=weight)
    return Arm(learn(given.tuned, rows.referred(given.tuned), objective, steps=given.steps, lr=RATE, seed=given.seed)[0], 2 * given.steps)


def best_of_n(given: Setting) -> Arm:
    """The tuned model's answers, the best of four by a reward model of the same pairs."""
    judge = rewarding(given)
    return Arm(given.tuned, 2 * given.steps, answers=picked(given, judge, given.tuned, given.prompts, seed=given.seed))


def expert_iteration(given: Setting, *, rounds: int = 3) -> Arm:
    """Online: the best of four by a reward model of the same pairs are learned, and drawn anew from what learned them."""
    judge, policy = rewarding(given), given.tuned
    for number in range(rounds):
        best = picked(given, judge, policy, given.chosen.prompts[:512], seed=given.seed + 100 * (number + 1))
        policy, _ = learn(policy, Rows(best, seed=given.seed), NextToken(), steps=given.steps // rounds, lr=RATE, seed=given.seed)
    return Arm(policy, 2 * given.steps)


def rewarding(given: Setting) -> TransformerModel:
    """A reward model of the pairs, from the tuned model."""
    model = with_head(copy.deepcopy(given.tuned), Reward(), seed=given.seed)
    rows = Rows(given.chosen, given.rejected, seed=given.seed)
    return learn(model, rows, BradleyTerry(), steps=given.steps, lr=RATE, seed=given.seed)[0]


def picked(given: Setting, judge: TransformerModel, policy: TransformerModel, prompts: torch.Tensor, *, seed: int) -> Answers:
    """Of several answers of `policy` to each prompt, the one that `judge` rewards most."""
    many = sampled(policy, prompts.repeat_interleave(TOGETHER, 0), seed=seed)
    with at_rest(judge):
        rewards = document_rewards(judge, Rows(many, seed=0).all())[:, 0]
    return many.at(rewards.view(-1, TOGETHER).argmax(1) + TOGETHER * torch.arange(len(prompts)))


ARMS: dict[str, Callable[[Setting], Arm]] = {
    "SFT": lambda given: Arm(given.tuned, given.steps, per_token=True),
    "DPO": dpo,
    "SimPO": simpo,
    "ORPO from base": orpo,
    "KTO": kto,
    "KTO 9:1": lambda given: kto(given, keep=1 / 9),
    "KTO 9:1 reweighted": lambda given: kto(given, keep=1 / 9, weight=9.0),
    "best of 4": best_of_n,
    "expert iteration": expert_iteration,
}


def compared(arms: dict[str, Callable[[Setting], Arm]], seeds: tuple[int, ...], **how: Any) -> dict[str, dict[str, list[float]]]:
    """What each arm is worth by seed; every arm of a seed has the same models, pairs and prompts."""
    found: dict[str, dict[str, list[float]]] = {name: {} for name in arms}
    for seed in seeds:
        given = setting(seed, **how)
        for name, arm in arms.items():
            made = arm(given)
            values = measured(given, made.policy, per_token=made.per_token, answers=made.answers)
            for what, value in {**values, "steps": float(made.steps)}.items():
                found[name].setdefault(what, []).append(value)
    return found


def told(gap: dict[str, float]) -> str:
    return f"{gap['mean']:+.3f} ({gap['low']:+.3f} to {gap['high']:+.3f})"


def placed(gap: dict[str, float]) -> str:
    """Where one stands to the other, as far as the interval tells."""
    return "above" if gap["low"] > 0 else "below" if gap["high"] < 0 else "within noise of"


@experiment(
    "preference-methods",
    "T07.03",
    "T07.04",
    "T07.05",
    "T07.06",
    question="On one task with a gold reward and a rater biased to length, what do DPO, SimPO, ORPO and KTO reach?",
)
def preference_methods(effort: float) -> Result:
    """Four seeds, paired; 2,000 pairs; equal steps but for ORPO, which starts from the base."""
    steps, seeds = small.steps_of(STEPS, effort), tuple(range(4))
    found = compared(ARMS, seeds, steps=steps)

    def gap(one: str, other: str, what: str) -> dict[str, float]:
        """`one` less `other`."""
        return small.paired(found[other][what], found[one][what])

    gained, closer = gap("DPO", "SFT", "gold reward"), gap("SimPO", "DPO", "words")
    orpo_gap, kto_gap = gap("ORPO from base", "DPO", "accuracy"), gap("KTO", "DPO", "gold reward")
    few, more = gap("KTO 9:1 reweighted", "DPO", "gold reward"), gap("KTO 9:1 reweighted", "KTO 9:1", "gold reward")
    fewer = small.mean(found["ORPO from base"]["steps"]) / small.mean(found["DPO"]["steps"])
    rivals = {name: gap("DPO", name, "gold reward") for name in ("best of 4", "expert iteration")}
    gaps = {
        "DPO less SFT, gold reward": gained,
        "SimPO less DPO, words": closer,
        "SimPO less DPO, win rate": gap("SimPO", "DPO", "win rate"),
        "ORPO less SFT and DPO, accuracy": orpo_gap,
        "ORPO less SFT and DPO, gold reward": gap("ORPO from base", "DPO", "gold reward"),
        "KTO less DPO, gold reward": kto_gap,
        "KTO 9:1 reweighted less DPO, gold reward": few,
        "KTO 9:1 reweighted less not, gold reward": more,
        **{f"DPO less {name}, gold reward": value for name, value in rivals.items()},
    }
    wins = {name: round(small.mean(values["win rate"]), 3) for name, values in found.items()}
    verdict = (
        f"DPO {'gains' if gained['low'] > 0 else 'does not gain'} over SFT: gold reward {told(gained)}, win rate {wins['DPO']}; against PPO on "
        "the same data it is not compared, since there is no PPO here yet. "
        f"SimPO's answers are {'shorter' if closer['high'] < 0 else 'not shorter'} than DPO's: words {told(closer)}, win rate {wins['SimPO']}. "
        f"ORPO from the base in {fewer:.0%} of the steps is {placed(orpo_gap)} SFT and DPO in accuracy: {told(orpo_gap)}. "
        f"KTO on thumbs is {placed(kto_gap)} DPO in gold reward: {told(kto_gap)}; at 9:1 with reweighting {placed(few)} DPO: {told(few)}, and "
        f"{placed(more)} KTO at 9:1 without: {told(more)}."
    )
    return Result({"steps": steps, "arms, by seed": found, "paired differences": gaps}, verdict, seeds)


@experiment("noisy-preferences", "X.71", question="With a fifth of the labels the wrong way round, does smoothing beat DPO?")
def noisy_preferences(effort: float) -> Result:
    """Few pairs read many times, by a rater who is sharp but for the flips; five seeds, paired; judged on clean pairs."""
    steps, seeds = small.steps_of(2 * STEPS, effort), tuple(range(5))
    objectives = {"DPO": DPO(beta=BETA), "cDPO": DPO(beta=BETA, label_smoothing=0.2), "robust DPO": RobustDPO(beta=BETA, flipped=0.2)}

    def arm(name: str) -> Callable[[Setting], Arm]:
        return lambda given: Arm(learn(given.tuned, given.rows(), objectives[name], steps=steps, lr=RATE, seed=given.seed)[0], steps)

    found = compared({name: arm(name) for name in objectives}, seeds, steps=steps // 2, pairs=600, sharp=20.0, bias=0.0, flipped=0.2)
    gaps = {
        name: {what: small.paired(found["DPO"][what], found[name][what]) for what in ("accuracy", "gold reward")}
        for name in ("cDPO", "robust DPO")
    }
    said = "; ".join(f"{name}: accuracy {told(gap['accuracy'])}, gold reward {told(gap['gold reward'])}" for name, gap in gaps.items())
    best = gaps["cDPO"]
    holds = best["accuracy"]["low"] > 0 or best["gold reward"]["low"] > 0
    worse = best["accuracy"]["high"] < 0 or best["gold reward"]["high"] < 0
    verdict = f"{'Holds' if holds and not worse else 'Does not hold at this size'}: less DPO, paired, {said}."
    return Result({"steps": steps, "pairs": 600, "flipped": 0.2, "methods, by seed": found, "less DPO": gaps}, verdict, seeds)


@experiment(
    "deterministic-preferences",
    "X.70",
    question="With labels that never vary, does IPO's margin stay where its target is while DPO's grows?",
)
def deterministic_preferences(effort: float) -> Result:
    """Sixty-four pairs, always told the same way, at a constant rate; mean difference of log-ratios after each quarter; three seeds."""
    steps, seeds, beta = small.steps_of(1000, effort), tuple(range(3)), 0.1
    numbers: dict[str, Any] = {"steps": steps, "beta": beta, "IPO's target": 1 / (2 * beta)}
    ends: dict[str, list[list[float]]] = {"DPO": [], "IPO": []}
    worth: dict[str, dict[str, list[float]]] = {"DPO": {}, "IPO": {}}
    for seed in seeds:
        given = setting(seed, steps=small.steps_of(STEPS, effort), pairs=64, sharp=1e6, bias=0.0)
        for name, objective in (("DPO", DPO(beta=beta)), ("IPO", IPO(beta=beta, per_token=False))):
            made, rows = learn(given.tuned, given.rows(), objective, steps=steps, lr=5e-4, seed=seed, schedule=Constant())
            tenth = max(1, steps // 10)
            stops = [max(tenth, steps * quarter // 4) for quarter in range(1, 5)]
            ends[name].append([small.mean(row["margin"] / beta for row in rows[stop - tenth : stop]) for stop in stops])
            for what, value in measured(given, made).items():
                worth[name].setdefault(what, []).append(value)
    numbers |= {"difference of log-ratios after each quarter, by seed": ends, "policies, by seed": worth}
    grown = {name: [last / half for _, half, _, last in runs] for name, runs in ends.items()}
    divergence = small.paired(worth["DPO"]["KL"], worth["IPO"]["KL"])
    numbers |= {"last over second quarter": grown, "IPO less DPO, KL": divergence}
    target = 1 / (2 * beta)
    last = {name: [run[-1] for run in runs] for name, runs in ends.items()}
    holds = max(abs(end - target) for end in last["IPO"]) < 0.2 * target < target < min(last["DPO"]) and min(grown["DPO"]) > 1.1
    verdict = (
        f"{'Holds' if holds else 'Does not hold'}: after all steps the difference of log-ratios is {_listed(last['IPO'])} under IPO (target "
        f"{target:g}) and {_listed(last['DPO'])} under DPO, where it grew {min(grown['DPO']):.2f} times or more over the second half. IPO less DPO, "
        f"KL to the reference: {told(divergence)}."
    )
    return Result(numbers, verdict, seeds)


def _listed(values: list[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)
