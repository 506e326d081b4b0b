"""BART against transformers, in fp32, on tiny models whose every parameter is redrawn, the bias of the output too.

Encoder and decoder differ in depth, heads and widths, and rows in their padding. Logits, greedy and beam search, and the way
there and back. A mutation of any one tensor or key on our side alone must show.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.parity import hf
from trivium.core.errors import ConfigError, TriviumError
from trivium.infer.generate import generate, generate_naive
from trivium.infer.sampling import Sampling
from trivium.io import directory
from trivium.io.hf import families
from trivium.models.encoder_decoder import EncoderDecoderModel
from trivium.nn.inputs import Inputs

TABLE: dict[str, dict[str, Any]] = {
    "bart": {
        "vocab_size": 101, "d_model": 48, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 6,
        "encoder_ffn_dim": 56, "decoder_ffn_dim": 40, "max_position_embeddings": 40,
    },
    "bart-scaled": {
        "vocab_size": 89, "d_model": 40, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 5, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 44, "decoder_ffn_dim": 72, "max_position_embeddings": 30, "scale_embedding": True, "activation_function": "relu",
        "dropout": 0.25, "attention_dropout": 0.5, "activation_dropout": 0.125, "classifier_dropout": 0.3, "encoder_layerdrop": 0.1,
        "decoder_layerdrop": 0.2, "init_std": 0.03, "use_cache": False, "pad_token_id": 4, "bos_token_id": 5, "eos_token_id": 6,
        "decoder_start_token_id": 3, "forced_eos_token_id": None,
    },
}  # fmt: skip
EARLY = {"normalize_before", "normalize_embedding", "add_final_layer_norm", "static_position_embeddings"}  # keys of early files alone
LENGTHS = [13, 6, 9]
TOLERANCE = 1e-5  # of the logits' standard deviation


def tiny(keys: dict[str, Any], *, seed: int = 0) -> transformers.BartForConditionalGeneration:
    """Redrawn; positions weigh more than the rest, attention and biases less, and the stream is turned away from the tokens that came
    in: else one token, or the last one again, is the likeliest everywhere."""
    config = transformers.BartConfig(**keys)
    model = transformers.BartForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    hf.redraw(model, seed=seed)
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
        model.final_logits_bias.copy_(0.3 * torch.randn(1, config.vocab_size, generator=torch.Generator().manual_seed(7)))
    return model


@pytest.fixture(scope="module", params=TABLE)
def case(request, tmp_path_factory) -> tuple[transformers.BartForConditionalGeneration, Path]:
    """transformers' model and the directory it wrote."""
    model = tiny(TABLE[request.param])
    return model, hf.save(model, tmp_path_factory.mktemp(request.param))


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
def off(ours: EncoderDecoderModel, config: Any, expected: torch.Tensor) -> float:
    """The largest difference of logits, in standard deviations."""
    tokens, there, decoder = batch(config)
    found = ours(Inputs(decoder, source=Inputs(tokens, segments=there.long() - 1))).logits
    return ((found - expected).abs().max() / expected.std()).item()


@pytest.mark.concept("X.157", part="io/hf/bart.py")
@pytest.mark.concept("T03.03", part="models/encoder_decoder.py")
def test_logits(case):
    theirs, path = case
    expected = theirs_of(theirs)
    assert 0.5 <= expected.std() <= 3
    assert off(directory.read(path).model, theirs.config, expected) < TOLERANCE


@torch.no_grad()
def their_search(model: transformers.PreTrainedModel, start: int, *, beams: int, count: int) -> list[list[int]]:
    tokens, there = padded(sources(model.config), model.config.pad_token_id)
    model.generation_config.forced_eos_token_id = None
    out = model.generate(
        tokens, attention_mask=there.long(), decoder_start_token_id=start, max_new_tokens=count, num_beams=beams, do_sample=False,
        eos_token_id=None, forced_eos_token_id=None, pad_token_id=model.config.pad_token_id,
    )  # fmt: skip
    return out[:, 1:].tolist()


@pytest.mark.concept("X.157", part="io/hf/bart.py")
@pytest.mark.concept("T03.03", part="models/encoder_decoder.py")
def test_greedy_tokens(case):
    """Sources of different lengths in one batch; each alone, without a cache, the same."""
    theirs, path = case
    model, count = directory.read(path).model, 12
    expected = their_search(theirs, 3, beams=1, count=count)
    given = sources(theirs.config)
    greedy = Sampling(temperature=0, max_tokens=count)
    found = generate(model, [[3]] * len(given), greedy, sources=given)
    assert [completion.ids for completion in found] == expected
    assert generate_naive(model, [[3]] * len(given), greedy, sources=given) == expected
    assert len({token for row in expected for token in row}) > 5  # text, not one token over and over


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


