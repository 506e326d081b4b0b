"""A preference task whose gold reward is known: prompts of two topics, answers of words that each topic likes or not, and a rater who
is swayed by length.

The gold reward is a mean over words, so length earns nothing; a rater's bias for longer answers is what methods can fall for. Small
enough that a model is trained in seconds. Whatever trains a policy, offline or online, is an arm: `Setting` in, model out.
"""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...core.log import log
from ...core.seed import derive, generator
from ...data.batch import Batch
from ...models.block import Block
from ...models.transformer import Transformer, TransformerModel, build, initialize
from ...nn.attention import Attention
from ...nn.feedforward import MLP
from ...nn.heads import LMHead
from ...nn.inputs import Inputs
from ...nn.positions import Rope
from ...optim.optimizers import AdamW
from ...optim.schedules import Cosine, Schedule
from ...train import history
from ...train.logprobs import document_logprobs, lengths
from ...train.loop import TrainConfig, fit
from ...train.objectives import NextToken, Objective
from ...train.reference import VALUE, at_rest

END, TOPICS, WORDS = 0, 8, 16  # token 0 ends an answer; then topics, then words
FIRST, VOCAB = 1 + TOPICS, 1 + TOPICS + WORDS
SHORTEST, LONGEST, ROOM = 2, 10, 20  # words in an answer that is written; and that may be sampled
PAIRS, HELD, ROWS = 2000, 500, 32

SHAPE = Transformer(
    dim=32,
    vocab=VOCAB,
    layers=("a",) * 2,
    blocks={"a": Block(mixer=Attention(heads=2, kv_heads=2, head_dim=16, position=Rope()), ffn=MLP(hidden=64))},
    head=LMHead(tied=True),
)


@dataclass(frozen=True)
class Answers:
    """N answers: prompts [N, 2] and words [N, ROOM], END from the end of each on."""

    prompts: Tensor
    words: Tensor

    @property
    def sizes(self) -> Tensor:
        """Words in each, [N]."""
        return (self.words != END).sum(1)

    def at(self, index: Tensor) -> Answers:
        return Answers(self.prompts[index], self.words[index])


@dataclass(frozen=True)
class Task:
    """What topics like: a value for each word of each topic, drawn once."""

    likes: Tensor = field(default_factory=lambda: torch.randn(TOPICS, WORDS, generator=generator(0, "what topics like")))

    def values(self, prompts: Tensor) -> Tensor:
        """The value of every word to a prompt, [N, WORDS], of deviation 1."""
        return self.likes[prompts - 1].sum(1) / 2**0.5

    def gold(self, answers: Answers) -> Tensor:
        """The true reward [N]: the mean value of an answer's words, less the share of words that it said before; 0 for none."""
        there = answers.words != END
        each = self.values(answers.prompts).gather(1, (answers.words - FIRST).clamp(min=0))
        seen = answers.words[:, :, None] == answers.words[:, None, :]
        again = (seen & torch.ones_like(seen[0]).tril(-1)).any(2)
        return ((each - again.to(each.dtype)) * there).sum(1) / answers.sizes.clamp(min=1)

    def written(self, prompts: Tensor, *, skill: float, seed: int) -> Answers:
        """Answers of any length from SHORTEST to LONGEST whose words are drawn by softmax(skill * value): 0 is a writer who knows
        nothing."""
        draws = generator(seed, "written")
        words = torch.multinomial((skill * self.values(prompts)).softmax(1), ROOM, replacement=True, generator=draws) + FIRST
        size = torch.randint(SHORTEST, LONGEST + 1, (len(prompts), 1), generator=draws)
        return Answers(prompts, words.masked_fill(torch.arange(ROOM) >= size, END))

    def rated(self, one: Answers, other: Answers, *, seed: int, sharp: float = 4.0, bias: float = 0.0) -> Tensor:
        """Whether `one` is chosen, [N]: as Bradley and Terry say, of `sharp` times the gold reward and `bias` times the words."""
        ahead = sharp * (self.gold(one) - self.gold(other)) + bias * (one.sizes - other.sizes)
        return torch.rand(len(ahead), generator=generator(seed, "rated")) < torch.sigmoid(ahead)


def asked(count: int, *, seed: int) -> Tensor:
    """Prompts [N, 2]: two topics each."""
    return torch.randint(1, 1 + TOPICS, (count, 2), generator=generator(seed, "asked"))


