"""Schedules against transformers' and torch's own."""

from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from trivium.core.errors import ConfigError
from trivium.core.spec import validate
from trivium.optim.schedules import WSD, Constant, Cosine, Linear, Schedule, count


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)


def rates(scheduler: torch.optim.lr_scheduler.LRScheduler, total: int) -> list[float]:
    found = []
    for _ in range(total):
        found.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return found


def factors(schedule: Schedule, total: int) -> list[float]:
    return [schedule.factor(step, total) for step in range(total)]


def apart(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.concept("T10.05", part="optim/schedules.py")
@pytest.mark.parametrize("warmup", [0, 1, 7, 40])
def test_warmup_and_linear_decay_are_transformers(warmup):
    theirs = rates(transformers.get_linear_schedule_with_warmup(optimizer(), warmup, 53), 53)
    assert apart(factors(Linear(warmup=warmup), 53), theirs) < 1e-12
    theirs = rates(transformers.get_constant_schedule_with_warmup(optimizer(), warmup), 53)
    assert apart(factors(Constant(warmup=warmup), 53), theirs) < 1e-12


@pytest.mark.concept("T10.05", part="optim/schedules.py")
def test_warmup_is_a_count_or_a_share():
    assert factors(Linear(warmup=0.1), 41) == factors(Linear(warmup=5), 41)  # a share is rounded up, as in transformers
    assert [Constant(warmup=4).factor(step, 100) for step in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert count(0.0, 10) == 0 and count(1, 10) == 1 and count(0.99, 10) == 10


@pytest.mark.concept("T10.06", part="optim/schedules.py")
@pytest.mark.parametrize("warmup", [0, 6])
def test_cosine_is_transformers(warmup):
    assert (
        apart(factors(Cosine(warmup=warmup), 61), rates(transformers.get_cosine_schedule_with_warmup(optimizer(), warmup, 61), 61)) < 1e-12
    )
    theirs = rates(transformers.get_cosine_with_hard_restarts_schedule_with_warmup(optimizer(), warmup, 61, num_cycles=4), 61)
    assert apart(factors(Cosine(warmup=warmup, cycles=4), 61), theirs) < 1e-12
    theirs = rates(transformers.get_cosine_with_min_lr_schedule_with_warmup(optimizer(), warmup, 61, min_lr_rate=0.2), 61)
    assert apart(factors(Cosine(warmup=warmup, minimum=0.2), 61), theirs) < 1e-12


@pytest.mark.concept("T10.06", part="optim/schedules.py")
def test_cosine_is_torchs():
    assert (
        apart(factors(Cosine(minimum=0.1), 50), rates(torch.optim.lr_scheduler.CosineAnnealingLR(optimizer(), 50, eta_min=0.1), 50)) < 1e-12
    )
    theirs = rates(torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer(), 15, eta_min=0.1), 60)
    assert apart(factors(Cosine(minimum=0.1, cycles=4), 60), theirs) < 1e-12


@pytest.mark.parametrize("descent", ["linear", "cosine", "1-sqrt"])
def test_wsd_is_transformers(descent):
    for minimum in (0.0, 0.1):
        theirs = transformers.get_wsd_schedule(
            optimizer(), num_warmup_steps=5, num_stable_steps=40, num_decay_steps=10, min_lr_ratio=minimum, decay_type=descent
        )
        after = slice(0 if minimum == 0 else 5, None)  # transformers starts its warmup at the minimum, ours always at 0
        assert apart(factors(WSD(warmup=5, decay=10, minimum=minimum, descent=descent), 55)[after], rates(theirs, 55)[after]) < 1e-12
    assert factors(WSD(decay=0.25, descent=descent), 40) == factors(WSD(decay=10, descent=descent), 40)


@given(
    st.sampled_from([Constant, Linear, Cosine, WSD]),
    st.one_of(st.integers(0, 40), st.floats(0, 0.99)),
    st.integers(1, 60),
    st.integers(0, 80),
)
@settings(max_examples=200, deadline=None)
def test_factors_stay_between_zero_and_one(cls, warmup, total, step):
    assert 0.0 <= cls(warmup=warmup).factor(step, total) <= 1.0 + 1e-12


def test_after_the_end_the_factor_is_the_minimum():
    assert [s.factor(9, 9) for s in (Constant(), Linear(minimum=0.3), Cosine(minimum=0.3, cycles=2), WSD(minimum=0.3))] == [
        1.0,
        0.3,
        0.3,
        0.3,
    ]


def test_a_schedule_is_found_by_its_kind():
    assert validate(Schedule, {"kind": "wsd", "decay": 3}) == WSD(decay=3)
    with pytest.raises(ConfigError, match="did you mean 'cosine'"):
        validate(Schedule, "cosin")
