"""A GGUF file in Hugging Face's terms equals what transformers reads, and nothing in it goes unnoticed."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.assets import asset
from tests.io.gguf.files import finish, llama, write_llama
from trivium.core.errors import ConfigError, FileError, TriviumError
from trivium.infer.sampling import Sampling
from trivium.io.gguf.family import GGUFModel, to_hf
from trivium.io.gguf.reader import open_gguf
from trivium.recipes.load import load

LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
CONFIGS = {
    "grouped, untied": {},
    "tied": {"tie_word_embeddings": True},
    "wide heads, biases, other numbers": {
        "head_dim": 12,
        "attention_bias": True,
        "mlp_bias": True,
        "num_key_value_heads": 6,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "linear scaling": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    "llama3 scaling": {"head_dim": 64, "rope_parameters": {**LLAMA3, "rope_theta": 500000.0}},
}


def write(
    tmp_path: Path, model: LlamaForCausalLM, *, metadata: dict[str, Any] | None = None, tensors: dict[str, Any] | None = None
) -> Path:
    config, extra, more = model.config, {}, {}
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        extra = {"llama.attention.key_length": config.head_dim, "llama.attention.value_length": config.head_dim}
    if config.rope_parameters["rope_type"] == "linear":
        extra |= {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": config.rope_parameters["factor"]}
    if config.rope_parameters["rope_type"] == "llama3":
        more = {"rope_freqs.weight": frequency_factors(config)}
    return write_llama(tmp_path / "model.gguf", model, metadata=extra | (metadata or {}), tensors=more | (tensors or {}))


def frequency_factors(config: LlamaConfig) -> np.ndarray:
    """What Llama 3's scaling divides frequencies by, from transformers' own frequencies."""
    plain = 1 / config.rope_parameters["rope_theta"] ** (torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    return (plain / llama_frequencies(config)).numpy()


def llama_frequencies(config: LlamaConfig) -> torch.Tensor:
    return LlamaForCausalLM(config).model.rotary_emb.inv_freq


def rebuilt(found: GGUFModel) -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig(**found.config)).eval()
    tensors = {name: lazy.load() for name, lazy in found.tensors.items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and missing == (["lm_head.weight"] if found.config["tie_word_embeddings"] else [])
    model.tie_weights()
    return model


@pytest.mark.parametrize("case", CONFIGS)
def test_what_the_converter_writes_comes_back(tmp_path: Path, case: str):
    model = llama(**CONFIGS[case])
    found = to_hf(open_gguf(write(tmp_path, model)))
    ours, theirs = LlamaConfig(**found.config).to_dict(), model.config.to_dict()
    told = {key for key in theirs if key not in ("architectures", "bos_token_id", "eos_token_id", "dtype")}
    assert {key: ours[key] for key in told} == {key: theirs[key] for key in told}
    again = rebuilt(found)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    tokens = torch.arange(40)[None] % 48
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert torch.equal(llama_frequencies(again.config), llama_frequencies(model.config))


@cache
def smollm2() -> LlamaForCausalLM:
    """What transformers makes of the real file."""
    path = asset("smollm2")
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


@pytest.mark.concept("X.35", part="io/gguf/family.py")
@pytest.mark.slow
def test_the_real_model_talks_and_agrees_with_transformers():
    """SmolLM2 as Q4_1: the logits that transformers computes from the same file, and sense when it speaks."""
    made = load(asset("smollm2"), dtype="fp32")
    tokens = torch.tensor([made.tokenizer.encode("Gravity is the force that pulls 12 apples to the ground.")])
    with torch.no_grad():
        expected = smollm2()(tokens).logits
        assert torch.allclose(made.model(tokens).logits, expected, atol=1e-3)
    assert expected.std() > 1
    assert "Paris" in made.chat("What is the capital of France?", sampling=Sampling(temperature=0, max_tokens=24)).text


@pytest.mark.slow
def test_the_real_model_equals_what_transformers_reads():
    path, theirs = asset("smollm2"), smollm2()
    found = to_hf(open_gguf(path))
    assert set(theirs.state_dict()) == {*found.tensors, "lm_head.weight"}
    for name, lazy in found.tensors.items():
        tensor = lazy.load()
        assert tensor.dtype == lazy.dtype and tuple(tensor.shape) == lazy.shape
        assert torch.equal(tensor, theirs.state_dict()[name]), name
    ours, expected = LlamaConfig(**found.config).to_dict(), theirs.config.to_dict()
    for key in found.config.keys() - {"architectures", "rms_norm_eps"}:
        assert ours[key] == expected[key], key
    assert found.config["rms_norm_eps"] == 1e-5 and np.float32(1e-5) == np.float32(expected["rms_norm_eps"])
    assert found.notes == ["llama.attention.layer_norm_rms_epsilon: 9.999999747378752e-06, stored as float32, is read as 1e-05"]
    assert found.generation_config == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    assert "<|im_start|>" in found.chat_template and "tokenizer.chat_template" not in found.tokenizer
    assert len(found.tokenizer["tokenizer.ggml.tokens"]) == found.config["vocab_size"] == 49152


def test_dtype_rounds_once_and_stored_types_stay(tmp_path: Path):
    model = llama()
    half = model.state_dict()["lm_head.weight"].half()
    file = open_gguf(write(tmp_path, model, tensors={"output.weight": half.numpy()}))
    plain, rounded = to_hf(file), to_hf(file, dtype=torch.bfloat16)
    assert plain.tensors["lm_head.weight"].dtype == torch.float16
    assert torch.equal(plain.tensors["lm_head.weight"].load(), half)
    for name, lazy in rounded.tensors.items():
        assert torch.equal(lazy.load(), plain.tensors[name].load().to(torch.bfloat16)), name


def test_special_tokens_and_templates(tmp_path: Path):
    ids = {"bos": 1, "eos": 2, "eot": 3, "eom": 2, "padding": -1}
    metadata = {f"tokenizer.ggml.{name}_token_id": value for name, value in ids.items()}
    metadata |= {
        "tokenizer.chat_template": "{{ messages }}",
        "tokenizer.chat_template.tool_use": "{{ tools }}",
        "tokenizer.ggml.model": "gpt2",
    }
    found = to_hf(open_gguf(write(tmp_path, llama(), metadata=metadata)))
    assert found.generation_config == {"bos_token_id": 1, "eos_token_id": [2, 3]}
    assert found.config["pad_token_id"] is None
    assert found.chat_template == "{{ messages }}"
    assert dict(found.tokenizer)["tokenizer.ggml.model"] == "gpt2" and set(found.tokenizer) == {k for k in metadata if ".ggml." in k}
    assert any("padding_token_id: -1 is no token" in note for note in found.notes)
    assert any("tool_use: a second chat template" in note for note in found.notes)


def test_float32_becomes_the_shortest_decimal_and_is_told(tmp_path: Path):
    found = to_hf(open_gguf(write(tmp_path, llama(rms_norm_eps=1e-6), metadata={"llama.rope.freq_base": 10000.1})))
    assert found.config["rms_norm_eps"] == 1e-6 and found.config["rope_parameters"]["rope_theta"] == 10000.1
    assert len(found.notes) == 2
    assert to_hf(open_gguf(write(tmp_path, llama(rms_norm_eps=0.5)))).notes == []


BAD_METADATA = {
    "llama.attention.sliding_window": (512, "not understood: llama.attention.sliding_window"),
    "vendor.secret": ("x", "not understood: vendor.secret"),
    "llama.expert_count": (8, "expert_count is 8; only 0"),
    "llama.rope.dimension_count": (4, "dimension_count is 4; only 8"),
    "llama.attention.value_length": (16, "value_length is 16; only 8"),
    "llama.attention.causal": (False, "only causal"),
    "llama.vocab_size": (49, "is 49, but token_embd.weight has 48 rows"),
    "llama.block_count": (None, "llama.block_count is missing"),
    "llama.context_length": (0, "is 0, but must be positive"),
    "llama.embedding_length": ("48", "must be one int, not '48'"),
    "llama.feed_forward_length": (True, "must be one int, not True"),
    "llama.attention.head_count_kv": ([3, 3], "a value for each layer is not supported"),
    "llama.attention.head_count": (7, "is no multiple of 7 heads"),
    "llama.attention.layer_norm_rms_epsilon": (float("nan"), "must be one float"),
    "llama.rope.scaling.type": ("yarn", "'yarn'; none, linear and Llama 3's"),
    "tokenizer.chat_template": (7, "must be one str"),
}


@pytest.mark.parametrize("key", BAD_METADATA)
def test_metadata_that_cannot_be_expressed_is_refused(tmp_path: Path, key: str):
    value, message = BAD_METADATA[key]
    with pytest.raises(ConfigError, match=message) as caught:
        to_hf(open_gguf(write(tmp_path, llama(), metadata={key: value})))
    assert "model.gguf" in str(caught.value)


BAD_TENSORS = {
    "blk.1.ffn_up.weight": (None, "tensors are missing: blk.1.ffn_up.weight"),
    "blk.0.attn_q.bias": (np.zeros(48, np.float32), "missing: blk.1.attn_q.bias, blk.0.attn_k.bias"),
    "blk.0.attn_k.weight": (np.zeros((48, 48), np.float32), "not 3 heads of 8"),
    "blk.7.attn_k.weight": (np.zeros((24, 48), np.float32), "not understood: blk.7.attn_k.weight"),
    "token_embd.weight": (np.zeros(48, np.float32), "not two dimensions"),
    "rope_freqs.weight": (np.full(4, 2, np.float32), "does not hold Llama 3's factors"),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, name: str):
    tensor, message = BAD_TENSORS[name]
    with pytest.raises(ConfigError, match=message):
        to_hf(open_gguf(write(tmp_path, llama(), tensors={name: tensor})))


def test_no_embedding_is_an_error_of_the_file(tmp_path: Path):
    with pytest.raises(FileError, match=r"unknown tensor 'token_embd.weight'"):
        to_hf(open_gguf(write(tmp_path, llama(), tensors={"token_embd.weight": None})))


def test_allowed_things_are_passed_over_and_told(tmp_path: Path):
    file = open_gguf(write(tmp_path, llama(), metadata={"vendor.secret": "x"}, tensors={"extra": np.zeros(3, np.float32)}))
    with pytest.raises(ConfigError, match="not understood: vendor.secret, extra"):
        to_hf(file)
    with pytest.raises(ConfigError, match="not understood: extra;"):
        to_hf(file, allow=["vendor.secret"])
    notes = [note for note in to_hf(file, allow=["vendor.secret", "extra"]).notes if "allowed" in note]
    assert notes == [f"{name}: not understood, passed over as allowed" for name in ("vendor.secret", "extra")]


def test_factors_of_one_are_no_scaling(tmp_path: Path):
    found = to_hf(open_gguf(write(tmp_path, llama(), tensors={"rope_freqs.weight": np.ones(4, np.float32)})))
    assert found.config["rope_parameters"] == {"rope_theta": 10000.0, "rope_type": "default"}


def test_other_architectures_are_named(tmp_path: Path):
    writer = gguf.GGUFWriter(tmp_path / "mamba.gguf", "mamba")
    with pytest.raises(ConfigError, match=r"mamba.gguf: unknown GGUF architecture 'mamba'.* \(known: llama\)"):
        to_hf(open_gguf(finish(writer, tmp_path / "mamba.gguf")))


@pytest.mark.slow
def test_any_mutation_ends_well(tmp_path: Path):
    """A changed header gives a model or our own error."""
    path = write(tmp_path, llama(num_hidden_layers=1, vocab_size=8), metadata={"llama.vocab_size": 8, "tokenizer.ggml.bos_token_id": 1})
    data = path.read_bytes()
    end = open_gguf(path).tensors["token_embd.weight"].offset

    said: list[bool] = []

    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(st.lists(st.tuples(st.integers(24, end), st.binary(min_size=1, max_size=4)), min_size=1, max_size=2))
    def check(changes: list[tuple[int, bytes]]) -> None:
        mutated = bytearray(data)
        for at, new in changes:
            mutated[at : at + len(new)] = new
        path.write_bytes(mutated)
        try:
            for lazy in to_hf(open_gguf(path)).tensors.values():
                assert tuple(lazy.load().shape) == lazy.shape
        except TriviumError as error:
            said.append(str(path) in str(error))

    check()
    assert said and all(said)
