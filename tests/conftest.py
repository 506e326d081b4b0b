"""What every test shares: one torch thread, no network, reproducible properties, and an account of the time spent."""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

# Before anything imports torch. Two workers with one thread each are faster than two threads, and sums keep their order.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

# As in a terminal, also where a shell started the tests in the background: it has these ignored there, and what is ignored stays so.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Properties draw the same examples each time; what HYPOTHESIS_PROFILE=explore finds is pinned with @example on the test.
settings.register_profile("same", deadline=None, derandomize=True, database=None)
settings.register_profile("explore", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

BUDGET = {"tests/journeys": 300, "tests/parity": 200, "tests/recipes": 200, "tests/io": 100}  # seconds of one worker
OTHER_BUDGET = 60


def _no_network(event: str, arguments: tuple) -> None:
    if event == "socket.connect" and isinstance(arguments[1], tuple) and arguments[1][0] not in ("127.0.0.1", "::1", "localhost"):
        raise RuntimeError(f"a test tried to reach {arguments[1][0]}; tests run without network")


sys.addaudithook(_no_network)


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """`note(text)`: a measured figure that the end of the run prints."""
    return lambda text: request.node.user_properties.append(("note", text))


class Account:
    """Seconds by folder, and notes; collected where the reports of all workers arrive."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.notes: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds["/".join(Path(report.nodeid.split("::")[0]).parts[:2])] += report.duration
        if report.when == "call":
            self.notes += [str(value) for name, value in report.user_properties if name == "note"]

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for line in self.notes:
            terminalreporter.write_line(line)
        for folder, seconds in sorted(self.seconds.items()):
            budget = BUDGET.get(folder, OTHER_BUDGET)
            over = "  over" if seconds > budget else ""
            terminalreporter.write_line(f"{folder:<20}{seconds:7.1f} s of {budget} s{over}")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Account())
