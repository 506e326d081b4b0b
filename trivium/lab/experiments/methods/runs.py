"""One run of one way with one seed, and the ledger that all runs are kept in: a line of JSON each, appended when it is done.

A run is a process of its own, so that its peak memory is its own. The same command started twice shares the work: each run is
claimed by a lock on a file, which its process gives back however it ends, and what the ledger holds is never made again. A line is
found by the hash of all that it depends on, so that changed settings are measured anew and old lines stay.
"""

from __future__ import annotations

import datetime
import fcntl
import hashlib
import json
import multiprocessing
import os
import pydoc_data.topics
import random
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from ....adapt.adapter import merge
from ....core.errors import DataError
from ....core.log import log
from ....core.seed import derive
from ....core.spec import Spec
from ....data import rows
from ....data.bank import Prepared
from ....data.prepare import prepare
from ....evaluate.generation import Generate
from ....evaluate.scorers import Json
from ....evaluate.task import Subject
from ....infer.sampling import Sampling
from ....io import files
from ....io.pull import pull
from ....models import count
from ....optim.optimizers import AdamW
from ....optim.schedules import Cosine
from ....recipes.demo_task import examples, messages
from ....recipes.load import Bundle, load
from ....recipes.prefer import Prefer, prefer
from ....recipes.pull import convert
from ....recipes.sft import SFT, sft
from ....train import history
from ....train.loop import TrainConfig
from ....train.reference import logprobs_of
from ....train.run import Run as Trained
from .ways import Way

Line = dict[str, Any]
GENERAL = 256  # tokens of a window of general text
SCORED = 2048  # tokens in one scoring forward


class Job(Spec):
    """What every run of a table has in common."""

    model: str = Field("smollm2", description="what is adapted")
    precision: Literal["bf16", "fp32"] = "bf16"
    steps: int = Field(gt=0, description="updates of every run")
    length: int = Field(gt=0, description="tokens in a packed row")
    rows: int = Field(gt=0, description="packed rows of an update")
    general: int = Field(8, gt=1, description="windows of general text that are scored before and after")

    def measure(self, way: Way, *, seed: int, base: Path, scratch: Path) -> Line:
        """Adapts the model at `base` and measures it."""
        raise NotImplementedError

    def depends(self) -> str:
        """A hash of what a run depends on beside this job and its way."""
        return ""

    def settings(self, way: Way, *, seed: int, base: Path, out: Path) -> dict[str, Any]:
        """Fields of the recipe's config, up to its data."""
        return {
            "model": str(base),
            "out": str(out),
            "length": self.length,
            "optim": AdamW(lr=way.rate, weight_decay=0.0),
            "schedule": Cosine(warmup=0.1),
            "train": TrainConfig(steps=self.steps, rows=self.rows, precision=self.precision, seed=seed, track=()),
            **way.changes,
        }


class Teaching(Job):
    """The demo's task: short texts in, JSON out; the test's templates, names and places stand nowhere in training."""

    steps: int = 36
    length: int = 512
    rows: int = 1
    texts: int = Field(240, gt=0, description="texts to learn from")
    test: int = Field(64, gt=1, description="held-out texts")
    most: int = Field(80, gt=0, description="tokens of an answer, at most")

    def measure(self, way: Way, *, seed: int, base: Path, scratch: Path) -> Line:
        train = [{"messages": messages(one)} for one in examples("train", seed=seed, count=self.texts)]
        test = [{"messages": messages(one)} for one in examples("test", seed=0, count=self.test)]
        data = {"data": (_write(scratch / "train.jsonl", train),)}
        bundle, facts = load(base, dtype=self.precision), {}
        if way.rate:
            config = SFT(**self.settings(way, seed=seed, base=base, out=scratch / "run"), **data)
            facts = _watched(lambda: sft(config, bundle=bundle), bundle, scratch / "run")
        facts |= _scored(bundle, prepare(test, bundle.prompt, length=self.length), "answer")
        facts |= _scored(bundle, _general(bundle, self.general), "general")
        task = Generate(data=(_write(scratch / "test.jsonl", test),), scorer=Json(), sampling=Sampling(temperature=0, max_tokens=self.most))
        samples = task.run(Subject(bundle.model, bundle.tokenizer, bundle.prompt, batch=self.test), task.records())
        told = {name: [one.terms[name] for one in samples] for name in ("exact_match", "field_recall")}
        return {
            **facts,
            "exact": [term[0] for term in told["exact_match"]],
            "fields": [term[0] for term in told["field_recall"]],
            "fields wanted": [term[1] for term in told["field_recall"]],
            "first answer": samples[0].shown["answer"],
        }


