"""Ways to adapt a small language model of the standard library's source: DoRA against LoRA, adapters and prefixes against full
fine-tuning, soft prompts over model size, what is learned and what is forgotten.

What is taught: to go on with the language's manual, prose that the base never read; or a skill, to say of a sentence whether it
praises.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ...adapt.adapter import Adapter, adapter_tensors, adapters, initialize_adapter
from ...adapt.bottleneck import Bottleneck
from ...adapt.dora import DoRA
from ...adapt.lora import LoRA
from ...adapt.prefix import Prefix
from ...adapt.prompt import Prompt
from ...adapt.square import MoRA
from ...core.seed import generator
from ...data.bank import Prepared
from ...models import count
from ...models.transformer import TransformerModel, with_head
from ...nn.heads_task import Classifier
from ...nn.inputs import Inputs
from ...optim.schedules import Cosine
from . import Result, experiment, small

SUBJECTS = ("parser", "module", "function", "class", "test", "method", "file", "server", "path", "value")
SAYS = ("is", "was", "looks", "seems", "remains", "can be")
DEGREES = ("", "very ", "really ", "so ")
QUALITIES = {
    **dict.fromkeys(("good", "fast", "safe", "simple", "clear", "correct", "complete", "useful"), True),
    **dict.fromkeys(("bad", "slow", "broken", "complex", "strange", "wrong", "empty", "useless"), False),
}
VERDICTS = (" False", " True")  # what follows a sentence
SCHEDULE = Cosine(warmup=0.1, minimum=0.1)


@cache
def base(dim: int, effort: float) -> TransformerModel:
    return small.train(small.shape(dim=dim), steps=small.steps_of(600, effort), seed=0)[0]


def adapted(adapter: Adapter | None, *, effort: float, seed: int, dim: int = small.DIM, classes: bool = False) -> TransformerModel:
    """A copy of the base, all of which is trained where there is no adapter. `classes`: with a head of two classes, trained too."""
    model = copy.deepcopy(base(dim, effort))
    if classes:
        with_head(model, Classifier(labels=2, pool="last"), seed=seed)
    if adapter is not None:
        initialize_adapter(adapter.apply(model), seed=seed)
        model.head.requires_grad_(classes)
    return model


def size(model: TransformerModel) -> int:
    """Parameters of the adapter; of the whole where there is none."""
    return sum(x.numel() for x in adapter_tensors(model).values()) if adapters(model) else count.parameters(model).total


@cache
def manual() -> tuple[Prepared, Prepared]:
    """Rows of the language's manual, and of every eighth of its sections, held out."""
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    return small.rows_of([text for i, text in enumerate(texts) if i % 8]), small.rows_of(texts[::8])


def read(adapter: Adapter | None, *, lr: float, steps: int, seed: int, effort: float, dim: int = small.DIM) -> TransformerModel:
    """The base after training on the manual."""
    model = adapted(adapter, effort=effort, seed=seed, dim=dim)
    return small.train(model.spec, steps=steps, seed=seed, lr=lr, data=manual()[0], model=model)[0]


@cache
def skill() -> tuple[tuple[Tensor, Tensor, Tensor], ...]:
    """Sentences to train on and others to test: tokens [N, T], segments [N, T] and whether each praises [N]."""
    every = [
        (f"# The {subject} {says} {degree}{quality}:", praises)
        for subject, says, degree, (quality, praises) in product(SUBJECTS, SAYS, DEGREES, QUALITIES.items())
    ]
    rows = [(small.tokenizer().encode(text, bos=False), label) for text, label in every]
    width = max(len(ids) for ids, _ in rows)
    tokens = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
    segments = torch.tensor([[0] * len(ids) + [-1] * (width - len(ids)) for ids, _ in rows])
    labels, order = torch.tensor([int(label) for _, label in rows]), torch.randperm(len(rows), generator=generator(0, "split"))
    return tuple((tokens[at], segments[at], labels[at]) for at in order.tensor_split(2))  # type: ignore[return-value]


@cache
def words() -> Tensor:
    """The token that stands for each verdict."""
    first = [small.tokenizer().encode(word, bos=False)[0] for word in VERDICTS]
    assert first[0] != first[1]
    return torch.tensor(first)


def judged(model: TransformerModel, tokens: Tensor, segments: Tensor) -> Tensor:
    """Logits [B, V] of what follows each sentence, or of its classes [B, 2]."""
    logits = model(Inputs(tokens, segments=segments), keep="last").logits
    assert logits is not None
    return logits


