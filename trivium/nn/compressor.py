"""Pools each stretch of `rate` tokens into one entry, channel by channel, by a softmax over gates (DeepSeek-V4, section 2.3).

With `overlap`, an entry also takes in the stretch before its own, by maps of their own: twice the width, the same number. The
sum is a recurrence: of a stretch that is not complete, or that the next one still needs, a log-sum-exp and a mean for each
channel say all there is to know, so state has a fixed size whatever the rate. Stretches are counted in positions.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import TriviumError
from .keepers import Fixed, State
from .linear import Linear, OwnStart, Projections
from .recurrent import States, recur
from .step import Step
from .store import Handle
from .strided import Entries

NOTHING = -1e30  # the log-sum-exp of no token; finite, so that no gradient is undefined


class Places(OwnStart):
    """`weight` [rate, channels]: what is added to the gate of each place in a stretch."""

    def __init__(self, rate: int, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rate, channels))

    def reset(self) -> None:
        nn.init.zeros_(self.weight)


class Compressor(nn.Module):
    """x [B, T, C] -> an entry of `width` channels for each stretch that is complete, before norm and position."""

    def __init__(self, dim: int, width: int, *, rate: int, overlap: bool, name: str):
        super().__init__()
        self.width, self.rate, self.overlap = width, rate, overlap
        self.names = (f"{name}.open", f"{name}.last", f"{name}.some") if overlap else (f"{name}.open", f"{name}.some")
        self.channels = 2 * width if overlap else width
        self.inp = Projections(kv=Linear(dim, self.channels), gate=Linear(dim, self.channels))
        self.places = Places(rate, self.channels)

    def state(self) -> State:
        """In float32: log-sum-exp and mean of the stretch that is open, and of the last one's part in the next; and, as 1 or 0,
        whether there is any."""
        shapes = {"open": (2, self.channels), "last": (2, self.width), "some": (2 if self.overlap else 1,)}
        return {name: Fixed(shapes[name.rsplit(".", 1)[1]], torch.float32) for name in self.names}

    def forward(self, x: Tensor, step: Step, handle: Handle) -> Tensor:
        """[B, T, width]: at each token that completes a stretch, its entry; elsewhere what means nothing."""
        kv, gate = self.inp(x, step)
        place = (step.positions % self.rate).expand(x.shape[:2])
        scan = partial(self._scan, aligned=step.inputs.positions is None)
        return recur(scan, (kv, gate + self.places.weight[place], place), self.names, step, handle, mixer=None)

    def _scan(self, inputs: tuple[Tensor, ...], states: States | None, *, aligned: bool) -> tuple[Tensor, States]:
        """`aligned`: a document begins at the first place of a stretch."""
        kv, gate, place = inputs
        count, first = place.shape[1], None if aligned and states is None else place[:, :1]
        stretches = (count + self.rate - (1 if first is None else 2)) // self.rate + (first is not None)  # that rows can touch
        at = torch.arange(count, device=kv.device).expand_as(place) + (0 if first is None else first)
        there = torch.arange(stretches * self.rate, device=kv.device) - (0 if first is None else first)
        there = ((there >= 0) & (there < count))[..., None]
        kv_grid, gate_grid = (_spread(x.float(), first, stretches * self.rate) for x in (kv, gate))
        kv_grid = kv_grid.unflatten(1, (stretches, self.rate))
        gate_grid = gate_grid.masked_fill(~there, NOTHING).unflatten(1, (stretches, self.rate))
        lse, mean = _pooled(gate_grid, kv_grid, 2)  # [N, W, channels]
        before = self._before(states, lse[:, 0])
        lse, mean = (_first_joined(old, new) for old, new in zip(_join(before[0], (lse[:, 0], mean[:, 0])), (lse, mean), strict=True))
        pooled, after = mean, (lse, mean)
        if self.overlap:  # the first half of the channels goes to the next entry, the second to this one
            earlier = tuple(torch.cat([old[:, None], new[:, :-1, : self.width]], 1) for old, new in zip(before[1], after, strict=True))
            pooled = _join((earlier[0], earlier[1]), (lse[..., self.width :], mean[..., self.width :]))[1]
        at = at // self.rate  # [N, L]: the stretch of each token
        return _at_each(pooled, at, first, self.rate).to(kv.dtype), self._after(after, before, at[:, -1], place[:, -1] == self.rate - 1)

    def _before(self, states: States | None, like: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Log-sum-exp and mean of the open stretch, and of the last one's part, as the inputs find them."""
        nothing = torch.full_like(like, NOTHING), torch.zeros_like(like)
        if states is None:
            return [nothing, (nothing[0][:, : self.width], nothing[1][:, : self.width])]
        some = states[-1]
        return [(torch.where(some[:, k, None] > 0, state[:, 0], NOTHING), state[:, 1]) for k, state in enumerate(states[:-1])]

    def _after(self, after: tuple[Tensor, Tensor], before: list[tuple[Tensor, Tensor]], at: Tensor, closed: Tensor) -> States:
        """The states once the stretch `at` [N] of each row has got its last token, which completed it where it is `closed` [N]."""
        rows = torch.arange(len(at), device=at.device)
        ended = closed[:, None]
        last = torch.stack([x[rows, at] for x in after], 1)  # [N, 2, channels]
        some = [torch.where(closed, 0.0, 1.0)]
        states = [torch.where(ended[..., None], 0.0, last)]
        if self.overlap:
            part = [torch.cat([old[:, None], new[..., : self.width]], 1) for old, new in zip(before[1], after, strict=True)]
            kept = torch.stack([x[rows, at + closed] for x in part], 1)
            some.append((kept[:, 0].amax(-1) > NOTHING / 2).float())
            states.append(kept)
        return (*states, torch.stack(some, 1))


