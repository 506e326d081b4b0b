"""Weight rules: there and back is the identity, names of adapters follow, and nothing is left over in silence."""

from __future__ import annotations

import pytest
import torch

from trivium.core.errors import FileError
from trivium.io.rules import Drop, Rename, Site, Split, Stack, Transpose, backward, forward, sites
from trivium.io.tensors import Lazy

RULES = [
    Rename("model.embed", "embed"),
    Drop("model.layers.{i}.rotary"),
    Drop("lm_head", same_as="model.embed"),
    Rename("model.layers.{i}.norm", "layers.{i}.norm"),
    Split("model.layers.{i}.qkv", ["layers.{i}.inp.q", "layers.{i}.inp.k", "layers.{i}.inp.v"], sizes=(4, 2, 2)),
    Split("model.layers.{i}.kv", ["layers.{i}.inp.k2", "layers.{i}.inp.v2"], sizes=(3, 2), transposed=True),
    Transpose("model.layers.{i}.proj", "layers.{i}.out"),
    Stack([f"model.layers.{{i}}.experts.{j}.up" for j in range(3)], "layers.{i}.experts.up"),
]


def stored() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    out = {"model.embed.weight": draw(7, 5)}
    for i in (0, 1, 10):
        out |= {
            f"model.layers.{i}.norm.weight": draw(5),
            f"model.layers.{i}.proj.weight": draw(4, 5),
            f"model.layers.{i}.proj.bias": draw(5),
        }
        out |= {f"model.layers.{i}.qkv.weight": draw(8, 5), f"model.layers.{i}.qkv.bias": draw(8)}
        out |= {f"model.layers.{i}.kv.weight": draw(4, 5), f"model.layers.{i}.kv.bias": draw(5)}
        out |= {f"model.layers.{i}.experts.{j}.up.weight": draw(6, 5) for j in range(3)}
    return out


def lazily(tensors: dict[str, torch.Tensor]) -> dict[str, Lazy]:
    return {name: Lazy.of(tensor) for name, tensor in tensors.items()}


def test_there_and_back_is_the_identity():
    disk = stored()
    ours = forward(RULES, lazily(disk))
    assert {name.split(".", 2)[-1] for name in ours if name.startswith("layers.10.")} == {
        "norm.weight", "out.weight", "out.bias", "inp.q.weight", "inp.k.weight", "inp.v.weight",
        "inp.q.bias", "inp.k.bias", "inp.v.bias", "experts.up.weight",
        "inp.k2.weight", "inp.v2.weight", "inp.k2.bias", "inp.v2.bias",
    }  # fmt: skip
    assert torch.equal(ours["layers.1.inp.k.weight"].load(), disk["model.layers.1.qkv.weight"][4:6])
    assert torch.equal(ours["layers.1.inp.v2.weight"].load(), disk["model.layers.1.kv.weight"].T[3:])
    assert torch.equal(ours["layers.1.inp.k2.bias"].load(), disk["model.layers.1.kv.bias"][:3])
    assert torch.equal(ours["layers.1.out.weight"].load(), disk["model.layers.1.proj.weight"].T)
    assert torch.equal(ours["layers.0.experts.up.weight"].load()[2], disk["model.layers.0.experts.2.up.weight"])
    for name, lazy in ours.items():
        assert lazy.load().shape == lazy.shape, name
    back = backward(RULES, ours)
    assert set(back) == set(disk)
    for name, lazy in back.items():
        assert lazy.shape == disk[name].shape and torch.equal(lazy.load(), disk[name]), name


def test_one_tensor_at_a_time():
    live, most = 0, 0

    def load(shape: tuple[int, ...]):
        def inner() -> torch.Tensor:
            nonlocal live, most
            live += 1
            most = max(most, live)
            return torch.zeros(shape)

        return inner

    lazies = {name: Lazy(lazy.shape, lazy.dtype, load(lazy.shape)) for name, lazy in lazily(stored()).items()}
    ours = forward(RULES, lazies)
    assert live == 0  # names and shapes cost no tensor
    for lazy in ours.values():
        live = 0
        lazy.load()
    assert most == 3  # the experts of one stack


def test_leftovers_are_named_and_counted():
    disk = lazily(stored()) | {f"extra.{i}.weight": Lazy.of(torch.ones(1)) for i in range(8)}
    with pytest.raises(FileError, match=r"8 tensors.*extra\.0\.weight.*and 3 more"):
        forward(RULES, disk)
    with pytest.raises(FileError, match="mystery.weight"):
        backward(RULES, forward(RULES, lazily(stored())) | {"mystery.weight": Lazy.of(torch.ones(1))})
    with pytest.raises(FileError, match="scales"):  # a leaf that no rule speaks of
        forward(RULES, {"model.embed.scales": Lazy.of(torch.ones(1))})


def test_incomplete_groups_are_named():
    disk = lazily(stored())
    del disk["model.layers.1.experts.2.up.weight"]
    with pytest.raises(FileError, match=r"model\.layers\.1\.experts\.2\.up\.weight.*missing"):
        forward(RULES, disk)


def test_split_checks_its_sizes():
    with pytest.raises(FileError, match="cannot be split"):
        forward(RULES, {"model.layers.0.qkv.weight": Lazy.of(torch.ones(9, 5))})


def test_dropped_copy_must_be_a_copy():
    disk = stored()
    copy = {"lm_head.weight": disk["model.embed.weight"].clone()}
    drop = {"model.layers.0.rotary.inv_freq": torch.ones(2)}
    assert set(forward(RULES, lazily(disk | copy | drop))) == set(forward(RULES, lazily(disk)))
    copy["lm_head.weight"][3, 2] += 1
    with pytest.raises(FileError, match="tied"):
        forward(RULES, lazily(disk | copy))


def test_modules_find_the_maps_on_disk_that_hold_them():
    mine = ["layers.12.out", "layers.12.inp.v", "layers.12.inp.q", "layers.3.inp.k2", "embed", "layers.0.experts.up", "head"]
    assert sites(RULES, mine) == {
        "model.layers.12.proj": Site(("layers.12.out",), transposed=True),
        "model.layers.12.qkv": Site(("layers.12.inp.q", "layers.12.inp.k", "layers.12.inp.v"), transposed=False),
        "model.layers.3.kv": Site(("layers.3.inp.k2", "layers.3.inp.v2"), transposed=True),
        "model.embed": Site(("embed",), transposed=False),
    }
