"""What command files share: options of a spec-driven command, the answer on stdout, and mistakes of usage."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, Union, get_args, get_origin

from cyclopts import Parameter

from ..core import config
from ..core.errors import ConfigError, FileError, unknown
from ..core.log import layout, log
from ..core.spec import Part, Spec
from . import UsageError

if TYPE_CHECKING:
    from ..infer.sampling import Sampling
    from ..train.run import Run

S = TypeVar("S", bound=Spec)

Flags = Annotated[str, Parameter(show=False, allow_leading_hyphen=True)]  # use as *flags: Flags; keeps what is not an option of the command
ModelAndText = Annotated[str, Parameter(name="MODEL [TEXT]", allow_leading_hyphen=True)]  # as *words: with options of a spec among them
Configs = Annotated[tuple[Path, ...], Parameter(name="--config", consume_multiple=False)]


def resolve(
    cls: type[S], configs: Sequence[Path], flags: Sequence[str], *, aliases: Mapping[str, str], command: Callable[..., object] | None = None
) -> S:
    """The spec that files and dotted flags say; what a change of kind dropped is said aloud. `command`: the function whose
    own options are known beside the spec's fields, when a misspelt one is answered."""
    named = pairs(flags)
    own = inspect.signature(command).parameters.values() if command else ()
    known = {*cls.model_fields, *aliases, *(option.name for option in own if option.kind is option.KEYWORD_ONLY)}
    for name, _ in named:
        if (first := name.split(".")[0].replace("-", "_")) not in known:
            raise UsageError(unknown("option", f"--{first}", [f"--{choice}" for choice in known]), field=name, choices=known)
    try:
        found = config.resolve(cls, configs, named, aliases=aliases)
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


def separate(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(words that stand alone, flags with their values): for commands whose options all take a value."""
    alone: list[str] = []
    flags: list[str] = []
    rest = iter(words)
    for word in rest:
        if not word.startswith("--") or len(word) == 2:
            alone.append(word)
        elif "=" in word:
            flags.append(word)
        elif (value := next(rest, None)) is None:
            raise UsageError(f"{word} needs a value")
        else:
            flags += [word, value]
    return alone, flags


def model_and_text(words: Sequence[str]) -> tuple[str, str | None, list[str]]:
    """(model, text, flags) of `MODEL [TEXT]` with options among them. The text comes from stdin where it is "-", or where
    none is given and stdin is no terminal; None: there is none."""
    alone, flags = separate(words)
    if not 1 <= len(alone) <= 2:
        raise UsageError("name a model, and put the text in quotes" if alone else "name a model: a known name, a folder, a GGUF file")
    text = alone[1] if len(alone) == 2 else None
    if text == "-" or (text is None and not sys.stdin.isatty()):
        try:
            text = sys.stdin.read().removesuffix("\n")
        except UnicodeDecodeError as error:
            raise UsageError(f"what came on stdin is not text in {error.encoding}: {error.reason} at byte {error.start}") from None
    return alone[0], text, flags


def sampled(flags: Sequence[str], *, stop: Sequence[str], command: Callable[..., object]) -> Sampling:
    """How to sample: greedily, where `flags` do not say otherwise. `stop` comes as it was typed, not read as YAML."""
    from ..infer.sampling import Sampling

    chosen = resolve(Sampling, (), ["--temperature", "0", *flags], aliases={"max_new_tokens": "max_tokens"}, command=command)
    return chosen.replace(stop=(*chosen.stop, *stop))


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


def teach(job: S, *, run: Callable[[S], Run], plan: Callable[[S], Mapping[str, Any]], dry_run: bool, try_: str, as_json: bool) -> None:
    """What every command that trains does. `run(job)`, then where the result is, or with its metrics as JSON, and what to `try_` next, in
    which `{path}` is the result's. Dry: the resolved config alone, or as JSON with what `plan(job)` says beside it."""
    if dry_run:
        planned = plan(job)
        if "size" in planned:
            log.table("would train", ("what", "how many"), list(planned["size"].items()))
        answer({"config": job.to_dict(defaults=True), **planned} if as_json else job, as_json=as_json)
        return
    done = run(job)
    if as_json:
        answer({"path": str(done.path), "metrics": done.metrics}, as_json=True)
        return
    answer(str(done.path), as_json=False)
    log.say(try_.format(path=done.path))


def describe(target: str) -> str:
    """The fields of the spec at "module:Class" as a table of options, for the help of its command."""
    module, _, name = target.partition(":")
    cls = getattr(importlib.import_module(module), name)
    rows = list(_fields(cls, ""))
    return "Fields: each is an option, and a field of --config files where the command reads them.\n\n" + layout(
        ["option", "default", "what"], rows
    )


def _fields(cls: type[Spec], prefix: str, values: Spec | None = None) -> list[tuple[str, str, str]]:
    """(option, default, what) of each field below `cls`; `values` holds defaults that are not those of `cls` itself."""
    rows: list[tuple[str, str, str]] = []
    for name, info in cls.model_fields.items():
        if name == "kind":
            continue
        absent = values is None and info.is_required()
        default = None if absent else getattr(values, name) if values else info.get_default(call_default_factory=True)
        kinds = _kinds(info.annotation)
        said = ": ".join(filter(None, (info.description, f"one of {', '.join(kinds)}" if kinds else None)))
        inner, of = _bare(info.annotation), f"{prefix}{name}."
        if get_origin(inner) is dict:  # of specs, by names that the user gives
            inner, of = get_args(inner)[1], f"{prefix}{name}.NAME."
        if isinstance(default, Spec):
            if kind := default.to_dict().get("kind"):
                rows.append((f"--{prefix}{name}", str(kind), said))
            rows += _fields(type(default), f"{prefix}{name}.", default)
            continue
        rows.append((f"--{prefix}{name}", "(required)" if absent else said_as(default), said))
        if not kinds and not isinstance(default, Spec) and isinstance(inner, type) and issubclass(inner, Spec):
            rows += _fields(inner, of)
        if absent:
            for kind, member in kinds.items():
                rows += [(option, value, f"({kind}) {what}") for option, value, what in _fields(member, f"{prefix}{name}.")]
    return rows


def said_as(default: Any) -> str:
    """A default, as a config would say it: a part by its kind and what is not its own default."""
    if isinstance(default, Spec):
        told = default.to_dict()
        return f"{told.pop('kind', type(default).__name__)}" + (f" {json.dumps(told, default=str)}" if told else "")
    if isinstance(default, tuple):
        return "[" + ", ".join(said_as(item) for item in default) + "]"
    return json.dumps(dict(default) if isinstance(default, Mapping) else default, default=str, ensure_ascii=False)


def _kinds(annotation: Any) -> Mapping[str, type[Part]]:
    """The members of the open union that a field holds, by kind."""
    root = _bare(annotation)
    return dict(root.registry.items()) if isinstance(root, type) and issubclass(root, Part) and "registry" in root.__dict__ else {}


def _bare(annotation: Any) -> Any:
    """The type without what is annotated, and without None beside it."""
    args = [arg for arg in get_args(annotation) if arg is not NoneType]
    if get_origin(annotation) is Annotated or (get_origin(annotation) in (Union, UnionType) and len(args) == 1):
        return _bare(args[0])
    return annotation
