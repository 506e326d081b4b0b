"""Instruction tuning in small: a model that has skills learns to be asked for them, and is asked for one that no instruction named.

The base model reads lists of words and what is true of them ("third: pear", "animal: goat"). A cluster of tasks is one such skill,
phrased as instructions in several ways. FLAN's question (arXiv:2109.01652), asked at equal updates: does tuning on some clusters
help with the others, and more of them more? And what prompts are worth as targets (arXiv:2405.14394).
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from ...checks import bootstrap
from ...data.bank import Prepared
from ...data.batches import Batches, ordered
from ...data.prepare import prepare
from ...models.transformer import TransformerModel
from ...nn.inputs import Inputs
from ...text import bpe
from ...text.named import template_of
from ...text.prompt import Prompt
from ...text.tokenizer import Tokenizer
from ...train.objectives import NextToken
from . import Result, experiment, small

KINDS = {
    "animal": "cat dog cow goat bear lion wolf hare",
    "fruit": "plum pear fig lime date kiwi apple grape",
    "tool": "saw axe file rake drill knife spade clamp",
    "color": "red blue green pink gray brown black white",
    "city": "Rome Oslo Lima Bonn Cairo Paris Delhi Kyiv",
}
PLACES = ("first", "second", "third", "fourth", "last")
SKILLS = (*PLACES, *KINDS)
PHRASES = ("Name the {} word of this list.", "Which word is the {} one?", "Tell me only the {} here.", "Find the {} in these words.")
LENGTH = 96


@cache
def side() -> tuple[Tokenizer, Prompt]:
    """A tokenizer in which each word is a token, and Alpaca's template."""
    words = " ".join([*KINDS.values(), *PLACES, *KINDS])
    text = [f" {words}\n {words}:", *PHRASES, *template_of("alpaca").split("'")]
    found = bpe.train(text * 30, size=640).tokenizer
    return found, Prompt.of(found, template_of("alpaca"))


def words(chance: random.Random) -> list[str]:
    """One word of each kind, in any order."""
    found = [chance.choice(kind.split()) for kind in KINDS.values()]
    chance.shuffle(found)
    return found


def answer(listed: Sequence[str], skill: str) -> str:
    if skill in PLACES:
        return listed[PLACES.index(skill)]
    return next(word for word in listed if word in KINDS[skill].split())


def raw(count: int, seed: int) -> Prepared:
    """What the base model reads: lists, and eight of the ten things that are true of each."""
    chance = random.Random(seed)
    texts = []
    for _ in range(count):
        listed = words(chance)
        facts = "".join(f"\n {skill}: {answer(listed, skill)}" for skill in chance.sample(SKILLS, 8))
        texts.append({"text": f" {' '.join(listed)}{facts}"})
    return prepare(texts, side()[1], length=LENGTH, format="text")


def asked(skills: Sequence[str], count: int, seed: int) -> Prepared:
    """Instructions for these skills, one after another."""
    chance = random.Random(seed)
    rows = []
    for number in range(count):
        skill, listed = skills[number % len(skills)], words(chance)
        told = chance.choice(PHRASES).format(skill)  # a space before each word, as where the base model has read it
        rows.append({"instruction": told, "input": f" {' '.join(listed)}", "output": f" {answer(listed, skill)}"})
    return prepare(rows, side()[1], length=LENGTH, packing="none")


@torch.no_grad()
def right(model: TransformerModel, bank: Prepared) -> np.ndarray:
    """Which answers [N] the model would write, to their end, as they are."""
    found = []
    for batch in ordered(bank, rows=64):
        logits = model.eval()(Inputs(batch.tokens, segments=batch.segments)).logits
        assert logits is not None
        hit = logits[:, :-1].argmax(-1) == batch.tokens[:, 1:]
        found.append((hit | ~batch.targets[:, 1:]).all(1))
    return torch.cat(found).numpy()


@dataclass(frozen=True)
class Budget:
    """Updates of the base model and of tuning, and held-out rows."""

    base: int
    tuning: int
    rows: int

    @classmethod
    def of(cls, effort: float) -> Budget:
        return cls(small.steps_of(1000, effort), small.steps_of(200, effort), max(8, round(400 * min(1.0, effort))))


def base(seed: int, budget: Budget) -> TransformerModel:
    spec = small.shape(dim=64, layers=3).replace(vocab=side()[0].vocab_size)
    return small.train(spec, steps=budget.base, seed=seed, lr=3e-3, rows=16, data=raw(12_000, seed))[0]


def tuned(
    model: TransformerModel, sets: Sequence[Prepared], *, steps: int, seed: int, prompt_weight: float = 0.0, rows: int = 16
) -> TransformerModel:
    """A copy of `model` after so many updates on an even mixture of `sets`."""
    return small.train(
        model.spec,
        steps=steps,
        seed=seed,
        lr=1e-3,
        rows=rows,
        data=Batches([(one, 1) for one in sets], seed=seed, rows=rows),
        model=copy.deepcopy(model),
        objective=NextToken(prompt_weight=prompt_weight),
    )[0]


