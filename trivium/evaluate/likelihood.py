"""How likely a model finds given tokens: the one forward pass under perplexity and multiple choice.

Sequences of about one length share a batch, padded on the right; log-probabilities are taken in fp32 at the asked positions alone. A score
does not depend on the batch beyond rounding. Contexts shared by several sequences are not shared in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.errors import DataError
from ..nn.inputs import Inputs

_CHUNK = 1 << 22  # logits upcast at a time


@dataclass(frozen=True)
class Request:
    """Score `ids[start:]`, each token given all before it; `start` is at least 1."""

    ids: Sequence[int]
    start: int


@dataclass(frozen=True)
class Likelihood:
    """Natural-log probability of each asked token, and whether each was the model's first choice."""

    logprobs: tuple[float, ...]
    greedy: bool

    @property
    def total(self) -> float:
        return math.fsum(self.logprobs)


def likelihoods(model: nn.Module, requests: Sequence[Request], *, tokens: int = 2048) -> list[Likelihood]:
    """The likelihood of each request, in order. `tokens`: most tokens in one forward, padding counted (one sequence may exceed it)."""
    for request in requests:
        if not 1 <= request.start < len(request.ids):
            raise DataError(
                f"a score needs at least one token before and one to score; got {len(request.ids)} tokens from {request.start} on"
            )
    found: dict[int, Likelihood] = {}
    with evaluating(model):
        for batch in batched([len(request.ids) - 1 for request in requests], tokens):  # the last id is only ever a target
            for index, likelihood in zip(batch, _score(model, [requests[i] for i in batch]), strict=True):
                found[index] = likelihood
    return [found[index] for index in range(len(requests))]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradients inside; the model's mode is put back after."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


def batched(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Indices of sequences of these `lengths`, longest first, so that a batch too large for memory is the first one."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _score(model: nn.Module, requests: Sequence[Request]) -> list[Likelihood]:
    lengths = [len(request.ids) - 1 for request in requests]
    shape = (len(requests), max(lengths))
    tokens = torch.zeros(shape, dtype=torch.int64)
    segments = torch.full(shape, -1, dtype=torch.int64)
    keep = torch.zeros(shape, dtype=torch.bool)
    for row, (request, length) in enumerate(zip(requests, lengths, strict=True)):
        tokens[row, :length] = torch.as_tensor(request.ids[:-1])
        segments[row, :length] = 0
        keep[row, request.start - 1 : length] = True
    labels = torch.cat([torch.as_tensor(request.ids[request.start :], dtype=torch.int64) for request in requests])
    device = next(model.parameters()).device
    padded = min(lengths) < max(lengths)
    inputs = Inputs(tokens.to(device), segments=segments.to(device) if padded else None)
    logprobs, first = gather(model(inputs, keep=keep.to(device)).logits, labels.to(device))
    counts = [len(request.ids) - request.start for request in requests]
    return [
        Likelihood(tuple(part.tolist()), bool(hits.all()))
        for part, hits in zip(logprobs.cpu().split(counts), first.cpu().split(counts), strict=True)
    ]


def gather(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability [N] of `labels` [N] under `logits` [N, V], in fp32 (fp64 for fp64) in chunks, and whether each label is the argmax."""
    logprobs, first = [], []
    dtype = torch.promote_types(logits.dtype, torch.float32)
    for part, label in zip(*(x.split(max(1, _CHUNK // logits.shape[1])) for x in (logits, labels)), strict=True):
        upcast = part.to(dtype)
        logprobs.append(upcast.gather(1, label[:, None])[:, 0] - upcast.logsumexp(1))
        first.append(upcast.argmax(1) == label)
    return torch.cat(logprobs), torch.cat(first)
