"""What the benchmarks share: workers, alternating rounds, the machine, the table.

Each side of a comparison lives in a fresh process of its own, so that its peak memory is its own, and the sides take turns,
so that a noisy neighbor hits both. The process that drives them imports no torch and sleeps while a side works.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, Self

from trivium.core.log import layout, log

ROOT = Path(__file__).resolve().parents[1]
WITHIN = 0.05  # ratios this near to 1 are equal
FEATURES = (
    *("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8"),
    *("asimd", "asimddp", "bf16", "i8mm", "sve", "sve2"),
)
PREFIXES = ("OMP_", "KMP_", "GOMP_", "MKL_", "ONEDNN_", "DNNL_", "MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "TORCH_", "ATEN_")


# ---------------------------------------------------------------- workers


class Worker:
    """A fresh process that holds one object, `target` ("module:Class" made with `options`), and calls its methods."""

    def __init__(self, target: str, *, threads: int, options: Mapping[str, Any]):
        self.target, self.started = target, time.perf_counter()
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        quiet = {
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "TOKENIZERS_PARALLELISM": "false",
        }
        code = "from benchmarks.common import serve; serve()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, target, json.dumps(options)],
            cwd=ROOT,
            env={**os.environ, **quiet, **dict.fromkeys(names, str(threads))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, method: str, /, **arguments: Any) -> Any:
        """What the method returned, after a trip through JSON. A worker that fails ends the benchmark."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps([method, arguments]) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise SystemExit(f"{self.target}.{method} failed; its error stands above")
        return json.loads(answer)

    def age(self) -> float:
        """Seconds since just before the process was started."""
        return time.perf_counter() - self.started

    def peak(self) -> float:
        """The most memory that was resident so far, MB."""
        return self.call("peak") / 1e6

    def close(self) -> None:
        """The process ends by itself when its orders do."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


def serve() -> None:
    """The worker's side: orders come on stdin, answers go to stdout, and whatever libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module, _, name = sys.argv[1].partition(":")
    held = getattr(importlib.import_module(module), name)(**json.loads(sys.argv[2]))
    for line in sys.stdin:
        method, arguments = json.loads(line)
        result = peak_bytes() if method == "peak" else getattr(held, method)(**arguments)
        print(json.dumps(result), file=answers, flush=True)


def peak_bytes() -> int:
    """This process's resident high-water mark. Linux hands `ru_maxrss` down through exec, so /proc is asked first."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def clock(do: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Wall and processor seconds of a call, and what it returned."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = do()
    return {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu}, result


@contextmanager
def workers(sides: Mapping[str, str], *, threads: int, options: Mapping[str, Any]) -> Iterator[dict[str, Worker]]:
    """One worker for each side, by name."""
    running = {}
    try:
        for name, target in sides.items():
            running[name] = Worker(target, threads=threads, options=options)
            running[name].call("peak")  # one loads at a time
        yield running
    finally:
        for worker in running.values():
            worker.close()


def rounds(sides: Sequence[str], do: Callable[[str], Any], *, count: int, warm: int, what: str) -> dict[str, list[Any]]:
    """`do(side)` for each side in turn, `count` times after `warm` that do not count; who goes first alternates."""
    found: dict[str, list[Any]] = {side: [] for side in sides}
    log.say(f"{what}: {count} rounds of {', '.join(sides)}")
    for number in range(warm + count):
        for side in sides if number % 2 == 0 else reversed(sides):
            result = do(side)
            if number >= warm:
                found[side].append(result)
    return found


# ---------------------------------------------------------------- what was measured


@dataclass(frozen=True)
class Row:
    """One measure of trivium, in the order of rounds, beside the same of a peer (or of none)."""

    what: str
    unit: str
    better: Literal["more", "less"]
    ours: Sequence[float]
    peer: str = ""
    theirs: Sequence[float] = ()
    goal: float | None = None  # the ratio that is asked for; without a peer, the figure itself

    @property
    def ratios(self) -> list[float]:
        """Round by round, above 1 where trivium is ahead."""
        pairs = zip(self.ours, self.theirs, strict=True) if self.peer else ()
        return [ours / theirs if self.better == "more" else theirs / ours for ours, theirs in pairs]

    @property
    def standing(self) -> str:
        """Ahead or behind beyond the spread of the rounds' ratios; within 5% is equal."""
        if not self.peer:
            return ""
        middle, low, high = statistics.median(self.ratios), min(self.ratios), max(self.ratios)
        if abs(middle - 1) <= WITHIN:
            return "equal"
        if middle > 1:
            return "ahead" if low > 1 else "ahead, not in every round"
        return "behind" if high < 1 else "behind, not in every round"

    @property
    def met(self) -> bool | None:
        if self.goal is None:
            return None
        if self.peer:
            return statistics.median(self.ratios) >= self.goal
        middle = statistics.median(self.ours)
        return middle >= self.goal if self.better == "more" else middle <= self.goal

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ratios": self.ratios, "standing": self.standing, "met": self.met}


