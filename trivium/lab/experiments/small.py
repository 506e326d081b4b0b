"""What the experiments share: text that every machine has, small models, training that is the library's own, and means."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...core.log import log
from ...data.bank import Prepared
from ...data.batches import Batches
from ...data.prepare import prepare
from ...models.block import Block
from ...models.transformer import Transformer, TransformerModel, build, initialize
from ...nn.attention import Attention
from ...nn.feedforward import MLP
from ...nn.heads import LMHead
from ...nn.inputs import Inputs
from ...nn.positions import Rope
from ...optim.optimizers import AdamW
from ...optim.schedules import Constant, Cosine, Schedule
from ...recipes.from_scratch import FromScratch, corpus
from ...recipes.sft import loss_on
from ...text import bpe
from ...text.prompt import Prompt
from ...text.tokenizer import Tokenizer
from ...train import history
from ...train.loop import Source, TrainConfig, fit
from ...train.objectives import NextToken, Objective

VOCAB, DIM, LAYERS, HEADS = 1024, 64, 3, 4
ROWS, LENGTH = 8, 128
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 97.5% quantiles of t with 1 to 9 degrees of freedom


@cache
def texts() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Training texts and held-out ones: 3 MB and 6 files of the standard library."""
    train, held = corpus(FromScratch(megabytes=3.0, held_out=6))
    return tuple(train), tuple(held)


@cache
def tokenizer() -> Tokenizer:
    return bpe.train(texts()[0], size=VOCAB).tokenizer


@cache
def banks(length: int = LENGTH, megabytes: float = 3.0) -> tuple[Prepared, Prepared]:
    """Training rows and held-out rows of `length` tokens."""
    train, held = texts()
    room, kept = megabytes * 1e6, []
    for text in train:
        if room > 0:
            kept.append(text)
            room -= len(text)
    return rows_of(kept, length), rows_of(held, length)


def rows_of(texts: Sequence[str], length: int = LENGTH) -> Prepared:
    return prepare([{"text": text} for text in texts], Prompt.of(tokenizer(), None), length=length, format="text")


def shape(*, dim: int = DIM, layers: int = LAYERS, attention: Mapping[str, Any] | None = None, **block: Any) -> Transformer:
    """A small Llama of 1,024 words, with other values for its attention and its blocks."""
    mixer = Attention(heads=HEADS, kv_heads=HEADS, head_dim=dim // HEADS, position=Rope()).replace(**(attention or {}))
    parts: dict[str, Any] = {"mixer": mixer, "ffn": MLP(hidden=dim * 8 // 3), **block}
    return Transformer(dim=dim, vocab=VOCAB, layers=("a",) * layers, blocks={"a": Block(**parts)}, head=LMHead(tied=True))


def train(
    spec: Transformer,
    *,
    steps: int,
    seed: int,
    lr: float = 3e-3,
    schedule: Schedule = Cosine(warmup=0.05, minimum=0.1),  # noqa: B008 - frozen
    data: Prepared | Source | None = None,
    rows: int = ROWS,
    std: float = 0.02,
    clip: float | None = 1.0,
    model: TransformerModel | None = None,
    objective: Objective = NextToken(),  # noqa: B008 - frozen
) -> tuple[TransformerModel, list[float]]:
    """A model of this spec (or `model`) after so many steps in fp32, and its training losses. Raises `TriviumError` for a loss that
    is not finite."""
    made = model if model is not None else initialize(build(spec, device="cpu"), seed=seed, std=std)
    with tempfile.TemporaryDirectory() as folder, log.hushed():
        fit(
            made.train(),
            data if not isinstance(data, Prepared | None) else Batches([(data or banks()[0], 1)], seed=seed, rows=rows),
            objective=objective,
            optim=AdamW(lr=lr, betas=(0.9, 0.95), weight_decay=0.1),
            schedule=schedule,
            config=TrainConfig(steps=steps, rows=rows, precision="fp32", clip=clip, seed=seed, track=()),
            directory=folder,
        )
        losses = [row["loss"] for row in history.read(Path(folder))]
    return made.eval(), losses


def descend(
    model: nn.Module,
    loss: Callable[[int], Tensor],
    *,
    steps: int,
    lr: float,
    schedule: Schedule = Constant(),  # noqa: B008 - frozen
    weight_decay: float = 0.01,
) -> None:
    """Trains what of `model` requires gradients on `loss(step)`, in place: for losses that no objective of the library says."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay)
    model.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * schedule.factor(step, steps)
        optimizer.zero_grad()
        loss(step).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    model.eval()


def held_out(model: nn.Module, data: Prepared | None = None) -> float:
    """Loss per token on the held-out rows."""
    return loss_on(data or banks()[1], NextToken(), rows=ROWS)(model)["loss"]


@torch.no_grad()
def loss_at(model: TransformerModel, length: int, *, tokens: int = 16_384) -> float:
    """Held-out loss over windows of `length` tokens that do not overlap, about `tokens` of them in all; every length sees the
    same text."""
    ids = torch.tensor([i for text in texts()[1] for i in tokenizer().encode(text, bos=False)])
    rows = ids[: min(tokens, len(ids)) // length * length].view(-1, length)
    total = 0.0
    for part in rows.split(max(1, 4096 // length)):
        logits = model(Inputs(part)).logits
        assert logits is not None
        total += float(nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), part[:, 1:].flatten(), reduction="sum"))
    return total / (rows.shape[0] * (length - 1))


def steps_of(full: int, effort: float) -> int:
    return max(3, round(full * effort))


def mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def paired(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """Mean of b - a over 2 pairs and more, with the 95% interval of Student's t (n - 1 degrees of freedom)."""
    differences = [y - x for x, y in zip(a, b, strict=True)]
    middle, n = mean(differences), len(differences)
    spread = math.sqrt(sum((d - middle) ** 2 for d in differences) / (n - 1) / n)
    half = student(n - 1) * spread
    return {"mean": middle, "low": middle - half, "high": middle + half}


def student(freedom: int) -> float:
    """The 97.5% quantile of Student's t: of the table, and beyond it by the first terms of its expansion about the normal's (within 0.0003)."""
    if freedom <= len(STUDENT):
        return STUDENT[freedom - 1]
    z = 1.959964
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2) + third


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The slope of log cost over log size: 1 is linear growth, 2 quadratic."""
    x, y = [math.log(s) for s in sizes], [math.log(c) for c in costs]
    mx, my = mean(x), mean(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


def by_seed(run: Callable[[int], float], seeds: Sequence[int]) -> list[float]:
    return [run(seed) for seed in seeds]