def _spread(x: Tensor, first: Tensor | None, size: int) -> Tensor:
    """x [N, L, C] with its tokens from place `first` [N, 1] on, None: from 0, of `size` places; others hold what means nothing."""
    if first is None:
        return F.pad(x, (0, 0, 0, size - x.shape[1]))
    index = (torch.arange(size, device=x.device) - first).clamp(0, x.shape[1] - 1)
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def _at_each(x: Tensor, at: Tensor, first: Tensor | None, rate: int) -> Tensor:
    """Of x [N, W, C], a stretch's for each of its tokens [N, L, C], which are `at` [N, L]."""
    if first is None:
        return x[:, :, None].expand(-1, -1, rate, -1).flatten(1, 2)[:, : at.shape[1]]
    return x.gather(1, at[..., None].expand(-1, -1, x.shape[2]))


def _pooled(gate: Tensor, kv: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Over `dim`: the log-sum-exp of gates, and the mean of what they weigh."""
    return gate.logsumexp(dim), (gate.softmax(dim) * kv).sum(dim)


def _join(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The log-sum-exp and mean of two sets of tokens together."""
    return _pooled(torch.stack([a[0], b[0]]), torch.stack([a[1], b[1]]), 0)


def _first_joined(first: Tensor, x: Tensor) -> Tensor:
    return torch.cat([first[:, None], x[:, 1:]], 1)


def completed(values: Tensor, step: Step, rate: int) -> Entries:
    """The entries among `values` [B, T, W], as `Compressor` gives them."""

    def find() -> tuple[Tensor, Tensor, Tensor | None]:
        """Which tokens completed one, their positions, and their segments."""
        count = step.count
        if step.even:
            at = torch.arange(min((-step.slots.start - 1) % rate, count), count, rate, device=values.device)[None]
            return at, step.positions[:, at[0]], None
        if step.inputs.positions is not None:
            _check_consecutive(step)
        done = (step.positions % rate == rate - 1).expand(values.shape[:2])
        if step.segments is not None:
            done = done & (step.segments >= 0)
        at = done.int().argsort(dim=1, descending=True, stable=True)[:, : -(-count // rate)]
        segments = torch.zeros_like(at) if step.segments is None else step.segments.gather(1, at)
        return at, step.positions.expand(values.shape[:2]).gather(1, at), torch.where(done.gather(1, at), segments, -1)

    at, positions, segments = step.memo(("completed", rate), find)
    return Entries(values.gather(1, at.expand(len(values), -1)[..., None].expand(-1, -1, values.shape[2])), positions, segments, at)


def _check_consecutive(step: Step) -> None:
    """Raise `TriviumError` unless given positions count on by one within each document."""
    gaps = step.positions.diff(dim=1) != 1
    if step.segments is not None:
        gaps = gaps & (step.segments[:, 1:] == step.segments[:, :-1]) & (step.segments[:, 1:] >= 0)
    if gaps.any():
        raise TriviumError("compressed attention pools tokens by their positions, which must count on by one within a document")
