"""AdamW with 8-bit states: bitsandbytes' steps and states, what is held, that it learns as AdamW does, and goes on bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.nn import bitsandbytes_golden as golden
from tests.train.toys import CONFIG, model, train
from trivium.core.errors import ConfigError
from trivium.core.spec import validate
from trivium.optim.eight_bit import AdamW8bit
from trivium.optim.masters import Masters
from trivium.optim.optimizers import AdamW, Optimizer
from trivium.train import checkpoint

FOUND = json.loads(golden.FIXTURE.read_text())


@pytest.mark.concept("T06.04", part="optim/eight_bit.py")
def test_steps_and_states_are_those_of_bitsandbytes():
    """Of a large parameter, in blocks of 256 of which the last is cut, and of a small one, whose states are whole."""
    params = golden.parameters()
    spec = AdamW8bit(**golden.ADAMW, no_decay=())
    optimizer = spec.build(params)
    for step, expected in enumerate(FOUND["steps"]):
        for name, gradient in golden.gradients(step).items():
            params[name].grad = gradient
        optimizer.step()
        for name, param in params.items():
            wanted = golden.tensor(expected[name], torch.float32)
            off = (param.flatten()[:: golden.EVERY] - wanted).abs()
            if step == 0 or name == "small":
                assert off.max() < 1e-6
            else:  # where a value lay between two codes, their CPU kernel may have missed the nearer one
                assert (off > 2e-6).float().mean() < 0.01 * step and off.max() < 0.5 * spec.lr
    state = optimizer.state[params["large"]]
    for ours, theirs, dtype in (
        ("exp_avg", "state1", torch.uint8),
        ("exp_avg_sq", "state2", torch.uint8),
        ("exp_avg_scale", "absmax1", torch.float32),
        ("exp_avg_sq_scale", "absmax2", torch.float32),
    ):
        wanted = golden.tensor(FOUND["state"][theirs], dtype)
        assert state[ours].dtype is dtype
        difference = (state[ours].flatten().double() - wanted.double()).abs()
        if dtype is torch.uint8:  # between two codes, their CPU kernel may miss the nearer one
            assert (difference > 1).double().mean() < 0.001 and (difference > 0).double().mean() < 0.03
        else:
            torch.testing.assert_close(state[ours], wanted, rtol=1e-2, atol=0)
    assert set(optimizer.state[params["small"]]) == {"step", "exp_avg", "exp_avg_sq"}
    assert optimizer.state[params["small"]]["exp_avg"].dtype is torch.float32


def test_a_quarter_is_held():
    params = {"w": nn.Parameter(torch.zeros(256, 256))}
    sizes = {}
    for spec in (AdamW(lr=0.1), AdamW8bit(lr=0.1)):
        optimizer = spec.build(params)
        params["w"].grad = torch.ones(256, 256)
        optimizer.step()
        sizes[spec.kind] = sum(value.nbytes for value in optimizer.state[params["w"]].values())
    assert sizes["adamw"] == 8 * 256**2 + 4 and sizes["adamw8bit"] == 2 * 256**2 + 2 * 4 * 256 + 4


def test_it_learns_as_adamw_does():
    """A regression through a network whose matrices all have 8-bit states: the losses end within a quarter of each other."""
    x = golden.drawn(256, 32, seed=0)
    y = torch.tanh(x @ golden.drawn(32, 8, seed=1))
    losses = {}
    for spec in (AdamW(lr=3e-3), AdamW8bit(lr=3e-3, smallest=64)):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8))
        optimizer = spec.build(dict(net.named_parameters()))
        for _ in range(120):
            optimizer.zero_grad()
            loss = F.mse_loss(net(x), y)
            loss.backward()
            optimizer.step()
        losses[spec.kind] = loss.item()
    assert losses["adamw"] < 0.2 and abs(losses["adamw8bit"] / losses["adamw"] - 1) < 0.25


def test_states_survive_torchs_own_loading():
    """In which torch would cast codes, and scales of a bfloat16 parameter, to the parameter's dtype."""
    for dtype in (torch.float32, torch.bfloat16):
        ends = []
        for stops in (False, True):
            param = nn.Parameter(golden.drawn(40, 30, seed=3).to(dtype))
            optimizer = AdamW8bit(lr=0.01, smallest=8).build({"w": param})
            for step in range(6):
                if stops and step == 3:
                    state = optimizer.state_dict()
                    optimizer = AdamW8bit(lr=0.01, smallest=8).build({"w": param})
                    optimizer.load_state_dict(state)
                param.grad = golden.drawn(40, 30, seed=step).to(dtype)
                optimizer.step()
            ends.append(param.detach().clone())
        assert torch.equal(*ends)


@pytest.mark.concept("T06.04", part="optim/eight_bit.py")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path, precision):
    config = CONFIG.replace(precision=precision)
    whole, _ = train(tmp_path / "a", config=config, of=model(), optim=AdamW8bit(lr=1e-2, smallest=100))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    checkpoint.delete(tmp_path / "b" / "checkpoint-6")
    again, done = train(tmp_path / "b", config=config, of=model(), optim=AdamW8bit(lr=1e-2, smallest=100))
    assert done.resumed == 4 and all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    kept = checkpoint.latest(tmp_path / "b").tensors("optimizer")
    assert {tensor.dtype for tensor in kept.values()} == {torch.uint8, torch.float32}


def test_offloaded_states_change_nothing_where_there_is_no_gpu():
    ends = []
    for offload in (False, True):
        net = nn.Linear(80, 70)
        with torch.no_grad():
            net.weight.copy_(golden.drawn(70, 80, seed=0))
        masters = Masters(net, AdamW8bit(lr=0.01, offload=offload), dtype=torch.float32)
        for step in range(3):
            net.weight.grad, net.bias.grad = golden.drawn(70, 80, seed=step), None
            masters.step(1.0)
        ends.append(net.weight.detach().clone())
    assert torch.equal(*ends)


def test_bad_settings():
    with pytest.raises(ConfigError, match="block"):
        validate(Optimizer, {"kind": "adamw8bit", "lr": 0.1, "block": 0})