class Preferring(Job):
    """Pairs of a better and a worse answer, from a file of preference rows; the last rows of a fixed shuffle are held out."""

    steps: int = 14
    length: int = 160
    rows: int = Field(4, description="packed rows of an update; a row has room for two answers of `length` tokens")
    pairs: str = Field(description="file of preference rows")
    train: int = Field(300, gt=0, description="pairs to learn from, drawn anew for each seed")
    test: int = Field(64, gt=1, description="pairs held out")
    asked: int = Field(16, gt=1, description="prompts of held-out pairs that the model answers, to see how long it speaks")
    most: int = Field(96, gt=0, description="tokens of an answer, at most")

    def depends(self) -> str:
        return files.sha256(Path(self.pairs))

    def split(self, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Rows to learn from, which the seed draws, and held-out ones, which are always the same. Rows whose sides are the same or
        that are too long for `length` by a rough count are left out."""
        found = [{name: one.value.get(name) for name in ("instruction", "input", "chosen", "rejected")} for one in rows.read(self.pairs)]
        kept = [one for one in found if one["chosen"] != one["rejected"] and len(json.dumps(one)) < 4 * self.length]
        random.Random(0).shuffle(kept)
        if len(kept) < self.train + self.test:
            raise DataError(f"{self.pairs}: {len(kept)} pairs are of use, and {self.train + self.test} are wanted", value=self.pairs)
        held, rest = kept[: self.test], kept[self.test :]
        random.Random(derive(seed, "pairs")).shuffle(rest)
        return rest[: self.train], held

    def measure(self, way: Way, *, seed: int, base: Path, scratch: Path) -> Line:
        train, held = self.split(seed)
        bundle, facts = load(base, dtype=self.precision), {}
        if way.first:
            self._taught(way, bundle, train, seed=seed, base=base, scratch=scratch)
        if way.rate:
            data = {"data": (_write(scratch / "train.jsonl", train),), "max_dropped": None}
            config = Prefer(**self.settings(way, seed=seed, base=base, out=scratch / "run"), **data)
            facts = _watched(lambda: prefer(config, bundle=bundle), bundle, scratch / "run")
        bank = prepare(held, bundle.prompt, length=self.length, feeds="preference", max_dropped=None)
        facts |= _scored(bundle, bank, "pair", pairs=True) | _scored(bundle, _general(bundle, self.general), "general")
        asked = [{"messages": [*_question(one), {"role": "assistant", "content": one["chosen"]}]} for one in held[: self.asked]]
        sampling = Sampling(temperature=0, max_tokens=self.most)
        task = Generate(data=(_write(scratch / "asked.jsonl", asked),), sampling=sampling)
        samples = task.run(Subject(bundle.model, bundle.tokenizer, bundle.prompt, batch=self.asked), task.records())
        said = [one.shown["answer"] for one in samples]
        return {**facts, "spoken": [len(bundle.tokenizer.encode(text, bos=False)) for text in said], "first answers": said[:3]}

    def _taught(self, way: Way, bundle: Bundle, train: Sequence[Mapping[str, Any]], *, seed: int, base: Path, scratch: Path) -> None:
        """The chosen answers learned first, and merged, so that what follows is compared with the model that learned them."""
        lines = [{"messages": [*_question(one), {"role": "assistant", "content": one["chosen"]}]} for one in train]
        given = self.settings(way, seed=seed, base=base, out=scratch / "first")
        given["train"] = given["train"].replace(steps=max(1, round(way.first * self.steps)))
        del given["objective"]
        sft(SFT(**given, data=(_write(scratch / "chosen.jsonl", lines),), max_dropped=None), bundle=bundle)
        merge(bundle.model, probe=torch.tensor([bundle.prompt.generation(_question(train[0]))]))


@dataclass(frozen=True)
class Run:
    """One way of a job with one seed."""

    name: str
    way: Way
    seed: int
    job: Job

    @property
    def id(self) -> str:
        """The hash of all that its result depends on. What is not trained depends on no seed."""
        about = [type(self.job).__name__, self.job.to_dict(defaults=True), self.job.depends(), self.way.to_dict(), self.seed]
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


def measured(run: Run, base: str) -> Line:
    """What came of a run, as its line in the ledger."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch, log.hushed():
        found = run.job.measure(run.way, seed=run.seed, base=Path(base), scratch=Path(scratch))
    about = {"id": run.id, "job": type(run.job).__name__, "way": run.name, "seed": run.seed, "rate": run.way.rate}
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    machine = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    return {**about, **found, "minutes": round((time.perf_counter() - started) / 60, 2), "date": today, "machine": machine}


def apart(run: Run, base: str) -> Line:
    """`measured` in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as other:
        return other.submit(measured, run, base).result()


def complete(wanted: Sequence[Run], folder: Path, *, do: Callable[[Run, str], Line] = apart) -> dict[str, Line]:
    """Makes what the ledger in `folder` lacks of `wanted`, and returns all their lines by id. Where another process is at a run, the
    others come first; at the end it is waited for."""
    folder.mkdir(parents=True, exist_ok=True)
    ledger = folder / "runs.jsonl"
    for wait in (False, True):
        for number, run in enumerate(wanted, start=1):
            if run.id in read(ledger):
                continue
            with _claimed(folder / f"{run.id}.lock", wait=wait) as mine:
                if not mine or run.id in read(ledger):
                    continue
                line = do(run, str(based(run.job.model, folder)))
                _append(ledger, line)
            log.say(f"{number}/{len(wanted)}: {run.name}, seed {run.seed}: {line['minutes']} min")
    found = read(ledger)
    return {run.id: found[run.id] for run in wanted}


def based(model: str, folder: Path) -> Path:
    """`model` as a directory: itself, or what it is converted to in `folder`, once."""
    if Path(model).is_dir():
        return Path(model)
    with _claimed(folder / "base.lock", wait=True), log.hushed():
        return convert(pull(model).path, folder / "base", dtype="bf16")


def read(ledger: Path) -> dict[str, Line]:
    """The lines of a ledger by id; a last one that was cut off does not count."""
    found = {}
    for text in ledger.read_text(encoding="utf-8").splitlines() if ledger.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        found[line["id"]] = line
    return found


def _append(ledger: Path, line: Line) -> None:
    """In one write, so that two processes do not mix theirs."""
    place = os.open(ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(place, (json.dumps(line, ensure_ascii=False) + "\n").encode())
        os.fsync(place)
    finally:
        os.close(place)


@contextmanager
def _claimed(path: Path, *, wait: bool) -> Iterator[bool]:
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def _watched(train: Callable[[], Trained], bundle: Bundle, run: Path) -> Line:
    """What training took: trained parameters, tokens per second of its updates, and the most memory that was resident in it."""
    _forget_peak()
    train()
    steps = history.read(run)
    trained = sum(parameter.numel() for parameter in bundle.model.parameters() if parameter.requires_grad)
    return {
        "trained": trained,
        "parameters": count.parameters(bundle.model).total,
        "tokens": sum(step["tokens"] for step in steps),
        "tokens per second": sum(step["tokens"] for step in steps) / sum(step["seconds"] for step in steps),
        "peak MB": _peak(),
        "losses": [round(step["loss"], 4) for step in steps],
    }


def _forget_peak() -> None:
    """Linux: from here on the peak is counted anew."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        log.warn("the peak of memory cannot be counted anew here: it includes loading")


def _peak() -> float | None:
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return None if found is None else int(found[1]) / 1e3


def _scored(bundle: Bundle, bank: Prepared, name: str, *, pairs: bool = False) -> Line:
    """The log-probability of each row, and how many tokens it sums over."""
    found = logprobs_of(bundle.model, bank, rows=max(1, SCORED // bank.length), pairs=pairs)
    return {f"{name} logprobs": [round(float(value), 4) for value in found], f"{name} tokens": bank.index["supervised"].tolist()}


def _general(bundle: Bundle, count: int) -> Prepared:
    """Windows of English that every machine has: the opening of the longest help topics of Python."""
    texts = sorted(pydoc_data.topics.topics.values(), key=len, reverse=True)[:count]
    openings = [bundle.tokenizer.decode(bundle.tokenizer.encode(text[: 8 * GENERAL], bos=False)[: GENERAL - 8]) for text in texts]
    return prepare([{"text": text} for text in openings], bundle.prompt, length=GENERAL, format="text")


def _question(row: Mapping[str, Any]) -> list[dict[str, str]]:
    asked = row["instruction"] if not row["input"] else f"{row['instruction']}\n{row['input']}"
    return [{"role": "user", "content": asked}]


def _write(path: Path, lines: Sequence[Mapping[str, Any]]) -> str:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return str(path)
