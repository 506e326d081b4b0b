"""llama.cpp itself runs what is written: same ids, same logits. Needs llama-cpp-python; without it these tests are skipped.

llama.cpp rounds the activations to the type of the matrix that they meet, so only a file of F32 matrices must agree to the
last digits; the others are held to what that rounding costs.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.assets import asset
from tests.io.gguf.files import llama
from tests.io.gguf.test_export import bundle, ours
from tests.io.gguf.test_family import CONFIGS
from tests.text.helpers import ODD, prompt
from tests.text.helpers import ours as real
from tests.text.test_gguf_export import SPLITS, trained
from tests.text.test_gguf_vocab import NAMES
from trivium.io.gguf.export import write_model
from trivium.io.gguf.writer import write_gguf
from trivium.recipes.gguf import export_gguf
from trivium.recipes.load import load
from trivium.text.gguf_export import metadata

llama_cpp = pytest.importorskip("llama_cpp")

TEXT = "The capital of France is Paris, and 123 + 456 = 579. Grüße 🙂 from 東京.\n\n\tdef f(x): return x  \n"
EXACT = {"type_k": 0, "type_v": 0}  # the cache as float32


def theirs(path: Path, ids: list[int]) -> torch.Tensor:
    """llama.cpp's logits after each of `ids`: [T, V]."""
    model = llama_cpp.Llama(str(path), n_ctx=128, n_batch=128, logits_all=True, n_threads=1, verbose=False, **EXACT)
    model.eval(ids)
    return torch.from_numpy(np.array(model.scores[: len(ids)]))


def mine(path: Path, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return load(path, dtype="fp32").model(torch.tensor([ids])).logits[0]


def divergence(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Mean KL divergence of the predictions, in nats."""
    ours, theirs = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
    return float((ours.exp() * (ours - theirs)).sum(-1).mean())


@pytest.mark.parametrize("case", CONFIGS)
def test_logits_of_float32_files(tmp_path: Path, case: str):
    source = llama(**CONFIGS[case])
    model, rest = ours(source)
    write_model(tmp_path / "m.gguf", model, rest=rest)
    ids = [(7 * k) % 48 for k in range(100)]
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
    assert expected.std() > 0.5
    assert torch.allclose(theirs(tmp_path / "m.gguf", ids), expected, atol=1e-4)


@pytest.mark.parametrize(("dtype", "bound"), [("f16", 1e-5), ("bf16", 1e-3), ("q8_0", 1e-3)])
def test_logits_of_rounded_files(tmp_path: Path, dtype: str, bound: float):
    made = bundle(tmp_path, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)
    out = export_gguf(made, tmp_path / "m.gguf", dtype=dtype)
    ids = [(37 * k) % 256 for k in range(100)]
    expected, found = mine(out, ids), theirs(out, ids)
    assert 0 < divergence(expected, found) < bound and expected.std() > 0.5
    assert divergence(expected, found.roll(1, 0)) > 10 * bound, "the bound tells models apart"


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "bound"), [("f32", 1e-9), ("f16", 1e-4), ("bf16", 1e-3), ("q8_0", 1e-2)])
def test_the_real_model(tmp_path: Path, dtype: str, bound: float, note: Callable[[str], None]):
    """SmolLM2: the same ids for a text and for a conversation, and the same predictions."""
    made = load(asset("smollm2"), dtype="fp32")
    out = export_gguf(made, tmp_path / "m.gguf", dtype=dtype)
    vocabulary = llama_cpp.Llama(str(out), vocab_only=True, verbose=False)
    ids = made.tokenizer.encode(TEXT)
    assert vocabulary.tokenize(TEXT.encode(), add_bos=made.tokenizer.add_bos, special=False) == ids
    turn = made.prompt.generation([{"role": "user", "content": "Hi"}])
    assert vocabulary.tokenize(made.tokenizer.decode(turn, skip_special=False).encode(), add_bos=False, special=True) == turn
    assert (vocabulary.token_bos(), vocabulary.token_eos()) == (made.tokenizer.bos, made.tokenizer.eos)
    assert vocabulary.metadata["tokenizer.chat_template"] == made.prompt.template
    expected, found = mine(out, ids), theirs(out, ids)
    figure = divergence(expected, found)
    most = float((expected - found).abs().max())
    note(
        f"llama.cpp on SmolLM2 as {dtype}: KL {figure:.1e} nats, logits differ by at most {most:.1e} (deviation {float(expected.std()):.1f})"
    )
    assert figure < bound


@pytest.mark.parametrize("split", SPLITS)
def test_trained_vocabularies(tmp_path: Path, split: str):
    tokenizer = trained(split)
    write_gguf(tmp_path / "v.gguf", {"general.architecture": "llama", **metadata(tokenizer)[0]}, {})
    vocabulary = llama_cpp.Llama(str(tmp_path / "v.gguf"), vocab_only=True, verbose=False)
    for text in (TEXT, ODD, Path(__file__).read_text()):
        assert vocabulary.tokenize(text.encode(), add_bos=tokenizer.add_bos, special=False) == tokenizer.encode(text)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_real_vocabularies(tmp_path: Path, name: str):
    """llama.cpp gives a vocabulary the ids that its own tokenizer gives: words, and a conversation with control tokens."""
    tokenizer = real(name)
    found, _ = metadata(tokenizer)
    write_gguf(tmp_path / "v.gguf", {"general.architecture": "llama", **found}, {})
    vocabulary = llama_cpp.Llama(str(tmp_path / "v.gguf"), vocab_only=True, verbose=False)
    for text in (TEXT, unicodedata.normalize("NFC", ODD), "I'LL we'll 1234567 x=1;\r\n\r\n  y ///"):  # it does not normalize itself
        assert vocabulary.tokenize(text.encode(), add_bos=tokenizer.add_bos, special=False) == tokenizer.encode(text)
    turn = prompt(name).generation([{"role": "user", "content": "Hi"}])
    assert vocabulary.tokenize(tokenizer.decode(turn, skip_special=False).encode(), add_bos=False, special=True) == turn