def learned(model: TransformerModel, *, lr: float, steps: int, seed: int) -> float:
    """Accuracy on the test sentences after training: the likeliest of all words, or class, is the right one."""
    (tokens, segments, labels), test = skill()
    classes = isinstance(model.spec.head, Classifier)

    def loss(step: int) -> Tensor:
        at = torch.randint(0, len(tokens), (32,), generator=generator(seed, "row", step))
        return cross_entropy(judged(model, tokens[at], segments[at]), labels[at] if classes else words()[labels[at]])

    small.descend(model, loss, steps=steps, lr=lr, schedule=SCHEDULE, weight_decay=0.0)
    with torch.no_grad():
        found = judged(model, *test[:2]).argmax(-1)
    return float((found == (test[2] if classes else words()[test[2]])).float().mean())


def told(gaps: Mapping[str, Mapping[str, float]], form: str = "+.4f") -> str:
    return "; ".join(f"{name} {gap['mean']:{form}} ({gap['low']:{form}} to {gap['high']:{form}})" for name, gap in gaps.items())


@experiment("dora-lora", "T06.05", question="Is DoRA better than LoRA at equal ranks?")
def dora_lora(effort: float) -> Result:
    """Ranks 2, 8 and 32 on all linear maps of a model of width 64, alpha twice the rank, one rate; five seeds paired: loss on held-out
    sections of the manual."""
    steps, seeds, ranks = small.steps_of(120, effort), tuple(range(5)), (2, 8, 32)
    losses: dict[str, dict[str, list[float]]] = {"LoRA": {}, "DoRA": {}}
    for name, kind in (("LoRA", LoRA), ("DoRA", DoRA)):
        for rank in ranks:
            adapter = kind(rank=rank, alpha=2.0 * rank)
            models = [read(adapter, lr=3e-3, steps=steps, seed=seed, effort=effort) for seed in seeds]
            losses[name][str(rank)] = [small.held_out(model, manual()[1]) for model in models]
    gaps = {f"rank {rank}": small.paired(losses["LoRA"][str(rank)], losses["DoRA"][str(rank)]) for rank in ranks}
    before = small.held_out(base(small.DIM, effort), manual()[1])
    numbers = {"steps": steps, "loss before": before, "held-out loss by rank and seed": losses, "DoRA less LoRA, nats": gaps}
    better, worse = sum(gap["high"] < 0 for gap in gaps.values()), sum(gap["low"] > 0 for gap in gaps.values())
    standing = "Holds" if better == len(ranks) else "Does not hold in full at this size"
    return Result(numbers, f"{standing}: DoRA is better at {better} and worse at {worse} of {len(ranks)} ranks: {told(gaps)} nats.", seeds)


@experiment(
    "adapter-accuracy",
    "T06.03",
    "T06.06",
    "T06.07",
    "X.67",
    question="Do LoRA, bottleneck adapters and prefixes come within a point of full fine-tuning?",
)
def adapter_accuracy(effort: float) -> Result:
    """The skill, 1,920 sentences to train and as many to test, equal updates, each way at its own rate, three seeds. P-tuning v2 (a prefix
    and a head of classes) against full fine-tuning with that head."""
    steps, seeds = small.steps_of(300, effort), (0, 1, 2)
    ways: dict[str, tuple[Adapter | None, float, bool]] = {
        "full": (None, 1e-3, False),
        "LoRA": (LoRA(rank=8, alpha=16.0), 5e-3, False),
        "bottleneck": (Bottleneck(size=8), 5e-3, False),
        "prefix": (Prefix(length=16), 3e-2, False),
        "full with classes": (None, 1e-3, True),
        "P-tuning v2": (Prefix(length=16), 3e-2, True),
    }
    found: dict[str, list[float]] = {}
    numbers: dict[str, Any] = {"steps": steps}
    whole = size(base(small.DIM, effort))
    for name, (adapter, lr, classes) in ways.items():
        models = [adapted(adapter, effort=effort, seed=seed, classes=classes) for seed in seeds]
        found[name] = [learned(model, lr=lr, steps=steps, seed=seed) for model, seed in zip(models, seeds, strict=True)]
        parameters = size(models[0])
        numbers[name] = {"accuracy by seed": found[name], "rate": lr, "parameters": parameters, "share of the base": parameters / whole}
    bounds = {"LoRA": ("full", 0.01), "bottleneck": ("full", 0.01), "prefix": ("full", 0.02), "P-tuning v2": ("full with classes", 0.02)}
    gaps = {name: small.paired(found[against], found[name]) for name, (against, _) in bounds.items()}
    numbers["less full fine-tuning"] = gaps
    near = [name for name, (_, bound) in bounds.items() if gaps[name]["mean"] >= -bound]
    standing = "Holds" if len(near) == len(bounds) else f"Holds for {', '.join(near) or 'none'}"
    verdict = f"{standing} (within 1 point for LoRA and bottleneck, 2 for prefixes): accuracy less full fine-tuning: {told(gaps, '+.1%')}."
    return Result(numbers, verdict, seeds)


