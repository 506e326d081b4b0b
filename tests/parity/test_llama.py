"""Llama and Mistral against transformers, in fp32, on tiny models whose every parameter is redrawn.

The table gives each key of config.json that a family reads two values (but `hidden_act`, where silu is all there is),
and heads, kv heads, head size and width that all differ. A mutation of any one tensor or key on our side alone must show.
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
from trivium.io import directory
from trivium.io.hf import families
from trivium.io.tensors import read_weights
from trivium.models.transformer import TransformerModel

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
SHAPE = {"vocab_size": 101, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 6}
OTHER = {"vocab_size": 89, "hidden_size": 40, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 5}
TABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-gqa-biases": ("llama", {
        **SHAPE, "num_key_value_heads": 2, "head_dim": 10, "rms_norm_eps": 0.01, "attention_bias": True, "max_position_embeddings": 64,
    }),
    "llama-mqa-llama3-tied": ("llama", {
        **OTHER, "num_key_value_heads": 1, "head_dim": 14, "rms_norm_eps": 0.05, "mlp_bias": True, "tie_word_embeddings": True,
        "max_position_embeddings": 256, "rope_parameters": LLAMA3, "bos_token_id": 5, "eos_token_id": [6, 7], "pad_token_id": 3,
        "initializer_range": 0.03, "attention_dropout": 0.25, "use_cache": False, "pretraining_tp": 2,
    }),
    "llama-mha-linear": ("llama", {**OTHER, "rms_norm_eps": 0.02, "rope_parameters": {"rope_type": "linear", "rope_theta": 30.0, "factor": 2.5}}),
    "mistral-window": ("mistral", {
        **SHAPE, "num_key_value_heads": 3, "head_dim": 4, "rms_norm_eps": 0.01, "sliding_window": 7, "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    }),
    "mistral-full-tied": ("mistral", {
        **OTHER, "num_key_value_heads": 1, "head_dim": 12, "rms_norm_eps": 0.05, "sliding_window": None, "tie_word_embeddings": True,
    }),
}  # fmt: skip
LENGTH = 40  # longer than the window
TOLERANCE = 1e-5  # of the logits' standard deviation


@pytest.fixture(scope="module", params=TABLE)
def case(request, tmp_path_factory) -> tuple[transformers.PreTrainedModel, Path]:
    """transformers' model and the directory it wrote."""
    model_type, keys = TABLE[request.param]
    model = hf.tiny(model_type, **keys)
    return model, hf.save(model, tmp_path_factory.mktemp(request.param))


