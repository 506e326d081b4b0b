"""Instruction tuning in small: a model that has skills learns to be asked for them, and is asked for one that no instruction named.

The base model reads lists of words and what is true of them, told in two ways ("animal: goat", "the animal of: ... is goat"). A cluster of
tasks is one such skill, to find the word of one kind, phrased as instructions in several ways. FLAN's question (arXiv:2109.01652), asked at
equal updates: does tuning on some clusters help with the others, and more of them more? And what prompts are worth as targets
(arXiv:2405.14394).
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
from ...data.batches import ordered
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
    "animal": "cat dog cow goat",
    "fruit": "plum pear fig lime",
    "tool": "saw axe file rake",
    "color": "red blue green pink",
    "city": "Rome Oslo Lima Bonn",
    "metal": "iron tin gold lead",
    "fish": "cod eel tuna carp",
    "tree": "oak elm ash birch",
    "bird": "owl hawk crow duck",
    "drink": "tea milk wine beer",
    "cloth": "silk wool felt lace",
    "dance": "waltz tango polka samba",
    "ship": "raft canoe ferry yacht",
    "coat": "vest cape robe shawl",
    "month": "March April May June",
    "sport": "golf polo judo rugby",
    "stone": "opal jade ruby onyx",
    "spice": "mint clove cumin basil",
    "number": "one two seven nine",
    "bread": "bun roll toast bagel",
    "river": "Nile Rhine Seine Volga",
    "organ": "heart lung liver brain",
    "flower": "rose lily tulip daisy",
    "insect": "ant bee wasp moth",
}
SKILLS = tuple(KINDS)
KIND = {word: kind for kind, listed in KINDS.items() for word in listed.split()}
SIZE = 5  # words of a list, each of another kind
HELD = 4  # clusters that no instruction names
PHRASES = ("Name the {} word of this list.", "Which word is the {} one?", "Tell me only the {} here.", "Find the {} in these words.")
LENGTH = 96


@cache
def side() -> tuple[Tokenizer, Prompt]:
    """A tokenizer in which each word is a token, and Alpaca's template."""
    words = " ".join([*KIND, *KINDS])
    text = [f" {words}\n {words}:\n the of:\n is", *PHRASES, *template_of("alpaca").split("'")]
    found = bpe.train(text * 30, size=1024).tokenizer
    return found, Prompt.of(found, template_of("alpaca"))


def words(chance: random.Random, skill: str | None = None) -> list[str]:
    """Words of as many kinds, in any order, one of them of the kind `skill`."""
    kinds = chance.sample([kind for kind in KINDS if kind != skill], SIZE - (skill is not None))
    found = [chance.choice(KINDS[kind].split()) for kind in ([*kinds, skill] if skill else kinds)]
    chance.shuffle(found)
    return found


def answer(listed: Sequence[str], skill: str) -> str:
    return next(word for word in listed if KIND[word] == skill)


def raw(count: int, seed: int) -> Prepared:
    """What the base model reads: a list and what is true of it, or three times what is of a kind in a list."""
    chance, texts = random.Random(seed), []
    for number in range(count):
        if number % 2:
            listed = words(chance)
            facts = (f"\n {KIND[word]}: {word}" for word in chance.sample(listed, SIZE))
            texts.append({"text": f"\n {' '.join(listed)}{''.join(facts)}"})
        else:
            lists = [words(chance) for _ in range(3)]
            picks = [chance.choice(listed) for listed in lists]
            told = (f"\n the {KIND[pick]} of:\n {' '.join(one)}\n is {pick}" for one, pick in zip(lists, picks, strict=True))
            texts.append({"text": "".join(told)})
    return prepare(texts, side()[1], length=LENGTH, format="text")


def asked(skills: Sequence[str], count: int, seed: int) -> Prepared:
    """Instructions for these skills, one after another."""
    chance = random.Random(seed)
    rows = []
    for number in range(count):
        skill = skills[number % len(skills)]
        listed = words(chance, skill)
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
        return cls(small.steps_of(1600, effort), small.steps_of(400, effort), max(8, round(400 * min(1.0, effort))))


def base(seed: int, budget: Budget) -> TransformerModel:
    """Weights start at 0.1: of ten skills that were tried first, a model of this width had all after 800 updates so, and from the usual
    0.02 one after 3,000 (one seed)."""
    spec = small.shape(dim=64, layers=3).replace(vocab=side()[0].vocab_size)
    return small.train(spec, steps=budget.base, seed=seed, lr=3e-3, rows=16, data=raw(30_000, seed), std=0.1)[0]


