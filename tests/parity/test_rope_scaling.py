"""Rotary scalings against transformers: frequencies and magnitude by themselves, then whole models within and beyond the
trained length, from transformers' own files and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.parity import hf
from tests.parity.harness import OTHER, SHAPE, TOLERANCE, Decoded, Exported, off, tokens
from tests.tiny import segments_of, tiny
from trivium.core.errors import ConfigError, TriviumError
from trivium.infer.generate import generate, generate_naive
from trivium.infer.sampling import Sampling
from trivium.io import directory
from trivium.io.hf import families, rope
from trivium.io.hf.rope import ORIGINAL
from trivium.io.rules import forward
from trivium.io.tensors import Lazy
from trivium.models.transformer import build
from trivium.nn.inputs import Inputs
from trivium.nn.positions import Rope
from trivium.nn.rope_scaling import NTKScaling, YarnScaling, inverse_wavelengths

POSITIONS = 24  # max_position_embeddings, which the tests' 40 tokens exceed
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def long(pairs: int, **keys: Any) -> dict[str, Any]:
    return {
        "rope_type": "longrope", "rope_theta": 300.0, "short_factor": [1 + 0.1 * i for i in range(pairs)],
        "long_factor": [1.5 + 0.7 * i for i in range(pairs)], "original_max_position_embeddings": 20, **keys,
    }  # fmt: skip


SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "rope_theta": 30.0, "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 3.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn-32x": {**YARN, "factor": 32.0, "rope_theta": 10000.0, "original_max_position_embeddings": 4096},
    "yarn-whole": {**YARN, "beta_fast": 3.0, "beta_slow": 0.7, "truncate": False, "factor": 8},
    "yarn-cut": {**YARN, "beta_fast": 3.0, "beta_slow": 0.7, "rope_theta": 10000.0, "original_max_position_embeddings": 256},
    "yarn-factor": {**YARN, "attention_factor": 0.7},
    "yarn-mscale": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn-one-mscale": {**YARN, "mscale": 0.7},
    "yarn-nulls": {**YARN, "attention_factor": None, "beta_fast": None, "mscale": None},
    "yarn-shrinks": {**YARN, "factor": 0.5},
    "longrope": long(6),
    "longrope-factor": long(6, factor=5.0),
    "longrope-attention-factor": long(6, attention_factor=1.3),
    "longrope-shrinks": long(6, factor=0.9),
}  # fmt: skip


@pytest.mark.concept("T13.02", "T13.03", "T13.04", part="nn/rope_scaling.py")
@pytest.mark.concept("T02.01", part="nn/rope_scaling.py")
@pytest.mark.parametrize("length", [1, POSITIONS, POSITIONS + 1, 41, 1000])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_and_magnitude(name, length):
    config = transformers.LlamaConfig(
        hidden_size=48, num_attention_heads=4, head_dim=12, max_position_embeddings=POSITIONS, rope_parameters=dict(SCALINGS[name])
    )
    expected, magnitude = ROPE_INIT_FUNCTIONS[SCALINGS[name]["rope_type"]](config, torch.device("cpu"), seq_len=length)
    ours = rope.to_rope(rope.modernize(config.to_dict())["rope_parameters"], positions=POSITIONS)
    found = ours.frequencies(12, torch.tensor(length))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
    assert ours.scaling is not None and abs(ours.scaling.magnitude - magnitude) < 1e-7
    many = ours.frequencies(12, torch.tensor([[1, length], [length, 9]]))
    assert torch.equal(many if many.ndim == 1 else many[0, 1], found)


@pytest.mark.concept("T02.01", part="nn/positions.py")
@pytest.mark.parametrize("share", [0.5, 0.75])
@pytest.mark.parametrize("name", ["linear", "dynamic", "llama3", "yarn", "longrope"])
def test_frequencies_of_a_part_of_each_head(name, share):
    parameters = {**(long(int(8 * share)) if name == "longrope" else SCALINGS[name]), "partial_rotary_factor": share}
    config = transformers.LlamaConfig(
        hidden_size=48, num_attention_heads=4, head_dim=16, max_position_embeddings=POSITIONS, rope_parameters=dict(parameters)
    )
    expected, _ = ROPE_INIT_FUNCTIONS[name](config, torch.device("cpu"), seq_len=30)
    ours = rope.to_rope(rope.modernize(config.to_dict())["rope_parameters"], positions=POSITIONS, partial=True)
    torch.testing.assert_close(ours.frequencies(ours.turned(16), torch.tensor(30)), expected, rtol=0, atol=1e-7)


@pytest.mark.concept("T13.02", part="nn/rope_scaling.py")
def test_a_fixed_change_of_base_is_the_dynamic_one_held_at_a_length():
    """The dynamic base at length L is the fixed one for the factor `f L / original - (f - 1)`; the longest wavelength grows by
    the factor, the shortest stays."""
    dynamic = rope.to_rope(SCALINGS["dynamic"], positions=POSITIONS)
    for length in (48, 72, 240):
        fixed = Rope(base=100.0, scaling=NTKScaling(factor=3.0 * length / POSITIONS - 2))
        torch.testing.assert_close(fixed.frequencies(12, torch.tensor(0)), dynamic.frequencies(12, torch.tensor(length)), rtol=0, atol=1e-7)
        plain, scaled = inverse_wavelengths(100.0, 12, torch.device("cpu")), fixed.frequencies(12, torch.tensor(0))
        assert plain[0] == scaled[0] and plain[-1] / scaled[-1] == pytest.approx(3.0 * length / POSITIONS - 2, rel=1e-5)


@pytest.mark.concept("T13.03", part="nn/rope_scaling.py")
def test_interpolated_positions_stay_within_those_trained():
    plain, scaled = Rope(base=100.0), rope.to_rope(SCALINGS["linear"], positions=POSITIONS)
    scaled = scaled.replace(base=100.0)
    trained = POSITIONS - 1
    furthest = int(2.5 * trained)
    angles = furthest * scaled.frequencies(12, torch.tensor(0))
    assert (angles <= trained * plain.frequencies(12, torch.tensor(0)) + 1e-6).all()
    torch.testing.assert_close(angles, furthest / 2.5 * plain.frequencies(12, torch.tensor(0)))


@pytest.mark.concept("T13.04", part="nn/rope_scaling.py")
def test_yarn_keeps_fast_channels_and_interpolates_slow_ones():
    scaling = YarnScaling(factor=8.0, original_max_position_embeddings=4096)
    plain, scaled = (Rope(base=1e4, scaling=s).frequencies(128, torch.tensor(0)) for s in (None, scaling))
    turns = 4096 * plain / (2 * torch.pi)
    ratio = plain / scaled
    torch.testing.assert_close(ratio[turns > 40], torch.ones_like(ratio[turns > 40]))
    torch.testing.assert_close(ratio[turns < 0.8], torch.full_like(ratio[turns < 0.8], 8.0))
    assert (ratio.diff() >= -1e-4).all()
    assert scaling.magnitude == pytest.approx(0.1 * torch.tensor(8.0).log().item() + 1)


TABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-linear": ("llama", {**SHAPE, "max_position_embeddings": POSITIONS, "rope_parameters": SCALINGS["linear"]}),
    "llama-dynamic": ("llama", {**SHAPE, "max_position_embeddings": POSITIONS, "rope_parameters": SCALINGS["dynamic"]}),
    "llama-llama3": ("llama", {**OTHER, "max_position_embeddings": 128, "rope_parameters": LLAMA3}),
    "llama-yarn": ("llama", {**SHAPE, "max_position_embeddings": 64, "rope_parameters": YARN}),
    "llama-longrope": ("llama", {**SHAPE, "max_position_embeddings": 80, "rope_parameters": long(4)}),
    "mistral-dynamic": ("mistral", {
        **OTHER, "num_key_value_heads": 1, "head_dim": 12, "sliding_window": 11, "max_position_embeddings": POSITIONS,
        "rope_parameters": SCALINGS["dynamic"],
    }),
    "mistral-yarn": ("mistral", {
        **OTHER, "num_key_value_heads": 1, "head_dim": 12, "max_position_embeddings": 64, "rope_parameters": SCALINGS["yarn-mscale"],
    }),
    "qwen2-dynamic": ("qwen2", {
        **OTHER, "num_key_value_heads": 1, "max_position_embeddings": POSITIONS, "rope_parameters": SCALINGS["dynamic"],
    }),
    "qwen3-longrope": ("qwen3", {
        **SHAPE, "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 60, "rope_parameters": long(6, factor=3),
    }),
}  # fmt: skip


class TestScaled(Exported, Decoded):
    """Greedy text runs over the end of the trained length: keys keep the turn that they were cached with, in transformers as here."""

    table = TABLE

    @pytest.mark.concept("T13.02", "T13.03", "T13.04", part="io/hf/rope.py")
    @pytest.mark.parametrize("length", [9, 20, 21, POSITIONS, POSITIONS + 1, 40])
    def test_logits_within_and_beyond_the_trained_length(self, case, length):
        x = tokens(case.theirs.config.vocab_size)[:, :length]
        assert off(case.read().model, hf.logits(case.theirs, x), x) < 3 * TOLERANCE


def test_a_document_has_its_own_length():
    """Rows, packed documents and padding do not change the length that a document is turned by; steps read what they hold."""
    model_type, keys = TABLE["llama-dynamic"]
    theirs = hf.tiny(model_type, **keys)
    spec, rest = families.get("llama").to_spec(theirs.config.to_diff_dict())
    model, x = tiny(spec), tokens(101, rows=3)
    segments = segments_of([[30, 10], [-5, 35], [12, 28]], 40)
    together = model(Inputs(x, segments=segments)).logits
    for row in range(3):
        for document in segments[row].unique().tolist():
            at = (segments[row] == document).nonzero()[:, 0]
            if document >= 0:
                torch.testing.assert_close(together[row, at], model(x[row, at][None]).logits[0], rtol=0, atol=2e-5)
    positions = torch.arange(40).repeat(3, 1)
    torch.testing.assert_close(model(Inputs(x, positions=positions)).logits, model(x).logits, rtol=0, atol=2e-5)
    cache = model.cache(3, 40)
    within = torch.cat([model(Inputs(piece, cache=cache)).logits for piece in x[:, :24].split((7, 1, 16), 1)], 1)
    torch.testing.assert_close(within, model(x[:, :24]).logits, rtol=0, atol=2e-5)
    assert rest and spec.context == 3 * POSITIONS


@pytest.mark.parametrize("name", ["phi3", "llama"])
def test_an_answer_that_grows_past_the_switch_is_read_again(name):
    """With LongRoPE, as transformers' Phi 3 does; then cached tokens are those of full forwards. Rows cross in their own time."""
    keys = {**SHAPE, "num_key_value_heads": 2, "max_position_embeddings": 80, "pad_token_id": 0}
    if name == "phi3":
        keys |= {"original_max_position_embeddings": 20}
    theirs = hf.tiny(name, **keys, rope_parameters={key: value for key, value in long(4).items() if name == "llama" or key != ORIGINAL})
    family = families.get(name)
    spec, _ = family.to_spec(theirs.config.to_diff_dict())
    tensors = {key: Lazy.of(value) for key, value in theirs.state_dict().items()}
    model = build(spec, device="meta")
    directory.fill(model, forward(family.rules(spec), tensors))
    rows = tokens(101, seed=1)
    prompts, greedy = [rows[0, :9].tolist(), rows[1, :16].tolist(), rows[1, :30].tolist()], Sampling(temperature=0, max_tokens=20)
    found = [one.ids for one in generate(model, prompts, greedy, chunk=8)]
    assert found == generate_naive(model, prompts, greedy)
    if name == "phi3":
        assert found == [hf.greedy(theirs, torch.tensor([prompt]), 20)[0].tolist() for prompt in prompts]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "ntk", "factor": 2.0}, "unknown rope_type 'ntk'"),
        ({"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 7}, "says another length"),
        ({"rope_type": "yarn", "factor": 2.0, "beta_fast": 1.0, "beta_slow": 2.0, "original_max_position_embeddings": 7}, "beta_fast"),
        ({"rope_type": "longrope", "short_factor": [1.0]}, "long_factor"),
    ],
)
def test_parameters_that_cannot_be_read_say_why(parameters, message):
    with pytest.raises(ConfigError, match=message):
        rope.to_rope({"rope_theta": 10.0, **parameters}, positions=64)


def test_factors_that_do_not_fit_the_head_are_refused():
    model_type, keys = TABLE["llama-longrope"]
    spec, _ = families.get(model_type).to_spec(hf.MODELS[model_type][0](**{**keys, "rope_parameters": long(5)}).to_diff_dict())
    with pytest.raises(TriviumError, match="one for each of the 4 pairs"):
        tiny(spec)(tokens(101))
