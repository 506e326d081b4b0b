"""From raw text to a model of one's own, taught a task: all of it from the Python standard library's own source.

Every machine that runs this has the text. Held-out files are measured in bits per byte beside an n-gram model over the
same tokens and a compressor that has read the same training text, and a function is completed.
"""

from __future__ import annotations

import hashlib
import math
import re
import sysconfig
import time
from pathlib import Path
from typing import Any

from pydantic import Field

from ..core.device import dtype
from ..core.log import log
from ..core.spec import Spec
from ..data import rows
from ..evaluate.baselines import KneserNey, compressed_bits_per_byte
from ..evaluate.perplexity import document, negative_log_likelihoods
from ..io import files
from ..text import bpe
from ..text.tokenizer import Tokenizer
from ..train.loop import TrainConfig
from .data import bank
from .load import Bundle, load
from .pretrain import Pretrain, complete, pretrain
from .sft import SFT, loss_on, sft

FUNCTION = "def read_lines(path):\n    "


class FromScratch(Spec):
    """What is done; the defaults are made for two cores and about ten minutes."""

    out: str = Field("trivium-from-scratch", description="the folder that everything is kept in")
    text: tuple[str, ...] = Field((), description="other text to learn: files, folders or globs; Python's standard library by default")
    vocab: int = Field(4096, gt=256, description="tokens in the vocabulary")
    preset: str = Field("llama-5m", description="the model's shape")
    megabytes: float = Field(8.0, gt=0, description="most text to learn from")
    held_out: int = Field(12, gt=0, description="files that are measured and never trained on")
    length: int = Field(256, ge=2, description="tokens in a row")
    train: TrainConfig = Field(TrainConfig(rows=8, steps=1800, validate_every=600, save_every=300), description="how long and how")
    teach: TrainConfig = Field(TrainConfig(rows=8, steps=60), description="how long and how the adapter is trained")


def from_scratch(config: FromScratch) -> dict[str, Any]:
    """Run all steps; returns the measured facts, which are also written to `out/facts.json`."""
    out, started = Path(config.out), time.perf_counter()
    log.say("\n[1/5] Gather text and hold files out.")
    train, held = corpus(config)
    log.say(f"  {sum(map(len, train)) / 1e6:.1f} MB to learn from, {len(held)} files held out ({sum(map(len, held)) / 1e3:.0f} kB)")
    paths = {
        name: files.write_lines(out / "data" / f"{name}.jsonl", ({"text": text} for text in texts))
        for name, texts in (("train", train), ("held-out", held))
    }
    log.say("\n[2/5] Train a tokenizer.")
    tokenizer = _tokenizer(config, out, train)
    log.say("\n[3/5] Train a model.")
    run = pretrain(
        Pretrain(
            preset=config.preset,
            tokenizer=str(out / "tokenizer"),
            data=(str(paths["train"]),),
            validation=(str(paths["held-out"]),),
            out=str(out / "run"),
            length=config.length,
            train=config.train,
            samples=(FUNCTION,),
        )
    )
    log.say("\n[4/5] Measure it on files that it has not seen.")
    bundle = load(run.path)
    facts = measured(bundle, tokenizer, train, held, context=config.length)
    facts["completion"] = FUNCTION + complete(bundle, FUNCTION)
    log.table("bits per byte of held-out files (less is better)", ("what", "bits per byte"), list(facts["bits per byte"].items()))
    log.say(f"\n{facts['completion']}\n\nlet it write: trivium generate {run.path} 'import '")
    log.say("\n[5/5] Teach it to begin docstrings.")
    facts["docstrings"] = _taught(config, out, bundle, run.path, train, held)
    facts["seconds"] = round(time.perf_counter() - started, 1)
    files.write_json(out / "facts.json", facts)
    return facts


