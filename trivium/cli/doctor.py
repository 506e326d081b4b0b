"""`trivium doctor`: what this machine has."""

from __future__ import annotations

from .options import answer


def doctor(*, quick: bool = False, json: bool = False) -> None:
    """Reports versions, processor, memory, disk, GPU and cache, measures matrix products, and says what to watch.

    Put its output into a report of a problem.

    Try:
      trivium doctor
      trivium doctor --quick --json

    Parameters
    ----------
    quick
        Leave the measurement out.
    json
        Answer as JSON.
    """
    from ..recipes.doctor import examine

    report = examine(measure=not quick)
    if json:
        answer(report, as_json=True)
        return
    advice = report.pop("advice")
    answer([{"what": f"{part}.{name}", "found": found} for part, facts in report.items() for name, found in facts.items()], as_json=False)
    for line in advice:
        answer(f"\nwatch: {line}", as_json=False)
