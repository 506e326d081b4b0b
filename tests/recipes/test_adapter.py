"""Adapters into weights and out again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.recipes.toys import bundle
from trivium.adapt.lora import LoRA, updates
from trivium.core.errors import TriviumError
from trivium.io import peft
from trivium.recipes.adapter import inspect_adapter, merge_adapter, unmerge_adapter
from trivium.recipes.load import load


@pytest.fixture
def adapter(toy: Path, tmp_path: Path) -> Path:
    """An adapter of the toy whose every parameter is drawn, with ranks and alphas of its own here and there."""
    model = bundle().model
    LoRA(rank=4, alpha=8.0, targets=("q", "ffn.out"), ranks={"ffn.out": 2}, alphas={"q": 3.0}).apply(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, update in updates(model, "default").values():
            for parameter in (update.A, update.B):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    peft.write(tmp_path / "adapter", model, family="llama", base=toy)
    return tmp_path / "adapter"


def test_merged_and_taken_out_again_is_the_base(toy: Path, adapter: Path, tmp_path: Path):
    found = merge_adapter(adapter, tmp_path / "merged")
    assert found.maps == 4 and found.max_logit_difference < 1e-4
    base, merged, both = load(toy), load(tmp_path / "merged"), load(adapter)
    x = torch.arange(40)[None]
    torch.testing.assert_close(merged.model(x).logits, both.model(x).logits, atol=1e-4, rtol=0)
    assert (merged.model(x).logits - base.model(x).logits).abs().max() > 0.1
    unmerge_adapter(tmp_path / "merged", adapter, tmp_path / "again")
    again = load(tmp_path / "again")
    assert again.passes == () and [step["step"] for step in again.lineage] == ["merge", "unmerge"]
    for name, parameter in base.model.named_parameters():
        torch.testing.assert_close(again.model.get_parameter(name), parameter, atol=1e-6, rtol=0)


def test_what_an_adapter_holds(toy: Path, adapter: Path):
    found = inspect_adapter(adapter)
    assert found["base"] == str(toy) and found["base_digest"] == load(toy).digest and len(found["maps"]) == 4
    rows = {row["module"]: row for row in found["maps"]}
    row = rows["model.layers.0.mlp.down_proj"]
    assert (row["in"], row["out"], row["rank"], row["parameters"]) == (64, 48, 2, 2 * (64 + 48))
    assert found["parameters"] == sum(row["parameters"] for row in rows.values())
    _, update = updates(load(adapter).model, "default")["layers.0.ffn.out"]
    assert row["norm"] == pytest.approx((update.B @ update.A).norm().item(), rel=1e-4)


def test_what_is_no_adapter(toy: Path, tmp_path: Path):
    with pytest.raises(TriviumError, match="is no adapter directory"):
        merge_adapter(toy, tmp_path / "merged")
