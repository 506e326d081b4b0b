"""What a run will need before it is begun: memory, disk, steps and time, and a refusal with proposals where it cannot fit.

One training step of the very code that will run is taken on tensors that hold nothing (`models/ledger.py`), so figures
follow the model, its passes and the batch; the process itself is measured, and so are this machine's rates. What glibc's
allocator keeps beside is empirical (`SLACK`, `HOLES`; benchmarks/plan.py). Peaks of loading and validation are left out.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import platform
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..adapt.adapter import Adapter
from ..adapt.lora import LoRA
from ..adapt.nf4 import Nf4
from ..adapt.passes import Pass, apply_passes
from ..core.device import dtype
from ..core.errors import TriviumError
from ..core.home import home
from ..core.log import log
from ..data.bank import Prepared
from ..data.batch import Batch
from ..data.batches import collate
from ..io import files
from ..models import count
from ..models.checkpointing import Recompute
from ..models.ledger import Ledger, followed, ghost
from ..models.transformer import Transformer, TransformerModel, build
from ..optim.masters import Masters
from ..optim.optimizers import Optimizer
from ..train.loop import TrainConfig
from ..train.objectives import Objective
from .doctor import examine
from .mixture import Sets, batches

# Fitted to peaks of whole processes: what a step holds for a while takes this much more, and each of its allocations leaves
# a hole that is seldom filled again (before glibc 2.38, an aligned block never fits where one of its size was).
SLACK, HOLES = 0.15, 0.07
STEADY = ("weights", "masters", "average", "optimizer")  # held from the first step to the last
MARGIN = 0.05  # of the memory that is free, left to others


@dataclass(frozen=True)
class Training:
    """One training run as far as its needs go. `batch`: the heaviest; `tokens`: of the whole run."""

    spec: Transformer
    passes: tuple[Pass, ...]
    batch: Batch
    steps: int
    tokens: int
    objective: Objective
    optim: Optimizer
    train: TrainConfig
    out: Path

    def cheaper(self) -> Iterator[tuple[str, Training]]:
        """What could be changed so that less memory is needed, as options, each on top of those before."""
        options, now = [], self
        rows = len(self.batch.tokens)
        for option, changes in (
            ("--train.micro 1", {"micro": 1} if rows > 1 and (self.train.micro or rows) > 1 else None),
            ("--train.recompute.every 1", {"recompute": Recompute()} if self.train.recompute is None else None),
            ("--train.precision bf16", {"precision": "bf16"} if self.train.precision == "fp32" else None),
        ):
            if changes is not None:
                options.append(option)
                now = replace(now, train=now.train.replace(**changes))
                yield " ".join(options), now
        if not any(isinstance(step, Adapter) for step in self.passes):
            options.append("--adapter.rank 16")
            now = replace(now, passes=(*self.passes, LoRA(rank=16)))
            yield " ".join(options), now
        if not any(isinstance(step, Nf4) for step in self.passes):
            options.append("--passes nf4")
            yield " ".join(options), replace(now, passes=(Nf4(), *now.passes))


@dataclass(frozen=True)
class Plan:
    """`memory`: bytes by kind at the worst moment; `checkpoint`: bytes of each on disk; `flops` of the whole run, and its
    `seconds` were it to multiply matrices and move bytes at the rates that this machine reached."""

    training: Training
    parameters: int
    trained: int
    memory: dict[str, int]
    checkpoint: int
    flops: int
    seconds: float

    @property
    def peak(self) -> int:
        return sum(self.memory.values())

    @property
    def disk(self) -> int:
        """Bytes that checkpoints take at the worst moment: those that stay and the one being written."""
        train, steps = self.training.train, self.training.steps
        saves = 1 if train.save_every is None else math.ceil(steps / train.save_every)
        return self.checkpoint * (saves if train.keep_last is None else min(saves, train.keep_last + 1))

    def rows(self) -> list[tuple[str, str]]:
        """For a table."""
        kinds = ", ".join(f"{name} {size(value)}" for name, value in sorted(self.memory.items(), key=lambda item: -item[1]))
        return [
            ("parameters", f"{self.parameters:,}, {self.trained:,} trained"),
            ("steps", f"{self.training.steps:,}"),
            ("tokens", f"{self.training.tokens:,}"),
            ("memory at the worst moment", f"{size(self.peak)} of {size(available_memory())} free ({kinds})"),
            ("disk", f"{size(self.disk)} for checkpoints of {size(self.checkpoint)}, {size(free_disk(self.training.out))} free"),
            ("time", f"about {duration(self.seconds)}, {self.flops / 1e12:,.1f} TFLOP"),
        ]

    def to_dict(self) -> dict[str, Any]:
        facts = {"parameters": self.parameters, "trained": self.trained, "steps": self.training.steps, "tokens": self.training.tokens}
        needs = {"memory": self.memory, "peak": self.peak, "checkpoint": self.checkpoint, "disk": self.disk}
        limits = {"memory_free": available_memory(), "disk_free": free_disk(self.training.out)}
        return {**facts, **needs, **limits, "flops": self.flops, "seconds": self.seconds}

    def require_fits(self) -> Plan:
        """Itself, or a `TriviumError` that says what is short by how much, and what would fit."""
        room = available_memory() * (1 - MARGIN)
        if self.peak > room:
            tried = [(option, needs(changed).peak) for option, changed in self.training.cheaper()]
            fitting = [f"{option} (needs {size(peak)})" for option, peak in tried if peak <= room]
            advice = f"What would fit: {'; '.join(fitting)}" if fitting else "Take a smaller model, or shorter rows (--length)"
            raise TriviumError(f"this run needs {size(self.peak)} of memory at its worst moment, and {size(room)} are free. {advice}")
        free = free_disk(self.training.out)
        if self.disk > free:
            raise TriviumError(
                f"checkpoints of this run need {size(self.disk)} in {self.training.out}, and {size(free)} are free. "
                "Write elsewhere (--out), or keep fewer (--train.keep_last 1)"
            )
        return self


def needs(training: Training, *, held: int = 0) -> Plan:
    """What `training` will need, on a CPU. `held`: bytes of the model that this process holds already."""
    train, batch = training.train, training.batch
    model = apply_passes(build(training.spec, dtype=dtype(train.precision)), training.passes)
    model.recompute = train.recompute
    found = count.parameters(model)
    kept = training.objective.positions(batch)
    flops = count.flops(model, batch.segments, kept=kept).total
    ghost(model)
    ledger, state = dry_run(model, training)
    transient = sum(value for kind, value in ledger.peak.items() if kind not in STEADY)
    memory = {**ledger.peak, "allocator": int(SLACK * transient + HOLES * ledger.churned), "process": max(0, resident() - held)}
    times = training.tokens / int((batch.segments >= 0).sum())
    rates = machine_rates()
    seconds = flops / rates[train.precision] + ledger.moved / rates["bytes"]
    return Plan(
        training=training,
        parameters=found.total,
        trained=found.trained,
        memory={kind: value for kind, value in memory.items() if value},
        checkpoint=count.bytes_of(tensor for group in state.values() for tensor in group.values()),
        flops=round(flops * times),
        seconds=seconds * times,
    )


class _Cast(nn.Module):
    """A model that has its dtype already: torch cannot cast ghosts."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def to(self, *_: Any, **__: Any) -> _Cast:
        return self


