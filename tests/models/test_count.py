"""Counted without running against what runs: torch's FlopCounterMode, real stores, real parameters."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.adapt.test_methods import METHODS
from tests.tiny import ask, host, parts, segments_of, tiny, tokens
from trivium.adapt.adapter import Adapter, initialize_adapter
from trivium.adapt.dora import DoRA
from trivium.adapt.ia3 import IA3
from trivium.adapt.lora import LoRA
from trivium.core.spec import Part
from trivium.models import count
from trivium.models.checkpointing import Recompute
from trivium.models.presets import llama, presets
from trivium.models.transformer import TransformerModel, build
from trivium.nn.attention import use_backend
from trivium.nn.inputs import Inputs

PARTS = parts()
WINDOWED = llama(dim=24, layers=2, heads=4, kv_heads=2, hidden=40, vocab=61, window=4)
SPECS = {**dict(PARTS), "window": WINDOWED, "tiny-llama": presets.get("tiny-llama")()}


def counter() -> FlopCounterMode:
    """torch's counter, which knows addmm but not its in-place form."""

    def in_place(y, a, b, *, alpha=1, beta=1, out_shape=None):
        return 2 * a[0] * a[1] * b[1]

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place})


def counted(model: TransformerModel, segments: torch.Tensor, part: Part | None = None) -> tuple[int, int]:
    """Forward and backward as torch counts them; logits at every second place."""
    use_backend(model, "eager")  # CPU flash attention is not counted by torch
    keep = torch.zeros_like(segments, dtype=torch.bool)
    keep[:, ::2] = True
    with counter() as mode:
        out = model(ask(part, tokens(*segments.shape), segments=segments), keep=keep)
    forward = mode.get_total_flops()
    with counter() as mode:
        out.logits.square().sum().backward()
    return forward, mode.get_total_flops()


def ours(model: TransformerModel, segments: torch.Tensor, part: Part | None = None) -> count.Flops:
    return count.flops(model, segments, kept=segments[:, ::2].numel(), memory=ask(part, torch.zeros_like(segments)).memory)


BATCHES = {"packed": [[9, 3], [-2, 10], [5, 5, 2]], "full": [[12], [12]]}


@pytest.mark.concept("X.39", part="models/count.py")
@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_flops_of_every_part(spec, rows):
    part = spec if isinstance(spec, Part) else None
    if isinstance(spec, Part) and "flops" in spec.exempt:
        pytest.skip(spec.exempt["flops"])
    model = tiny(host(spec) if isinstance(spec, Part) else spec)
    segments = segments_of(rows, 12)
    forward, backward = counted(model, segments, part)
    found = ours(model, segments, part)
    assert found.forward == pytest.approx(forward, rel=0.01)
    assert found.backward == pytest.approx(backward, rel=0.01)


@pytest.mark.concept("X.39", part="models/count.py")
@pytest.mark.parametrize("targets", ["all-linear", ("q", "v"), ("ffn.out",), ("k",)], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_frozen_weights_cost_no_gradient(targets, dropout):
    model = LoRA(rank=4, targets=targets, dropout=dropout).apply(tiny(host(dict(PARTS)["mixer-attention"]))).train()
    segments = segments_of(BATCHES["packed"], 12)
    forward, backward = counted(model, segments)
    found = ours(model, segments)
    assert found.forward == pytest.approx(forward, rel=0.01)
    assert found.backward == pytest.approx(backward, rel=0.01)
    assert found.backward < 1.7 * found.forward


ADAPTED: dict[str, Adapter] = {
    **METHODS,
    "dora with dropout": DoRA(rank=3, dropout=0.1),
    "ia3 of the first map": IA3(targets=("layers.0.mixer.inp.k",), inputs=("layers.0.mixer.inp.k",)),
    "whole": LoRA(rank=3, targets=("q",), full=("inp.up",)),
}


@pytest.mark.concept("X.39", part="models/count.py")
@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("name", ADAPTED)
def test_flops_of_every_adapter(name, rows):
    """To the last product, forward and backward."""
    model = ADAPTED[name].apply(tiny(presets.get("tiny-llama")())).train()
    initialize_adapter(model, seed=0)
    segments = segments_of(rows, 12)
    forward, backward = counted(model, segments)
    found = ours(model, segments)
    assert (found.forward, found.backward) == (forward, backward)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("recompute", [Recompute(), Recompute(every=3), Recompute(only="mixer"), Recompute(only="ffn")], ids=str)
def test_what_checkpointing_computes_again(recompute, lora):
    model = tiny(llama(dim=24, layers=4, heads=4, kv_heads=2, hidden=40, vocab=61))
    if lora:
        LoRA(rank=4).apply(model)
    model.recompute = recompute
    segments = segments_of(BATCHES["packed"], 12)
    forward, backward = counted(model, segments)
    found = ours(model, segments)
    assert found.forward == forward and found.again > 0
    assert found.backward + found.again == pytest.approx(backward, rel=0.01)


@pytest.mark.concept("X.39", part="models/count.py")
@pytest.mark.parametrize("name", [name for name in presets.names() if name != "smollm2-135m"] + ["smollm2-135m"])
def test_parameters_are_exact(name):
    spec = presets.get(name)()
    model = build(spec)
    found = count.parameters(model)
    assert found.total == sum(p.numel() for p in model.parameters())
    moved = sum(p.numel() for key, p in model.named_parameters() if ".correction." in key)  # what balances experts without a gradient
    assert found.trained == found.total - moved
    before = found.total
    LoRA(rank=2).apply(model)
    after = count.parameters(model)
    assert after.total - before == after.trained == sum(p.numel() for n, p in model.named_parameters() if ".lora." in n)


def test_smollm2_has_the_parameters_it_is_named_for():
    assert count.parameters(build(presets.get("smollm2-135m")())).total == 134_515_008


@pytest.mark.concept("X.39", part="models/count.py")
def test_a_cache_takes_what_was_counted():
    model = tiny(presets.get("tiny-llama")())
    assert len(count.cache_bytes(model)) == 2
    assert sum(count.cache_bytes(model)) * 3 * 7 == model.cache(rows=3, capacity=7).bytes


def test_decoding_reads_what_is_held():
    model = tiny(presets.get("tiny-llama")())
    use_backend(model, "eager")
    cache = model.cache(rows=1, capacity=20)
    with torch.no_grad():
        model(Inputs(tokens(1, 11), cache=cache))
        with counter() as mode:
            model(Inputs(tokens(1, 1), cache=cache))
    assert count.decoding_flops(model, held=11) == mode.get_total_flops()
