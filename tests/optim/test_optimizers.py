"""AdamW against torch.optim.AdamW: the written update, the fused one, their state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trivium.optim.optimizers import AdamW, Optimizer, WrittenAdamW

SHAPES = {"w": (7, 5), "v": (33, 3), "norm": (5,), "bias": (7,)}


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for name, shape in SHAPES.items()}


def set_gradients(params: dict[str, Tensor], step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for param in params.values():
        noise = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        param.grad = (scale * (noise + 0.1 * param.detach())).to(param.dtype)


def run(optimizer: torch.optim.Optimizer, params: dict[str, Tensor], steps: range, scale: float = 1.0) -> None:
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / 200)  # a schedule at work
        set_gradients(params, step, scale)
        optimizer.step()


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


def spec(**changes) -> AdamW:
    return AdamW(lr=1e-2).replace(**{"weight_decay": 0.1, **changes})


def torchs(params: dict[str, Tensor], spec: AdamW) -> torch.optim.AdamW:
    groups = [{"params": [p], "weight_decay": spec.weight_decay if p.dim() > 1 else 0.0} for p in params.values()]
    return torch.optim.AdamW(groups, lr=spec.lr, betas=spec.betas, eps=spec.eps, amsgrad=spec.amsgrad, foreach=False)


@pytest.mark.concept("T10.04", part="optim/optimizers.py")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-7), (torch.float64, 1e-12)])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_trajectories_are_torchs(dtype, tolerance, amsgrad, fused):
    ours, theirs = parameters(dtype), parameters(dtype)
    setting = spec(amsgrad=amsgrad, fused=fused, betas=(0.8, 0.99), eps=1e-6)
    a, b = setting.build(ours), torchs(theirs, setting)
    for step in range(100):
        run(a, ours, range(step, step + 1))
        run(b, theirs, range(step, step + 1))
        largest = max(p.abs().max().item() for p in theirs.values())
        assert distance(ours, theirs) <= tolerance * max(1.0, largest)
    assert distance(ours, parameters(dtype)) > 0.1


@pytest.mark.concept("T10.04", part="optim/optimizers.py")
@pytest.mark.parametrize("fused", [False, True])
def test_decay_is_decoupled_from_the_gradient(fused):
    """With decay in the gradient (Adam + L2) Adam's normalization undoes it; AdamW takes the same share away whatever the gradient's scale."""
    decayed: dict[str, list[Tensor]] = {"adamw": [], "adam+l2": []}
    for scale in (1.0, 1000.0):
        for kind in decayed:
            ends = []
            for decay in (0.0, 0.1):
                params = parameters(torch.float64)
                held = {"w": params["w"]}
                if kind == "adamw":
                    optimizer = spec(weight_decay=decay, eps=1e-30, fused=fused).build(held)
                else:
                    optimizer = torch.optim.Adam(held.values(), lr=1e-2, weight_decay=decay, eps=1e-30)
                for step in range(3):
                    generator = torch.Generator().manual_seed(step)
                    held["w"].grad = scale * torch.randn(SHAPES["w"], generator=generator, dtype=torch.float64)
                    optimizer.step()
                ends.append(held["w"].detach())
            decayed[kind].append(ends[1] - ends[0])
    small, large = decayed["adamw"]
    assert (small - large).abs().max() < 1e-12 and small.abs().max() > 1e-3
    small, large = decayed["adam+l2"]
    assert (small - large).abs().max() > 0.5 * small.abs().max()
    assert (decayed["adamw"][0] - small).abs().max() > 1e-4


@pytest.mark.concept("T10.04", part="optim/optimizers.py")
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_state_goes_to_torch_and_back(fused, amsgrad):
    setting = spec(fused=fused, amsgrad=amsgrad)
    whole = parameters(torch.float64)
    run(setting.build(whole), whole, range(30))

    params = parameters(torch.float64)
    ours = setting.build(params)
    run(ours, params, range(10))
    groups = [[params["w"], params["v"]], [params["norm"], params["bias"]]]
    theirs = torch.optim.AdamW([{"params": group} for group in groups], foreach=False)
    theirs.load_state_dict(ours.state_dict())
    run(theirs, params, range(10, 20))
    ours = setting.build(params)
    ours.load_state_dict(theirs.state_dict())
    run(ours, params, range(20, 30))
    assert distance(params, whole) < 1e-12


def test_what_decays():
    """Norms and biases do not, unless patterns say something else."""
    params = {**parameters(), "embed.weight": torch.zeros(4, 4)}
    assert {name for name, p in params.items() if spec().decays(name, p)} == {"w", "v", "embed.weight"}
    chosen = spec(no_decay=("embed.*", "v"))
    assert {name for name, p in params.items() if chosen.decays(name, p)} == {"w", "norm", "bias"}
    decays = {id(p): group["weight_decay"] for group in chosen.build(params).param_groups for p in group["params"]}
    assert {name for name, p in params.items() if decays[id(p)] == 0.0} == {"v", "embed.weight"}


def test_written_and_fused_are_two_things():
    params = parameters()
    assert isinstance(spec(fused=False).build(params), WrittenAdamW)
    assert spec().build(params).defaults["fused"]
    assert Optimizer.registry.get("adamw") is AdamW