def dry_run(model: nn.Module, training: Training) -> tuple[Ledger, dict[str, dict[str, Tensor]]]:
    """One step of the loop on a ghost, as it is once the optimizer holds its state. Returns what was held, and what a
    checkpoint saves."""
    phase = ""
    logits = training.objective.positions(training.batch) * training.spec.vocab
    shapes = {parameter.shape for parameter in model.parameters()}

    def kind(tensor: Tensor) -> str:
        if phase == "update":
            return "optimizer"
        if tensor.numel() == logits:
            return "logits"
        return "gradients" if phase == "backward" and tensor.shape in shapes else "activations"

    ledger = Ledger(kind)
    ledger.note(model.parameters(), "weights")
    masters = Masters(_Cast(model), training.optim, dtype=dtype(training.train.precision), ema=training.train.ema)
    ledger.note(masters.tensors.values(), "masters")
    if masters.average is not None:
        ledger.note(masters.average.tensors.values(), "average")
    rows = len(training.batch.tokens)
    micros = training.batch.split(math.ceil(rows / (training.train.micro or rows)))
    model.train()
    with followed(ledger):
        phase = "update"
        for master in masters.tensors.values():
            master.grad = torch.empty_like(master)
        masters.step(1.0)
        ledger.mark()
        for micro in micros[:2]:  # the second one finds the first one's gradients
            phase = "forward"
            term = torch.stack(list(training.objective.terms(model, micro).values())).sum()
            phase = "backward"
            term.backward()
            masters.accumulate()
            del term
        ledger.moved = round(ledger.moved * len(micros) / len(micros[:2]))
        masters.clip(training.train.clip)
        phase = "update"
        masters.step(1.0)
    return ledger, masters.state()


def heaviest(prepared: Prepared, *, rows: int) -> Batch:
    """`rows` bins that together weigh at least about as much as any batch: long documents and many targets."""
    lengths, supervised = (prepared.index[name].astype(np.float64) for name in ("length", "supervised"))
    sums = [np.add.reduceat(values[prepared.bins.rows], prepared.bins.starts[:-1]) for values in (lengths, lengths**2, supervised)]
    weight = sum(values / max(values.max(), 1.0) for values in sums)
    chosen = np.argsort(-np.asarray(weight), kind="stable")[:rows].tolist()
    return collate([(prepared, int(chosen[i % len(chosen)])) for i in range(rows)])


def whole(*, rows: int, length: int) -> Batch:
    """Full rows of one document each in which everything is a target: the most that any data can ask for."""
    segments = torch.zeros(rows, length, dtype=torch.int64)
    targets = torch.ones_like(segments, dtype=torch.bool)
    targets[:, 0] = False
    return Batch(torch.zeros_like(segments), segments, targets)


