"""Small things to train: a source of batches with gaps and padding, the tiny model, and one run of it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trivium.adapt.lora import LoRA
from trivium.core.seed import generator
from trivium.data.batch import Batch
from trivium.models.presets import llama
from trivium.models.transformer import build
from trivium.nn.heads import Head
from trivium.nn.inputs import Inputs, Output
from trivium.optim.optimizers import AdamW
from trivium.optim.schedules import Cosine
from trivium.train.loop import Fit, TrainConfig, fit
from trivium.train.objectives import NextToken

VOCAB = 23


@dataclass(frozen=True)
class Rows:
    """Rows of two documents with prompts and padding. In a document each token is the one before it plus a step that its first token says."""

    rows: int = 4
    length: int = 18
    seed: int = 0

    @property
    def fingerprint(self) -> str:
        return f"rows-{self.rows}-{self.length}-{self.seed}"

    def steps(self, epochs: float) -> int:
        return max(1, round(5 * epochs))

    def batch(self, i: int) -> Batch:
        draws = generator(self.seed, "batch", i)
        tokens = torch.zeros(self.rows, self.length, dtype=torch.int64)
        segments = torch.full_like(tokens, -1)
        targets = torch.zeros_like(tokens, dtype=torch.bool)
        for row in range(self.rows):
            at = 0
            for document in range(2):
                size = int(torch.randint(5, self.length // 2 + 1, (), generator=draws))
                start, stride = (int(n) for n in torch.randint(1, 7, (2,), generator=draws))
                span = slice(at, at + size)
                tokens[row, span] = (start + stride * torch.arange(size)) % VOCAB
                segments[row, span] = document
                targets[row, at + int(torch.randint(2, 4, (), generator=draws)) : at + size] = True
                at += size
        return Batch(tokens, segments, targets, self.values(i))

    def values(self, i: int) -> dict[str, torch.Tensor]:
        """What documents may have: a reference's log-probability, a margin, whether the first one of a pair was liked, a class."""
        draws = generator(self.seed, "values", i)
        liked = (-1.0) ** torch.arange(self.rows)
        return {
            "reference": -20 - 5 * torch.rand(self.rows, 2, generator=draws),
            "margin": torch.rand(self.rows, 2, generator=draws),
            "label": torch.stack([liked, torch.zeros(self.rows)], 1),
            "class": torch.randint(0, 3, (self.rows, 2), generator=draws).float(),
        }


@dataclass(frozen=True)
class Signalled(Rows):
    """Sends this process a signal while batch `at` is made, `times` times."""

    at: int = 0
    times: int = 1
    number: int = signal.SIGINT

    def batch(self, i: int) -> Batch:
        if i == self.at:
            for _ in range(self.times):
                signal.raise_signal(self.number)
        return super().batch(i)


def model(*, lora: float | None = None, head: Head | None = None) -> nn.Module:
    """A tiny Llama with every parameter drawn, so that norms count too; with `lora`, adapters of that dropout and nothing else to train."""
    spec = llama(dim=16, layers=2, heads=4, kv_heads=2, head_dim=4, hidden=24, vocab=VOCAB, context=64)
    if head is not None:
        spec = spec.replace(head=head)
    made = build(spec, device="cpu")
    if lora is not None:
        made = LoRA(rank=2, alpha=4.0, targets="all-linear", dropout=lora).apply(made)
    with torch.no_grad():
        for name, param in made.named_parameters():
            drawn = torch.randn(param.shape, generator=generator(0, name))
            param.copy_(1 + 0.2 * drawn if "norm" in name else 0.25 * drawn)
    return made


class Bigram(nn.Module):
    """Two parameters and dropout: the least that a crash test needs."""

    def __init__(self) -> None:
        super().__init__()
        draws = generator(0, "bigram")
        self.embed = nn.Parameter(torch.randn(VOCAB, 6, generator=draws))
        self.out = nn.Parameter(torch.randn(VOCAB, 6, generator=draws))

    def forward(self, inputs: Inputs, *, keep: torch.Tensor) -> Output:
        hidden = F.dropout(self.embed[inputs.tokens], 0.2, self.training)
        return Output(hidden, hidden[keep] @ self.out.T)


CONFIG = TrainConfig(steps=6, rows=4, micro=2, precision="fp32", seed=3, save_every=2, validate_every=3, track=())


def train(
    directory: Path,
    *,
    config: TrainConfig = CONFIG,
    of: nn.Module | None = None,
    rows: Rows | None = None,
    optim: AdamW | None = None,
    **given,
) -> tuple[nn.Module, Fit]:
    """One run; the default is six steps of LoRA with dropout, accumulation and validation."""
    trained = of if of is not None else model(lora=0.1)
    done = fit(
        trained,
        rows or Rows(),
        objective=given.get("objective", NextToken(label_smoothing=0.1)),
        optim=optim or AdamW(lr=1e-2),
        schedule=given.get("schedule", Cosine(warmup=2)),
        config=config,
        directory=directory,
        validate=given.get("validate", held_out),
        identity=given.get("identity", {"model": {"name": "toy"}}),
    )
    return trained, done


def held_out(trained: nn.Module) -> dict[str, float]:
    """A validation that draws random numbers, which must not change what is trained."""
    batch = Rows(seed=99).batch(0)
    torch.rand(5)
    assert not trained.training
    return {"loss": NextToken().terms(trained, batch)["loss"].item() / float(batch.targets.sum())}


def weights(trained: nn.Module) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in trained.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Forking is safe only where torch has no other threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
