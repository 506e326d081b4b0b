"""What data is worth: few curated rows against many noisy ones, and raw text with and without instructions made from it.

A small model learns a world of made-up people and what is true of them. Every row is drawn, so it is known which rows were spoilt; the
scorer is not told. The writer of instructions is a rule that errs now and then, since no model of this size writes any; all
that comes after it (parsing, judging, dedup) is the library's own.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch

from ...core.log import log
from ...core.seed import derive
from ...data.bank import Prepared
from ...data.batches import Batches
from ...data.curation import Best, Exact, curate
from ...data.items import Means, read_items
from ...data.prepare import prepare
from ...data.scorers import Blend, Features, Gain, Likelihood, Scorer, auc
from ...data.synthesis import FromText, Passage, Written, tally
from ...models.transformer import TransformerModel
from ...nn.inputs import Inputs
from ...recipes.curate import losses
from ...text import bpe
from ...text.prompt import Prompt, Row
from ...text.tokenizer import Tokenizer
from . import Result, experiment, small

SEEDS = (0, 1, 2, 3)
PEOPLE, COPIES = 12, 5  # of a pool: who is asked about, and how often each question comes
TOLD_OF, SEEN, LIVES = 36, 24, 12  # of raw text: who is told of, and of how many instructions are made; lives of each
VALUES = {
    "home": ["Paris", "Rome", "Oslo", "Lima", "Cairo", "Delhi", "Tokyo", "Quito", "Berlin", "Madrid", "Dublin", "Vienna"],
    "color": ["red", "green", "blue", "white", "black", "gray", "gold", "pink", "brown", "purple", "orange", "silver"],
    "trade": ["baker", "painter", "sailor", "tailor", "doctor", "lawyer", "farmer", "miner", "singer", "writer", "pilot", "judge"],
    "food": ["bread", "rice", "soup", "cheese", "fish", "beans", "apples", "honey", "pasta", "olives", "eggs", "cake"],
}
ASKED = {
    "home": ("Where does {} live?", "In which city is {} at home?", "Which town is the home of {}?", "{} lives where?"),
    "color": ("Which color does {} like?", "What is the favorite color of {}?", "{} prefers which color?", "What color pleases {}?"),
    "trade": ("What is the trade of {}?", "What does {} work as?", "{} earns a living as what?", "Which job has {}?"),
    "food": ("What does {} eat?", "Which food does {} like?", "{} has what for dinner?", "What is on the plate of {}?"),
}
TOLD = {
    "home": ("{} lives in {}.", "The home of {} is in {}.", "You can find {} in {}."),
    "color": ("{} likes the color {}.", "The favorite color of {} is {}.", "Most of what {} wears is {}."),
    "trade": ("{} works as a {}.", "By trade {} is a {}.", "People know {} as a good {}."),
    "food": ("{} eats a lot of {}.", "The dinner of {} is often {}.", "At noon {} wants {}."),
}
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<|endoftext|>' }}{% endfor %}{{ '<assistant>' if add_generation_prompt }}"
)


@cache
def people(count: int, seed: int) -> dict[str, dict[str, str]]:
    """Made-up people, and what is true of each."""
    draw = random.Random(derive(seed, "people"))
    starts, ends = (
        ("Ka", "Mo", "Ti", "Sel", "Bru", "Ane", "Lor", "Vi", "Dor", "Pel"),
        ("ra", "nko", "lin", "mar", "tos", "bert", "wen", "sia"),
    )
    names = draw.sample([a + b for a in starts for b in ends], count)
    return {name: {what: draw.choice(values) for what, values in VALUES.items()} for name in names}


@cache
def tokenizer() -> Tokenizer:
    """One for all seeds: the words of the world and of both tasks."""
    told = [line.format(name, value) for name, facts in people(80, 0).items() for w, value in facts.items() for line in TOLD[w]]
    asked = [f"Question: {line.format(name)}\nAnswer: {v}" for name in people(80, 0) for w in ASKED for line in ASKED[w] for v in VALUES[w]]
    return bpe.train([*told, *asked], size=small.VOCAB).tokenizer


def bank(rows: Sequence[Mapping[str, Any]], length: int = small.LENGTH) -> Prepared:
    return prepare(rows, Prompt.of(tokenizer(), None), length=length)


@torch.no_grad()
def accuracy(model: TransformerModel, rows: Sequence[Mapping[str, str]]) -> float:
    """The share of rows whose whole completion is the likeliest, token for token; the end of the text aside."""
    prompt, right = Prompt.of(tokenizer(), None), 0
    made: list[Row] = [prompt.completion(row["prompt"], row["completion"]) for row in rows]
    for start in range(0, len(made), 64):
        part = made[start : start + 64]
        tokens = torch.zeros(len(part), max(len(row.ids) for row in part), dtype=torch.int64)
        targets = torch.zeros_like(tokens, dtype=torch.bool)
        for at, row in enumerate(part):
            tokens[at, : len(row.ids)] = torch.tensor(row.ids)
            targets[at, : len(row.ids) - 1] = torch.tensor(row.targets[:-1])
        logits = model(Inputs(tokens, segments=torch.zeros_like(tokens))).logits
        assert logits is not None
        hit = (logits[:, :-1].argmax(-1) == tokens[:, 1:]) | ~targets[:, 1:]
        right += int(hit.all(1).sum())
    return right / len(rows)


# Few curated rows, or many noisy ones


def question(name: str, what: str, way: int, answer: str) -> dict[str, str]:
    return {"prompt": f"Question: {ASKED[what][way].format(name)}\nAnswer:", "completion": f" {answer}"}


def noisy(seed: int) -> tuple[list[dict[str, str]], list[bool], list[dict[str, str]]]:
    """A pool of questions and answers of which half were spoilt, which ones, and questions to be asked: each fact in the one way in
    which the pool never asks for it."""
    draw = random.Random(derive(seed, "noisy"))
    rows: list[tuple[dict[str, str], bool]] = []
    asked: list[dict[str, str]] = []
    for name, facts in people(PEOPLE, seed).items():
        for what, answer in facts.items():
            held = draw.randrange(4)
            asked.append(question(name, what, held, answer))
            for way in (way for way in range(4) if way != held):
                for _ in range(COPIES):
                    spoilt = draw.random() < 0.5
                    rows.append((question(name, what, way, spoil(answer, what, draw) if spoilt else answer), spoilt))
    draw.shuffle(rows)
    return [row for row, _ in rows], [spoilt for _, spoilt in rows], asked


def spoil(answer: str, what: str, draw: random.Random) -> str:
    """Another answer to the question, an answer to another question, letters out of order, or a word again and again."""
    match draw.randrange(4):
        case 0:
            return draw.choice([value for value in VALUES[what] if value != answer])
        case 1:
            return draw.choice(VALUES[draw.choice([other for other in VALUES if other != what])])
        case 2:
            return "".join(draw.sample(answer + "#=/%", len(answer) + 4))
    return " ".join([answer] * 4)


def scored(rows: Sequence[dict[str, str]], spoilt: Sequence[bool], *, steps: int, seed: int) -> tuple[Means, dict[str, float]]:
    """What scores the pool: a model that has seen it for a short while, spoilt rows and all; and how each scorer ranks the good
    above the spoilt. Answers by themselves are among what it sees, so that it knows what they cost alone."""
    alone = [{"prompt": "", "completion": row["completion"]} for row in rows[:: len(rows) // 400 + 1]]
    model, _ = small.train(small.shape(), steps=steps, seed=seed, data=bank([*rows, *alone]))
    with log.hushed():
        means = Means(Prompt.of(tokenizer(), None), losses(model))
        items, bad = read_items(rows), torch.tensor(spoilt).numpy()
        found = {}
        scorers: dict[str, Scorer] = {"features": Features(), "gain": Gain(), "likelihood": Likelihood(), "blend": Blend()}
        for name, scorer in scorers.items():
            scores = scorer.scores(items, means)
            found[name] = auc(scores[~bad], scores[bad])
    return means, found


@experiment(
    "curation",
    "X.45",
    question="Do few curated rows teach more than many noisy ones in the same number of steps, and does a scorer put planted noise last?",
)
def curation(effort: float) -> Result:
    """720 rows of which half are spoilt; the half that the library's blend of scorers likes best, a half drawn at random, and all of
    them, trained for equal steps, to which those of the scorer are not counted; four seeds."""
    steps = small.steps_of(300, effort)
    sides: dict[str, list[float]] = {"all, noisy": [], "random half": [], "curated half": []}
    areas: list[dict[str, float]] = []
    noise: list[float] = []
    for seed in SEEDS:
        rows, spoilt, asked = noisy(seed)
        means, found = scored(rows, spoilt, steps=small.steps_of(300, effort), seed=seed)
        areas.append(found)
        with log.hushed():
            kept = curate(rows, [Best(by=Blend(), count=len(rows) // 2)], means=means).kept
        noise.append(small.mean(float(spoilt[record.line - 1]) for record in kept))
        drawn = random.Random(derive(seed, "random")).sample(rows, len(kept))
        chosen = (rows, drawn, [record.value for record in kept])
        for name, side in zip(sides, chosen, strict=True):
            model, _ = small.train(small.shape(), steps=steps, seed=seed, data=bank(side))
            sides[name].append(accuracy(model, asked))
    gain = small.paired(sides["all, noisy"], sides["curated half"])
    over = small.paired(sides["random half"], sides["curated half"])
    area = {name: [found[name] for found in areas] for name in areas[0]}
    numbers = {
        "steps": steps,
        "rows of a pool": 12 * COPIES * PEOPLE,
        "exact match by seed": sides,
        "curated less noisy": gain,
        "curated less random": over,
        "AUC by seed": area,
        "share of noise in the curated": noise,
    }
    holds, ranks = gain["low"] > 0, min(area["blend"]) > 0.9
    verdict = (
        f"{_word(holds, gain['high'] < 0)}: a curated half answers {gain['mean']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f}) more of the "
        f"questions than all noisy rows at equal steps, and {over['mean']:+.3f} ({over['low']:+.3f} to {over['high']:+.3f}) more than a random "
        f"half. That the scorer ranks planted noise with an AUC above 0.9 {'holds' if ranks else 'does not hold'}: at least "
        f"{min(area['blend']):.3f} (without a model {min(area['features']):.3f}, likelihood alone {min(area['likelihood']):.3f})."
    )
    return Result(numbers, verdict, SEEDS)


# Raw text, with instructions made from it or without


class Rule:
    """In the place of a model that writes questions and answers about a passage; one time in ten it does not keep to the form, one
    time in ten it answers with what the passage does not say."""

    def __init__(self, seed: int):
        self.seed = seed

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        /,
        *,
        stage: str,
        numbers: Sequence[int],
        stop: Sequence[str] = (),
        stop_ids: Sequence[int] = (),
    ) -> list[Written]:
        assert not stop and not stop_ids, "a passage is answered to its end"
        return [
            self._written(tokenizer().decode(ids), random.Random(derive(self.seed, stage, n)))
            for ids, n in zip(prompts, numbers, strict=True)
        ]

    def _written(self, prompt: str, draw: random.Random) -> Written:
        said = prompt.partition("Text:\n")[2].partition("<assistant>")[0]
        name, facts = next((name, facts) for name, facts in people(TOLD_OF, self.seed).items() if name in said)
        what = draw.choice([what for what, value in facts.items() if value in said])
        answer = draw.choice(VALUES[what]) if draw.random() < 0.1 else facts[what]
        if draw.random() < 0.1:
            return Written(f"{name}, {answer}", ended=True)
        return Written(f"Question: {draw.choice(ASKED[what]).format(name)}\nAnswer: {answer}", ended=True)


def lives(seed: int) -> list[str]:
    """Passages of raw text: what is true of someone, in other words and order each time."""
    draw = random.Random(derive(seed, "lives"))
    texts = []
    for name, facts in people(TOLD_OF, seed).items():
        for _ in range(LIVES):
            lines = [draw.choice(TOLD[what]).format(name, value) for what, value in facts.items()]
            texts.append(" ".join(draw.sample(lines, len(lines))))
    draw.shuffle(texts)
    return texts


def instructions(texts: Sequence[str], *, seed: int) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """Texts of questions and answers about `texts`, as parsed, judged and left by dedup; and how many became what."""
    prompt = Prompt.of(tokenizer(), TEMPLATE)
    passages = [Passage(text, f"text:{n}") for n, text in enumerate(texts)]
    drafts = FromText(grounded=1.0).drafts(range(2 * len(texts)), prompt=prompt, passages=passages, write=Rule(seed))
    rows = [{"text": f"Question: {draft.question}\nAnswer: {draft.answer}"} for draft in drafts if draft.trouble is None]
    with log.hushed():
        kept = curate(rows, [Exact()]).kept
    return [{"text": record.value["text"]} for record in kept], {**tally(drafts), "kept": len(kept)}


@experiment(
    "instruction-mix",
    "X.44",
    question="At equal tokens, does raw text with instructions made from a part of it answer more questions about the rest than raw text alone?",
)
def instruction_mix(effort: float) -> Result:
    """36 people, 12 short lives of each as raw text; instructions are made from the lives of 24, and questions asked about the other 12.
    Every batch has the same number of tokens on both sides; four seeds."""
    steps = small.steps_of(600, effort)
    numbers: dict[str, Any] = {}
    found: dict[str, dict[str, list[float]]] = {arm: {"unseen": [], "seen": []} for arm in ("raw", "mixed")}
    for seed in SEEDS:
        names = list(people(TOLD_OF, seed))
        texts = lives(seed)
        pairs, became = instructions([text for text in texts if any(name in text for name in names[:SEEN])], seed=seed)
        numbers[f"drafts, seed {seed}"] = became
        raw = [{"text": text} for text in texts]
        shares = {"raw": [(bank(raw), 1)], "mixed": [(bank(raw), 1), (bank(pairs), 1)]}
        for arm, sets in shares.items():
            model = trained(sets, steps=steps, seed=seed)
            for part, who in (("unseen", names[SEEN:]), ("seen", names[:SEEN])):
                asked = [
                    question(name, what, way, people(TOLD_OF, seed)[name][what]) for name in who for what in VALUES for way in range(4)
                ]
                found[arm][part].append(accuracy(model, asked))
    gap = {part: small.paired(found["raw"][part], found["mixed"][part]) for part in ("unseen", "seen")}
    numbers |= {"steps": steps, "tokens of a step": small.ROWS * small.LENGTH, "exact match by seed": found, "mixed less raw": gap}
    far = gap["unseen"]
    share = small.mean(numbers[f"drafts, seed {seed}"]["parsed share"] for seed in SEEDS)
    verdict = (
        f"{_word(far['low'] > 0, far['high'] < 0)}: at equal tokens the mix answers {far['mean']:+.3f} ({far['low']:+.3f} to {far['high']:+.3f}) "
        f"more of the questions about people of whom it read only raw text ({small.mean(found['mixed']['unseen']):.2f} against "
        f"{small.mean(found['raw']['unseen']):.2f}; chance 0.08), and {gap['seen']['mean']:+.3f} about the others. {share:.0%} of the drafts parsed. "
        "The instructions were written by a rule, not by a model."
    )
    return Result(numbers, verdict, SEEDS)


def trained(sets: Sequence[tuple[Prepared, int]], *, steps: int, seed: int) -> TransformerModel:
    """The small model after so many steps on data sets with shares of the tokens."""
    return small.train(small.shape(), steps=steps, seed=seed, data=Batches(list(sets), seed=seed, rows=small.ROWS))[0]


def _word(holds: bool, against: bool) -> str:  # noqa: FBT001 - two facts of one sentence
    return "Holds" if holds else "Does not hold at this size" if against else "Not settled at this size"
