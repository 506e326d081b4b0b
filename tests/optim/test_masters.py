"""Masters: what bf16 alone would lose is kept, and gradients add up in fp32."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trivium.core.errors import ConfigError, FileError
from trivium.optim.masters import Masters
from trivium.optim.optimizers import AdamW


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))


def steps(masters: Masters, module: nn.Module, numbers: range) -> None:
    dtype = next(module.parameters()).dtype
    for number in numbers:
        x = torch.randn(3, 6, generator=torch.Generator().manual_seed(number)).to(dtype)
        module(x).float().square().sum().backward()
        masters.accumulate()
        masters.step(0.5)


def test_small_updates_reach_bf16_through_the_masters():
    module = model()
    masters = Masters(module, AdamW(lr=1e-4, weight_decay=0.0), dtype=torch.bfloat16)
    before = {name: param.clone() for name, param in module.named_parameters()}
    steps(masters, module, range(100))
    for name, param in module.named_parameters():
        assert param.dtype == torch.bfloat16 and masters.tensors[name].dtype == torch.float32
        assert torch.equal(param, masters.tensors[name].bfloat16())
        assert not torch.equal(param, before[name])
    lone = before["0.weight"].clone()
    for _ in range(100):
        lone -= 5e-5  # the same rate without a master: lost to rounding for all but the smallest weights
    assert (lone == before["0.weight"]).float().mean() > 0.5


def test_masters_keep_what_the_model_had_beyond_bf16():
    module = model()
    exact = module[0].weight.detach().clone()
    masters = Masters(module, AdamW(lr=1e-4), dtype=torch.bfloat16)
    assert torch.equal(masters.tensors["0.weight"], exact)
    assert torch.equal(module[0].weight, exact.bfloat16())


def test_gradients_add_up_in_fp32():
    module = nn.Linear(1, 1, bias=False)
    masters = Masters(module, AdamW(lr=1e-4), dtype=torch.bfloat16)
    for value in (256.0, 0.5, 0.5):  # in bf16 256 + 0.5 is 256
        (module.weight * value).sum().backward()
        masters.accumulate()
    assert masters.tensors["weight"].grad.item() == 257.0
    assert module.weight.grad is None


def test_only_what_requires_a_gradient_is_taken():
    module = model()
    module[0].requires_grad_(False)
    masters = Masters(module, AdamW(lr=1e-4), dtype=torch.bfloat16)
    assert set(masters.tensors) == {"1.weight", "1.bias"}
    assert module[0].weight.dtype == torch.bfloat16
    module.requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing to train"):
        Masters(module, AdamW(lr=1e-4), dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", [AdamW(lr=1e-2, amsgrad=True), AdamW(lr=1e-2, fused=False)])
def test_state_restores_bit_for_bit(dtype, spec):
    whole = model()
    masters = Masters(whole, spec, dtype=dtype)
    steps(masters, whole, range(6))

    first = model()
    masters = Masters(first, spec, dtype=dtype)
    steps(masters, first, range(3))
    state = {name: {key: value.clone() for key, value in group.items()} for name, group in masters.state().items()}
    second = model()
    with torch.no_grad():
        for param in second.parameters():
            param.zero_()
    masters = Masters(second, spec, dtype=dtype)
    masters.load(state)
    steps(masters, second, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


def test_a_state_of_another_model_is_refused():
    module = model()
    masters = Masters(module, AdamW(lr=1e-4), dtype=torch.float32)
    state = masters.state()
    with pytest.raises(FileError, match=r"0\.bias"):
        masters.load({**state, "parameters": {n: t for n, t in state["parameters"].items() if n != "0.bias"}})
    with pytest.raises(FileError, match=r"1\.weight"):
        masters.load({**state, "parameters": {**state["parameters"], "1.weight": torch.zeros(2)}})


def test_clipping_is_torchs():
    ours, theirs = model(), model()
    masters = Masters(ours, AdamW(lr=1e-4), dtype=torch.float32)
    for module in (ours, theirs):
        module(torch.ones(2, 6)).square().sum().backward()
    norm = masters.clip(0.1)
    assert torch.equal(norm, nn.utils.clip_grad_norm_(theirs.parameters(), 0.1))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert torch.allclose(masters.clip(None), torch.tensor(0.1), atol=1e-6)