@experiment("prompt-scale", "T06.08", question="Does the gap of prompt tuning to full fine-tuning shrink with model size?")
def prompt_scale(effort: float) -> Result:
    """Widths 32, 64 and 128, each pre-trained for as many updates; 16 virtual tokens against all parameters on the manual; three seeds. The
    gap is one of held-out loss, and the share of what full fine-tuning gains that prompts gain. (The skill is
    beyond a prompt: at width 64 its answers stay those of chance.)"""
    steps, seeds, widths = small.steps_of(120, effort), (0, 1, 2), (32, 64, 128)
    numbers: dict[str, Any] = {"steps": steps}
    gaps, shares = [], []
    for dim in widths:
        before = small.held_out(base(dim, effort), manual()[1])
        found = {}
        for name, adapter, lr in (("full", None, 1e-3), ("prompt", Prompt(length=16), 3e-2)):
            models = [read(adapter, lr=lr, steps=steps, seed=seed, effort=effort, dim=dim) for seed in seeds]
            found[name] = [small.held_out(model, manual()[1]) for model in models]
        pairs = list(zip(found["full"], found["prompt"], strict=True))
        gaps.append([prompt - full for full, prompt in pairs])
        shares.append([(before - prompt) / (before - full) for full, prompt in pairs])
        numbers[f"width {dim}"] = {
            "parameters": size(base(dim, effort)),
            "loss before": before,
            "held-out loss by seed": found,
            "gap, nats": gaps[-1],
            "share of the gain": shares[-1],
        }
    trends = {"gap, nats": small.paired(gaps[0], gaps[-1]), "share of the gain": small.paired(shares[0], shares[-1])}
    numbers["from the smallest to the largest"] = trends
    means = [small.mean(gap) for gap in gaps]
    falls = means[0] > means[1] > means[2]
    standing = "Does not hold at these sizes"
    if falls:
        standing = "Holds" if trends["gap, nats"]["high"] < 0 else "The means fall, the interval holds zero"
    by = ", ".join(f"{dim}: {gap:.3f} ({small.mean(part):.0%})" for dim, gap, part in zip(widths, means, shares, strict=True))
    return Result(
        numbers, f"{standing}: gap in nats by width (share of the gain) {by}; smallest to largest: {told(trends, '+.3f')}.", seeds
    )


@experiment("lora-forgetting", "X.64", question="Does LoRA learn less and forget less than full fine-tuning?")
def lora_forgetting(effort: float) -> Result:
    """The manual, after the standard library's source; ranks 2, 8 and 32 on all linear maps, rank 8 on q and v alone, and a square
    update of as many parameters; five seeds. Gain: what the loss on held-out sections falls; forgetting: what that on source rises."""
    steps, seeds = small.steps_of(120, effort), tuple(range(5))
    ways: dict[str, tuple[Adapter | None, float]] = {
        "full": (None, 1e-3),
        **{f"rank {rank}": (LoRA(rank=rank, alpha=2.0 * rank), 3e-3) for rank in (2, 8, 32)},
        "rank 8, q and v": (LoRA(rank=8, alpha=16.0, targets=("q", "v")), 3e-3),
        "square, as rank 8": (MoRA(rank=8), 3e-3),
    }
    source, target = (small.held_out(base(small.DIM, effort), data) for data in (None, manual()[1]))
    gain, forgot = {}, {}
    numbers: dict[str, Any] = {"steps": steps, "loss before, source and manual": [source, target]}
    for name, (adapter, lr) in ways.items():
        models = [read(adapter, lr=lr, steps=steps, seed=seed, effort=effort) for seed in seeds]
        gain[name] = [target - small.held_out(model, manual()[1]) for model in models]
        forgot[name] = [small.held_out(model) - source for model in models]
        numbers[name] = {"gain by seed": gain[name], "forgetting by seed": forgot[name], "parameters": size(models[0]), "rate": lr}
    learns, forgets = ({name: small.paired(row["full"], row[name]) for name in ways if name != "full"} for row in (gain, forgot))
    numbers |= {"gain less full's": learns, "forgetting less full's": forgets}
    ranks = [name for name in learns if name.startswith("rank")]
    less, kept = (all(row[name]["high"] < 0 for name in ranks) for row in (learns, forgets))
    verdict = (
        f"'Learns less' {'holds' if less else 'does not hold for every rank'}, 'forgets less' {'holds' if kept else 'does not hold for every rank'}. "
        f"Gain less full's {small.mean(gain['full']):.3f}: {told(learns, '+.3f')}; forgetting less full's {small.mean(forgot['full']):.3f}: "
        f"{told(forgets, '+.3f')} nats."
    )
    return Result(numbers, verdict, seeds)
