"""The running mean of what is trained: torch's own, resumed to the bit, left in the model in the end, counted by the plan."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from trivium.optim.masters import Masters
from trivium.optim.optimizers import AdamW


def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))


def update(masters: Masters, trained: nn.Module, number: int) -> None:
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(number)).to(next(trained.parameters()).dtype)
    trained(x).float().square().sum().backward()
    masters.accumulate()
    masters.step(1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_torchs(dtype: torch.dtype):
    """Of the masters, where parameters are bf16: fp32 throughout."""
    trained = module()
    masters = Masters(trained, AdamW(lr=1e-2), dtype=dtype, ema=0.9)
    copy = nn.ParameterDict({name.replace(".", "-"): nn.Parameter(tensor.detach().clone()) for name, tensor in masters.tensors.items()})
    theirs = AveragedModel(copy, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for number in range(12):
        update(masters, trained, number)
        for name, tensor in masters.tensors.items():
            copy[name.replace(".", "-")].data.copy_(tensor)
        theirs.update_parameters(copy)
    for name, mean in masters.average.tensors.items():
        expected = theirs.module[name.replace(".", "-")]
        assert mean.dtype == torch.float32 and (mean - expected).abs().max() < 1e-6
        assert (mean - masters.tensors[name]).abs().max() > 1e-4, "the mean lags behind"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_can_be_looked_at_and_left_in_the_model(dtype: torch.dtype):
    trained = module()
    masters = Masters(trained, AdamW(lr=1e-2), dtype=dtype, ema=0.5)
    for number in range(3):
        update(masters, trained, number)
    before = {name: param.detach().clone() for name, param in trained.named_parameters()}
    means = {name: mean.to(dtype) for name, mean in masters.average.tensors.items()}
    with masters.averaged():
        assert all(torch.equal(param, means[name]) for name, param in trained.named_parameters())
    assert all(torch.equal(param, before[name]) for name, param in trained.named_parameters())
    masters.settle()
    assert all(torch.equal(param, means[name]) and not torch.equal(param, before[name]) for name, param in trained.named_parameters())


def test_state_goes_on_to_the_bit(tmp_path: Path):
    whole, half = module(), module()
    one, two = (Masters(trained, AdamW(lr=1e-2), dtype=torch.bfloat16, ema=0.9) for trained in (whole, half))
    for number in range(6):
        update(one, whole, number)
    for number in range(3):
        update(two, half, number)
    again = module()
    three = Masters(again, AdamW(lr=1e-2), dtype=torch.bfloat16, ema=0.9)
    three.load({name: {key: tensor.clone() for key, tensor in group.items()} for name, group in two.state().items()})
    for number in range(3, 6):
        update(three, again, number)
    assert all(torch.equal(mean, three.average.tensors[name]) for name, mean in one.average.tensors.items())
    assert "average" not in Masters(module(), AdamW(lr=1e-2), dtype=torch.float32).state()
