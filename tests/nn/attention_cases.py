"""Attention problems for tests of backends: what is asked, drawn from all pairs of options, and what a backend makes of it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.tiny import segments_of
from trivium.core.seed import generator
from trivium.nn.backends import Backend, Bias, Extras
from trivium.nn.inputs import Inputs, Prefix
from trivium.nn.keepers import Slots
from trivium.nn.patterns import Window
from trivium.nn.step import Step, View

BLOCK = 16
OPTIONS: dict[str, Sequence[Any]] = {
    "seen": ("all", "causal", "mask", "holes", "per head", "window", "both ways", "packed", "prefix", "cached"),
    "count": (1, 7, BLOCK - 1, BLOCK, BLOCK + 1),
    "heads": ((2, 2), (4, 2), (3, 1)),
    "softcap": (None, 1.5),
    "sinks": (False, True),
    "bias": (None, "slopes", "learned"),
    "width": (8, 5),
}


def pairs_covered(options: Mapping[str, Sequence[Any]], *, seed: int = 0) -> list[dict[str, Any]]:
    """Few cases in which every two options of two different names meet."""
    draw, names = random.Random(seed), list(options)
    missing = {((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in options[a] for y in options[b]}
    cases = []
    while missing:
        drawn = [{name: draw.choice(values) for name, values in options.items()} for _ in range(50)]
        drawn = [{**case, **dict(draw.choice(sorted(missing, key=str)))} for case in drawn]
        best = max(drawn, key=lambda case: len(missing & met(case)))
        missing -= met(best)
        cases.append(best)
    return cases


def met(case: Mapping[str, Any]) -> set[tuple]:
    return set(itertools.combinations(case.items(), 2))


def draw(name: str, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator(0, name, *shape), dtype=torch.float64)


class Problem:
    """One case: the arguments of a backend, in any dtype, and the tensors whose gradients are wanted."""

    def __init__(self, *, seen: str, count: int, heads: tuple[int, int], softcap: float | None, sinks: bool, bias: str | None, width: int):
        batch, dim = 2, 8
        self.slots = count + (6 if seen == "cached" else 4 if seen in ("mask", "holes", "per head") else 0)
        self.leaves = {
            "q": draw("q", batch, heads[0], count, dim),
            "k": draw("k", batch, heads[1], self.slots, dim),
            "v": draw("v", batch, heads[1], self.slots, width),
            **({"sinks": draw("sinks", heads[0])} if sinks else {}),
            **({"table": draw("table", 9, heads[0])} if bias == "learned" else {}),
        }
        self.grad = draw("grad", batch, heads[0], count, width)
        self.softcap, self.bias, self.heads = softcap, bias, heads[0]
        self.causal = seen == "causal"
        self.mask = self._mask(seen, batch, count)

    def _mask(self, seen: str, batch: int, count: int) -> Tensor | View | None:
        x = torch.zeros(batch, count, dtype=torch.int64)
        match seen:
            case "mask" | "holes" | "per head":
                mask = draw(seen, batch, self.heads if seen == "per head" else 1, count, self.slots) > -0.5
                mask[..., 0] = True
                if seen == "holes":
                    mask[1, :, count // 2] = False
                return mask
            case "window":
                return Step.begin(Inputs(x), causal=True).view(Window(size=5))
            case "both ways":
                return Step.begin(Inputs(x), causal=False).view(Window(size=3))
            case "packed":
                rows = [[-1, count - 1], [count // 2, count - count // 2]] if count > 1 else [[1], [-1]]
                return Step.begin(Inputs(x, segments=segments_of(rows, count)), causal=True).view(Window(size=4))
            case "prefix":
                return Step.begin(Inputs(x, mask=Prefix(torch.tensor([count, count // 2]))), causal=True).view()
            case "cached":
                positions = torch.arange(self.slots - count, self.slots)[None].expand(batch, -1)
                step = Step.begin(Inputs(x, positions=positions), causal=True)
                return step.view(Window(size=9), slots=Slots(self.slots - count, self.slots, None, None))
        return None

    def run(self, backend: Backend, dtype: torch.dtype, *, gradients: bool = True, **options: Any) -> dict[str, Tensor]:
        """What the backend gives, and with `gradients` those of everything."""
        leaves = {name: x.to(dtype, copy=True).requires_grad_(gradients) for name, x in self.leaves.items()}
        table, sinks = leaves.get("table"), leaves.get("sinks")
        places = (torch.arange(self.slots - self.grad.shape[2], self.slots)[None], torch.arange(self.slots)[None])
        bias = {None: None, "slopes": slopes(self.heads), "learned": table if table is None else by_distance(table)}[self.bias]
        extras = Extras(self.softcap, bias, None if bias is None else places, sinks, () if table is None else (table,))
        out = backend(leaves["q"], leaves["k"], leaves["v"], scale=0.4, causal=self.causal, mask=self.mask, extras=extras, **options)
        if not gradients:
            return {"out": out}
        found = torch.autograd.grad(out, list(leaves.values()), self.grad.to(dtype))
        return {"out": out.detach(), **dict(zip(leaves, found, strict=True))}


def slopes(heads: int) -> Bias:
    """ALiBi's: the farther, the less."""
    by_head = 2.0 ** -torch.arange(1, heads + 1)
    return lambda queries, keys: -by_head[:, None, None] * (queries[:, None, :, None] - keys[:, None, None, :]).abs()


def by_distance(table: Tensor) -> Bias:
    """A learned number for each distance [9, H]."""

    def bias(queries: Tensor, keys: Tensor) -> Tensor:
        return table[(queries[:, :, None] - keys[:, None, :]).clamp(-4, 4) + 4].permute(0, 3, 1, 2)

    return bias