def rates(found: Mapping[str, Sequence[Mapping[str, float]]], what: str, units: float, *, peer: str, goal: float | None) -> list[Row]:
    """Two rows of clocked rounds that did `units` of work each: per second, and per processor second, which a busy machine disturbs less."""
    wall = {side: [units / one["seconds"] for one in times] for side, times in found.items()}
    cpu = {side: [units / one["cpu"] for one in times] for side, times in found.items()}
    return [
        Row(what, "tok/s", "more", wall["trivium"], peer, wall[peer], goal),
        Row(what, "tok/cpu s", "more", cpu["trivium"], peer, cpu[peer]),
    ]


def table(rows: Sequence[Row]) -> str:
    """The rows as text: medians, (lowest to highest) over rounds, ratios."""
    columns = ("what", "unit", "trivium", "(spread)", "peer", "its median", "(spread)", "ratio", "(spread)", "goal", "met", "standing")
    lines = []
    for row in rows:
        theirs = (_middle(row.theirs), _spread(row.theirs)) if row.peer else ("", "")
        ratio = (_middle(row.ratios), _spread(row.ratios)) if row.peer else ("", "")
        goal = "" if row.goal is None else f"{row.goal:g}"
        met = {None: "", True: "yes", False: "NO"}[row.met]
        ours = (_middle(row.ours), _spread(row.ours))
        lines.append((row.what, row.unit, *ours, row.peer, *theirs, *ratio, goal, met, row.standing))
    return layout(columns, lines)


def _middle(values: Sequence[float]) -> str:
    return _number(statistics.median(values))


def _spread(values: Sequence[float]) -> str:
    return f"({_number(min(values))} to {_number(max(values))})" if len(values) > 1 else ""


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


# ---------------------------------------------------------------- the machine


def machine() -> dict[str, Any]:
    """What the figures depend on. They do not travel to another machine; ratios travel better."""
    about, memory = Path("/proc/cpuinfo"), Path("/proc/meminfo")
    lines = about.read_text().splitlines() if about.exists() else []
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set(said.get("flags", said.get("Features", "")).split())
    total = (
        next((int(line.split()[1]) for line in memory.read_text().splitlines() if line.startswith("MemTotal")), 0) if memory.exists() else 0
    )
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": said.get("model name") or platform.processor() or platform.machine(),
        "family/model": f"{said.get('cpu family', '?')}/{said.get('model', '?')}",
        "cores": usable,
        "features": " ".join(name for name in FEATURES if name in flags),
        "memory": f"{total / 2**20:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "load at start": " ".join(f"{load:.1f}" for load in os.getloadavg()),
        "settings": " ".join(f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(PREFIXES)) or "none",
    }


def versions(*names: str) -> dict[str, str]:
    """Of Python, the checkout and these distributions."""
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    found = {"python": platform.python_version(), "commit": commit or "unknown"}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


# ---------------------------------------------------------------- the command


def arguments(doc: str | None, *, rounds: int = 5) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="threads of every side (default: 2)")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"alternating rounds that count (default: {rounds})")
    parser.add_argument("--quick", action="store_true", help="one tiny round, to see that everything runs; its figures mean nothing")
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file")
    return parser


def with_model(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument(
        "--model", default="smollm2", help="what to measure: a name, wheel, GGUF file or model directory (default: smollm2)"
    )
    return parser


def located(model: str) -> str:
    """A path as workers see it, who run in the repository's root; a name as it is."""
    return str(Path(model).resolve()) if Path(model).exists() else model


def converted(model: str, out: Path) -> Path:
    """`model` as a model directory in bf16, which every side loads. Run this in a worker: it imports torch."""
    from trivium.io.pull import pull
    from trivium.recipes.pull import convert

    return convert(pull(model).path, out, dtype="bf16")


def report(
    name: str,
    options: argparse.Namespace,
    rows: Sequence[Row],
    *,
    facts: Mapping[str, Any],
    notes: Sequence[str],
    versions: Mapping[str, str],
    machine: Mapping[str, Any],
) -> None:
    """Print the table with all that belongs to it on stdout, and write it where `--json` says."""
    title = f"benchmarks.{name}: {options.threads} threads, {options.rounds} rounds" + (
        " (QUICK: figures mean nothing)" if options.quick else ""
    )
    about = {**machine, "load at end": " ".join(f"{load:.1f}" for load in os.getloadavg())}
    print(f"\n{title}\n")
    print(layout(("machine", ""), list(about.items())))
    print("\n" + layout(("versions", ""), list(versions.items())))
    print("\n" + table(rows) + "\n\nratio: above 1 is ahead of the peer; spreads are lowest to highest over rounds\n")
    for key, value in facts.items():
        print(f"{key}: {value}")
    for note in notes:
        print(f"- {note}")
    if options.json is not None:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        whole = {
            "benchmark": name,
            "options": settings,
            "machine": about,
            "versions": dict(versions),
            "rows": [row.to_dict() for row in rows],
            "facts": dict(facts),
            "notes": list(notes),
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
