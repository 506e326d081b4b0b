"""Further rows for a vocabulary: old rows and logits stay, new rows are means, tied stays tied."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import tiny
from trivium.adapt.lora import LoRA
from trivium.adapt.resize import resize
from trivium.models import presets

TOKENS = torch.tensor([[3, 9, 27, 1, 40, 12]])


def model(*, tied: bool):
    return tiny(presets.llama(dim=24, layers=2, heads=4, kv_heads=2, head_dim=6, hidden=40, vocab=61, tied=tied))


@pytest.mark.parametrize("tied", [True, False])
def test_old_logits_stay_and_new_rows_are_means(tied):
    it = model(tied=tied)
    before, embed = it(TOKENS).logits, it.embed.weight.detach().clone()
    head = None if tied else it.head.out.weight.detach().clone()
    resize(it, [range(61), [4, 5]], used=61, multiple=8)
    after = it(TOKENS).logits
    assert it.spec.vocab == 64 and after.shape[-1] == 64
    torch.testing.assert_close(after[..., :61], before, rtol=0, atol=1e-6)
    torch.testing.assert_close(after[..., 61], before.mean(-1))
    torch.testing.assert_close(after[..., 62], before[..., [4, 5]].mean(-1))
    assert torch.equal(it.embed.weight[:61], embed) and torch.allclose(it.embed.weight[61], embed.mean(0))
    assert tied == (not hasattr(it.head, "out"))
    if head is not None:
        assert torch.equal(it.head.out.weight[:61], head) and torch.allclose(it.head.out.weight[63], head.mean(0))
    assert {name: p.shape for name, p in it.named_parameters()}["embed.weight"] == (64, 24) and it.embed.weight.requires_grad


def test_rows_without_a_token_are_used_before_the_tables_grow():
    it = model(tied=False)
    old = it.embed.weight.detach().clone()
    resize(it, [[1, 2]], used=58)
    assert it.spec.vocab == 61
    assert torch.equal(it.embed.weight[58], old[[1, 2]].mean(0)) and torch.equal(it.embed.weight[59:], old[59:])


def test_new_rows_are_trained_like_old_ones():
    it = resize(model(tied=False), [[1, 2]], used=61)
    it(torch.tensor([[61, 3]])).logits[..., 61].sum().backward()
    assert it.embed.weight.grad[61].abs().sum() > 0 and it.head.out.weight.grad[61].abs().sum() > 0


def test_an_adapted_head_is_refused():
    it = LoRA(rank=2, targets=("head.out",)).apply(model(tied=False))
    with pytest.raises(ValueError, match="add tokens to the plain model first"):
        resize(it, [[1]], used=61)
