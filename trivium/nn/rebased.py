"""Rotary positions as places in the cache (StreamingLLM, arXiv:2309.17453): no angle grows with the text.

A window's keys are turned by their distance, as ever. The first tokens stand right before the window, wherever that is: to them,
a query is at the last place. A query is therefore turned twice, side by side, and a key has zeros on the side that is not its
own, so that one product gives both scores. Keys are kept unturned, and turned when they are read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .step import Step, View

Turn = Callable[[Tensor, Step], Tensor]


def rebase(q: Tensor, k: Tensor, turn: Turn, view: View, *, places: int, first: int) -> tuple[Tensor, Tensor]:
    """Unturned q [B, H, T, D] and k [B, K, S, D] -> [B, H, T, 2D] and [B, K, S, 2D]. `places`: those of the first tokens and the
    window together, of which the query's own is the last."""
    steps = view.step.memo(("rebased", places, first, id(view.slots)), lambda: (view.slots, *_steps(view, places=places, first=first)))
    sinks = (view.key_positions < first)[:, None, :, None]
    turned = turn(k, steps[1])
    queries = torch.cat([turn(q, steps[2]), turn(q, steps[3])], -1)
    return queries, torch.cat([turned.masked_fill(sinks, 0.0), turned.masked_fill(~sinks, 0.0)], -1)


def _steps(view: View, *, places: int, first: int) -> tuple[Step, Step, Step]:
    """Steps that stand at the places of the keys, of queries among their window, and of queries among the first tokens."""
    queries, keys = view.step.positions, view.key_positions
    beyond = (queries.amin(1, keepdim=True) - places + 1).clamp_min(0)  # [B|1, 1]: how far the window has moved on
    return (
        at(view.step, torch.where(keys < first, keys, keys - beyond)),
        at(view.step, queries - beyond),
        at(view.step, queries.clamp_max(places - 1)),
    )


def at(step: Step, positions: Tensor) -> Step:
    """The step as if its tokens stood at these positions [B|1, T], for turning what is given as that many tokens."""
    return replace(step, positions=positions, _memo={})
