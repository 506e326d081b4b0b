"""`trivium concepts`: what works today."""

from __future__ import annotations

from .options import answer


def concepts(query: str | None = None, /, *, all: bool = False, exempt: bool = False, json: bool = False) -> None:
    """Lists the concepts that work today, the file that does each with its lines of code, and the test that proves it.

    works: everything that the concept's row asks for is shown. checked: tests against independent sides pass, its
    experiment is still to be run. GPU part not run: only the measurement on a GPU is missing.

    Try:
      trivium concepts
      trivium concepts attention
      trivium concepts T09 --all
      trivium concepts --exempt
      trivium concepts --json

    Parameters
    ----------
    query
        An id, the start of one, or words of a name.
    all
        List what does not work yet, too.
    exempt
        List instead which parts, in which form, do not keep what every part is held to, and why.
    json
        Answer as JSON: a list of id, name, tier, status, part, test, lines, with every row.
    """
    from ..lab import concepts as contract
    from ..lab.concepts import NOT_YET, table

    if exempt:
        answer(contract.exempt(), as_json=json)
        return
    rows = table(query)
    if json:
        answer(rows, as_json=True)
        return
    there = [row for row in rows if row["status"] != NOT_YET]
    shown = rows if all else there
    if shown:
        answer(shown, as_json=False)
    answer(
        f"{len(there)} of {len(rows)} are there" + ("" if all or len(there) == len(rows) else "; --all lists the rest, too"), as_json=False
    )
