"""What `inspect` says of sizes, against a cache that is really opened and products that are really counted."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from trivium.nn.attention import use_backend
from trivium.nn.inputs import Inputs
from trivium.recipes.inspect import facts
from trivium.recipes.load import load


def test_sizes_at_the_models_context(toy):
    bundle = load(toy)
    model, found = bundle.model, facts(bundle)
    use_backend(model, "eager")
    said, context = found["at"], bundle.spec.context
    assert said["context"] == context and said["cache_bytes"] == model.cache(rows=1, capacity=context).bytes
    assert said["weight_bytes"] == found["weight_bytes"] and sum(row["parameters"] for row in found["layers"]) == found["parameters"]
    x = torch.zeros(1, context, dtype=torch.int64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x, keep="last")
    assert abs(said["read_flops"] / counter.get_total_flops() - 1) < 0.01
    cache = model.cache(rows=1, capacity=context)
    with torch.no_grad():
        model(Inputs(x[:, :-1], cache=cache))
        with FlopCounterMode(display=False) as counter:
            model(Inputs(x[:, -1:], cache=cache), keep="last")
    assert abs(said["token_flops"] / counter.get_total_flops() - 1) < 0.01
