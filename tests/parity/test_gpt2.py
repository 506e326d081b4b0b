"""GPT-2 and GPT-1 against transformers, in fp32, on tiny models whose every parameter is redrawn (see `harness.py`); and GPT-3."""

from __future__ import annotations

import json
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

from tests.parity import hf
from tests.parity.harness import LENGTH, TOLERANCE, Causal, Loss, Refusals, config_of, off, tensors_of, tokens
from trivium.core.errors import ConfigError, TriviumError
from trivium.io import directory
from trivium.io.hf import families
from trivium.models.presets import gpt3, presets
from trivium.models.transformer import build

SHAPE = {"vocab_size": 101, "n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 64}
OTHER = {"vocab_size": 89, "n_embd": 40, "n_layer": 2, "n_head": 5, "n_positions": 50}
DROPOUTS = {"resid_pdrop": 0.25, "embd_pdrop": 0.0, "attn_pdrop": 0.5}
SUMMARY = {
    "initializer_range": 0.03, "summary_type": "last", "summary_use_proj": False, "summary_activation": "tanh",
    "summary_proj_to_labels": False, "summary_first_dropout": 0.0,
}  # fmt: skip
TABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {**SHAPE, "layer_norm_epsilon": 0.01}),
    "gpt2-exact-gelu-untied": ("gpt2", {
        **OTHER, **DROPOUTS, **SUMMARY, "n_inner": 56, "layer_norm_epsilon": 0.05, "activation_function": "gelu", "tie_word_embeddings": False,
        "use_cache": False, "bos_token_id": 5, "eos_token_id": [6, 7], "reorder_and_upcast_attn": True,
    }),
    "gpt2-scaled-by-layer": ("gpt2", {
        **SHAPE, "layer_norm_epsilon": 0.02, "scale_attn_by_inverse_layer_idx": True, "activation_function": "relu", "n_inner": 192,
    }),
    "gpt2-unscaled": ("gpt2", {
        **OTHER, "scale_attn_weights": False, "activation_function": "quick_gelu", "layer_norm_epsilon": 0.04,
    }),
    "gpt2-unscaled-by-layer": ("gpt2", {
        **OTHER, "scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True, "activation_function": "gelu_pytorch_tanh",
        "layer_norm_epsilon": 0.03,
    }),
    "gpt1": ("openai-gpt", {**SHAPE, "layer_norm_epsilon": 0.01, "bos_token_id": 3, "eos_token_id": 4, "pad_token_id": 5}),
    "gpt1-silu-untied": ("openai-gpt", {
        **OTHER, **DROPOUTS, **SUMMARY, "layer_norm_epsilon": 0.05, "afn": "swish", "tie_word_embeddings": False,
    }),
}  # fmt: skip


def tiny(kind: str, keys: dict[str, Any]) -> transformers.PreTrainedModel:
    """A redrawn model. Positions weigh more than what the layers add, and biases less: else one token is the likeliest
    everywhere, and greedy text proves nothing."""
    model = hf.tiny(kind, **keys)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.mul_(0.1)
            elif name.endswith(("wpe.weight", "positions_embed.weight")):
                parameter.mul_(8)
    return model


