"""A language model as a classifier (Radford et al. 2018): is a text prose or code? Which token's state tells, and how much of the model
has to be trained. The texts are docstrings and lines of the standard library; test texts are of files that training never saw."""

from __future__ import annotations

import ast
import copy
import random
from collections.abc import Sequence
from typing import Any

from ...adapt.freeze import Freeze
from ...checks.metrics import accuracy
from ...data.bank import Prepared
from ...data.batches import Batches
from ...data.classes import VALUE, prepare_classes
from ...evaluate.classes import scores
from ...models.transformer import TransformerModel, with_head
from ...nn.heads_task import Classifier, Pool
from ...text.prompt import Prompt
from ...train.classes import Classes
from . import Result, experiment, small

NAMES = ("code", "prose")
LENGTH, LINES = 64, 2


def snippets(sources: Sequence[str], count: int, seed: int) -> list[dict[str, str]]:
    """So many pieces of `LINES` lines, or as many as there are, half of docstrings and half of code; indents, which would tell, are
    taken off."""
    prose, code = [], []
    for source in sources:
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            continue
        holders = (node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef))
        docs = [text for node in holders if (text := ast.get_docstring(node)) is not None]
        said = {line.strip() for text in docs for line in text.splitlines()}
        plain = [line.strip() for line in source.splitlines()]
        code += pieces([line for line in plain if line and not line.startswith("#") and line not in said and '"""' not in line])
        prose += [piece for text in docs for piece in pieces([line.strip() for line in text.splitlines() if line.strip()])]
    chance, half = random.Random(seed), min(count // 2, len(code), len(prose))
    chosen = [
        {"text": text, "label": name} for name, every in zip(NAMES, (code, prose), strict=True) for text in chance.sample(every, half)
    ]
    chance.shuffle(chosen)
    return chosen


def pieces(lines: Sequence[str]) -> list[str]:
    found = ["\n".join(lines[at : at + LINES]) for at in range(0, len(lines) - LINES + 1, LINES)]
    return [text for text in found if len(text) >= 30]


def bank(rows: Sequence[dict[str, str]]) -> Prepared:
    return prepare_classes(rows, Prompt.of(small.tokenizer(), None), names=NAMES, length=LENGTH, too_long="truncate")


def judged(model: TransformerModel, test: Prepared) -> float:
    found = scores(model, [test.row(row)[0].tolist() for row in range(len(test))], classes=2).argmax(1)
    return accuracy(found.tolist(), test.values[VALUE].astype(int).tolist())


def trained(
    base: TransformerModel, rows: Prepared, *, steps: int, seed: int, pool: Pool = "last", tune: str = "last", lr: float = 1e-3
) -> TransformerModel:
    """A copy of `base` as a classifier, of which the head, the last layer too, or everything is trained."""
    model = with_head(copy.deepcopy(base), Classifier(labels=2, pool=pool, bias=False), seed=seed)
    if tune != "all":
        Freeze(last=int(tune == "last"), train=("head", "final_norm") if tune == "last" else ("head",)).apply(model)
    return small.train(
        model.spec, steps=steps, seed=seed, lr=lr, model=model, objective=Classes(), data=Batches([(rows, 1)], seed=seed, rows=16)
    )[0]


@experiment(
    "classifier", "X.62", question="Does a GPT with a head for classes tell two kinds of text apart, and is it the last token that tells?"
)
def classifier(effort: float) -> Result:
    """1,200 texts to learn from and up to 400 others; three seeds; the last, the first and the mean state; head, last layer, and all."""
    steps, seeds = small.steps_of(150, effort), (0, 1, 2)
    train, held = small.texts()
    ways: dict[str, dict[str, Any]] = {
        "last token, last layer": {},
        "first token, last layer": {"pool": "first"},
        "mean, last layer": {"pool": "mean"},
        "last token, head alone": {"tune": "head", "lr": 1e-2},
        "last token, all": {"tune": "all"},
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    sides = {seed: (bank(snippets(train, 1200, seed)), bank(snippets(held, 400, 100 + seed))) for seed in seeds}
    for seed, (rows, test) in sides.items():
        base = small.train(small.shape(), steps=small.steps_of(300, effort), seed=seed)[0]
        for name, how in ways.items():
            found[name].append(judged(trained(base, rows, steps=steps, seed=seed, **how), test))
    plain = found["last token, last layer"]
    gaps = {name: small.paired(plain, rates) for name, rates in found.items() if rates is not plain}
    numbers = {
        "updates": steps,
        "texts": {"train": len(sides[0][0]), "test": len(sides[0][1])},
        "accuracy by seed": found,
        "against last token, last layer": gaps,
    }
    ahead = gaps["first token, last layer"]
    holds = small.mean(plain) > 0.95 and ahead["high"] < 0
    told = ", ".join(f"{name} {small.mean(rates):.3f}" for name, rates in found.items())
    verdict = (
        f"{'Holds' if holds else 'Does not hold in full at this size'}: accuracy {told}; the first token against the last "
        f"{ahead['mean']:+.3f} ({ahead['low']:+.3f} to {ahead['high']:+.3f})."
    )
    return Result(numbers, verdict, seeds)