@pytest.mark.concept("X.157", part="io/hf/bart.py")
@pytest.mark.concept("T03.03", part="models/encoder_decoder.py")
def test_beam_search(case):
    theirs, path = case
    model, given = directory.read(path).model, sources(theirs.config)
    expected = their_search(theirs, 3, beams=4, count=12)
    assert beams_of(model, given, 3, beams=4, count=12) == expected
    assert expected != their_search(theirs, 3, beams=1, count=12)


def test_every_key_takes_two_values():
    family = families.get("bart")
    written = [transformers.BartConfig(**keys).to_dict() for keys in TABLE.values()]
    fixed = {"architectures", "tie_word_embeddings", "is_encoder_decoder", "is_decoder", *EARLY}
    for key in {*family.keys.model_fields, *family.carried} - fixed:
        assert len({json.dumps(config[key], sort_keys=True) for config in written}) > 1, key


def test_every_tensor_matters(case):
    """Changing any one tensor on our side alone breaks parity; a bias on the keys moves no score in exact arithmetic."""
    theirs, path = case
    expected = theirs_of(theirs)
    model = directory.read(path).model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        before = parameter.clone()
        parameter.add_(0.1 * torch.randn(before.shape, generator=torch.Generator().manual_seed(0)))
        there = off(model, theirs.config, expected)
        assert there < 10 * TOLERANCE if name.endswith("k.bias") else there > 100 * TOLERANCE, name
        parameter.copy_(before)


def test_every_key_matters(case, tmp_path):
    """Changing any one key on our side alone breaks parity, is refused, or (dropout) shows in the spec."""
    theirs, path = case
    expected = theirs_of(theirs)
    config = json.loads((path / "config.json").read_text())
    shutil.copy(path / "model.safetensors", tmp_path)
    spec, refused = directory.read(path).spec, set()
    for key in set(families.get("bart").keys.model_fields) - EARLY:
        value = config[key]
        changed: Any = 2 * value if isinstance(value, int) else 0.75
        if isinstance(value, bool):
            changed = not value
        elif key == "architectures":
            changed = ["BartForCausalLM"]
        elif key == "activation_function":
            changed = "silu"
        (tmp_path / "config.json").write_text(json.dumps({**config, key: changed}))
        try:
            loaded = directory.read(tmp_path)
        except TriviumError:
            refused.add(key)
            continue
        if "dropout" in key:
            assert loaded.spec != spec and off(loaded.model, theirs.config, expected) < TOLERANCE, key
        else:
            assert off(loaded.model, theirs.config, expected) > 100 * TOLERANCE, key
    assert not refused & {"activation_function", "scale_embedding", "dropout", "attention_dropout", "decoder_attention_heads"}


@pytest.mark.concept("X.157", part="io/hf/bart.py")
@pytest.mark.concept("T03.03", part="io/directory.py")
def test_export_is_what_transformers_writes(case, tmp_path):
    """Files equal byte for byte; transformers loads ours, gives the same and writes the same again."""
    theirs, path = case
    loaded = directory.read(path)
    directory.write(tmp_path / "ours", loaded.model, family="bart", rest=loaded.rest)
    assert (tmp_path / "ours" / "model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()
    back, report = type(theirs).from_pretrained(tmp_path / "ours", attn_implementation="eager", output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(theirs_of(back), theirs_of(theirs))
    assert json.loads((tmp_path / "ours" / "config.json").read_text()) == json.loads((path / "config.json").read_text())
    again = directory.read(tmp_path / "ours")
    assert again.spec == loaded.spec and again.rest == loaded.rest


def test_keys_of_early_files_are_kept():
    family, config = families.get("bart"), transformers.BartConfig(**TABLE["bart"]).to_diff_dict()
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


@pytest.mark.parametrize(
    "change, message",
    [
        ({"activation_function": "mish"}, "activation_function 'mish'"),
        ({"architectures": ["BartForCausalLM"]}, "architectures 'BartForCausalLM' is not supported"),
        ({"decoder_attention_heads": 5}, "decoder_attention_heads"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
    ],
)
def test_configs_that_cannot_be_read_say_why(change, message):
    with pytest.raises(ConfigError, match=message):
        families.get("bart").to_spec({**transformers.BartConfig(**TABLE["bart"]).to_diff_dict(), **change})


@pytest.mark.parametrize(
    "stack, change, reason",
    [
        ("encoder", {"dim": 40}, "dim"),
        ("decoder", {"head": {"kind": "lm"}}, "head"),
        ("decoder", {"final_norm": {"kind": "layer"}}, "final_norm"),
        ("encoder", {"context": 7}, "context"),
        ("decoder", {"embed": {"kind": "tokens"}}, "learned positions"),
    ],
)
def test_what_the_family_cannot_say_is_refused(stack, change, reason):
    family = families.get("bart")
    spec, rest = family.to_spec(transformers.BartConfig(**TABLE["bart"]).to_diff_dict())
    with pytest.raises(ConfigError, match=reason):
        family.to_hf(spec.replace(**{stack: getattr(spec, stack).replace(**change)}), rest)
