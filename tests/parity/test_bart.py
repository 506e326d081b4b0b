"""BART against transformers, in fp32, on tiny models whose every parameter is redrawn, the bias of the output too.

Encoder and decoder differ in depth, heads and widths, and rows in their padding. Greedy and beam search; the rest is `harness.py`'s.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from tests.parity import hf
from tests.parity.harness import Family, Parity, Refusals
from trivium.core.errors import ConfigError
from trivium.infer.generate import generate, generate_naive
from trivium.infer.sampling import Sampling
from trivium.io.hf import families
from trivium.models.encoder_decoder import EncoderDecoderModel
from trivium.nn.inputs import Inputs

TABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "bart": ("bart", {
        "vocab_size": 101, "d_model": 48, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 6,
        "encoder_ffn_dim": 56, "decoder_ffn_dim": 40, "max_position_embeddings": 40,
    }),
    "bart-scaled": ("bart", {
        "vocab_size": 89, "d_model": 40, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 5, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 44, "decoder_ffn_dim": 72, "max_position_embeddings": 30, "scale_embedding": True, "activation_function": "relu",
        "dropout": 0.25, "attention_dropout": 0.5, "activation_dropout": 0.125, "classifier_dropout": 0.3, "encoder_layerdrop": 0.1,
        "decoder_layerdrop": 0.2, "init_std": 0.03, "use_cache": False, "pad_token_id": 4, "bos_token_id": 5, "eos_token_id": 6,
        "decoder_start_token_id": 3, "forced_eos_token_id": None,
    }),
}  # fmt: skip
EARLY = {"normalize_before", "normalize_embedding", "add_final_layer_norm", "static_position_embeddings"}  # keys of early files alone
LENGTHS = [13, 6, 9]


def tiny(kind: str, keys: dict[str, Any]) -> transformers.BartForConditionalGeneration:
    """Redrawn; positions weigh more than the rest, attention and biases less, and the stream is turned away from the tokens that came
    in: else one token, or the last one again, is the likeliest everywhere."""
    model = hf.tiny(kind, **keys)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.mul_(0.1)
            elif name.endswith("embed_positions.weight"):
                parameter.mul_(8)
            elif name.endswith("out_proj.weight"):
                parameter.mul_(0.2)
            elif name == "model.decoder.layernorm_embedding.weight":
                parameter[::2].mul_(-1)
        model.final_logits_bias.copy_(0.3 * torch.randn(1, model.config.vocab_size, generator=torch.Generator().manual_seed(7)))
    return model


def sources(config: Any, *, lengths: list[int] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(7, config.vocab_size, (length,), generator=generator).tolist() for length in lengths]


def padded(rows: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and which ones are there."""
    width = max(map(len, rows))
    tokens = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    return tokens, torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]


