"""What every registered optimizer and schedule must keep. A part is picked up by being registered."""

from __future__ import annotations

import json

import pytest
import torch

from trivium.core.spec import validate
from trivium.optim.optimizers import Optimizer
from trivium.optim.schedules import Schedule

OPTIMIZERS = [part.tiny() for name, part in Optimizer.registry.items() if not name.startswith("test-")]
SCHEDULES = [part.tiny() for _, part in Schedule.registry.items()]
every_optimizer = pytest.mark.parametrize("spec", OPTIMIZERS, ids=lambda spec: spec.kind)
every_schedule = pytest.mark.parametrize("spec", SCHEDULES, ids=lambda spec: spec.kind)


def descend(optimizer: torch.optim.Optimizer, param: torch.Tensor, steps: int) -> None:
    for _ in range(steps):
        param.grad = 2 * (param.detach() - 3)
        optimizer.step()


@pytest.mark.parametrize("spec", [*OPTIMIZERS, *SCHEDULES], ids=lambda spec: spec.kind)
def test_the_spec_is_its_json(spec):
    root = Optimizer if isinstance(spec, Optimizer) else Schedule
    assert validate(root, json.loads(spec.canonical())) == spec


@every_optimizer
def test_it_goes_down(spec):
    param = torch.zeros(4, 3, requires_grad=True)
    descend(spec.build({"w": param}), param, 200)
    assert (param - 3).abs().max() < 0.3


@every_optimizer
def test_it_resumes_bit_for_bit(spec):
    whole, param = torch.zeros(4, 3, requires_grad=True), torch.zeros(4, 3, requires_grad=True)
    descend(spec.build({"w": whole}), whole, 9)
    first = spec.build({"w": param})
    descend(first, param, 5)
    second = spec.build({"w": param})
    second.load_state_dict(first.state_dict())
    descend(second, param, 4)
    assert torch.equal(whole, param)


@every_schedule
def test_a_factor_is_pure_and_starts_with_warmup(spec):
    factors = [spec.factor(step, 40) for step in range(41)]
    assert factors[:4] == [0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1]
    assert all(0 < factor <= 1 for factor in factors[1:])
    assert [spec.factor(step, 40) for step in reversed(range(41))] == factors[::-1]