def tuned(model: TransformerModel, bank: Prepared, *, steps: int, seed: int, prompt_weight: float = 0.0) -> TransformerModel:
    """A copy of `model` after so many updates on `bank`."""
    objective, copied = NextToken(prompt_weight=prompt_weight), copy.deepcopy(model)
    return small.train(model.spec, steps=steps, seed=seed, lr=1e-3, rows=16, data=bank, model=copied, objective=objective)[0]


@experiment(
    "instruction-tuning", "T06.02", question="Does tuning on instructions for some tasks help with tasks that no instruction named?"
)
def instruction_tuning(effort: float) -> Result:
    """Four clusters are held out, others for each of five seeds; the model is tuned on 1, 5, 10 and 20 of the rest, at equal updates, and
    asked for what was held out."""
    budget, seeds, counts = Budget.of(effort), tuple(range(5)), (0, 1, 5, 10, 20)
    hits: dict[int, list[np.ndarray]] = {count: [] for count in counts}
    known: list[float] = []
    for seed in seeds:
        order = random.Random(seed).sample(SKILLS, len(SKILLS))
        held, rest = order[:HELD], order[HELD:]
        test, model = asked(held, budget.rows, 10_000 + seed), base(seed, budget)
        hits[0].append(right(model, test))
        for count in counts[1:]:
            made = tuned(model, asked(rest[:count], 2560, 100 + seed), steps=budget.tuning, seed=seed)
            hits[count].append(right(made, test))
            if count == counts[-1]:
                known.append(float(right(made, asked(rest, budget.rows, 20_000 + seed)).mean()))
    ones = np.ones(len(hits[0][0]))
    shares = {count: bootstrap.crossed(np.stack(rows).astype(float), ones) for count, rows in hits.items()}
    gains = {count: small.paired([r.mean() for r in hits[0]], [r.mean() for r in hits[count]]) for count in counts[1:]}
    growth = small.paired([r.mean() for r in hits[1]], [r.mean() for r in hits[20]])
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
        "20 clusters over 1": growth,
        "exact match on tuned clusters (20)": known,
    }
    means = [shares[count].value for count in counts]
    helps, grows = gains[20]["low"] > 0, growth["low"] > 0
    rising = all(a < b for a, b in pairwise(means[1:]))
    verdict = (
        f"{'Holds' if helps and grows else 'Holds in part' if helps else 'Does not hold at this size'}: held-out exact match "
        f"{', '.join(f'{mean:.2f}' for mean in means)} after {', '.join(map(str, counts))} clusters; 20 over the base "
        f"{gains[20]['mean']:+.2f} ({gains[20]['low']:+.2f} to {gains[20]['high']:+.2f}), 20 over 1 {growth['mean']:+.2f} "
        f"({growth['low']:+.2f} to {growth['high']:+.2f}); {'rising' if rising else 'not rising at each step'} with clusters."
    )
    return Result(numbers, verdict, seeds)


@experiment("instruction-modelling", "X.63", question="Do tokens of prompts help as targets, beside those of answers?")
def instruction_modelling(effort: float) -> Result:
    """All clusters, 240 rows, twelve passes: prompts count nothing, a tenth, or as much as answers. Held-out loss of answers and exact
    match, three seeds, paired."""
    budget, seeds, weights = Budget.of(effort), (0, 1, 2), (0.0, 0.1, 1.0)
    losses: dict[float, list[float]] = {weight: [] for weight in weights}
    shares: dict[float, list[float]] = {weight: [] for weight in weights}
    for seed in seeds:
        model, test, few = base(seed, budget), asked(SKILLS, budget.rows, 10_000 + seed), asked(SKILLS, 240, 100 + seed)
        for weight in weights:
            made = tuned(model, few, steps=small.steps_of(180, effort), seed=seed, prompt_weight=weight)
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
    told = "; ".join(
        f"{weight:g}: {gaps[weight]['mean']:+.4f} nats ({gaps[weight]['low']:+.4f} to {gaps[weight]['high']:+.4f}), exact match "
        f"{matches[weight]['mean']:+.3f}"
        for weight in weights[1:]
    )
    sides = {"helps": [w for w in weights[1:] if gaps[w]["high"] < 0], "hurts": [w for w in weights[1:] if gaps[w]["low"] > 0]}
    settled = [f"at {', '.join(f'{weight:g}' for weight in found)} it {what}" for what, found in sides.items() if found]
    ruling = f"Modelling prompts: {' and '.join(settled) or 'no difference is settled at this size'}"
    return Result(numbers, f"{ruling}: held-out loss of answers against masking, by the weight of prompts: {told}.", seeds)
