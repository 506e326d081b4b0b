"""What recurrent mixers share: documents, padding, cached state and rollback, so that a mixer states its recurrence alone.

A mixer gives a `scan` from the start of a document, or from a state, over rows of equal length. Packed documents are
gathered, each scanned from zero, and put back; rows that hold something go on from it; where a store must be able to
take tokens back, the last tokens are scanned one by one and the state after each is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ..core.errors import ConfigError
from .backends import gather_documents, scatter_documents
from .inputs import Prefix
from .step import Step
from .store import Handle

States = tuple[Tensor, ...]
Scan = Callable[[tuple[Tensor, ...], States | None], tuple[Tensor, States]]
"""scan(inputs each [N, L, ...], states each [N, ...] or None for the start) -> outputs [N, L, ...], states after the last."""


def recur(scan: Scan, inputs: Sequence[Tensor], names: Sequence[str], step: Step, handle: Handle, *, mixer: str | None) -> Tensor:
    """Outputs [B, T, ...] of a recurrence over `inputs` [B, T, ...], each document from its own start; padding gets what is
    finite and never read. `names`: the mixer's `Fixed` entries, in the order of the states.

    A state holds what came before and no more: a mask by which tokens see later ones raises a `ConfigError` that names the kind
    `mixer`. None is for a part whose mixer refuses such masks, or heeds them elsewhere.
    """
    if mixer is not None and step.inputs.mask is not None:
        who = "a prefix" if isinstance(step.inputs.mask, Prefix) else "a whole document"
        raise ConfigError(f"a {mixer!r} mixer reads left to right and cannot let {who} see itself: use attention", field="mask")
    inputs = tuple(inputs)
    if not handle.wanted:
        return scan(inputs, None)[0] if step.segments is None else _documents(scan, inputs, step)
    held, before = _held(names, handle), _last_segment(step)
    count, tail = inputs[0].shape[1], handle.wanted - 1
    outputs, kept = [], []
    for start, end in [(0, count - tail), *((at, at + 1) for at in range(count - tail, count))]:
        part = tuple(x[:, start:end] for x in inputs)
        if step.segments is None:
            y, held = scan(part, held)
        else:
            segments = step.segments[:, start:end].cpu().numpy()
            y, held = _ragged(scan, part, held, segments, before)
            for row, line in enumerate(segments):
                before[row] = next((name for name in line[::-1] if name >= 0), before[row])
        outputs.append(y)
        kept.append(held)
    handle.write(**{name: torch.stack([states[i] for states in kept], 1) for i, name in enumerate(names)})
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


def _held(names: Sequence[str], handle: Handle) -> States | None:
    found = [handle.read(name) for name in names]
    return None if found[0] is None else tuple(state for state in found if state is not None)


def _documents(scan: Scan, inputs: tuple[Tensor, ...], step: Step) -> Tensor:
    """Without a cache: groups of documents of like length, padded at their ends, which nothing before them sees."""
    batch, count = inputs[0].shape[:2]
    documents = step.documents
    flat = [gather_documents(x.flatten(0, 1), documents) for x in inputs]
    outputs, base = [], 0
    for group in documents.groups:
        rows, length = group.slots.shape
        part = tuple(x[base : base + rows * length].unflatten(0, (rows, length)) for x in flat)
        outputs.append(scan(part, None)[0].flatten(0, 1))
        base += rows * length
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return scatter_documents(joined, documents).unflatten(0, (batch, count))


def _last_segment(step: Step) -> list[int]:
    """[B]: the document that each row is in."""
    assert step.inputs.cache is not None
    last = step.inputs.cache.pending.last
    return [] if last is None else last.tolist()


def _ragged(scan: Scan, inputs: tuple[Tensor, ...], held: States | None, segments: np.ndarray, before: list[int]) -> tuple[Tensor, States]:
    """With a cache: every document apart, those of equal length together. A row's first document goes on from what it holds
    where it is the one that the row is in, `before`; what a row holds in the end is the state after its last token."""
    device, (rows, count) = inputs[0].device, segments.shape
    runs = _runs(segments, before)
    blank, like = scan(tuple(x[:, :1] for x in inputs), None)[::-1]
    states = tuple(torch.zeros_like(state) for state in blank) if held is None else tuple(state.clone() for state in held)
    y = like.new_zeros(rows * count, *like.shape[2:])
    for turn, length in sorted({(run.turn, run.end - run.start) for run in runs}):
        chosen = [run for run in runs if run.turn == turn and run.end - run.start == length]
        index = torch.tensor([run.row for run in chosen], device=device)
        places = torch.tensor([[run.row * count + at for at in range(run.start, run.end)] for run in chosen], device=device)
        goes_on = torch.tensor([run.goes_on for run in chosen], device=device)
        start = tuple(state[index] * goes_on.view(-1, *[1] * (state.dim() - 1)) for state in states)
        out, new = scan(tuple(x.flatten(0, 1)[places] for x in inputs), start)
        y[places.flatten()] = out.flatten(0, 1)
        for state, value in zip(states, new, strict=True):
            state[index] = value.to(state.dtype)
    return y.unflatten(0, (rows, count)), states


@dataclass(frozen=True)
class Run:
    """A document's tokens in one row; `turn`: which of the row's documents it is; `goes_on`: from what the row holds."""

    row: int
    start: int
    end: int
    turn: int
    goes_on: bool


def _runs(segments: np.ndarray, before: list[int]) -> list[Run]:
    found = []
    for row, line in enumerate(segments):
        edges = [0, *(np.flatnonzero(np.diff(line)) + 1).tolist(), len(line)]
        turn = 0
        for start, end in pairwise(edges):
            if line[start] >= 0:
                found.append(Run(row, start, end, turn, turn == 0 and before[row] == line[start]))
                turn += 1
    return found
