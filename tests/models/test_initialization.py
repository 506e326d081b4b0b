"""How matrices start: each one's deviation is its formula's, torch's own where torch has it, and variance stays flat."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.tiny import tokens
from trivium.core.errors import ConfigError
from trivium.models.block import Block
from trivium.models.presets import gpt
from trivium.models.transformer import Transformer, TransformerModel, build, initialize
from trivium.nn.activations import ReLU
from trivium.nn.feedforward import MLP
from trivium.nn.inputs import Inputs
from trivium.nn.step import Step

pytestmark = pytest.mark.concept("X.51", part="models/initialization.py")


def gpt2_model(*, layers: int, dim: int = 64, start: str = "gpt2", std: float = 0.02) -> TransformerModel:
    spec = gpt(dim=dim, layers=f"{layers}*layer", heads=4, vocab=512, context=128, windows={"layer": None}, dropout=0.0)
    return initialize(build(spec, device="cpu"), seed=0, start=start, std=std).eval()


@pytest.mark.parametrize("start", ["gpt2", "xavier", "kaiming"])
def test_every_tensor_starts_as_its_formula_says(start):
    model = gpt2_model(layers=3, start=start)
    drawn = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
            continue
        if "norm" in name:
            assert (parameter == 1).all(), name
            continue
        like = torch.empty(parameter.shape)
        if start == "gpt2" or name.startswith("embed"):
            expected = 0.02 / 6**0.5 if start == "gpt2" and name.endswith("out.weight") else 0.02
        elif start == "xavier":
            expected = nn.init.xavier_normal_(like, generator=drawn).std()
        else:
            expected = nn.init.kaiming_normal_(like, nonlinearity="relu" if "ffn.inp" in name else "linear", generator=drawn).std()
        error = 4 * (2 / parameter.numel()) ** 0.5
        assert abs(parameter.std() / expected - 1) < error, (name, parameter.std(), expected)
        assert abs(parameter.mean()) < 5 * expected / parameter.numel() ** 0.5, name
        normal = (parameter / parameter.std()).flatten()
        assert abs((normal**4).mean() - 3) < 0.3, name  # a normal draw, not a uniform one


def spread(model: TransformerModel) -> list[float]:
    """The variance of the stream before each layer and after the last one."""
    x = tokens(4, 64, vocab=512)
    step, out = Step.begin(Inputs(x), causal=True), []
    with torch.no_grad():
        stream = model.embed(x, step)
        out.append(stream.var().item())
        for layer in model.layers:
            stream = layer(stream, step)
            out.append(stream.var().item())
    return out


def test_gpt2s_scaling_keeps_the_stream_flat_over_48_layers():
    scaled, plain = gpt2_model(layers=48), gpt2_model(layers=48)
    with torch.no_grad():
        for layer in plain.layers:
            for linear in (layer.mixer.out, layer.ffn.out):
                linear.weight.mul_(96**0.5)
    flat, grown = spread(scaled), spread(plain)
    assert max(flat) / min(flat) < 2
    assert grown[-1] / grown[0] > 20


def test_gpt2s_scaling_makes_what_layers_add_independent_of_their_number():
    added = {layers: (values := spread(gpt2_model(layers=layers, std=0.1)))[-1] - values[0] for layers in (6, 48)}
    assert 0.7 < added[48] / added[6] < 1.4


def test_kaiming_keeps_variance_through_48_layers_without_norms_or_residuals():
    block = Block(ffn=MLP(hidden=512, activation=ReLU(), gated=False), norm={"kind": "none"}, residual={"kind": "none"})
    spec = Transformer(dim=256, vocab=512, layers="48*a", blocks={"a": block})
    kaiming = spread(initialize(build(spec, device="cpu"), seed=0, start="kaiming", std=1.0))
    assert all(1 / 4 < value / kaiming[0] < 4 for value in kaiming)
    xavier = spread(initialize(build(spec, device="cpu"), seed=0, start="xavier", std=1.0))
    assert xavier[-1] / xavier[0] < 1e-6  # made for activations without a kink at zero


def test_an_unknown_start_is_named():
    with pytest.raises(ConfigError, match="did you mean 'xavier'"):
        gpt2_model(layers=1, start="xaviar")