def tokens(vocab: int, *, seed: int = 0, rows: int = 2) -> torch.Tensor:
    return torch.randint(0, vocab, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def off(ours: TransformerModel, theirs: torch.Tensor, x: torch.Tensor) -> float:
    """The largest difference of logits, in standard deviations."""
    return ((ours(x).logits - theirs).abs().max() / theirs.std()).item()


@torch.no_grad()
def cached_greedy(model: TransformerModel, prompt: torch.Tensor, count: int) -> torch.Tensor:
    from trivium.nn.inputs import Inputs

    cache = model.cache(len(prompt), prompt.shape[1] + count)
    out, step = [], prompt
    for _ in range(count):
        logits = model(Inputs(step, cache=cache), keep="last").logits
        step = logits.argmax(-1, keepdim=True)
        out.append(step)
    return torch.cat(out, 1)


def test_every_key_takes_two_values():
    for name in ("llama", "mistral"):
        family = families.get(name)
        written = [hf.MODELS[kind][0](**keys).to_dict() for kind, keys in TABLE.values() if kind == name]
        for key in [*family.keys.model_fields, *family.carried]:
            values = {json.dumps(config[key], sort_keys=True) for config in written}
            assert len(values) > 1 or key in ("hidden_act", *(family.carried if name == "mistral" else ())), (
                f"{name}: {key} is always {values}"
            )


@pytest.mark.concept("X.130", "X.133", part="io/hf/llama.py")
@pytest.mark.concept("T03.01", part="models/transformer.py")
@pytest.mark.concept("T19.01", part="nn/attention.py")
def test_logits(case):
    theirs, path = case
    x = tokens(theirs.config.vocab_size)
    expected = hf.logits(theirs, x)
    assert 1 <= expected.std() <= 3
    assert off(directory.read(path).model, expected, x) < TOLERANCE


@pytest.mark.concept("X.130", "X.133", part="io/hf/llama.py")
@pytest.mark.concept("T03.01", part="models/transformer.py")
def test_greedy_tokens_with_a_cache(case):
    theirs, path = case
    prompt = tokens(theirs.config.vocab_size, seed=1)[:, :12]
    expected = hf.greedy(theirs, prompt, 24)
    assert torch.equal(cached_greedy(directory.read(path).model, prompt, 24), expected)
    assert len(expected.unique()) > 5  # text, not one token over and over


@pytest.mark.concept("T03.01", part="models/transformer.py")
def test_loss(case):
    theirs, path = case
    x = tokens(theirs.config.vocab_size, seed=2)
    with torch.no_grad():
        expected = theirs(input_ids=x, attention_mask=torch.ones_like(x), labels=x).loss
        logits = directory.read(path).model(x).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    assert abs(loss - expected) < 1e-5


def test_every_tensor_matters(case):
    every_tensor_matters(*case)


def every_tensor_matters(theirs: transformers.PreTrainedModel, path: Path, *, but: tuple[str, ...] = ()) -> None:
    """Changing any one tensor on our side alone breaks parity; so does swapping two of one shape. `but`: those that cannot matter."""
    x = tokens(theirs.config.vocab_size)
    expected = hf.logits(theirs, x)
    model = directory.read(path).model.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if name in but:
            continue
        before = parameter.clone()
        parameter.add_(0.05 * torch.randn(before.shape, generator=generator))
        assert off(model, expected, x) > 100 * TOLERANCE, name
        parameter.copy_(before)
    a, b = parameters["layers.0.mixer_norm.weight"], parameters["layers.0.ffn_norm.weight"]
    swapped = a.clone(), b.clone()
    a.copy_(swapped[1])
    b.copy_(swapped[0])
    assert off(model, expected, x) > 100 * TOLERANCE


def mutations(model_type: str, config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """One changed config for each key that the family reads, and for each value inside `rope_parameters`."""
    rope = config["rope_parameters"]
    linear = {"rope_type": "linear", "rope_theta": rope["rope_theta"], "factor": 3.0}
    plain = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    out = {"rope_type": {"rope_parameters": plain if rope["rope_type"] == "linear" else linear}}
    out |= {key: {"rope_parameters": {**rope, key: 2 * value}} for key, value in rope.items() if key != "rope_type"}
    for key in set(families.get(model_type).keys.model_fields) - {"rope_parameters"}:
        value = config[key]
        if isinstance(value, bool):
            out[key] = {key: not value}
        else:
            out[key] = {key: "gelu" if key == "hidden_act" else 5 if value is None else 2 * value}
    return {key: {**config, **change} for key, change in out.items()}


def test_every_key_matters(case, tmp_path):
    """Changing any one key on our side alone breaks parity or is refused. `max_position_embeddings` shapes no logit."""
    theirs, path = case
    x = tokens(theirs.config.vocab_size)
    expected = hf.logits(theirs, x)
    config = json.loads((path / "config.json").read_text())
    shutil.copy(path / "model.safetensors", tmp_path)
    refused = set()
    for key, changed in mutations(config["model_type"], config).items():
        (tmp_path / "config.json").write_text(json.dumps(changed))
        try:
            loaded = directory.read(tmp_path)
        except TriviumError:
            refused.add(key)
            continue
        if key == "max_position_embeddings":
            assert loaded.spec.context == 2 * config[key]
        else:
            assert off(loaded.model, expected, x) > 100 * TOLERANCE, key
    assert not refused & {"rms_norm_eps", "max_position_embeddings", "rope_type", "sliding_window", *config["rope_parameters"]}


@pytest.mark.concept("X.88", part="io/directory.py")
@pytest.mark.concept("X.130", "X.133", part="io/hf/llama.py")
def test_export_is_what_transformers_writes(case, tmp_path):
    """Files equal byte for byte; transformers loads ours and writes the same again, key by key and tensor by tensor."""
    theirs, path = case
    loaded = directory.read(path)
    family = theirs.config.model_type
    directory.write(
        tmp_path / "ours", loaded.model, family=family, rest=loaded.rest, generation_config=theirs.generation_config.to_diff_dict()
    )
    assert (tmp_path / "ours" / "model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()
    back, report = type(theirs).from_pretrained(tmp_path / "ours", attn_implementation="eager", output_loading_info=True)
    assert not any(report.values()), report
    x = tokens(theirs.config.vocab_size)
    assert torch.equal(hf.logits(back, x), hf.logits(theirs, x))
    hf.save(back, tmp_path / "again")
    ours, again = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "again"))
    assert ours == again == json.loads((path / "config.json").read_text())
    mine, written = read_weights(tmp_path / "ours"), read_weights(tmp_path / "again")
    assert list(mine) == list(written)
    for name in mine:
        a, b = mine[name].load(), written[name].load()
        assert a.dtype == b.dtype and torch.equal(a, b), name


@pytest.mark.concept("X.88", part="io/directory.py")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bit_exact(case, tmp_path, dtype):
    _, path = case
    first = directory.read(path, dtype=dtype)
    directory.write(tmp_path / "a", first.model, family=first.family, rest=first.rest)
    second = directory.read(tmp_path / "a")
    assert second.spec == first.spec and second.rest == {**first.rest, "dtype": str(dtype).removeprefix("torch.")}
    directory.write(tmp_path / "b", second.model, family=second.family, rest=second.rest)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    for (name, a), b in zip(first.model.named_parameters(), second.model.parameters(), strict=True):
        assert a.dtype == b.dtype == dtype and torch.equal(a, b), name


@pytest.mark.parametrize("scaling", [None, {"type": "linear", "factor": 2.0}, {k: v for k, v in LLAMA3.items() if k != "rope_theta"}])
def test_layout_of_transformers_4(tmp_path, scaling):
    """`rope_theta` and `rope_scaling`, `torch_dtype`, no `head_dim`, the rotary frequencies among the weights."""
    theirs = hf.tiny("llama", **OTHER, rope_theta=50.0, rope_scaling=scaling and dict(scaling), max_position_embeddings=128)
    hf.save(theirs, tmp_path / "x")
    old = json.loads((tmp_path / "x" / "config.json").read_text())
    for key in ("rope_parameters", "dtype", "head_dim", "num_key_value_heads", "mlp_bias", "attention_bias", "pad_token_id"):
        del old[key]
    old |= {
        "rope_theta": 50.0,
        "rope_scaling": scaling,
        "torch_dtype": "float32",
        "_name_or_path": "somewhere",
        "transformers_version": "4.40.0",
    }
    (tmp_path / "x" / "config.json").write_text(json.dumps(old))
    weights = {name: lazy.load().clone() for name, lazy in read_weights(tmp_path / "x").items()}
    weights |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    import safetensors.torch

    safetensors.torch.save_file(weights, tmp_path / "x" / "model.safetensors")
    loaded = directory.read(tmp_path / "x")
    x = tokens(OTHER["vocab_size"])
    assert off(loaded.model, hf.logits(theirs, x), x) < TOLERANCE
    directory.write(tmp_path / "ours", loaded.model, family="llama", rest=loaded.rest)
    back = type(theirs).from_pretrained(tmp_path / "ours", attn_implementation="eager")
    hf.save(back, tmp_path / "again")
    ours, again = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "again"))
    assert ours.pop("transformers_version") == "4.40.0" and again.pop("transformers_version") == transformers.__version__
    assert ours == again
    assert torch.equal(hf.logits(back, x), hf.logits(theirs, x))


