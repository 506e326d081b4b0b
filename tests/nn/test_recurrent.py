"""No mixer passes over a mask: what lets a token see later ones is heeded, or refused in the mixer's name."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from tests.tiny import apart, ask, host, parts, tiny, tokens
from trivium.core.errors import ConfigError
from trivium.nn.attention import Mixer
from trivium.nn.inputs import Prefix

MIXERS = {name.removeprefix("mixer-"): part for name, part in parts() if isinstance(part, Mixer)}
ONE_WAY = {"compressive", "gated_delta", "gated_linear", "infini", "mamba", "mamba2", "mlgru", "retention"}  # kinds that read left to right
BOTH_WAYS = {"gated_unit", "linear_attention", "linear-attention-plain", "low_rank", "low-rank-one-map"}  # or see a whole document at once


@pytest.mark.parametrize("mask", [Prefix(torch.tensor([9, 9])), "full"], ids=["prefix", "full"])
@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()
def test_a_mask_is_heeded_or_refused(name: str, mask: Prefix | Literal["full"]):
    part = MIXERS[name]
    model, x = tiny(host(part)), tokens(2, 9)
    if part.kind in ONE_WAY or (name in BOTH_WAYS and mask != "full"):
        with pytest.raises(ConfigError, match=f"{part.kind!r} mixer reads left to right") as caught:
            model(ask(part, x, mask=mask))
        assert caught.value.field == "mask"
    else:
        assert apart(model(ask(part, x, mask=mask)).logits[:, 0], model(ask(part, x)).logits[:, 0]) > 5e-4
