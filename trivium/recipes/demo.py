"""The main job, end to end: a real model comes in, is verified, learns a task, proves it, and goes out.

Every step leaves a file, and a second run starts from what is there. Nothing here is special to the demo but the task:
each step is the recipe that its own command runs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field

from ..adapt.lora import LoRA
from ..checks import bootstrap
from ..core.errors import TriviumError
from ..core.log import log
from ..core.spec import Spec
from ..evaluate.generation import Generate
from ..evaluate.results import Result
from ..evaluate.results import load as load_result
from ..evaluate.scorers import Json
from ..infer.sampling import Sampling
from ..io import files
from ..optim.optimizers import AdamW
from ..optim.schedules import Cosine
from ..train import history
from ..train.loop import TrainConfig
from . import evaluate as evaluation
from . import fresh, report
from .adapter import TOLERANCE, merge_into
from .demo_baseline import NearestTemplate
from .demo_task import examples, messages
from .load import Bundle, load
from .pull import pull_model
from .sft import SFT, sft
from .verify import show as show_checks
from .verify import verify


class Demo(Spec):
    """What the demo does; the defaults are made for two cores and about ten minutes."""

    model: str = Field("smollm2", description="the model that is taught")
    out: str = Field("trivium-demo", description="the folder that everything is kept in")
    train_rows: int = Field(1400, gt=0, description="texts to learn from")
    test_rows: int = Field(96, gt=0, description="held-out texts, of other templates, names and places")
    length: int = Field(1024, gt=0, description="tokens in one step")
    adapter: LoRA = Field(LoRA(rank=16, alpha=32.0), description="what is trained")
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    seed: int = Field(0, ge=0, description="of data, adapter and order")
    tolerance: float = Field(TOLERANCE, gt=0, description="largest mean KL, in nats, by which merging may move the model")


def demo(config: Demo) -> dict[str, Any]:
    """Run all steps; returns the facts that `report.html` shows. Raises `TriviumError` if a check fails."""
    return _Demo(config).run()


class _Demo:
    def __init__(self, config: Demo):
        self.config, self.out = config, Path(config.out)
        self.facts: dict[str, Any] = {"config": config.to_dict(defaults=True), "commands": [], "seconds": {}}
        self.step = 0

    def run(self) -> dict[str, Any]:
        base = self.timed("pull", "Fetch the model and turn it into a model directory.", self.pull)
        self.timed("verify", "Compare what was loaded with independent readers and with itself.", lambda: self.verify(base))
        data = self.timed("data", "Write the task: short texts in, JSON out.", self.data)
        before = self.timed("before", "Measure the untaught model.", lambda: self.measure(base, None, data, "before"))
        adapter = self.timed("teach", "Teach it with LoRA; only the answers count.", lambda: self.teach(base, data))
        after = self.timed("after", "Measure again.", lambda: self.measure(base, adapter, data, "after"))
        self.verdict(before, after)
        merged = self.timed(
            "merge", "Merge the adapter into the weights, save, and reload elsewhere.", lambda: self.merge(base, adapter, data)
        )
        self.timed("answer", "Answer a new text.", lambda: self.answer(merged))
        path = report.write(self.out / "report.html", self.facts, history.read(self.out / "run"))
        log.say(f"\nThe whole story: {path}\nTalk to the result: trivium chat {merged}")
        return self.facts

    def timed(self, name: str, words: str, do: Callable[[], Any]) -> Any:
        self.step += 1
        log.say(f"\n[{self.step}/8] {words}")
        started = time.perf_counter()
        result = do()
        self.facts["seconds"][name] = round(time.perf_counter() - started, 1)
        return result

    def ran(self, command: str) -> None:
        self.facts["commands"].append(command)
        log.say(f"  $ {command}")

    def pull(self) -> Path:
        base = self.out / "base"
        self.ran(f"trivium pull {self.config.model} --out {base}")
        return pull_model(self.config.model, out=base)

    def verify(self, base: Path) -> None:
        self.ran(f"trivium verify {base}")
        checks = verify(base)
        show_checks(checks)
        self.facts["checks"] = [check.to_dict() for check in checks]
        if failed := [check.check for check in checks if not check.passed]:
            raise TriviumError(f"{base}: does not hold what it promises: {', '.join(failed)}")

    def data(self) -> dict[str, Path]:
        """The splits as JSONL; the test's templates, names and places stand nowhere in training."""
        config, paths = self.config, {}
        for split, count in (("train", config.train_rows), ("valid", 64), ("test", config.test_rows)):
            paths[split] = self.out / "data" / f"{split}.jsonl"
            made = examples(split, seed=config.seed, count=count)  # type: ignore[arg-type]
            lines = [json.dumps({"messages": messages(example)}, ensure_ascii=False) for example in made]
            paths[split].parent.mkdir(parents=True, exist_ok=True)
            with files.atomic_file(paths[split]) as sink:
                sink.write(("\n".join(lines) + "\n").encode())
        known, asked = (
            examples(split, seed=config.seed, count=n) for split, n in (("train", config.train_rows), ("test", config.test_rows))
        )
        lookup = NearestTemplate(known)
        hits = [[float(lookup.answer(example.text) == example.answer), 1.0] for example in asked]
        found = bootstrap.interval(np.array(hits), bootstrap.ratio, seed=0)
        self.facts["baseline"] = asdict(found)
        self.facts["example"] = messages(known[0])
        log.say(f"  a text: {known[0].text}\n  its answer: {messages(known[0])[-1]['content']}")
        log.say(f"  looking up the nearest training text and exchanging its words gets {found.value:.1%} of {len(asked)} right")
        return paths

    def measure(self, base: Path, adapter: Path | None, data: Mapping[str, Path], name: str) -> Result:
        path = self.out / "results" / f"{name}.json"
        with_adapter = f" --adapter {adapter}" if adapter else ""
        self.ran(
            f"trivium eval run --model {base}{with_adapter} --task.kind generate --task.scorer json --task.sampling.max_tokens 96 --batch 32 "
            f"--task.data {data['test']} --out {path}"
        )
        task = Generate(data=(str(data["test"]),), scorer=Json(), sampling=Sampling(temperature=0, max_tokens=96))
        config = evaluation.Eval(model=str(base), adapter=None if adapter is None else str(adapter), task=task, out=str(path), batch=32)
        bundle = load(base, adapter=adapter)
        result = self.known(path, bundle, task, data["test"]) or evaluation.evaluate(config, bundle=bundle)
        evaluation.show(result, title=name)
        self.facts[name] = {metric: measured.to_dict(defaults=True) for metric, measured in result.metrics.items()}
        self.facts.setdefault("hashes", {})[name] = dict(result.hashes)
        self.facts["machine"], self.facts["versions"] = dict(result.machine), dict(result.versions)
        return result

    def known(self, path: Path, bundle: Bundle, task: Generate, data: Path) -> Result | None:
        """A result that is there already, if it is of these weights, this task and this data."""
        if not path.is_file():
            return None
        result, _ = load_result(path)
        same = result.hashes["weights"] == bundle.weights() and result.hashes[f"data/{data.name}"] == files.sha256(data)
        if not same or result.to_dict()["task"] != task.to_dict(defaults=True):
            return None
        log.say("  measured before, with the same weights, task and data")
        return result

    def teach(self, base: Path, data: Mapping[str, Path]) -> Path:
        config = SFT(
            model=str(base),
            data=(str(data["train"]),),
            validation=(str(data["valid"]),),
            out=str(self.out / "run"),
            adapter=self.config.adapter,
            length=self.config.length,
            optim=AdamW(lr=self.config.lr, weight_decay=0.0),
            schedule=Cosine(warmup=0.05),
            train=TrainConfig(epochs=1.0, rows=1, precision="bf16", seed=self.config.seed, save_every=25),
        )
        self.ran(f"trivium sft --config {self.out / 'run' / 'config.yaml'}")
        run = sft(config)
        self.facts["training"] = run.metrics
        return run.path

    def verdict(self, before: Result, after: Result) -> None:
        a, b = before.metrics["exact_match"], after.metrics["exact_match"]
        outside = b.low is not None and a.high is not None and b.low > a.high
        log.say(
            f"\n  exact match went from {a.value:.1%} to {b.value:.1%}"
            + (", outside each other's intervals" if outside else ", within the intervals")
        )
        self.facts["gain"] = {"before": a.value, "after": b.value, "outside_intervals": outside}

    def merge(self, base: Path, adapter: Path, data: Mapping[str, Path]) -> Path:
        out = self.out / "model"
        self.ran(f"trivium adapter merge {adapter} --base {base} --out {out} --overwrite")
        bundle = load(base, adapter=adapter)
        probe = bundle.prompt.generation(messages(examples("test", seed=self.config.seed, count=1)[0])[:-1])
        self.facts["merge"] = asdict(merge_into(bundle, out, tolerance=self.config.tolerance, probe=probe, overwrite=True))
        ours = load(out, dtype="fp32").model
        with torch.inference_mode():
            reference = ours(torch.tensor([probe])).logits[0].numpy()
        for by in fresh.BY:
            found = fresh.logits(out, probe, by=by)
            off = float(np.abs(found - reference).max() / reference.std())
            tolerance = 1e-6 if by == "trivium" else 1e-4
            log.say(f"  reloaded in a new process by {by}: logits differ by at most {off:.2g} of their deviation (allowed: {tolerance:g})")
            self.facts.setdefault("reload", []).append({"by": by, "difference": off, "tolerance": tolerance, "pass": off <= tolerance})
            if off > tolerance:
                raise TriviumError(f"{out}: {by} computes other logits from the saved model ({off:.2g} of their deviation)")
        return out

    def answer(self, model: Path) -> None:
        example = examples("test", seed=self.config.seed + 1000, count=1)[0]
        asked = messages(example)[:-1]
        answer = load(model).chat(asked, sampling=Sampling(temperature=0, max_tokens=96)).text
        log.say(f"  {asked[-1]['content']}\n  {answer}")
        self.facts["answer"] = {"messages": asked, "answer": answer, "expected": example.answer}
