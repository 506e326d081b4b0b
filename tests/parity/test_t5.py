"""T5 and T5 v1.1 against transformers, in fp32, on tiny models whose every parameter is redrawn.

The two stacks differ in depth, heads are wider together than the model, and rows differ in their padding. Logits, greedy and beam
search, and the way there and back. A mutation of any one tensor or key on our side alone must show.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

from tests.parity import hf
from tests.parity.test_bart import TOLERANCE, beams_of, off, sources, their_search, theirs_of
from trivium.core.errors import ConfigError, FileError, TriviumError
from trivium.infer.generate import generate, generate_naive
from trivium.infer.sampling import Sampling
from trivium.io import directory
from trivium.io.hf import families
from trivium.io.tensors import read_weights

TABLE: dict[str, dict[str, Any]] = {
    "t5": {
        "vocab_size": 101, "d_model": 48, "d_kv": 10, "d_ff": 56, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 6,
        "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "layer_norm_epsilon": 0.01,
    },
    "t5-v1.1": {
        "vocab_size": 89, "d_model": 40, "d_kv": 6, "d_ff": 72, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 5, "dropout_rate": 0.25,
        "relative_attention_num_buckets": 16, "relative_attention_max_distance": 20, "layer_norm_epsilon": 0.05, "initializer_factor": 0.5,
        "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "pad_token_id": 3, "eos_token_id": 4, "classifier_dropout": 0.3,
        "use_cache": False,
    },
    "t5-gelu": {
        "vocab_size": 89, "d_model": 40, "d_kv": 6, "d_ff": 72, "num_layers": 2, "num_heads": 5, "feed_forward_proj": "gelu",
        "layer_norm_epsilon": 0.02,
    },
}  # fmt: skip


def tiny(keys: dict[str, Any], *, seed: int = 0) -> transformers.T5ForConditionalGeneration:
    """Redrawn; biases of distances and what sublayers add weigh more, and queries less, since scores are not scaled. v1.1 has a head
    of its own."""
    config = transformers.T5Config(**keys)
    model = transformers.T5ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    if keys.get("tie_word_embeddings") is False:
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.shared.weight))
    hf.redraw(model, seed=seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".q.weight"):
                parameter.mul_(config.d_kv**-0.5)
            elif name.endswith((".o.weight", ".wo.weight")):
                parameter.mul_(3)
            elif "relative_attention_bias" in name:
                parameter.mul_(4)
            elif name == "shared.weight" and config.scale_decoder_outputs:
                parameter.mul_(2)
    return model


def save(model: transformers.T5ForConditionalGeneration, path: Path) -> Path:
    """As transformers writes it; it always says that the head is tied, and files of v1.1 say that it is not."""
    hf.save(model, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": model.config.scale_decoder_outputs}))
    return path


@pytest.fixture(scope="module", params=TABLE)
def case(request, tmp_path_factory) -> tuple[transformers.T5ForConditionalGeneration, Path]:
    """transformers' model and the directory it wrote."""
    model = tiny(TABLE[request.param])
    return model, save(model, tmp_path_factory.mktemp(request.param))


@pytest.mark.concept("X.156", part="io/hf/t5.py")
@pytest.mark.concept("T03.03", part="models/encoder_decoder.py")
def test_logits(case):
    theirs, path = case
    expected = theirs_of(theirs)
    assert 0.4 <= expected.std() <= 3
    model = directory.read(path).model
    assert off(model, theirs.config, expected) < TOLERANCE
    assert len([name for name, _ in model.named_parameters() if "table" in name]) == 2


@pytest.mark.concept("X.156", part="io/hf/t5.py")
@pytest.mark.concept("T03.03", part="models/encoder_decoder.py")
def test_greedy_and_beam_search(case):
    theirs, path = case
    model, given, count = directory.read(path).model, sources(theirs.config), 12
    expected = their_search(theirs, 0, beams=1, count=count)
    greedy = Sampling(temperature=0, max_tokens=count)
    assert [completion.ids for completion in generate(model, [[0]] * len(given), greedy, sources=given)] == expected
    assert generate_naive(model, [[0]] * len(given), greedy, sources=given) == expected
    assert len({token for row in expected for token in row}) > 5
    beams = their_search(theirs, 0, beams=4, count=count)
    assert beams_of(model, given, 0, beams=4, count=count) == beams and beams != expected


def test_every_key_takes_two_values():
    family = families.get("t5")
    written = [transformers.T5Config(**keys).to_dict() for keys in TABLE.values()]
    fixed = {"architectures", "tie_word_embeddings", "is_encoder_decoder", "is_decoder"}
    for key in {*family.keys.model_fields, *family.carried} - fixed:
        assert len({json.dumps(config[key], sort_keys=True) for config in written}) > 1, key


def test_every_tensor_matters(case):
    theirs, path = case
    expected = theirs_of(theirs)
    model = directory.read(path).model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        before = parameter.clone()
        parameter.add_(0.1 * torch.randn(before.shape, generator=torch.Generator().manual_seed(0)))
        assert off(model, theirs.config, expected) > 100 * TOLERANCE, name
        parameter.copy_(before)


