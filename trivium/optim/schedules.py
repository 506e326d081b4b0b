"""Learning-rate schedules as pure functions: `factor(step, total)` is what the optimizer's rate is multiplied by.

`step` counts finished updates, so a resumed run needs nothing but the step. The conventions are transformers': warmup rises
linearly from 0, and the last update is made one step before the end of the decay. Warmup: 1706.02677; cosine and restarts:
1608.03983; warmup-stable-decay: 2404.06395.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from ..core.registry import Registry
from ..core.spec import Part


class Schedule(Part, registry=Registry("schedule", "trivium.optim")):
    """Root of the schedules: a linear warmup, then what the member says."""

    warmup: float = Field(0.0, ge=0.0, description="updates over which the rate rises from 0; below 1, a share of all updates")

    def factor(self, step: int, total: int) -> float:
        """What multiplies the rate of update number `step` (from 0) of a run of `total` updates."""
        warmup = count(self.warmup, total)
        return step / warmup if step < warmup else self.after(min(step, total), warmup, total)

    def after(self, step: int, warmup: int, total: int) -> float:
        """The factor once the `warmup` updates are made; warmup <= step <= total."""
        raise NotImplementedError


class Constant(Schedule):
    """The full rate."""

    kind: Literal["constant"] = "constant"

    @classmethod
    def tiny(cls) -> Constant:
        return cls(warmup=3)

    def after(self, step: int, warmup: int, total: int) -> float:
        return 1.0


class Decay(Schedule):
    """The schedules that end in a descent of a certain `shape` to `minimum`; the full rate before it."""

    minimum: float = Field(0.0, ge=0.0, le=1.0, description="the factor at the end of the descent")

    def after(self, step: int, warmup: int, total: int) -> float:
        span = self.span(warmup, total)
        done = step - (total - span)
        if done < 0:
            return 1.0
        return self.minimum + (1.0 - self.minimum) * self.shape(done / span) if done < span else self.minimum

    def span(self, warmup: int, total: int) -> int:
        """How many of the last updates the descent takes."""
        return total - warmup

    def shape(self, progress: float) -> float:
        """The descent from 1 to 0 as `progress` goes from 0 to 1 (which it does not reach)."""
        raise NotImplementedError


class Linear(Decay):
    """A straight line down."""

    kind: Literal["linear"] = "linear"

    @classmethod
    def tiny(cls) -> Linear:
        return cls(warmup=3, minimum=0.1)

    def shape(self, progress: float) -> float:
        return 1.0 - progress


class Cosine(Decay):
    """Half a cosine down, `cycles` times, each from the full rate (SGDR's warm restarts)."""

    kind: Literal["cosine"] = "cosine"
    cycles: int = Field(1, ge=1, description="how many equal descents the run is divided into")

    @classmethod
    def tiny(cls) -> Cosine:
        return cls(warmup=3, minimum=0.1, cycles=2)

    def shape(self, progress: float) -> float:
        return 0.5 * (1.0 + math.cos(math.pi * (self.cycles * progress % 1.0)))


class WSD(Decay):
    """Warmup, stable, decay: the full rate until the last `decay` updates."""

    kind: Literal["wsd"] = "wsd"
    decay: float = Field(0.2, gt=0.0, description="updates of the descent; below 1, a share of all updates")
    descent: Literal["linear", "cosine", "1-sqrt"] = Field("linear", description="the form of the descent")

    @classmethod
    def tiny(cls) -> WSD:
        return cls(warmup=3, minimum=0.1)

    def span(self, warmup: int, total: int) -> int:
        return min(count(self.decay, total), total - warmup)

    def shape(self, progress: float) -> float:
        match self.descent:
            case "linear":
                return 1.0 - progress
            case "cosine":
                return 0.5 * (1.0 + math.cos(math.pi * progress))
            case "1-sqrt":
                return 1.0 - math.sqrt(progress)


def count(value: float, total: int) -> int:
    """`value` updates, or the share `value` of `total` (rounded up) where it is below 1."""
    return int(value) if value >= 1 else math.ceil(value * total)
