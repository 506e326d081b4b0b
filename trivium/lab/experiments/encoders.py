"""A small encoder that first filled in masked tokens of the standard library's source, against the same one from scratch, on few
labels (arXiv:1810.04805): what package a snippet comes from, with what word the line after it begins, and what role each name in it
plays, as named entities are tagged.

The packages of all tasks were left out of pre-training, and files that test are never files that train.
"""

from __future__ import annotations

import ast
import copy
import re
import sysconfig
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ...checks import metrics
from ...core.errors import ConfigError
from ...core.seed import generator
from ...infer.generate import generate
from ...models.transformer import TransformerModel, build, initialize, with_head
from ...nn.heads import Head, MaskedLMHead
from ...nn.heads_task import Classifier, Tagger
from ...nn.inputs import Inputs
from ...optim.schedules import Cosine
from . import Result, experiment, small

PACKAGES = ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "xml")
ROLES = ("module", "class", "function", "argument")
STARTS = ("return", "if", "for", "def", "self", "raise", "try", "else")
TAGS = ("O", *(f"{mark}-{role}" for role in ROLES for mark in "BI"))
LENGTH, MASK = 64, small.VOCAB
SPEC = small.shape().replace(vocab=small.VOCAB + 1, causal=False, head=MaskedLMHead())
SCRATCH = 0.08  # deviation of what starts on labels from scratch: nearer to 64 ** -0.5, which the width asks for
SCHEDULE = Cosine(warmup=0.1, minimum=0.1)


@cache
def files() -> dict[str, tuple[str, ...]]:
    """The sources of each package, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = {name: sorted(path for path in (root / name).rglob("*.py") if "test" not in path.relative_to(root).parts) for name in PACKAGES}
    return {name: tuple(path.read_text(encoding="utf-8", errors="replace") for path in paths) for name, paths in found.items()}


@cache
def unlabelled() -> tuple[Tensor, Tensor]:
    """Token ids [n] to pre-train on, without the tasks' packages, and held-out ones."""
    left_out = {text for texts in files().values() for text in texts}
    sides = [[text for text in side if text not in left_out] for side in small.texts()]
    train, held = (torch.tensor([i for text in side for i in small.tokenizer().encode(text, bos=False)]) for side in sides)
    return train, held