@experiment(
    "instruction-tuning", "T06.02", question="Does tuning on instructions for some tasks help with tasks that no instruction named?"
)
def instruction_tuning(effort: float) -> Result:
    """One place and one kind are held out, others for each of three seeds; the model is tuned on 1, 2, 4 and 8 of the other eight
    clusters, at equal updates, and asked for what was held out."""
    budget, seeds, counts = Budget.of(effort), (0, 1, 2), (0, 1, 2, 4, 8)
    hits: dict[int, list[np.ndarray]] = {count: [] for count in counts}
    known: list[float] = []
    for seed in seeds:
        held = (PLACES[seed % 5], tuple(KINDS)[seed % 5])
        rest = [skill for pair in zip(PLACES, KINDS, strict=True) for skill in pair if skill not in held]
        test, model = asked(held, budget.rows, 10_000 + seed), base(seed, budget)
        hits[0].append(right(model, test))
        for count in counts[1:]:
            own = rest[:count]
            made = tuned(
                model, [asked([skill], 640 // count, 100 * seed + n) for n, skill in enumerate(own)], steps=budget.tuning, seed=seed
            )
            hits[count].append(right(made, test))
            if count == counts[-1]:
                known.append(float(right(made, asked(own, budget.rows, 20_000 + seed)).mean()))
    ones = np.ones(len(hits[0][0]))
    shares = {count: bootstrap.crossed(np.stack(rows).astype(float), ones) for count, rows in hits.items()}
    gains = {count: small.paired([r.mean() for r in hits[0]], [r.mean() for r in hits[count]]) for count in counts[1:]}
    growth = small.paired([r.mean() for r in hits[1]], [r.mean() for r in hits[8]])
    numbers: dict[str, Any] = {
        "updates": {"base": budget.base, "tuning": budget.tuning},
        "held-out exact match by clusters": {
            str(n): {
                "mean": one.value,
                "interval": [one.interval().low, one.interval().high],
                "by seed": [float(r.mean()) for r in hits[n]],
            }
            for n, one in shares.items()
        },
        "gain over the base": {str(n): gain for n, gain in gains.items()},
        "8 clusters over 1": growth,
        "exact match on tuned clusters (8)": known,
    }
    means = [shares[count].value for count in counts]
    helps, grows = gains[8]["low"] > 0, growth["low"] > 0
    rising = all(a < b for a, b in pairwise(means[1:]))
    verdict = (
        f"{'Holds' if helps and grows else 'Holds in part' if helps else 'Does not hold at this size'}: held-out exact match "
        f"{', '.join(f'{mean:.2f}' for mean in means)} after {', '.join(map(str, counts))} clusters; 8 over the base "
        f"{gains[8]['mean']:+.2f} ({gains[8]['low']:+.2f} to {gains[8]['high']:+.2f}), 8 over 1 {growth['mean']:+.2f} "
        f"({growth['low']:+.2f} to {growth['high']:+.2f}); {'rising' if rising else 'not rising at each step'} with clusters."
    )
    return Result(numbers, verdict, seeds)


@experiment("instruction-modelling", "X.63", question="Do tokens of prompts help as targets, beside those of answers?")
def instruction_modelling(effort: float) -> Result:
    """All ten clusters, 120 rows, ten passes: prompts count nothing, a tenth, or as much as answers. Held-out loss of answers and exact
    match, three seeds, paired."""
    budget, seeds, weights = Budget.of(effort), (0, 1, 2), (0.0, 0.1, 1.0)
    losses: dict[float, list[float]] = {weight: [] for weight in weights}
    shares: dict[float, list[float]] = {weight: [] for weight in weights}
    for seed in seeds:
        model, test, few = base(seed, budget), asked(SKILLS, budget.rows, 10_000 + seed), asked(SKILLS, 120, 100 + seed)
        for weight in weights:
            made = tuned(model, [few], steps=small.steps_of(75, effort), seed=seed, prompt_weight=weight)
            losses[weight].append(small.held_out(made, test))
            shares[weight].append(float(right(made, test).mean()))
    gaps = {weight: small.paired(losses[0.0], losses[weight]) for weight in weights[1:]}
    matches = {weight: small.paired(shares[0.0], shares[weight]) for weight in weights[1:]}
    numbers: dict[str, Any] = {
        f"prompt weight {weight:g}": {
            "held-out answer loss by seed": losses[weight],
            "exact match by seed": shares[weight],
            **({"loss against masking": gaps[weight], "exact match against masking": matches[weight]} if weight else {}),
        }
        for weight in weights
    }
    better = [weight for weight in weights[1:] if gaps[weight]["high"] < 0]
    worse = [weight for weight in weights[1:] if gaps[weight]["low"] > 0]
    told = "; ".join(
        f"{weight:g}: {gaps[weight]['mean']:+.4f} nats ({gaps[weight]['low']:+.4f} to {gaps[weight]['high']:+.4f}), exact match "
        f"{matches[weight]['mean']:+.3f}"
        for weight in weights[1:]
    )
    ruling = (
        "Modelling prompts helps" if better else "Modelling prompts hurts" if len(worse) == 2 else "No difference is settled at this size"
    )
    return Result(numbers, f"{ruling}: held-out loss of answers against masking, by the weight of prompts: {told}.", seeds)
