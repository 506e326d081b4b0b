"""What starting costs: `import trivium` and `trivium --help` in fresh processes, wall and processor time, and no torch imported.

A process's time holds the interpreter's own start, which the row `python -c pass` shows.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from . import common
from .common import Row

SCRIPT = Path(sys.executable).with_name("trivium")
PEER = "import transformers"
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import trivium": [sys.executable, "-c", "import trivium"],
    "trivium --help": [str(SCRIPT), "--help"] if SCRIPT.exists() else [sys.executable, "-m", "trivium", "--help"],
    "import torch": [sys.executable, "-c", "import torch"],
    PEER: [sys.executable, "-c", PEER],
}
GOALS = {"import trivium": 0.15, "trivium --help": 0.4}  # seconds of wall time, interpreter included


def start(command: list[str]) -> dict[str, float]:
    """One fresh process to its end: wall and processor seconds."""
    began = time.perf_counter()
    silent = subprocess.DEVNULL
    process = subprocess.Popen(command, stdin=silent, stdout=silent, cwd=common.ROOT)
    _, status, used = os.wait4(process.pid, 0)
    wall = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with status {process.returncode}")
    return {"seconds": wall, "cpu": used.ru_utime + used.ru_stime}


def imports(command: list[str]) -> list[str]:
    """The modules that a command imports, by Python's own account."""
    env = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    told = subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=env, cwd=common.ROOT).stderr
    return [line.rsplit("|", 1)[1].strip() for line in told.splitlines() if line.startswith("import time:")][1:]


def main() -> None:
    options = common.arguments(__doc__, rounds=15).parse_args()
    machine = common.machine()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    if options.quick:
        options.rounds = 1
    found = common.rounds(list(COMMANDS), lambda name: start(COMMANDS[name]), count=options.rounds, warm=1, what="starting")
    rows = []
    for name, times in found.items():
        rows.append(Row(name, "s wall", "less", [one["seconds"] for one in times], goal=GOALS.get(name)))
        rows.append(Row(name, "s cpu", "less", [one["cpu"] for one in times]))
    ours, theirs = ([one["seconds"] for one in found[name]] for name in ("import trivium", PEER))
    rows.append(Row("import trivium", "s wall", "less", ours, PEER, theirs))
    modules = {name: imports(COMMANDS[name]) for name in GOALS}
    facts = {
        f"{name} imports": f"{len(seen)} modules, " + ("TORCH AMONG THEM" if "torch" in seen else "no torch")
        for name, seen in modules.items()
    }
    notes = ["the column `trivium` holds the command that the row names; goals are for wall time, the interpreter's start included"]
    told = common.versions("trivium", "torch", "transformers", "pydantic", "cyclopts")
    common.report("startup", options, rows, facts=facts, notes=notes, versions=told, machine=machine)


if __name__ == "__main__":
    main()