def test_shards_both_ways(case, tmp_path):
    theirs, _ = case
    x = tokens(theirs.config.vocab_size)
    hf.save(theirs, tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    loaded = directory.read(tmp_path / "theirs")
    assert off(loaded.model, hf.logits(theirs, x), x) < TOLERANCE
    directory.write(tmp_path / "ours", loaded.model, family=loaded.family, rest=loaded.rest, shard_bytes=20_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
    back = type(theirs).from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert torch.equal(hf.logits(back, x), hf.logits(theirs, x))


def test_stored_copy_of_a_tied_head_is_checked(tmp_path):
    import safetensors.torch

    theirs = hf.tiny(*TABLE["mistral-full-tied"][:1], **TABLE["mistral-full-tied"][1])
    hf.save(theirs, tmp_path)
    weights = {name: lazy.load().clone() for name, lazy in read_weights(tmp_path).items()}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    directory.read(tmp_path)
    weights["lm_head.weight"][0, 0] += 1
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(TriviumError, match="tied"):
        directory.read(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_scaling": {"rope_type": "proportional", "factor": 2.0}}, "proportional"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "faktor": 1}}, "faktor"),
        ({"rope_scaling": 3}, "rope_parameters"),
        ({"rope_parameters": {"rope_theta": 10.0, "factor": 2.0}}, "factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"num_key_value_heads": 4}, "kv_heads"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"hidden_size": 2**62}, "these sizes"),
        ({"vocab_size": 2**80}, "these sizes"),
        ({"rms_norm_eps": -1}, "rms_norm_eps"),
        ({"rope_parameters": {"rope_theta": "big"}}, "base"),
        ({"rope_parameters": {"rope_theta": None}}, "base"),
        ({"hiden_size": 3}, "did you mean hidden_size"),
        ({"quantization_config": {}}, "quantization_config"),
        ({"model_type": "lama"}, "llama"),
        ({"model_type": None}, "model_type"),
    ],
)
def test_configs_that_cannot_be_read_say_why(tmp_path, change, message):
    config = hf.MODELS["llama"][0](**SHAPE).to_diff_dict()
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(TriviumError, match=message):
        directory.read(tmp_path)


def test_unknown_keys_can_be_allowed_and_stay_allowed(tmp_path):
    theirs = hf.tiny("llama", **OTHER, favourite_color="blue")
    hf.save(theirs, tmp_path / "x")
    with pytest.raises(ConfigError, match="favourite_color"):
        directory.read(tmp_path / "x")
    loaded = directory.read(tmp_path / "x", allow_unknown=["favourite_color"])
    directory.write(tmp_path / "y", loaded.model, family="llama", rest=loaded.rest)
    assert directory.read(tmp_path / "y").rest["favourite_color"] == "blue"


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"context": None}, "context = None"),
        ({"causal": False}, "causal = False"),
        ({"embed": {"kind": "tokens", "scale": 2.0}}, "embed.scale = 2.0"),
        ({"final_norm": {"kind": "none"}}, "final_norm"),
        ({"final_norm": {"kind": "rms", "eps": 0.5}}, "eps"),
        ({"dim": 50}, "multiple of the number of heads"),
    ],
)
def test_what_a_family_cannot_say_is_refused(change, reason):
    family = families.get("llama")
    spec, rest = family.to_spec(hf.MODELS["llama"][0](**SHAPE).to_diff_dict())
    with pytest.raises(ConfigError, match=reason):
        family.to_hf(spec.replace(**change), rest)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"mixer": {"bias": ["q"]}}, "bias"),
        ({"mixer": {"position": None}}, "rotary"),
        ({"mixer": {"scores": {"scale": 0.5}}}, "scale = 0.5"),
        ({"mixer": {"pattern": {"kind": "window", "size": 3}}}, "pattern"),
        ({"ffn": {"activation": {"kind": "swish", "beta": 2.0}}}, "activation"),
        ({"ffn": None}, "mlp"),
        ({"norm_at": "post"}, "norm_at"),
        ({"residual": {"kind": "plain", "scale": 0.5}}, "residual"),
    ],
)
def test_blocks_that_a_family_cannot_say_are_refused(change, reason):
    family = families.get("llama")
    spec, rest = family.to_spec(hf.MODELS["llama"][0](**SHAPE).to_diff_dict())
    block = spec.blocks["layer"].to_dict()
    for part, fields in change.items():
        block[part] = {**block[part], **fields} if isinstance(fields, dict) and part in block else fields
    with pytest.raises(ConfigError, match=reason):
        family.to_hf(spec.replace(blocks={"layer": block}), rest)
    two = spec.replace(layers=("layer", "other", "layer"), blocks={"layer": spec.blocks["layer"], "other": block})
    with pytest.raises(ConfigError, match="alike"):
        family.to_hf(two, rest)
