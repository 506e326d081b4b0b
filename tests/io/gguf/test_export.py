"""A model that goes out as GGUF comes back as it was, and other readers see the same model."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.assets import asset
from tests.io.gguf.files import llama
from tests.io.gguf.test_family import CONFIGS, LLAMA3
from tests.tiny import tiny
from trivium.adapt.lora import LoRA
from trivium.adapt.passes import apply_passes
from trivium.core.errors import ConfigError, FileError
from trivium.io.directory import assemble
from trivium.io.gguf.export import as_stored, interleaved, write_model
from trivium.io.gguf.family import to_hf
from trivium.io.gguf.reader import open_gguf
from trivium.io.gguf.writer import write_gguf
from trivium.io.tensors import Lazy
from trivium.models.presets import llama as shape
from trivium.models.transformer import Transformer, TransformerModel
from trivium.nn.patterns import Window
from trivium.recipes.gguf import export_gguf, modelfile
from trivium.recipes.load import Bundle, load
from trivium.recipes.pull import convert
from trivium.text.gguf_vocab import CONTROL, NORMAL
from trivium.text.prompt import Prompt
from trivium.text.stream import byte_alphabet
from trivium.text.tokenizer import Tokenizer

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"


def ours(model: LlamaForCausalLM) -> tuple[TransformerModel, dict[str, Any]]:
    """A model of transformers as one of ours."""
    tensors = {name: Lazy.of(tensor) for name, tensor in model.state_dict().items()}
    return assemble(json.loads(model.config.to_json_string()), tensors)


def vocabulary() -> Tokenizer:
    """Bytes, three merges, and tokens that begin and end a text."""
    tokens = [*byte_alphabet(), "th", "the", "Ġthe", "<s>", "</s>", "<pad>"]
    metadata = {"model": "gpt2", "pre": "smollm", "tokens": tokens, "merges": ["t h", "th e", "Ġ the"]}
    metadata |= {"token_type": [NORMAL] * 259 + [CONTROL] * 3, "bos_token_id": 259, "eos_token_id": 260, "padding_token_id": 261}
    return Tokenizer.from_gguf({f"tokenizer.ggml.{key}": value for key, value in metadata.items()})


def bundle(folder: Path, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Bundle:
    """A tiny model with its tokenizer and template."""
    tokenizer = vocabulary()
    model, rest = ours(llama(vocab_size=264, bos_token_id=259, eos_token_id=260, pad_token_id=261, **changes))
    generation_config = {"eos_token_id": [260, 258], "bos_token_id": 259, "pad_token_id": 261}
    prompt = Prompt.of(tokenizer, TEMPLATE, generation_config)
    return Bundle(model.to(dtype), tokenizer, prompt, folder, family="llama", rest=rest, generation_config=generation_config)


SHORT = {**LLAMA3, "rope_theta": 500000.0, "factor": 8.0, "original_max_position_embeddings": 4096}
CASES = {**CONFIGS, "llama3 scaling of another length": {"head_dim": 64, "rope_parameters": SHORT}}


@pytest.mark.concept("X.35", part="io/gguf/export.py")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_there_and_back_is_the_same_model(tmp_path: Path, case: str, dtype: str):
    """Config and tensors, bit for bit; and the gguf package's reader agrees."""
    source = llama(**CASES[case]).to(DTYPES[dtype])
    model, rest = ours(source)
    written = write_model(tmp_path / "m.gguf", model, rest=rest)
    assert written.type == dtype.upper() and not written.notes
    found = to_hf(open_gguf(tmp_path / "m.gguf"), dtype=DTYPES[dtype])
    back, expected = LlamaConfig(**found.config).to_dict(), source.config.to_dict()
    for key in expected.keys() - {"architectures", "dtype"}:
        assert back[key] == expected[key], key
    again, _ = assemble(found.config, found.tensors)
    assert again.spec == model.spec
    for (name, mine), theirs in zip(model.named_parameters(), again.parameters(), strict=True):
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs), name
    there = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert set(there) == set(open_gguf(tmp_path / "m.gguf").tensors)
    for name, tensor in there.items():
        vector = name.endswith(("_norm.weight", ".bias", "rope_freqs.weight"))
        assert tensor.tensor_type.name == ("F32" if vector else dtype.upper()), name
    state = source.state_dict()
    values = gguf.dequantize(there["blk.1.ffn_down.weight"].data, there["blk.1.ffn_down.weight"].tensor_type)
    assert np.array_equal(values, state["model.layers.1.mlp.down_proj.weight"].float().numpy())


