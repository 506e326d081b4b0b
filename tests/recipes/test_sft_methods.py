"""`sft` with every method: trained, saved, loaded again by its directory, gone on with, and looked into."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.recipes.toys import write_rows
from trivium.adapt.adapter import Adapter
from trivium.adapt.dora import DoRA
from trivium.adapt.freeze import Freeze
from trivium.adapt.lora import LoRA
from trivium.adapt.noise import Noise
from trivium.core.errors import ConfigError, TriviumError
from trivium.core.spec import validate
from trivium.recipes.adapter import inspect_adapter, merge_adapter, unmerge_adapter
from trivium.recipes.load import load
from trivium.recipes.sft import SFT, plan, sft

IDS = torch.arange(3, 23)[None]


def config(toy: Path, tmp_path: Path, **more: object) -> SFT:
    rows = write_rows(tmp_path / "rows.jsonl", count=6)
    return validate(SFT, {"model": str(toy), "data": [str(rows)], "out": str(tmp_path / "run"), "length": 256,
                          "train": {"steps": 2, "rows": 1, "precision": "fp32"}, **more})  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", Adapter.registry)
def test_train_save_load(toy: Path, tmp_path: Path, kind: str):
    adapter = Adapter.registry.get(kind).tiny()
    asked = config(toy, tmp_path, adapter=adapter.to_dict())
    assert asked.adapter == adapter
    size = plan(asked)["size"]
    run = sft(asked)
    expected = run.model(IDS).logits
    assert size["trained parameters"] == sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    again = load(run.path)
    torch.testing.assert_close(again.model(IDS).logits, expected, rtol=0, atol=1e-5)
    assert not torch.equal(load(toy).model(IDS).logits, expected)
    found = inspect_adapter(run.path)
    assert found["parameters"] > 0 and found["base"] == str(toy.resolve())
    if kind in ("lora", "dora", "mora", "ia3"):
        assert merge_adapter(run.path, tmp_path / "merged").mean_kl < 1e-6
        torch.testing.assert_close(load(tmp_path / "merged").model(IDS).logits, expected, rtol=0, atol=1e-5)
        unmerge_adapter(tmp_path / "merged", run.path, tmp_path / "base")
        torch.testing.assert_close(load(tmp_path / "base").model(IDS).logits, load(toy).model(IDS).logits, rtol=0, atol=1e-5)
    else:
        with pytest.raises(ConfigError, match="cannot be merged"):
            merge_adapter(run.path, tmp_path / "merged")


def test_passes_for_training_alone_are_not_saved(toy: Path, tmp_path: Path):
    run = sft(config(toy, tmp_path, adapter=None, passes=[Freeze(last=1, train=("final_norm",)).to_dict(), Noise().to_dict()]))
    before, after = load(toy).model, load(run.path)
    assert after.passes == ()
    for name, parameter in before.named_parameters():
        assert torch.equal(parameter, after.model.get_parameter(name)) != name.startswith(("layers.1.", "final_norm.")), name


def test_kinds_may_be_left_out_where_they_are_lora(toy: Path, tmp_path: Path):
    assert config(toy, tmp_path, adapter={"rank": 3}).adapter == LoRA(rank=3)
    assert config(toy, tmp_path, adapter={"kind": "dora", "rank": 3}).adapter == DoRA(rank=3)
    with pytest.raises(TriviumError, match="unknown adapter 'dorra'"):
        config(toy, tmp_path, adapter={"kind": "dorra"})


def test_an_adapter_of_another_base(toy: Path, tmp_path: Path):
    run = sft(config(toy, tmp_path, adapter={"kind": "prefix", "length": 2}))
    other = load(toy)
    with torch.no_grad():
        other.model.embed.weight.mul_(1.01)
    other.save(tmp_path / "other")
    with pytest.raises(TriviumError, match="other base weights"):
        load(tmp_path / "other", adapter=run.path)
