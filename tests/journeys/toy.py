"""A tiny model directory, whole in every file: what the real commands are run on in tests.

A two-layer Llama of random weights, a tokenizer of bytes, and a ChatML template. It says nothing sensible, and says it fast.
"""

from __future__ import annotations

from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from trivium.models.presets import llama
from trivium.models.transformer import build, initialize
from trivium.recipes.load import Bundle
from trivium.text.prompt import Prompt
from trivium.text.tokenizer import Tokenizer

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer() -> Tokenizer:
    """One token a byte, and the three special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    engine = tokenizers.Tokenizer(models.BPE(vocab={token: id for id, token in enumerate(alphabet)}, merges=[]))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens(list(SPECIAL))
    return Tokenizer(engine, {"bos_token": SPECIAL[0], "eos_token": SPECIAL[2], "pad_token": SPECIAL[0]}, where="toy")


def bundle(*, seed: int = 0) -> Bundle:
    """The toy in memory, as `load` would give it."""
    text = tokenizer()
    spec = llama(dim=32, layers=2, heads=4, kv_heads=2, hidden=48, vocab=text.vocab_size, tied=True, context=1024)
    model = initialize(build(spec, device="cpu"), seed=seed).eval()
    generation = {"bos_token_id": text.bos, "eos_token_id": [text.eos]}
    return Bundle(model, text, Prompt.of(text, TEMPLATE, generation), Path("toy"), family="llama", generation_config=generation)


def write(path: Path, *, seed: int = 0) -> Path:
    """The toy as a model directory at `path`."""
    return bundle(seed=seed).save(path)