def test_packed_matrices_and_vectors(tmp_path: Path):
    """Q8_0 is what the package makes of the same rows; vectors stay, and rows that are no whole blocks become F16."""
    source = llama(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=80)
    model, rest = ours(source)
    written = write_model(tmp_path / "m.gguf", model, rest=rest, dtype="q8_0")
    assert written.type == "Q8_0"
    assert written.notes == (
        "2 matrices are F16, since their rows are not whole blocks of 32: blk.0.ffn_down.weight, blk.1.ffn_down.weight",
        "matrices are rounded from float32 to Q8_0",
    )
    file, state = open_gguf(tmp_path / "m.gguf"), source.state_dict()
    assert {info.type for info in file.tensors.values()} == {"F32", "Q8_0", "F16"}
    assert {name for name, info in file.tensors.items() if info.type == "F32"} == {n for n in file.tensors if n.endswith("norm.weight")}
    assert file.metadata["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    rows = interleaved(state["model.layers.0.self_attn.q_proj.weight"], heads=4).numpy()
    for name, values in {"blk.0.attn_q.weight": rows, "token_embd.weight": state["model.embed_tokens.weight"].numpy()}.items():
        assert np.array_equal(file.raw(name), gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0).reshape(-1))
    assert np.array_equal(file.array("blk.0.attn_norm.weight"), state["model.layers.0.input_layernorm.weight"].numpy())


@pytest.mark.parametrize("dtype", ["f32", "q8_0"])
def test_transformers_loads_it_with_the_same_logits(tmp_path: Path, dtype: str):
    made = bundle(tmp_path, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)
    write_model(tmp_path / "m.gguf", made.model, dtype=dtype, tokenizer=made.tokenizer, template=TEMPLATE, rest=made.rest)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
    mine = load(tmp_path / "m.gguf", dtype="fp32")
    tokens = torch.arange(40)[None] * 6
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert torch.allclose(mine.model(tokens).logits, expected, atol=1e-5)
        assert expected.std() > 0.5
        assert torch.allclose(made.model(tokens).logits, expected, atol=1e-5) == (dtype == "f32")


def test_tokenizer_template_and_ids_come_back(tmp_path: Path):
    made = bundle(tmp_path, dtype=torch.bfloat16)
    out = export_gguf(made, tmp_path / "m.gguf")
    again = load(out)
    for text in ("the the <s>x</s> 12 grüße 🙂", ""):
        assert again.tokenizer.encode(text, allow_special=True) == made.tokenizer.encode(text, allow_special=True)
    names = ("bos", "eos", "pad", "unk", "add_bos", "add_eos", "special")
    assert [getattr(again.tokenizer, name) for name in names] == [getattr(made.tokenizer, name) for name in names]
    assert again.prompt.template == TEMPLATE and set(again.prompt.stops) == set(made.prompt.stops) == {260, 258}
    assert again.generation_config == made.generation_config
    assert again.spec == made.spec and again.tokenizer.vocab_size == 264
    reader = gguf.GGUFReader(out)
    assert reader.fields["tokenizer.chat_template"].contents() == TEMPLATE
    assert reader.fields["general.name"].contents() == tmp_path.name
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_BF16
    tokens = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(again.model(tokens).logits, made.model(tokens).logits)


def test_from_directory_to_gguf_to_directory(tmp_path: Path):
    """Hugging Face's files after the journey are those before it."""
    first, gguf_file, second = tmp_path / "first", tmp_path / "m.gguf", tmp_path / "second"
    bundle(tmp_path, dtype=torch.bfloat16).save(first)
    convert(first, gguf_file)
    convert(gguf_file, second)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (first, second)]
    assert configs[0].pop("eos_token_id") == 260 and configs[1].pop("eos_token_id") == [260, 258], "GGUF has one place for these"
    del configs[0]["transformers_version"]
    assert configs[0] == configs[1]
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    assert (first / "generation_config.json").read_bytes() == (second / "generation_config.json").read_bytes()
    assert (first / "chat_template.jinja").read_text() == (second / "chat_template.jinja").read_text()


