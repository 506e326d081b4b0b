"""Recall over a context: associative recall with many queries (MQAR, arXiv:2312.04927), selective copying and induction
(arXiv:2312.00752), in models of two layers."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from ...core.seed import generator
from ...data.batch import Batch
from ...models.block import Block
from ...models.transformer import Transformer, TransformerModel
from ...nn.attention import Mixer
from ...nn.inputs import Inputs
from . import Result, experiment, small

WORDS = 64  # keys are words 1 to 31, values 32 to 63


@dataclass
class Task:
    """Rows that are drawn anew for each batch. `recall`: key-value pairs, then keys, each to be followed by its value.
    `copy`: words among blanks, then a mark, then the words in order. `induction`: a word that stood once, what followed it."""

    kind: Literal["recall", "copy", "induction"]
    pairs: int = 8
    rows: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        self.fingerprint = str(self)

    def steps(self, epochs: float, /) -> int:
        return round(epochs)

    def batch(self, i: int, /) -> Batch:
        tokens, targets = getattr(self, f"_{self.kind}")(generator(self.seed, self.kind, i))
        return Batch(tokens, torch.zeros_like(tokens), targets)

    def _recall(self, g: torch.Generator) -> tuple[Tensor, Tensor]:
        keys = torch.stack([torch.randperm(31, generator=g)[: self.pairs] + 1 for _ in range(self.rows)])
        values = torch.randint(32, WORDS, keys.shape, generator=g)
        order = torch.stack([torch.randperm(self.pairs, generator=g) for _ in range(self.rows)])
        told = torch.stack([keys, values], -1).flatten(1)
        asked = torch.stack([keys.gather(1, order), values.gather(1, order)], -1).flatten(1)
        tokens = torch.cat([told, asked], 1)
        targets = torch.zeros_like(tokens, dtype=torch.bool)
        targets[:, told.shape[1] + 1 :: 2] = True
        return tokens, targets

    def _copy(self, g: torch.Generator) -> tuple[Tensor, Tensor]:
        length = 3 * self.pairs
        words = torch.randint(2, WORDS, (self.rows, self.pairs), generator=g)
        places = torch.stack([torch.randperm(length, generator=g)[: self.pairs].sort().values for _ in range(self.rows)])
        line = torch.zeros(self.rows, length, dtype=torch.int64).scatter(1, places, words)
        tokens = torch.cat([line, torch.ones(self.rows, 1, dtype=torch.int64), words], 1)
        targets = torch.zeros_like(tokens, dtype=torch.bool)
        targets[:, length + 1 :] = True
        return tokens, targets

    def _induction(self, g: torch.Generator) -> tuple[Tensor, Tensor]:
        length = 4 * self.pairs
        tokens = torch.randint(1, WORDS, (self.rows, length + 2), generator=g)
        places = torch.randint(0, length - 2, (self.rows,), generator=g)
        index = torch.arange(self.rows)
        tokens[index, places] = 0
        tokens[:, length], tokens[:, length + 1] = 0, tokens[index, places + 1]
        targets = torch.zeros_like(tokens, dtype=torch.bool)
        targets[:, -1] = True
        return tokens, targets


@torch.no_grad()
def accuracy(model: TransformerModel, task: Task) -> float:
    """Share of targets that are the likeliest word, over batches that training never draws."""
    right = total = 0
    for i in range(8):
        batch = task.batch(10_000_000 + i)
        logits = model(Inputs(batch.tokens)).logits
        assert logits is not None
        found = logits[:, :-1].argmax(-1) == batch.tokens[:, 1:]
        right, total = right + int(found[batch.targets[:, 1:]].sum()), total + int(batch.targets[:, 1:].sum())
    return right / total


@torch.no_grad()
def accuracy_by_distance(model: TransformerModel, pairs: int, *, parts: int = 4) -> dict[str, float]:
    """Of `recall`: share of right values by how many tokens lie between where a value was told and where it is asked for, in as many equal
    parts of the distances as `parts`."""
    task, found = Task("recall", pairs=pairs), []
    for i in range(8):
        tokens = task.batch(20_000_000 + i).tokens
        logits = model(Inputs(tokens)).logits
        assert logits is not None
        asked = 2 * pairs + 2 * torch.arange(pairs)
        told = 2 * (tokens[:, None, 0 : 2 * pairs : 2] == tokens[:, asked, None]).int().argmax(-1)
        right = logits[:, asked].argmax(-1) == tokens[:, asked + 1]
        found.append(torch.stack([(asked - told).flatten(), right.flatten()]))
    distances, rights = torch.cat(found, 1)
    edges = torch.linspace(0, 4 * pairs, parts + 1).int().tolist()
    spans = {f"{low + 1} to {high} tokens": rights[(distances > low) & (distances <= high)].float() for low, high in pairwise(edges)}
    return {name: float(span.mean()) for name, span in spans.items() if len(span)}


def stack(*mixers: Mixer) -> Transformer:
    base = small.shape(dim=64)
    block = base.blocks["a"]
    blocks = {f"b{i}": Block(mixer=mixer, ffn=block.ffn) for i, mixer in enumerate(mixers)}
    return base.replace(vocab=WORDS, layers=tuple(blocks), blocks=blocks)


def learned(spec: Transformer, task: Task, *, steps: int, seeds: tuple[int, ...], lr: float = 3e-3) -> list[float]:
    return [
        accuracy(small.train(spec, steps=steps, seed=seed, lr=lr, data=Task(task.kind, task.pairs, task.rows, seed))[0], task)
        for seed in seeds
    ]


@experiment("recall", "T19.06", "X.05", question="How far behind attention are linear mixers in recall, and does a hybrid close the gap?")
def recall(effort: float) -> Result:
    """MQAR with 12 pairs and heads of 16: full attention, linear attention, gated delta rule, and 3:1 hybrids of both; three seeds. And their
    loss as language models."""
    from ...nn.delta import GatedDelta
    from ...nn.linear_attention import LinearAttention

    steps, seeds = small.steps_of(1000, effort), (0, 1, 2)
    full = small.shape(dim=64).blocks["a"].mixer
    assert full is not None
    linear = LinearAttention(heads=4, head_dim=16)
    delta = GatedDelta(key_heads=2, value_heads=2, key_dim=16, value_dim=32)
    stacks = {
        "full": stack(full, full, full, full),
        "linear": stack(linear, linear, linear, linear),
        "gated delta": stack(delta, delta, delta, delta),
        "3:1 linear and full": stack(linear, linear, linear, full),
        "3:1 gated delta and full": stack(delta, delta, delta, full),
    }
    numbers: dict[str, Any] = {"steps": steps, "pairs": 12}
    means, losses = {}, {}
    for name, spec in stacks.items():
        numbers[name] = {"recall by seed": learned(spec, Task("recall", pairs=12), steps=steps, seeds=seeds)}
        means[name] = small.mean(numbers[name]["recall by seed"])
        text = spec.replace(vocab=small.VOCAB)
        losses[name] = numbers[name]["held-out loss by seed"] = [
            small.held_out(small.train(text, steps=steps // 2, seed=seed)[0]) for seed in seeds[:2]
        ]
    holds = means["3:1 gated delta and full"] > 0.9 * means["full"] and means["full"] > means["linear"] + 0.1
    told = "; ".join(f"{name} {means[name]:.1%} and {small.mean(losses[name]):.3f}" for name in stacks)
    return Result(numbers, f"{'Holds' if holds else 'Does not hold in full'}: recall and held-out loss: {told} nats.", seeds)


@experiment("mamba", "X.06", question="Does Mamba solve selective copying and induction, and decode in constant memory?")
def mamba(effort: float) -> Result:
    """Two layers of width 64, three seeds; processor time of a forward over length."""
    from ...nn.mamba import Mamba
    from .lengths import cost

    steps, seeds = small.steps_of(1500, effort), (0, 1, 2)
    spec = stack(Mamba(inner=128, dt_rank=4), Mamba(inner=128, dt_rank=4))
    numbers: dict[str, Any] = {
        task: learned(spec, Task(task, pairs=8), steps=steps, seeds=seeds, lr=2e-3)  # type: ignore[arg-type]
        for task in ("copy", "induction")
    }
    lengths = (1024, 2048, 4096, 8192) if effort >= 1 else (64, 128)
    times = [cost(spec.replace(vocab=small.VOCAB), n)[0] for n in lengths]
    numbers |= {"lengths": lengths, "processor seconds": times, "exponent": small.exponent(lengths, times)}
    solved = {task: max(numbers[task]) for task in ("copy", "induction")}
    holds = min(solved.values()) > 0.95
    verdict = (
        f"{'Holds' if holds else 'Does not hold in full at this budget'}: best accuracies {solved}; time grows with exponent "
        f"{numbers['exponent']:.2f}; the state is of a fixed size by declaration."
    )
    return Result(numbers, verdict, seeds)