@pytest.mark.concept("X.128", part="io/hf/gpt2.py")
@pytest.mark.concept("T03.01", part="models/transformer.py")
@pytest.mark.concept("T02.02", part="nn/positions_absolute.py")
@pytest.mark.concept("T01.05", part="nn/feedforward.py")
@pytest.mark.concept("X.88", part="io/directory.py")
class TestGPT2(Causal, Loss, Refusals):
    table = TABLE
    alike = ("add_cross_attention",)
    tiny = staticmethod(tiny)
    swaps = (("mixer_norm", "ffn_norm"), ("mixer.inp.q", "mixer.inp.k"))
    heeded = ("layer_norm_epsilon", "n_head", "scale_attn_weights", "scale_attn_by_inverse_layer_idx", *DROPOUTS)
    refused = ("vocab_size", "n_positions", "n_embd", "n_layer", "tie_word_embeddings")
    unreadable = [
        ("gpt2", {"activation_function": "mish"}, "activation_function 'mish'"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("gpt2", {"n_head": 5}, "n_head"),
        ("gpt2", {"resid_pdrop": 1.5}, "resid_pdrop"),
        ("gpt2", {"layer_norm_epsilon": 0}, "layer_norm_epsilon"),
        ("gpt2", {"hidden_size": 48}, "hidden_size"),
    ]
    unsayable = [
        ("gpt2", {"context": 32}, "context = 32"),
        ("gpt2", {"causal": False}, "causal = False"),
        ("gpt2", {"embed": {"kind": "tokens"}}, "positions"),
        ("gpt2", {"embed": {"kind": "tokens", "positions": {"kind": "sinusoidal"}}}, "positions"),
        ("gpt2", {"embed": {"kind": "tokens", "scale": 2.0, "positions": {"kind": "learned", "size": 64}}}, "scale = 2.0"),
        ("gpt2", {"final_norm": {"kind": "rms"}}, "final_norm"),
        ("gpt2", {"dim": 54}, "head_dim"),
    ]

    def silent(self, name: str, spec: Any) -> bool:
        """A bias on the keys adds the same to all of a query's scores: its path is held by the export."""
        return name.endswith("k.bias")

    def other(self, key: str, value: Any, config: dict[str, Any]) -> Any:
        if isinstance(value, str):
            return "relu" if value != "relu" else "gelu"
        return 0.125 if key.endswith("pdrop") else 8 if value is None else super().other(key, value, config)

    def test_positions_beyond_the_table_are_refused(self, case):
        model, size = case.read().model, case.theirs.config.n_positions
        model(torch.zeros(1, size, dtype=torch.int64))
        with pytest.raises(TriviumError, match=f"position {size} was asked for, but this model has learned {size}"):
            model(torch.zeros(1, size + 1, dtype=torch.int64))


@pytest.mark.parametrize("name", ["gpt2", "gpt1"])
def test_layout_of_early_files(tmp_path, name):
    """No prefix, the causal masks among the weights, `n_ctx` and its kin in the config, keys that are defaults left out."""
    model_type, keys = TABLE[name]
    theirs = tiny(model_type, keys)
    config = config_of(hf.save(theirs, tmp_path))
    for key in ("scale_attn_weights", "reorder_and_upcast_attn", "add_cross_attention", "tie_word_embeddings", "dtype", "n_inner"):
        config.pop(key, None)
    extra = {"n_ctx": config["n_positions"], "task_specific_params": {"text-generation": {"do_sample": True}}}
    if name == "gpt1":
        extra |= {"n_special": 0, "predict_special_tokens": True}
    (tmp_path / "config.json").write_text(json.dumps(config | extra))
    weights = {name.removeprefix("transformer."): tensor for name, tensor in tensors_of(tmp_path).items()}
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64).tril() for i in range(3)} | {"h.0.attn.masked_bias": torch.tensor(-1e4)}
    safetensors.torch.save_file(weights | masks, tmp_path / "model.safetensors")
    loaded = directory.read(tmp_path)
    x = tokens(keys["vocab_size"])
    assert off(loaded.model, hf.logits(theirs, x), x) < TOLERANCE
    directory.write(tmp_path / "ours", loaded.model, family=model_type, rest=loaded.rest)
    assert extra.items() <= config_of(tmp_path / "ours").items()
    assert torch.equal(hf.logits(type(theirs).from_pretrained(tmp_path / "ours", attn_implementation="eager"), x), hf.logits(theirs, x))


@pytest.mark.concept("X.128", part="io/hf/gpt2.py")
def test_presets_are_the_published_models():
    for name, config in (("gpt2", transformers.GPT2Config()), ("gpt1", transformers.OpenAIGPTConfig())):
        spec, _ = families.get(config.model_type).to_spec(config.to_diff_dict())
        assert presets.get(name)() == spec
    sizes = {"gpt1": 116_534_784, "gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200}
    for name, size in sizes.items():
        assert sum(p.numel() for p in build(presets.get(name)()).parameters()) == size, name
    with torch.device("meta"):
        counted = sum(p.numel() for p in transformers.GPT2LMHeadModel(transformers.GPT2Config()).parameters())
    assert counted == sizes["gpt2"]


@pytest.mark.concept("X.128", part="io/hf/gpt2.py")
def test_gpt3_has_its_published_size_and_local_layers_by_turns():
    spec = presets.get("gpt3-175b")()
    model = build(spec)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 1) == 174.6
    assert spec.layers[:4] == ("dense", "banded", "dense", "banded") and len(spec.layers) == 96


