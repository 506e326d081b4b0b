"""How requests are sampled: `Sampling` says it, a `Sampler` does it for a batch whose rows each have their own.

One order for everyone: repetition penalty, presence and frequency penalties, logit bias, temperature, top-k, top-p,
min-p. A draw is a pure function of the request: the uniform number of its n-th token is a hash of (seed, n), turned
into a token through the inverse of the cumulative distribution. Batch-mates, batch size and row order change nothing.
Nucleus 1904.09751, top-k 1805.04833, min-p 2407.01082, repetition penalty 1909.05858.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Annotated

import torch
from pydantic import Field, field_validator
from torch import Tensor

from ..core.seed import derive
from ..core.spec import Spec
from .steps import Filters, bias, draw, min_p, pick, pick_fast, presence_frequency, repetition, top_k, top_p, uniforms

COLDEST = 1e-5  # logits divided by less than this leave fp32's range

TokenId = Annotated[int, Field(ge=0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Sampling(Spec):
    """How one request is sampled. The defaults sample the model's own distribution; `temperature=0` is greedy."""

    max_tokens: int = Field(256, ge=1, description="most tokens to sample")
    temperature: Finite = Field(1.0, ge=0, description="logits are divided by this; 0 takes the likeliest token")
    top_k: int = Field(0, ge=0, description="keep the k highest logits and their ties; 0 keeps all")
    top_p: float = Field(1.0, gt=0, le=1, description="keep the smallest set of tokens with at least this mass; 1 keeps all")
    min_p: float = Field(0.0, ge=0, le=1, description="drop tokens below this share of the likeliest token's probability")
    repetition_penalty: Finite = Field(1.0, gt=0, description="shrinks logits of tokens in the prompt or the answer; 1 is off")
    presence_penalty: Finite = Field(0.0, description="subtracted from the logits of tokens in the answer")
    frequency_penalty: Finite = Field(0.0, description="subtracted from a token's logit for each time that it is in the answer")
    logit_bias: Mapping[TokenId, Finite] = Field({}, description="token id to a number that is added to its logit")
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field((), description="texts that end the answer, which stops before them")
    stop_ids: tuple[TokenId, ...] = Field((), description="token ids that end the answer, besides the model's own")
    seed: int = Field(0, ge=0, lt=2**63, description="same seed, same prompt: same answer")
    logprobs: int | None = Field(None, ge=0, description="report each token's log-probability, and this many of the likeliest")

    @field_validator("temperature")
    @classmethod
    def _no_colder_than_fp32(cls, value: float) -> float:
        if 0 < value < COLDEST:
            raise ValueError(f"a temperature is 0 (greedy) or at least {COLDEST}")
        return value

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def many(self, n: int) -> list[Sampling]:
        """`n` copies with seeds of their own, for several answers to one prompt."""
        return [self.replace(seed=derive(self.seed, "sample", i)) for i in range(n)]


@dataclass(frozen=True)
class Drawn:
    """One token a row. `logprobs` are the model's own (temperature 1, nothing processed), where any row asked for them."""

    ids: Tensor  # [B] int64
    logprobs: Tensor | None = None  # [B] fp32
    top_ids: Tensor | None = None  # [B, n], likeliest first
    top_logprobs: Tensor | None = None  # [B, n]