def corpus(config: FromScratch) -> tuple[list[str], list[str]]:
    """The texts to train on and those held out. Which files are held out depends on their names and contents alone."""
    if config.text:
        texts = [str(record.value["text"]) for record in rows.read(config.text)]
    else:
        root = Path(sysconfig.get_paths()["stdlib"])
        skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "__pycache__"}
        found = sorted(path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts[:-1]))
        texts = [text for path in found if (text := path.read_text(encoding="utf-8", errors="replace")).strip()]
    order = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())
    held, rest, room = [], [], config.megabytes * 1e6
    for text in order:
        if len(held) < config.held_out and 2_000 <= len(text) <= 60_000:
            held.append(text)
        elif len(text) <= room:
            rest.append(text)
            room -= len(text)
    return rest, held


def measured(bundle: Bundle, tokenizer: Tokenizer, train: list[str], held: list[str], *, context: int) -> dict[str, Any]:
    """Bits per byte of the held-out texts, all together: the model's, an n-gram model's and a compressor's."""
    size = sum(len(text.encode()) for text in held)
    ids = [tokenizer.encode(text, bos=False) for text in held]
    nlls = negative_log_likelihoods(
        bundle.model, [document(tokenizer, text) for text in held], context=context, stride=max(1, context // 2)
    )
    grams = KneserNey([tokenizer.encode(text, bos=False) for text in train], order=5, vocab=tokenizer.vocab_size)
    joined = "".join(train).encode()
    return {
        "bits per byte": {
            "this model": sum(nlls) / math.log(2) / size,
            "5-gram Kneser-Ney, same tokens": sum(map(grams.bits, ids)) / size,
            "lzma after reading the training text": compressed_bits_per_byte(joined, "".join(held).encode()),
        },
        "held-out bytes": size,
        "parameters": sum(parameter.numel() for parameter in bundle.model.parameters()),
    }


DOCSTRING = re.compile(r'^([ \t]*def \w+\([^\n]*\):\n[ \t]*""")([^"\n]{8,120})', re.MULTILINE)


def lessons(texts: list[str]) -> list[dict[str, str]]:
    """Every definition with a docstring, as a prompt that ends where its text begins, and its first line."""
    return [{"prompt": found[1], "completion": found[2].rstrip()} for text in texts for found in DOCSTRING.finditer(text)]


def _taught(config: FromScratch, out: Path, bundle: Bundle, model: Path, train: list[str], held: list[str]) -> dict[str, Any] | None:
    """Loss per token of held-out first lines before and after a LoRA adapter is trained on the others; None where there are too few."""
    rows_of = {"train": lessons(train), "held-out": lessons(held)}
    if min(map(len, rows_of.values())) < 2:
        log.say("  there are no docstrings in this text")
        return None
    paths = {name: files.write_lines(out / "data" / f"docstrings-{name}.jsonl", found) for name, found in rows_of.items()}
    job = SFT(
        model=str(model),
        data=(str(paths["train"]),),
        validation=(str(paths["held-out"]),),
        out=str(out / "docstrings"),
        length=config.length,
        max_dropped=None,
        max_empty=None,
        train=config.teach,
    )
    measured_on = bank(job.validation, bundle.prompt, length=config.length, max_dropped=None, max_empty=None)
    before = loss_on(measured_on, job.objective, rows=job.train.rows)(bundle.model.to(dtype(job.train.precision)))["loss"]
    run = sft(job, bundle=load(model, dtype=job.train.precision))
    after = run.metrics["validation.loss"]
    log.table("loss per token of held-out first lines", ("model", "nats"), [("before", before), ("with the adapter", after)])
    return {"rows": len(rows_of["train"]), "before": before, "after": after, "adapter": str(run.path)}


def _tokenizer(config: FromScratch, out: Path, texts: list[str]) -> Tokenizer:
    path = out / "tokenizer"
    if (path / "tokenizer.json").is_file():
        log.say(f"  {path} is there already")
        return Tokenizer.load(path)
    found = bpe.train(texts, size=config.vocab)
    with files.atomic_directory(path, overwrite=True) as partial:
        found.tokenizer.save(partial)
    log.say(f"  {found.tokenizer.vocab_size} tokens from {found.words} different words")
    return found.tokenizer
