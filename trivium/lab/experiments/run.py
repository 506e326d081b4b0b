"""`python -m trivium.lab.experiments NAME...`: run experiments and write their result files."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time

import torch

from ...core.log import log
from ...io import files
from ..concepts import CLAIMS
from . import experiments


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m trivium.lab.experiments", description=__doc__)
    parser.add_argument("names", nargs="+", choices=experiments.names())
    parser.add_argument("--effort", type=float, default=1.0, help="less than 1 shortens training and writes nothing")
    chosen = parser.parse_args()
    for name in chosen.names:
        found, started = experiments.get(name), time.perf_counter()
        log.say(f"{name}: {found.question}")
        result = found.run(chosen.effort)
        print(json.dumps(result.numbers, indent=1))
        print(result.verdict)
        if chosen.effort < 1:
            continue
        claim = {
            "concepts": list(found.concepts),
            "question": found.question,
            "command": f"python -m trivium.lab.experiments {name}",
            "seeds": list(result.seeds),
            "machine": f"{_processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
            "gpu": False,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "minutes": round((time.perf_counter() - started) / 60, 1),
            "numbers": result.numbers,
            "verdict": result.verdict,
        }
        CLAIMS.mkdir(exist_ok=True)
        files.write_json(CLAIMS / f"{name}.json", claim)
        log.say(f"written: {CLAIMS / name}.json")


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