class Sampler:
    """The settings of a batch as columns, and what its rows remember: tokens seen, tokens counted, tokens drawn.

    Steps that no row asks for are not run, and a greedy batch without penalties is an argmax.
    """

    def __init__(self, rows: Sequence[Sampling], prompts: Sequence[Sequence[int]], *, vocab: int, device: torch.device | str = "cpu"):
        assert len(rows) == len(prompts)
        self.vocab = vocab
        self.device = torch.device(device)
        self.drawn = torch.zeros(len(rows), dtype=torch.int64, device=self.device)
        self.seen: Tensor | None = None  # [B, V] prompt and answer
        self.counts: Tensor | None = None  # [B, V] answer
        if any(row.repetition_penalty != 1 for row in rows):
            self.seen = torch.zeros(len(rows), vocab, dtype=torch.bool, device=self.device)
            for seen, prompt in zip(self.seen, prompts, strict=True):
                seen[torch.tensor(prompt, dtype=torch.int64, device=self.device)] = True
        if any(row.presence_penalty or row.frequency_penalty for row in rows):
            self.counts = torch.zeros(len(rows), vocab, device=self.device)
        self._set(rows)

    def step(self, logits: Tensor) -> Drawn:
        """Draws one token a row from `logits` [B, V] (any float dtype) and remembers it."""
        scores = logits.float() if self.shape or not self.all_greedy else logits
        for process in self.shape:
            scores = process(scores)
        ids = scores.argmax(-1)
        if not self.all_greedy:
            drawn = self.pick(scores / self.temperature, u=uniforms(self.seeds, self.drawn))
            ids = torch.where(self.greedy, ids, drawn)
        self.drawn += 1
        if self.seen is not None:
            self.seen.scatter_(1, ids[:, None], True)
        if self.counts is not None:
            self.counts.scatter_add_(1, ids[:, None], torch.ones_like(ids[:, None], dtype=self.counts.dtype))
        if self.top is None:
            return Drawn(ids)
        logprobs = logits.float().log_softmax(-1)
        best = logprobs.topk(min(self.top, self.vocab))
        return Drawn(ids, logprobs.gather(1, ids[:, None])[:, 0], best.indices, best.values)

    def reorder(self, index: Sequence[int]) -> None:
        """Row i becomes what row `index[i]` was; rows may be dropped or repeated."""
        rows = torch.tensor(index, dtype=torch.int64, device=self.device)
        self.drawn = self.drawn[rows]
        self.seen = None if self.seen is None else self.seen[rows]
        self.counts = None if self.counts is None else self.counts[rows]
        self._set([self.rows[i] for i in index])

    def _set(self, rows: Sequence[Sampling]) -> None:
        self.rows = list(rows)
        self.all_greedy = all(row.greedy for row in rows)
        self.greedy = torch.tensor([row.greedy for row in rows], device=self.device)
        self.seeds = torch.tensor([row.seed for row in rows], dtype=torch.int64, device=self.device)
        self.temperature = self._column([row.temperature or 1.0 for row in rows])
        self.top = max((row.logprobs for row in rows if row.logprobs is not None), default=None)
        self.shape = self._shape()
        self.pick = self._pick()

    def _column(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.device)[:, None]

    def _shape(self) -> list[Callable[[Tensor], Tensor]]:
        """The steps before temperature, which greedy rows take too."""
        steps: list[Callable[[Tensor], Tensor]] = []
        if self.seen is not None:
            steps.append(partial(repetition, seen=self.seen, penalty=self._column([row.repetition_penalty for row in self.rows])))
        if self.counts is not None:
            presence = self._column([row.presence_penalty for row in self.rows])
            frequency = self._column([row.frequency_penalty for row in self.rows])
            steps.append(partial(presence_frequency, counts=self.counts, presence=presence, frequency=frequency))
        biases = [(i, token, value) for i, row in enumerate(self.rows) for token, value in row.logit_bias.items()]
        if biases:
            rows, ids, values = zip(*biases, strict=True)
            at = [torch.tensor(index, dtype=torch.int64, device=self.device) for index in (rows, ids)]
            steps.append(partial(bias, rows=at[0], ids=at[1], values=torch.tensor(values, device=self.device)))
        return steps

    def _pick(self) -> Callable[..., Tensor]:
        """What follows temperature: filters and draw, the fast way where reading a verdict on the host costs nothing."""
        if not any(row.top_k or row.top_p < 1 or row.min_p for row in self.rows if not row.greedy):
            return draw
        filters = Filters.of(
            [1 if row.greedy else row.top_k for row in self.rows],  # a greedy row's draw is not used: let it be cheap
            [row.top_p for row in self.rows],
            [row.min_p for row in self.rows],
            device=self.device,
        )
        return partial(pick_fast if self.device.type == "cpu" else pick, filters=filters)


def sample_naive(logits: Tensor, sampling: Sampling, *, prompt: Sequence[int], answer: Sequence[int]) -> int:
    """One row's next token from `logits` [V], word for word from the definitions: what `Sampler` is held to."""
    scores = logits.float().clone()
    for token in {*prompt, *answer}:
        scores[token] = scores[token] * sampling.repetition_penalty if scores[token] < 0 else scores[token] / sampling.repetition_penalty
    for token in set(answer):
        scores[token] -= answer.count(token) * sampling.frequency_penalty + sampling.presence_penalty
    for token, value in sampling.logit_bias.items():
        scores[token] += value
    if sampling.greedy:
        return int(scores.argmax())
    scores = (scores / sampling.temperature)[None]
    if sampling.top_k:
        scores = top_k(scores, k=torch.tensor([[sampling.top_k]]), most=sampling.top_k)
    if sampling.top_p < 1:
        scores = top_p(scores, p=torch.tensor([[sampling.top_p]], dtype=torch.float64))
    if sampling.min_p:
        scores = min_p(scores, p=torch.tensor([[sampling.min_p]]))
    sums = list(accumulate((scores[0] - scores.max()).exp().double().tolist()))
    target = uniforms(torch.tensor([sampling.seed]), torch.tensor([len(answer)])).item() * sums[-1]
    return next(token for token, reached in enumerate(sums) if reached > target)
