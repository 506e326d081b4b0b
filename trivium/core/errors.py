"""Errors that a user can act on: what is wrong, where, and what would be right.

Everything a user can cause is a `TriviumError` (a `ValueError`). Broken invariants of our own are `assert`s.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TriviumError(ValueError):
    """A mistake in something the user gave: a field, a file, a row, a command.

    `field` is the full path of what is wrong, `value` what stood there, `choices` what could have.
    """

    def __init__(self, message: str, *, field: str | None = None, value: object = None, choices: Iterable[str] = ()):
        super().__init__(message)
        self.field = field
        self.value = value
        self.choices = tuple(choices)


class ConfigError(TriviumError):
    """A spec or a config that does not hold: unknown field, unknown kind, wrong type."""


class DataError(TriviumError):
    """A row, a data file or a data set that cannot be used as asked."""


class FileError(TriviumError):
    """A file that is missing, damaged, hostile, or not what it claims to be."""


class MissingExtra(TriviumError):
    """An optional dependency that this feature needs and that is not installed."""

    def __init__(self, package: str, extra: str, feature: str):
        super().__init__(f"{feature} needs the package {package!r}; install it with: pip install 'trivium[{extra}]'")


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """The known name most like `name`, or None if none is close."""
    found = difflib.get_close_matches(str(name), list(choices), n=1, cutoff=0.5)
    return found[0] if found else None


def unknown(what: str, name: str, choices: Iterable[str], *, field: str | None = None) -> str:
    """One sentence for an unknown name: where it stood, the nearest known one, and all of them."""
    known = sorted(choices)
    near = nearest(name, known)
    where = f"{field}: " if field else ""
    hint = f"; did you mean {near!r}?" if near else ""
    listed = ", ".join(known[:12]) + (f" and {len(known) - 12} more" if len(known) > 12 else "")
    return f"{where}unknown {what} {name!r}{hint} (known: {listed or 'none'})"