@pytest.mark.slow
def test_the_real_model_out_and_in_again(tmp_path: Path):
    """SmolLM2 as BF16: the same weights, ids and template."""
    made = load(asset("smollm2"))
    out = export_gguf(made, tmp_path / "m.gguf", dtype="bf16")
    again = load(out)
    for (name, mine), theirs in zip(made.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    assert again.spec == made.spec and again.prompt.digest() == made.prompt.digest()


# What cannot be said


def spec(**changes: Any) -> Transformer:
    """A small Llama with parts changed: of its attention, its block, or itself."""
    base = shape(dim=32, layers=2, heads=4, kv_heads=2, hidden=48, vocab=40, context=64)
    block = base.blocks[base.layers[0]]
    attention = block.mixer.replace(**{key: value for key, value in changes.items() if key in ("pattern", "bias")})
    ffn = block.ffn.replace(**{key: value for key, value in changes.items() if key == "activation"})
    rest = {key: value for key, value in changes.items() if key in ("causal", "embed")}
    return base.replace(blocks={base.layers[0]: block.replace(mixer=attention, ffn=ffn)}, **rest)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "window": ({"pattern": Window(size=8)}, "it has no words for .*pattern"),
    "biases of q alone": ({"bias": ("q",)}, "it has no words for .*bias"),
    "not causal": ({"causal": False}, "it has no words for causal"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_spec_that_llama_cannot_say_is_refused(tmp_path: Path, case: str):
    changes, message = REFUSED[case]
    model = tiny(spec(**changes))
    with pytest.raises(ConfigError, match=f"GGUF's architecture 'llama' cannot hold this model: .*{message}"):
        write_model(tmp_path / "m.gguf", model)
    assert not list(tmp_path.iterdir())
    write_model(tmp_path / "m.gguf", tiny(spec()))


def test_passes_scalings_types_and_vocabularies_are_refused(tmp_path: Path):
    path = tmp_path / "m.gguf"
    adapted = apply_passes(tiny(spec()), [LoRA(rank=2)])
    with pytest.raises(ConfigError, match=r"cannot hold passes \(lora\): merge them first"):
        write_model(path, adapted)
    with pytest.raises(ConfigError, match="unknown type of GGUF tensors 'q4_0'; did you mean 'q8_0'"):
        write_model(path, tiny(spec()), dtype="q4_0")
    odd = {**LLAMA3, "rope_theta": 500000.0, "low_freq_factor": 2.0}
    with pytest.raises(ConfigError, match="do not tell this model's low_freq_factor 2"):
        write_model(path, ours(llama(head_dim=64, rope_parameters=odd))[0])
    with pytest.raises(ConfigError, match="ids up to 261, but the model only has 40"):
        write_model(path, tiny(spec()), tokenizer=vocabulary())
    big = tiny(spec())
    with torch.no_grad():
        big.layers[1].ffn.out.weight[3, 5] = 1e5
    with pytest.raises(FileError, match=r"blk.1.ffn_down.weight: 1 values cannot be held, the largest 100000"):
        write_model(path, big, dtype="f16")
    assert not list(tmp_path.iterdir())


def test_files_in_the_way_are_kept(tmp_path: Path):
    made = bundle(tmp_path)
    (tmp_path / "m.Modelfile").write_text("mine")
    with pytest.raises(FileError, match="m.Modelfile: is there already"):
        export_gguf(made, tmp_path / "m.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["m.Modelfile"]
    export_gguf(made, tmp_path / "m.gguf", overwrite=True)
    assert (tmp_path / "m.Modelfile").read_text() != "mine"
    with pytest.raises(FileError, match="m.gguf: is there already"):
        export_gguf(made, tmp_path / "m.gguf")
    with pytest.raises(ConfigError, match="takes no family"):
        convert(tmp_path / "m.gguf", tmp_path / "n.gguf", family="llama")


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path):
    alive: set[int] = set()
    most: list[int] = []

    def maker(index: int) -> Callable[[], torch.Tensor]:
        def make() -> torch.Tensor:
            tensor = torch.full((64, 64), float(index))
            alive.add(index)
            weakref.finalize(tensor, alive.discard, index)
            most.append(len(alive))
            return tensor

        return make

    tensors = {f"t{index}": as_stored(f"t{index}", Lazy((64, 64), torch.float32, maker(index)), "Q8_0") for index in range(8)}
    write_gguf(tmp_path / "m.gguf", {}, tensors)
    assert most == [1] * 8
    assert [open_gguf(tmp_path / "m.gguf").array(f"t{index}")[5, 5] for index in range(8)] == pytest.approx(list(range(8)), rel=1e-3)


# Beside it


def test_modelfile():
    text = modelfile("dir.v1.gguf", context=131072, stops=["<|im_end|>", 'a"b', "x\ny"], template=True)
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert lines == ["FROM ./dir.v1.gguf", "PARAMETER num_ctx 8192", 'PARAMETER stop "<|im_end|>"', 'PARAMETER stop """a"b"""']
    assert "-f dir.v1.Modelfile" in text and "131072" in text and "\nTEMPLATE" not in text
    assert modelfile("m.gguf", context=2048, stops=[], template=False).splitlines()[1:] == ["FROM ./m.gguf", "PARAMETER num_ctx 2048"]


def test_what_is_left_out_is_told(tmp_path: Path):
    made = bundle(tmp_path)
    ends, rest = {"eos_token_id": [258, 260, 257, 256]}, {**made.rest, "vendor_flag": 3}
    written = write_model(tmp_path / "m.gguf", made.model, tokenizer=made.tokenizer, rest=rest, generation_config=ends)
    assert written.notes == (
        "GGUF has words for 3 tokens that end a text; [256] end one in this model too and are left out",
        "config.json's vendor_flag, allowed without being understood, have no place in GGUF and are left out",
    )
    metadata = open_gguf(tmp_path / "m.gguf").metadata
    assert [metadata[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom")] == [260, 258, 257]