def masked(ids: Tensor, rows: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Windows [B, T] of which 15% of the tokens are to be filled in: 80% of those masked, 10% replaced; what stood there; which."""
    whole = ids.unfold(0, LENGTH, 1)[torch.randint(0, len(ids) - LENGTH, (rows,), generator=g)]
    chance, how = (torch.rand(whole.shape, generator=g) for _ in range(2))
    chosen = chance < 0.15
    other = torch.randint(0, small.VOCAB, whole.shape, generator=g)
    seen = torch.where(chosen & (how < 0.8), MASK, torch.where(chosen & (how < 0.9), other, whole))
    return seen, whole, chosen


def filling(model: TransformerModel, ids: Tensor, rows: int, g: torch.Generator) -> Tensor:
    """Loss over the chosen tokens of windows of `ids`."""
    seen, whole, chosen = masked(ids, rows, g)
    logits = model(Inputs(seen), keep=chosen).logits
    assert logits is not None
    return cross_entropy(logits, whole[chosen])


def pretrained(seed: int, steps: int) -> TransformerModel:
    model, ids = initialize(build(SPEC, device="cpu"), seed=seed), unlabelled()[0]
    small.descend(model, lambda i: filling(model, ids, 32, generator(seed, "mask", i)), steps=steps, lr=3e-3, schedule=SCHEDULE)
    return model


def roles(source: str) -> list[tuple[int, int, str]]:
    """Names where they are used, as (first character, end, role): modules that the file imports, classes and functions that it
    defines, arguments of the functions around them (`self` and `cls` apart)."""
    tree = ast.parse(source)
    starts = [0, *accumulate(len(line) + 1 for line in source.split("\n"))]
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                known |= {name.asname or name.name.partition(".")[0]: "module" for name in names}
            case ast.ClassDef(name=name):
                known[name] = "class"
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                known.setdefault(name, "function")
    found = {node: known[node.id] for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id in known}
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            taken = {each.arg for each in ast.walk(function.args) if isinstance(each, ast.arg)} - {"self", "cls"}
            inside = (node for part in function.body for node in ast.walk(part))
            found |= {node: "argument" for node in inside if isinstance(node, ast.Name) and node.id in taken}
    places = [(starts[node.lineno - 1] + node.col_offset, len(node.id), role) for node, role in found.items()]
    return sorted((first, first + length, role) for first, length, role in places)


def tagged(source: str) -> tuple[list[int], list[int]]:
    """Token ids of a source, and of each the number of its tag."""
    ids, offsets = small.tokenizer().spans(source, rest=False, markup=False)
    owner: dict[int, tuple[int, str]] = {}
    for number, (first, end, role) in enumerate(roles(source)):
        owner |= dict.fromkeys(range(first, end), (number, role))
    tags, before = [], None
    for first, end in offsets:
        mine = next((owner[at] for at in range(first, end) if at in owner), None)
        tags.append("O" if mine is None else f"{'I' if mine == before else 'B'}-{mine[1]}")
        before = mine
    return ids, [TAGS.index(tag) for tag in tags]


@cache
def read(source: str) -> dict[str, tuple[Tensor, Tensor]]:
    """By task: windows [n, T] of a source, and labels [n] or [n, T] (of what package a window comes is not said here)."""
    ids, tags = (torch.tensor(x, dtype=torch.int64) for x in tagged(source))
    whole = len(ids) // LENGTH * LENGTH
    windows = ids[:whole].view(-1, LENGTH)
    _, offsets = small.tokenizer().spans(source, rest=False, markup=False)
    at = {first: number for number, (first, _) in enumerate(offsets)}
    ends, starts = [], []
    for line in re.finditer(r"^ +(\w+)", source, re.MULTILINE):
        end = at.get(line.start())  # the token that the line begins with
        if line[1] in STARTS and end is not None and end >= LENGTH:
            ends.append(end)
            starts.append(STARTS.index(line[1]))
    before = torch.stack([ids[end - LENGTH : end] for end in ends]) if ends else windows[:0]
    return {
        "packages": (windows, torch.zeros(len(windows), dtype=torch.int64)),
        "next line": (before, torch.tensor(starts, dtype=torch.int64)),
        "roles": (windows, tags[:whole].view(-1, LENGTH)),
    }


@cache
def labelled(task: str) -> tuple[tuple[list[Tensor], list[Tensor]], ...]:
    """Of training and of test files: windows [n, T] and labels [n] or [n, T], of each class (of roles: of each package) apart."""
    sides = []
    for parity in (0, 1):
        windows, labels = [], []
        for texts in files().values():
            found = [read(text)[task] for text in texts[parity::2] if text.isascii()]
            windows.append(torch.cat([pair[0] for pair in found]))
            labels.append(torch.cat([pair[1] for pair in found]))
        if task == "packages":
            labels = [torch.full((len(part),), number) for number, part in enumerate(windows)]
        if task == "next line":
            every, first = torch.cat(windows), torch.cat(labels)
            windows = [every[first == number] for number in range(len(STARTS))]
            labels = [torch.full((len(part),), number) for number, part in enumerate(windows)]
        sides.append((windows, labels))
    return tuple(sides)


def drawn(task: str, side: int, each: int, seed: int) -> tuple[Tensor, Tensor]:
    """`each` windows of every class (of roles: of every package), with their labels."""
    windows, labels = labelled(task)[side]
    g = generator(seed, task, side)
    chosen = [torch.randperm(len(part), generator=g)[:each] for part in windows]
    return tuple(torch.cat([part[at] for part, at in zip(parts, chosen, strict=True)]) for parts in (windows, labels))  # type: ignore[return-value]


def tuned(start: TransformerModel | None, head: Head, data: tuple[Tensor, Tensor], *, steps: int, seed: int) -> TransformerModel:
    """The model `start`, or one from scratch, with this head, after training on the labelled windows."""
    if start is None:
        model = initialize(build(SPEC.replace(head=head), device="cpu"), seed=seed, std=SCRATCH)
    else:
        model = with_head(copy.deepcopy(start), head, seed=seed)
    windows, labels = data

    def loss(step: int) -> Tensor:
        at = torch.randint(0, len(windows), (16,), generator=generator(seed, "row", step))
        logits = model(Inputs(windows[at])).logits
        assert logits is not None
        return cross_entropy(logits.flatten(0, -2), labels[at].flatten())

    small.descend(model, loss, steps=steps, lr=2e-3, schedule=SCHEDULE)
    return model


@torch.no_grad()
def score(model: TransformerModel, data: tuple[Tensor, Tensor]) -> float:
    """Accuracy of classes; F1 of whole spans of tags."""
    logits = model(Inputs(data[0])).logits
    assert logits is not None
    given = logits.argmax(-1)
    if given.dim() == 1:
        return float((given == data[1]).float().mean())
    words = [[[TAGS[i] for i in row] for row in side.tolist()] for side in (given, data[1])]
    return metrics.value(metrics.span_terms(a, b)["span_f1"] for a, b in zip(*words, strict=True))


def refusal(model: TransformerModel) -> str:
    """What is said when an encoder is asked to generate."""
    try:
        generate(model, [[1]])
    except ConfigError as error:
        return str(error)
    return ""


@experiment("encoders", "T03.02", question="Does an encoder that was pre-trained beat one from scratch on few labels?")
def encoders(effort: float) -> Result:
    """Three layers of width 64; 8 classes of 16 windows of 64 tokens with labels (48 where names are tagged), 60 to test; as many
    updates on both sides. Three seeds, of pre-training, labels and order alike, paired."""
    steps, tuning, seeds = small.steps_of(1500, effort), small.steps_of(250, effort), (0, 1, 2)
    tasks: dict[str, Head] = {
        "packages": Classifier(labels=len(PACKAGES), pool="mean"),
        "next line": Classifier(labels=len(STARTS), pool="last"),
        "roles": Tagger(labels=len(TAGS)),
    }
    found: dict[str, dict[str, list[float]]] = {task: {"from scratch": [], "pre-trained": []} for task in tasks}
    numbers: dict[str, Any] = {"steps of pre-training": steps, "steps with labels": tuning, "loss of masked tokens, held out": []}
    refused = ""
    for seed in seeds:
        start = pretrained(seed, steps)
        with torch.no_grad():
            numbers["loss of masked tokens, held out"].append(float(filling(start, unlabelled()[1], 256, generator(0, "held"))))
        refused = refusal(start)
        for task, head in tasks.items():
            train, test = drawn(task, 0, 48 if task == "roles" else 16, seed), drawn(task, 1, 60, seed)
            for name, first in (("from scratch", None), ("pre-trained", start)):
                found[task][name].append(score(tuned(first, head, train, steps=tuning, seed=seed), test))
    gaps = {task: small.paired(row["from scratch"], row["pre-trained"]) for task, row in found.items()}
    numbers |= {"accuracy (of roles: F1 of spans)": found, "pre-trained less from scratch": gaps, "asked to generate": refused}
    sure = [task for task, gap in gaps.items() if gap["low"] > 0]
    means = {task: " to ".join(f"{small.mean(values):.1%}" for values in row.values()) for task, row in found.items()}
    told = "; ".join(f"{task} {means[task]} ({gap['low']:+.1%} to {gap['high']:+.1%})" for task, gap in gaps.items())
    standing = "Holds" if len(sure) == len(tasks) else f"Holds for {' and '.join(sure)}" if sure else "Does not hold at this size"
    return Result(numbers, f"{standing}: {told}. Asked to generate, the encoder is {'refused' if refused else 'not refused'}.", seeds)
