"""A toy model directory that everything can run on, and the command line in this process.

The toy is a small Llama with a trained byte-level tokenizer and a ChatML template.
"""

from __future__ import annotations

import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from tests.tiny import tiny
from trivium import cli
from trivium.io.hf import families
from trivium.models import presets
from trivium.recipes.demo_task import Split, examples, messages
from trivium.recipes.load import Bundle
from trivium.text.prompt import Prompt
from trivium.text.tokenizer import Tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VOCAB = 448


def tokenizer() -> Tokenizer:
    """Byte-level BPE, trained on the demo's texts, so that any text can be encoded and these are short."""
    engine = tokenizers.Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    texts = [message["content"] for example in examples("train", seed=0, count=200) for message in messages(example)]
    engine.train_from_iterator(texts, trainer)
    config = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[2], "pad_token": SPECIAL[0], "model_max_length": 512}
    return Tokenizer(engine, config, where="toy tokenizer")


def bundle(*, seed: int = 0, context: int = 256, dtype: torch.dtype = torch.float32) -> Bundle:
    """A toy model with every parameter drawn, beside its text side; not on disk."""
    text = tokenizer()
    spec = presets.llama(dim=48, layers=2, heads=6, kv_heads=3, head_dim=8, hidden=64, vocab=VOCAB, tied=True, context=context)
    generation = {"bos_token_id": text.bos, "eos_token_id": text.eos, "pad_token_id": text.pad}
    return Bundle(
        model=tiny(spec, seed=seed, dtype=dtype),
        tokenizer=text,
        prompt=Prompt.of(text, TEMPLATE, generation, None),
        path=Path("toy"),
        family="llama",
        rest=families.get("llama").to_spec(families.get("llama").to_hf(spec, {}))[1] | generation,
        generation_config=generation,
    )


def write_rows(path: Path, split: Split = "train", *, count: int = 12) -> Path:
    """The demo's examples as conversations."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = examples(split, seed=0, count=count)
    path.write_text("".join(json.dumps({"messages": messages(example)}, ensure_ascii=False) + "\n" for example in made))
    return path


@dataclass(frozen=True)
class Done:
    """What a command did."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Trivium:
    """The command line, in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
        self.capsys, self.monkeypatch = capsys, monkeypatch

    def __call__(self, *tokens: str | Path, stdin: str = "") -> Done:
        self.monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        self.capsys.readouterr()
        status = cli.main([str(token) for token in tokens])
        return Done(status, *self.capsys.readouterr())

    def ok(self, *tokens: str | Path, stdin: str = "") -> Done:
        """A command that must succeed."""
        done = self(*tokens, stdin=stdin)
        assert done.status == 0, done.err
        return done

    def refused(self, *tokens: str | Path, status: int = 1, stdin: str = "") -> str:
        """A command that must fail with one clear error and no answer; returns the error."""
        done = self(*tokens, stdin=stdin)
        assert done.status == status and done.out == "", done
        errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "Traceback" not in done.err, done.err
        return errors[0]


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy model directory; not to be changed."""
    return bundle().save(tmp_path_factory.mktemp("toy") / "toy")


@pytest.fixture
def trivium(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Trivium:
    """The command line, in an empty folder with a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRIVIUM_HOME", str(tmp_path / "cache"))
    return Trivium(capsys, monkeypatch)