class Job(Protocol):
    """What the config of a recipe that trains has."""

    @property
    def objective(self) -> Objective: ...
    @property
    def optim(self) -> Optimizer: ...
    @property
    def train(self) -> TrainConfig: ...
    @property
    def out(self) -> str: ...


def foresee(job: Job, model: TransformerModel, data: Prepared | Sets | Batch, *, adapter: Pass | None = None) -> Plan:
    """What training `model`, which this process holds, will need: on prepared data, on several sets of it with their weights, or on
    batches like the one given."""
    train = job.train
    if isinstance(data, Batch):
        batch, steps = data, train.steps or 1
        tokens = steps * int((batch.segments >= 0).sum())
    else:
        sets = [(data, 1)] if isinstance(data, Prepared) else list(data)
        heavy = [heaviest(prepared, rows=train.rows) for prepared, _ in sets]
        batch = max(heavy, key=lambda one: int((one.segments >= 0).sum()) + int(one.targets.sum()))
        dealer = batches(sets, train)
        steps = train.steps or dealer.steps(train.epochs)
        shares = (bins / len(one.bins) * len(one.tokens) for (one, _), bins in zip(sets, dealer.dealt(steps), strict=True))
        tokens = round(sum(shares))
    return needs(
        Training(
            spec=model.spec,
            passes=(*model.passes, *(() if adapter is None else (adapter,))),  # type: ignore[arg-type]
            batch=batch,
            steps=steps,
            tokens=tokens,
            objective=job.objective,
            optim=job.optim,
            train=train,
            out=Path(job.out),
        ),
        held=held_of(model.parameters()),
    )


def announce(planned: Plan) -> Plan:
    """Shown on the log, then refused if it cannot fit."""
    log.table("plan", ("what", "how much"), planned.rows())
    return planned.require_fits()


# The machine


def resident() -> int:
    """Bytes that this process holds in memory now; 0 where the system does not say."""
    found = re.search(r"VmRSS:\s+(\d+) kB", _read("/proc/self/status"))
    return int(found[1]) * 1024 if found else 0


def held_of(tensors: Iterable[torch.Tensor]) -> int:
    """How much of `resident` is these tensors: all of them, but of a mapped file no more than the pages that were read."""
    mappings = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ [1-9]\d* .*\n(?:.*\n)*?Rss: +(\d+) kB", _read("/proc/self/smaps"), re.M)
    files = [(int(start, 16), int(end, 16), int(held) * 1024) for start, end, held in mappings]
    own, mapped = 0, dict[int, int]()
    for tensor in tensors:
        where = tensor.data_ptr() if tensor.device.type == "cpu" else 0
        found = next(((start, held) for start, end, held in files if start <= where < end), None)
        if found is None:
            own += tensor.nbytes
        else:
            mapped[found[0]] = found[1]
    return own + sum(mapped.values())


def available_memory() -> int:
    """Bytes that this process may hold in all, what it holds already included; without an answer from the system, no limit."""
    limits = []
    if found := re.search(r"MemAvailable:\s+(\d+) kB", _read("/proc/meminfo")):
        limits.append(int(found[1]) * 1024 + resident())
    for limit, usage in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        top, used = (_read(f"/sys/fs/cgroup/{name}").strip() for name in (limit, usage))
        if top.isdigit() and used.isdigit():
            limits.append(int(top) - int(used) + resident())
    return min(limits, default=1 << 62)


def free_disk(path: Path) -> int:
    """Bytes free where `path` is or will be."""
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def machine_rates() -> dict[str, float]:
    """What this machine reached: matrix products in FLOP/s by precision, and `bytes` copied per second. Measured once and
    kept in the cache folder for this processor, torch and number of threads."""
    cpu = re.search(r"model name\s*: (.+)", _read("/proc/cpuinfo"))
    identity = {
        "cpu": cpu[1] if cpu else platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }
    path = home() / "machine.json"
    known = json.loads(path.read_text()) if path.exists() else []
    for entry in known:
        if entry["identity"] == identity:
            return entry["rates"]
    measured = examine(size=1024)["matmul"]
    rates = {name: measured[f"{name} TFLOP/s"] * 1e12 for name in ("fp32", "bf16")}
    rates["bytes"] = _copied()
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_file(path) as sink:
        sink.write(json.dumps([*known, {"identity": identity, "rates": rates}], indent=1).encode())
    return rates


def _copied(size: int = 1 << 24) -> float:
    """Bytes read and written per second when large tensors are copied: the best of three. They are small enough not to be what a
    process needs most of, and lie in pages of their own: blocks of the allocator's would change what it keeps from then on."""
    a, b = (torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8).fill_(1) for _ in range(2))
    best = math.inf
    for _ in range(3):
        start = time.perf_counter()
        b.copy_(a)
        best = min(best, time.perf_counter() - start)
    return 2 * size / best


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:  # not Linux
        return ""


def size(count: float) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