@pytest.mark.concept("X.128", part="io/hf/gpt2.py")
def test_gpt3s_alternating_layers_equal_gpt_neos():
    """The one model of transformers with dense and local layers by turns: GPT-Neo, which scales no scores and has no bias
    on q, k and v."""
    config = transformers.GPTNeoConfig(
        vocab_size=73, hidden_size=32, num_layers=4, num_heads=4, attention_types=[[["global", "local"], 2]], window_size=7,
        max_position_embeddings=64, intermediate_size=128,
    )  # fmt: skip
    theirs = transformers.GPTNeoForCausalLM._from_config(config, attn_implementation="eager").eval()
    hf.redraw(theirs, seed=0)
    spec = gpt3(dim=32, layers=4, heads=4)
    blocks = {
        name: block.replace(mixer=block.mixer.replace(bias=("out",), scores={"scale": 1.0}, pattern={"kind": kind} | size))
        for (name, block), kind, size in zip(spec.blocks.items(), ("full", "window"), ({}, {"size": 7}), strict=True)
    }
    ours = build(spec.replace(vocab=73, blocks=blocks), device="cpu").eval()
    names = {
        "mixer_norm": "ln_1", "mixer.inp.q": "attn.attention.q_proj", "mixer.inp.k": "attn.attention.k_proj", "mixer.inp.v": "attn.attention.v_proj",
        "mixer.out": "attn.attention.out_proj", "ffn_norm": "ln_2", "ffn.inp.up": "mlp.c_fc", "ffn.out": "mlp.c_proj",
    }  # fmt: skip
    state = theirs.transformer.state_dict()
    tensors = {"embed.weight": state["wte.weight"], "final_norm.weight": state["ln_f.weight"], "final_norm.bias": state["ln_f.bias"]}
    tensors["embed.positions.weight"] = torch.cat([state["wpe.weight"], torch.zeros(2048 - 64, 32)])
    for i in range(4):
        for mine, other in names.items():
            tensors |= {f"layers.{i}.{mine}.{leaf}": state[key] for leaf in ("weight", "bias") if (key := f"h.{i}.{other}.{leaf}") in state}
    ours.load_state_dict(tensors)
    x = tokens(73)
    assert LENGTH > 7
    expected = hf.logits(theirs, x)
    assert 1 <= expected.std() <= 3 and off(ours, expected, x) < TOLERANCE


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"mixer": {"bias": ["q"]}}, "bias"),
        ({"mixer": {"kv_heads": 2}}, "kv_heads"),
        ({"mixer": {"position": {"kind": "rope"}}}, "position"),
        ({"mixer": {"pattern": {"kind": "window", "size": 3}}}, "pattern"),
        ({"ffn": {"gated": True}}, "gated"),
        ({"ffn": {"activation": {"kind": "swish", "beta": 2.0}}}, "activation"),
        ({"ffn": None}, "mlp"),
        ({"norm_at": "post"}, "norm_at"),
        ({"norm": {"kind": "rms"}}, "norm"),
        ({"residual": {"kind": "plain", "scale": 0.5}}, "residual"),
    ],
)
def test_blocks_that_the_family_cannot_say_are_refused(change, reason):
    family = families.get("gpt2")
    spec, rest = family.to_spec(hf.MODELS["gpt2"][0](**SHAPE).to_diff_dict())
    block = spec.blocks["layer"].to_dict()
    for part, fields in change.items():
        same = isinstance(fields, dict) and part in block and fields.get("kind") in (None, block[part]["kind"])
        block[part] = {**block[part], **fields} if same else fields
    with pytest.raises(ConfigError, match=reason):
        family.to_hf(spec.replace(blocks={"layer": block}), rest)
    two = spec.replace(layers=("layer", "other", "layer"), blocks={"layer": spec.blocks["layer"], "other": block})
    with pytest.raises(ConfigError, match="cannot be written"):
        family.to_hf(two, rest)