def chosen_first(one: Answers, other: Answers, right: Tensor) -> tuple[Answers, Answers]:
    """Pairs the way round that a rater has them."""
    pick = right[:, None]
    return tuple(Answers(one.prompts, torch.where(pick, a, b)) for a, b in ((one.words, other.words), (other.words, one.words)))  # type: ignore[return-value]


class Rows:
    """Documents for the loop, all of `sides` of a row beside each other; each epoch in an order of its own."""

    def __init__(self, *sides: Answers, seed: int, rows: int = ROWS, values: dict[str, Tensor] | None = None):
        self.rows, self.seed, self.values = rows, seed, values or {}
        self.tokens, self.segments, self.targets = _packed(sides)
        self.fingerprint = str((len(self.tokens), len(sides), seed, rows, int(self.tokens.sum()), sorted(self.values)))

    def steps(self, epochs: float, /) -> int:
        return max(1, round(epochs * len(self.tokens) / self.rows))

    def batch(self, i: int, /) -> Batch:
        epoch, at = divmod(i * self.rows, len(self.tokens) // self.rows * self.rows)
        order = torch.randperm(len(self.tokens), generator=generator(self.seed, "order", epoch))
        return self.of(order[at : at + self.rows])

    def of(self, index: Tensor) -> Batch:
        """These rows, as wide as the longest."""
        width = int((self.segments[index] >= 0).sum(1).max())
        values = {name: value[index] for name, value in self.values.items()}
        return Batch(self.tokens[index, :width], self.segments[index, :width], self.targets[index, :width], values)

    def all(self) -> Batch:
        return self.of(torch.arange(len(self.tokens)))

    def referred(self, model: nn.Module) -> Rows:
        """The same rows with `model`'s log-probabilities of their documents as the reference."""
        made = copy.copy(self)
        with at_rest(model):
            made.values = {**self.values, VALUE: document_logprobs(model, self.all())}
        return made


def _packed(sides: tuple[Answers, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, segments and targets [N, T] of documents `prompt words END` end to end."""
    count, width = len(sides[0].prompts), len(sides) * (2 + ROOM + 1)
    tokens = torch.zeros(count, width, dtype=torch.int64)
    segments, targets = torch.full_like(tokens, -1), torch.zeros(count, width, dtype=torch.bool)
    column, start = torch.arange(2 + ROOM + 1), torch.zeros(count, 1, dtype=torch.int64)
    for number, side in enumerate(sides):
        document = torch.cat([side.prompts, side.words, torch.zeros(count, 1, dtype=torch.int64)], 1)
        size = side.sizes[:, None] + 3
        row, at = (column < size).nonzero(as_tuple=True)
        place = start[row, 0] + at
        tokens[row, place], segments[row, place], targets[row, place] = document[row, at], number, at >= 2
        start = start + size
    return tokens, segments, targets


def learn(
    model: TransformerModel,
    rows: Rows,
    objective: Objective,
    *,
    steps: int,
    lr: float,
    seed: int,
    schedule: Schedule = Cosine(warmup=0.05, minimum=0.1),  # noqa: B008 - frozen
) -> tuple[TransformerModel, list[dict[str, Any]]]:
    """A copy of `model` after so many steps of the library's loop, and the rows of its metrics."""
    made = copy.deepcopy(model)
    with tempfile.TemporaryDirectory() as folder, log.hushed():
        fit(
            made.train(),
            rows,
            objective=objective,
            optim=AdamW(lr=lr, weight_decay=0.0),
            schedule=schedule,
            config=TrainConfig(steps=steps, rows=rows.rows, precision="fp32", seed=seed, track=()),
            directory=folder,
        )
        found = history.read(Path(folder))
    return made.eval(), found


@torch.no_grad()
def sampled(model: TransformerModel, prompts: Tensor, *, seed: int) -> Answers:
    """One answer of `model` to each prompt, drawn from its own distribution; words that are none are not drawn."""
    draws, rows = generator(seed, "sampled"), torch.cat([prompts, torch.zeros(len(prompts), ROOM, dtype=torch.int64)], 1)
    done = torch.zeros(len(prompts), dtype=torch.bool)
    for at in range(2, 2 + ROOM):
        logits = model(Inputs(rows[:, :at]), keep="last").logits.view(len(rows), -1).float()  # type: ignore[union-attr]
        logits[:, 1:FIRST] = -torch.inf
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=draws)[:, 0].masked_fill(done, END)
        rows[:, at] = drawn
        done |= drawn == END
        if done.all():
            break
    return Answers(prompts, rows[:, 2:])


@dataclass(frozen=True)
class Setting:
    """What every arm is given: a base that writes without skill, the same after supervised fine-tuning on chosen answers, the pairs
    (rated with a bias for length), and fresh pairs that the gold reward itself has put the right way round."""

    task: Task
    seed: int
    steps: int
    base: TransformerModel
    tuned: TransformerModel
    chosen: Answers
    rejected: Answers
    held: Rows
    prompts: Tensor

    def rows(self) -> Rows:
        """The pairs, with the tuned model as the reference."""
        return Rows(self.chosen, self.rejected, seed=self.seed).referred(self.tuned)


def setting(
    seed: int,
    *,
    steps: int,
    pairs: int = PAIRS,
    held: int = HELD,
    skill: float = 0.5,
    sharp: float = 4.0,
    bias: float = 0.1,
    flipped: float = 0.0,
) -> Setting:
    """All that depends on the seed: weights, prompts, answers, ratings, of which the share `flipped` is turned round."""
    task, own = Task(), [derive(seed, what) for what in ("base", "one", "other", "held one", "held other", "flips")]
    base = initialize(build(SHAPE, device="cpu"), seed=seed, std=0.05)
    prompts = asked(pairs, seed=own[1])
    base, _ = learn(base, Rows(task.written(prompts, skill=0.0, seed=own[0]), seed=seed), NextToken(), steps=2 * steps, lr=3e-3, seed=seed)
    one, other = (task.written(prompts, skill=skill, seed=each) for each in own[1:3])
    right = task.rated(one, other, seed=own[1], sharp=sharp, bias=bias)
    right ^= torch.rand(pairs, generator=generator(own[5], "flipped")) < flipped
    chosen, rejected = chosen_first(one, other, right)
    tuned, _ = learn(base, Rows(chosen, seed=seed), NextToken(), steps=steps, lr=3e-3, seed=seed)
    fresh = asked(held, seed=own[3])
    one, other = (task.written(fresh, skill=skill, seed=each) for each in own[3:5])
    judged = Rows(*chosen_first(one, other, task.gold(one) > task.gold(other)), seed=seed).referred(tuned)
    return Setting(task, seed, steps, base, tuned, chosen, rejected, judged, fresh)


def measured(given: Setting, model: TransformerModel, *, per_token: bool = False, answers: Answers | None = None) -> dict[str, float]:
    """What a policy is worth: the gold reward of its answers (or of `answers`), how often they beat the tuned model's, their length and
    divergence from the tuned model; and as a judge of fresh pairs, by the log-ratio to the tuned model or by the log-probability
    `per_token`, accuracy, also where the better answer is the longer and where the shorter."""
    mine = answers or sampled(model, given.prompts, seed=given.seed)
    theirs = sampled(given.tuned, given.prompts, seed=given.seed)
    gold, other = given.task.gold(mine), given.task.gold(theirs)
    worth = {
        "gold reward": float(gold.mean()),
        "win rate": float(((gold > other).float() + (gold == other).float() / 2).mean()),
        "words": float(mine.sizes.float().mean()),
    }
    if answers is not None:  # picked ones say nothing of a policy
        return worth
    with at_rest(model):
        batch = Rows(mine, seed=0).all()
        kl = document_logprobs(model, batch)[:, 0] - document_logprobs(given.tuned, batch)[:, 0]
        batch = given.held.all()
        logprobs, size = document_logprobs(model, batch), lengths(batch)
    implied = logprobs / size if per_token else logprobs - batch.values[VALUE]
    right = (implied[:, 0] > implied[:, 1]).float()
    longer, shorter = size[:, 0] > size[:, 1], size[:, 0] < size[:, 1]
    return {
        **worth,
        "KL": float(kl.mean()),
        "accuracy": float(right.mean()),
        "accuracy, better is longer": float(right[longer].mean()),
        "accuracy, better is shorter": float(right[shorter].mean()),
    }
