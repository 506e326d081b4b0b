"""What command files share: options of a spec-driven command, the answer on stdout, and mistakes of usage."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from cyclopts import Parameter

from ..core import config
from ..core.errors import ConfigError, FileError, TriviumError
from ..core.log import layout, log
from ..core.spec import Spec

S = TypeVar("S", bound=Spec)

Flags = Annotated[str, Parameter(show=False, allow_leading_hyphen=True)]  # use as *flags: Flags; keeps what is not an option of the command
Configs = Annotated[tuple[Path, ...], Parameter(name="--config", consume_multiple=False)]


class UsageError(TriviumError):
    """A command line or a config that cannot be run as written; exit status 2."""


def resolve(cls: type[S], configs: Sequence[Path], flags: Sequence[str], *, aliases: Mapping[str, str]) -> S:
    """The spec that files and dotted flags say; what a change of kind dropped is said aloud."""
    try:
        found = config.resolve(cls, configs, pairs(flags), aliases=aliases)
    except (ConfigError, FileError) as error:
        raise UsageError(str(error), field=error.field, value=error.value, choices=error.choices) from error
    for line in found.dropped:
        log.warn(f"{line} is dropped: the new kind has no such field")
    return found.spec


def pairs(flags: Sequence[str]) -> list[tuple[str, str]]:
    """("--optim.lr", "2e-5", "--a=b", "--packed") to names and values; a flag without a value means true."""
    found: list[tuple[str, str]] = []
    waiting: str | None = None
    for token in flags:
        if token.startswith("--") and len(token) > 2:
            if waiting is not None:
                found.append((waiting, "true"))
            name, equals, value = token[2:].partition("=")
            waiting = None if equals else name
            if equals:
                found.append((name, value))
        elif waiting is not None:
            found.append((waiting, token))
            waiting = None
        else:
            raise UsageError(f"{token!r} belongs to no option; options are written --name value")
    if waiting is not None:
        found.append((waiting, "true"))
    return found


def answer(value: Any, *, as_json: bool) -> None:
    """The answer on stdout: JSON, or a list of records as a table, a spec as YAML, anything else as text."""
    if isinstance(value, Spec):
        print(
            json.dumps(value.to_dict(defaults=True), indent=1) if as_json else config.dump(value.to_dict(defaults=True)),
            end="\n" if as_json else "",
        )
    elif as_json:
        print(json.dumps(value, indent=1, ensure_ascii=False))
    elif isinstance(value, list) and value and isinstance(value[0], Mapping):
        print(layout(list(value[0]), [["" if cell is None else cell for cell in row.values()] for row in value]))
    else:
        print(value)


def describe(target: str) -> str:
    """The fields of the spec at "module:Class" as a table of options, for the help of its command."""
    module, _, name = target.partition(":")
    cls = getattr(importlib.import_module(module), name)
    rows = list(_fields(cls, ""))
    return "Fields, for --config and as options:\n\n" + layout(["option", "default", "what"], rows)


def _fields(cls: type[Spec], prefix: str) -> list[tuple[str, str, str]]:
    rows: list[tuple[str, str, str]] = []
    for name, info in cls.model_fields.items():
        default = None if info.is_required() else info.get_default(call_default_factory=True)
        said = info.description or ""
        if isinstance(default, Spec):
            kind = default.to_dict().get("kind")
            if kind:
                rows.append((f"--{prefix}{name}", str(kind), said))
            rows += _fields(type(default), f"{prefix}{name}.")
        elif name != "kind":
            shown = (
                "(required)"
                if info.is_required()
                else json.dumps(default if not isinstance(default, Mapping) else dict(default), default=str)
            )
            rows.append((f"--{prefix}{name}", shown, said))
    return rows
