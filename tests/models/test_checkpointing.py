"""Gradient checkpointing changes what is kept and nothing else: gradients to the bit, dropout included."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.tiny import ask, host, parts, segments_of, tiny, tokens
from tests.train import toys
from trivium.adapt.lora import LoRA
from trivium.core.errors import ConfigError
from trivium.core.spec import Part, validate
from trivium.models.checkpointing import Recompute
from trivium.models.ledger import Ledger
from trivium.models.presets import llama
from trivium.models.transformer import TransformerModel
from trivium.nn.inputs import Inputs

POLICIES = (Recompute(), Recompute(every=2), Recompute(every=3), Recompute(only="mixer"), Recompute(only="ffn"))
SEGMENTS = segments_of([[9, 3], [-2, 10], [5, 5, 2]], 12)


def model(*, layers: int = 5, dropout: float | None = None) -> TransformerModel:
    made = tiny(llama(dim=24, layers=layers, heads=4, kv_heads=2, hidden=40, vocab=61))
    if dropout is not None:
        LoRA(rank=3, dropout=dropout).apply(made)
        for name, parameter in made.named_parameters():
            if name.endswith((".A", ".B")):
                torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(len(name)))
    return made.train()


def gradients(of: TransformerModel, part: Part | None = None) -> dict[str, torch.Tensor]:
    of.zero_grad()
    torch.manual_seed(3)
    of(ask(part, tokens(3, 12), segments=SEGMENTS)).logits[SEGMENTS >= 0].square().mean().backward()
    torch.rand(2)
    return {name: p.grad.clone() for name, p in of.named_parameters() if p.grad is not None} | {"rng": torch.get_rng_state()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.concept("T10.02", part="models/checkpointing.py")
@pytest.mark.parametrize("dropout", [None, 0.0, 0.3], ids=str)
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_gradients_are_the_same_to_the_bit(policy, dropout):
    """And the random state that is left behind: the draws of the second pass are those of the first."""
    subject = model(dropout=dropout)
    expected = gradients(subject)
    subject.recompute = policy
    assert len(expected) > 5 and same(gradients(subject), expected)


@pytest.mark.concept("T10.02", part="models/checkpointing.py")
def test_a_second_pass_that_draws_anew_would_be_caught():
    """The oracle, torch's checkpoint over hand-made stretches, and the same without its random state."""
    subject = model(dropout=0.3)
    expected = gradients(subject)
    layers = list(subject.layers)

    def by_hand(*, keep: bool):
        def run(x, step):
            for start in range(0, len(layers), 2):
                stretch = torch.nn.ModuleList(layers[start : start + 2])

                def forward(x, stretch=stretch):
                    for layer in stretch:
                        x = layer(x, step)
                    return x

                x = checkpoint(forward, x, use_reentrant=False, preserve_rng_state=keep)
            return x

        return run

    subject.run = by_hand(keep=True)
    assert same(gradients(subject), expected)
    subject.run = by_hand(keep=False)
    assert not same(gradients(subject), expected)


@pytest.mark.parametrize("part", [part for _, part in parts()], ids=[name for name, _ in parts()])
def test_every_part_can_be_computed_again(part):
    subject = tiny(host(part)).train()
    expected = gradients(subject, part)
    subject.recompute = Recompute(every=2)
    assert same(gradients(subject, part), expected)


def held(layers: int, policy: Recompute | None) -> int:
    """Bytes that a forward leaves for its backward."""
    subject = model(layers=layers)
    subject.recompute = policy
    with Ledger() as ledger:
        ledger.note(subject.parameters(), "weights")
        out = subject(Inputs(tokens(3, 64)), keep="none").hidden
        kept = ledger.live["tensors"]
    assert out.requires_grad
    return kept


@pytest.mark.concept("T10.02", part="models/checkpointing.py")
def test_a_layer_keeps_its_input_and_no_more():
    one = 3 * 64 * 24 * 4  # a residual stream
    slope = {str(policy): (held(12, policy) - held(4, policy)) / 8 for policy in (None, Recompute(), Recompute(every=4))}
    assert slope["every=1 only=None"] == pytest.approx(one, rel=0.02)
    assert slope["every=4 only=None"] == pytest.approx(one / 4, rel=0.02)
    assert slope["None"] > 10 * one
    mixer, ffn = ((held(12, Recompute(only=only)) - held(4, Recompute(only=only))) / 8 for only in ("mixer", "ffn"))
    assert one < mixer < slope["None"] and one < ffn < slope["None"]


def peak(layers: int, policy: Recompute | None) -> int:
    """Bytes at the worst moment of a forward and backward, parameters and their gradients aside."""
    subject = model(layers=layers)
    subject.recompute = policy
    shapes = {parameter.shape for parameter in subject.parameters()}
    with Ledger(lambda tensor: "gradients" if tensor.shape in shapes else "tensors") as ledger:
        ledger.note(subject.parameters(), "weights")
        subject(Inputs(tokens(3, 64)), keep="none").hidden.sum().backward()
    return ledger.peak["tensors"]


@pytest.mark.slow
@pytest.mark.concept("T10.02", part="models/checkpointing.py")
def test_stretches_of_the_root_of_the_depth_need_the_root_of_the_memory():
    """16 to 64 layers: without it 4 times the memory, with stretches of sqrt(n) about twice."""
    assert peak(64, None) / peak(16, None) > 3.5
    assert peak(64, Recompute(every=8)) / peak(16, Recompute(every=4)) < 2.2
    assert peak(64, Recompute(every=8)) < 0.25 * peak(64, None)


def test_nothing_is_computed_again_where_there_is_no_backward():
    subject = model()
    subject.recompute = Recompute()
    with torch.no_grad():
        plain = subject(tokens(1, 6)).logits
        cache = subject.cache(rows=1, capacity=6)
        cached = subject(Inputs(tokens(1, 6), cache=cache)).logits
    assert cache.lengths == [6] and torch.equal(plain, cached)


def test_halves_have_no_stretches():
    with pytest.raises(ConfigError, match="every"):
        validate(Recompute, {"every": 2, "only": "mixer"})


@pytest.mark.concept("T10.02", part="models/checkpointing.py")
def test_a_run_with_it_is_the_run_without(tmp_path):
    """LoRA with dropout and accumulation: the same weights; and a run may be gone on with without it."""
    plain, _ = toys.train(tmp_path / "plain")
    again, _ = toys.train(tmp_path / "again", config=toys.CONFIG.replace(recompute=Recompute(every=2)))
    assert toys.same(toys.weights(again), toys.weights(plain))
    resumed, done = toys.train(tmp_path / "again", config=toys.CONFIG)
    assert done.resumed == 6 and toys.same(toys.weights(resumed), toys.weights(plain))


def test_what_has_no_layers_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="recompute"):
        toys.train(tmp_path, of=toys.Bigram(), config=toys.CONFIG.replace(recompute=Recompute()))