def test_every_key_matters(case, tmp_path):
    """Changing any one key on our side alone breaks parity, is refused, or (dropout) shows in the spec."""
    theirs, path = case
    expected = theirs_of(theirs)
    config = json.loads((path / "config.json").read_text())
    shutil.copy(path / "model.safetensors", tmp_path)
    spec, refused = directory.read(path).spec, set()
    for key in families.get("t5").keys.model_fields:
        value = config[key]
        changed: Any = 0.75 if "dropout" in key else 2 * value
        if isinstance(value, bool):
            changed = not value
        elif key == "architectures":
            changed = ["T5EncoderModel"]
        elif isinstance(value, str):
            changed = "silu" if key == "dense_act_fn" else "gated-silu" if config["is_gated_act"] else "silu"
        own = {"dense_act_fn": None} if key == "feed_forward_proj" else {}
        (tmp_path / "config.json").write_text(json.dumps({**config, key: changed, **own}))
        try:
            loaded = directory.read(tmp_path)
        except TriviumError:
            refused.add(key)
            continue
        if "dropout" in key:
            assert loaded.spec != spec and off(loaded.model, theirs.config, expected) < TOLERANCE, key
        elif key != "tie_word_embeddings":  # what it says, scale_decoder_outputs says too
            assert off(loaded.model, theirs.config, expected) > 100 * TOLERANCE, key
    assert not refused & {"feed_forward_proj", "layer_norm_epsilon", "relative_attention_max_distance", "dropout_rate"}
    assert refused >= {"architectures", "dense_act_fn", "is_gated_act", "scale_decoder_outputs", "num_heads"}


@pytest.mark.concept("X.156", part="io/hf/t5.py")
@pytest.mark.concept("T03.03", part="io/directory.py")
def test_export_is_what_transformers_writes(case, tmp_path):
    """Files equal byte for byte; transformers loads ours and gives the same."""
    theirs, path = case
    loaded = directory.read(path)
    directory.write(tmp_path / "ours", loaded.model, family="t5", rest=loaded.rest)
    assert (tmp_path / "ours" / "model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()
    back, report = type(theirs).from_pretrained(tmp_path / "ours", attn_implementation="eager", output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(theirs_of(back), theirs_of(theirs))
    assert json.loads((tmp_path / "ours" / "config.json").read_text()) == json.loads((path / "config.json").read_text())
    again = directory.read(tmp_path / "ours")
    assert again.spec == loaded.spec and again.rest == loaded.rest


def test_early_files(tmp_path):
    """No keys that came later; copies of the table of tokens, and a table of biases that nothing reads."""
    theirs = tiny(TABLE["t5"])
    save(theirs, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("scale_decoder_outputs", "tie_word_embeddings", "dense_act_fn", "is_gated_act", "is_decoder", "classifier_dropout"):
        del config[key]
    extra = {"n_positions": 512, "output_past": True, "decoder_start_token_id": 0}
    (tmp_path / "config.json").write_text(json.dumps({**config, **extra}))
    weights = {name: lazy.load().clone() for name, lazy in read_weights(tmp_path).items()}
    copies = {
        name: weights["shared.weight"].clone() for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    }
    unread = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": torch.ones(8, 6)}
    safetensors.torch.save_file(weights | copies | unread, tmp_path / "model.safetensors")
    loaded = directory.read(tmp_path)
    assert off(loaded.model, theirs.config, theirs_of(theirs)) < TOLERANCE
    assert extra.items() <= families.get("t5").to_hf(loaded.spec, loaded.rest).items()
    copies["lm_head.weight"][0] += 1
    safetensors.torch.save_file(weights | copies, tmp_path / "model.safetensors")
    with pytest.raises(FileError, match="lm_head"):
        directory.read(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"feed_forward_proj": "gated-mish"}, "feed_forward_proj 'gated-mish'"),
        ({"feed_forward_proj": "double-gelu"}, "feed_forward_proj 'double-gelu'"),
        ({"is_gated_act": True}, "disagree"),
        ({"architectures": ["T5EncoderModel"]}, "architectures 'T5EncoderModel' is not supported"),
        ({"relative_attention_num_buckets": 7}, "buckets"),
    ],
)
def test_configs_that_cannot_be_read_say_why(change, message):
    with pytest.raises(ConfigError, match=message):
        families.get("t5").to_spec({**transformers.T5Config(**TABLE["t5"]).to_diff_dict(), **change})


@pytest.mark.parametrize(
    "stack, change, reason",
    [
        ("decoder", {"head": {"kind": "lm", "tied": True}}, "scale"),
        ("decoder", {"head": {"kind": "lm", "scale": 0.5}}, "scale"),
        ("encoder", {"final_norm": {"kind": "none"}}, "final_norm"),
        ("encoder", {"context": 7}, "context"),
    ],
)
def test_what_the_family_cannot_say_is_refused(stack, change, reason):
    family = families.get("t5")
    spec, rest = family.to_spec(transformers.T5Config(**TABLE["t5"]).to_diff_dict())
    with pytest.raises(ConfigError, match=reason):
        family.to_hf(spec.replace(**{stack: getattr(spec, stack).replace(**change)}), rest)