def batch(config: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens, there = padded(sources(config), config.pad_token_id)
    return tokens, there, torch.randint(7, config.vocab_size, (len(LENGTHS), 11), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def theirs_of(model: transformers.PreTrainedModel) -> torch.Tensor:
    tokens, there, decoder = batch(model.config)
    return model(input_ids=tokens, attention_mask=there.long(), decoder_input_ids=decoder).logits


@torch.no_grad()
def ours_of(model: EncoderDecoderModel, config: Any) -> torch.Tensor:
    tokens, there, decoder = batch(config)
    return model(Inputs(decoder, source=Inputs(tokens, segments=there.long() - 1))).logits


@torch.no_grad()
def their_search(model: transformers.PreTrainedModel, start: int, *, beams: int, count: int) -> list[list[int]]:
    tokens, there = padded(sources(model.config), model.config.pad_token_id)
    model.generation_config.forced_eos_token_id = None
    out = model.generate(
        tokens, attention_mask=there.long(), decoder_start_token_id=start, max_new_tokens=count, num_beams=beams, do_sample=False,
        eos_token_id=None, forced_eos_token_id=None, pad_token_id=model.config.pad_token_id,
    )  # fmt: skip
    return out[:, 1:].tolist()


@torch.no_grad()
def beams_of(model: EncoderDecoderModel, given: list[list[int]], start: int, *, beams: int, count: int) -> list[list[int]]:
    """The likeliest of `beams` texts of `count` tokens for each source, over a cache whose rows are reordered."""
    tokens, there = padded(given, 0)
    rows = len(given)
    each = torch.arange(rows).repeat_interleave(beams)
    cache = model.cache(rows * beams, count + 1)
    source = Inputs(tokens[each], segments=(there.long() - 1)[each])
    step, texts = torch.full((rows * beams, 1), start), torch.zeros(rows * beams, 0, dtype=torch.int64)
    scores = torch.tensor([0.0] + [-1e9] * (beams - 1)).repeat(rows)
    for turn in range(count):
        logits = model(Inputs(step, source=source if turn == 0 else None, cache=cache), keep="last").logits
        total = (scores[:, None] + logits.log_softmax(-1)).view(rows, -1)
        scores, best = (x.flatten() for x in total.topk(beams))
        origin = torch.arange(rows).repeat_interleave(beams) * beams + best // logits.shape[-1]
        step = best[:, None] % logits.shape[-1]
        cache.reorder(origin.tolist())
        texts = torch.cat([texts[origin], step], 1)
    return texts[::beams].tolist()


class Searched(Parity):
    """Sources of different lengths in one batch, and each alone without a cache: texts of 12 tokens that begin with `start`."""

    start: int

    def test_greedy_tokens(self, case):
        model, given = case.read().model, sources(case.theirs.config)
        greedy, starts = Sampling(temperature=0, max_tokens=12), [[self.start]] * len(given)
        expected = their_search(case.theirs, self.start, beams=1, count=12)
        assert [completion.ids for completion in generate(model, starts, greedy, sources=given)] == expected
        assert generate_naive(model, starts, greedy, sources=given) == expected
        assert len({token for row in expected for token in row}) > 5  # text, not one token over and over

    def test_beam_search(self, case):
        expected = their_search(case.theirs, self.start, beams=4, count=12)
        assert beams_of(case.read().model, sources(case.theirs.config), self.start, beams=4, count=12) == expected
        assert expected != their_search(case.theirs, self.start, beams=1, count=12)


@pytest.mark.concept("X.157", part="io/hf/bart.py")
@pytest.mark.concept("T03.03", part="models/encoder_decoder.py")
@pytest.mark.concept("T03.03", part="io/directory.py")
class TestBart(Family, Searched, Refusals):
    table = TABLE
    noise = 0.1
    alike = ("architectures", "tie_word_embeddings", "is_encoder_decoder", "is_decoder", *EARLY)
    tiny = staticmethod(tiny)
    theirs = staticmethod(theirs_of)
    ours = staticmethod(ours_of)
    start = 3
    spread = (0.5, 3.0)
    others = {"architectures": ["BartForCausalLM"], "activation_function": "silu"}
    heeded = ("activation_function", "scale_embedding", "dropout", "attention_dropout", "decoder_attention_heads")
    unreadable = [
        ("bart", {"activation_function": "mish"}, "activation_function 'mish'"),
        ("bart", {"architectures": ["BartForCausalLM"]}, "architectures 'BartForCausalLM' is not supported"),
        ("bart", {"decoder_attention_heads": 5}, "decoder_attention_heads"),
        ("bart", {"tie_word_embeddings": False}, "tie_word_embeddings"),
    ]
    unsayable = [
        ("bart", {"encoder": {"dim": 40}}, "dim"),
        ("bart", {"decoder": {"head": {"kind": "lm"}}}, "head"),
        ("bart", {"decoder": {"final_norm": {"kind": "layer"}}}, "final_norm"),
        ("bart", {"encoder": {"context": 7}}, "context"),
        ("bart", {"decoder": {"embed": {"kind": "tokens"}}}, "learned positions"),
    ]

    def silent(self, name: str, spec: Any) -> bool:
        return name.endswith("k.bias")

    def other(self, key: str, value: Any, config: dict[str, Any]) -> Any:
        return value if key in EARLY else super().other(key, value, config)


def test_keys_of_early_files_are_kept():
    family, config = families.get("bart"), transformers.BartConfig(**TABLE["bart"][1]).to_diff_dict()
    early = {
        "normalize_before": False,
        "normalize_embedding": True,
        "num_beams": 4,
        "gradient_checkpointing": False,
        "classif_dropout": 0.0,
    }
    spec, rest = family.to_spec({**config, **early})
    assert spec == family.to_spec(config)[0] and early.items() <= family.to_hf(spec, rest).items()
    assert not early.keys() & family.to_hf(*family.to_spec(config)).keys()
    with pytest.raises(ConfigError, match="normalize_before"):
        family.to_spec({**config, "normalize_before": True})
