"""Experiments: one command settles one or several published claims on this machine, and leaves a result file.

    python -m trivium.lab.experiments NAME

trains what it needs from the standard library's own source, prints what it found and writes `lab/claims/NAME.json`: command,
seeds, machine, date, numbers, verdict. A claim that does not hold at this size is recorded so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...core.registry import Registry


@dataclass(frozen=True)
class Result:
    """What was found: `numbers` (JSON), and in one or two sentences whether the claim holds."""

    numbers: dict[str, Any]
    verdict: str
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Experiment:
    """`concepts`: rows of the contract that it measures. `run(effort)`: 1 is the whole experiment; less shortens training in
    proportion, for tests, and settles nothing."""

    concepts: tuple[str, ...]
    question: str
    run: Callable[[float], Result]


experiments: Registry[Experiment] = Registry("experiment", "trivium.lab.experiments")


def experiment(name: str, *concepts: str, question: str) -> Callable[[Callable[[float], Result]], Callable[[float], Result]]:
    """Registers `run(effort)` under a name."""

    def add(run: Callable[[float], Result]) -> Callable[[float], Result]:
        experiments.add(name, Experiment(concepts, question, run))
        return run

    return add
