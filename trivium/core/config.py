"""Configuration: YAML or JSON files and dotted flags become one validated spec, and two specs become a diff.

YAML is read as 1.2 (`1e-5` is a number, `no` is a word), without tags, with bounds on size, depth and aliases; duplicate
keys are errors. Files are laid over each other in order, then flags (`--optim.lr 2e-5`); an error names the file and line,
or the flag, that caused it. An overlay that changes a part's `kind` keeps only the fields that the new kind has.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar, get_args, get_origin

import yaml

from .errors import ConfigError, FileError, unknown
from .spec import Part, Spec, validate

S = TypeVar("S", bound=Spec)
Steps = tuple[str | int, ...]  # the way to a value: field names, and indices of lists

MAX_BYTES = 1 << 20
MAX_NODES = 100_000  # after aliases are expanded
MAX_DEPTH = 64
ABSENT = "(absent)"  # a side of a diff that does not have the field

_NULL, _BOOL, _INT, _FLOAT, _STR = (f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str"))
_CORE = (  # YAML 1.2, core schema: the patterns, and the characters that can start them
    (_NULL, r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    (_BOOL, r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    (_INT, r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (_FLOAT, r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.0123456789")),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict = {}


class _Dumper(yaml.SafeDumper):
    """Keeps PyYAML's 1.1 patterns as well: what either version would misread is quoted."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        breaks = any(char in text for char in "\x85\u2028\u2029")  # PyYAML folds these in its other styles
        return self.represent_scalar(_STR, text, style='"' if breaks else None)


_Dumper.add_representer(str, _Dumper.represent_text)


for _tag, _pattern, _first in _CORE:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), _first)


@dataclass
class Tree:
    """Plain values, and where each was said: `lines` maps the way to a value to "file:line" or to a flag."""

    data: dict[str, Any] = field(default_factory=dict)
    lines: dict[Steps, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Resolved(Generic[S]):
    """A validated spec, and the fields that went when an overlay changed a kind ("optim.betas (train.yaml:3)")."""

    spec: S
    dropped: tuple[str, ...]


# Files


def load(path: Path | str) -> Tree:
    """The mapping in a .yaml, .yml or .json file."""
    path = Path(path)
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise FileError(f"{path}: a config is a .yaml, .yml or .json file")
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        text = raw.decode("utf-8")
    except OSError as error:
        raise FileError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise FileError(f"{path}: not UTF-8 at byte {error.start}") from None
    if len(raw) > MAX_BYTES:
        raise FileError(f"{path}: larger than {MAX_BYTES} bytes; a config holds settings, not data")
    tree = Tree()
    data = _parse_json(text, str(path)) if path.suffix == ".json" else _parse_yaml(text, str(path), tree.lines)
    if not isinstance(data or {}, dict):
        raise ConfigError(f"{path}: the top of a config is a mapping of fields to values, not {type(data).__name__}")
    tree.data = data or {}
    return tree


def scalar(text: str, *, name: str) -> Any:
    """The value of a flag, read as YAML: `2e-5`, `true`, `no` (a word), `[q, v]`."""
    return _parse_yaml(text, name, {})


def dump(value: Spec | Mapping[str, Any]) -> str:
    """YAML that reads back as the same values here, and in readers of YAML 1.1.

    A spec is written with all its fields: one left out would be taken from the field that holds it, whose default may be another."""
    data = value.to_dict(defaults=True) if isinstance(value, Spec) else dict(value)
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _parse_yaml(text: str, name: str, lines: dict[Steps, str]) -> Any:
    try:
        node = yaml.compose(text, Loader=_Loader)
        return None if node is None else _Builder(name, lines).build(node, ())
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{name}{line}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not valid YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise ConfigError(f"{name}: nested deeper than {MAX_DEPTH}") from None


class _Builder:
    """YAML nodes to plain values, counting nodes so that aliases cannot multiply without bound."""

    def __init__(self, name: str, lines: dict[Steps, str]):
        self.name, self.lines, self.nodes = name, lines, 0

    def build(self, node: yaml.Node, steps: Steps) -> Any:
        self.nodes += 1
        where = f"{self.name}:{node.start_mark.line + 1}"
        if self.nodes > MAX_NODES or len(steps) > MAX_DEPTH:
            raise ConfigError(f"{where}: more than {MAX_NODES} values or nested deeper than {MAX_DEPTH}, counting what aliases repeat")
        self.lines[steps] = where
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, steps)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*steps, i)) for i, item in enumerate(node.value)]
        return _scalar(node, where)

    def _mapping(self, node: yaml.MappingNode, steps: Steps) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            where = f"{self.name}:{key_node.start_mark.line + 1}"
            key = _scalar(key_node, where) if isinstance(key_node, yaml.ScalarNode) else None
            if isinstance(key, bool) or not isinstance(key, str | int):
                raise ConfigError(f"{where}: a field name must be a word")
            if str(key) in found:
                raise ConfigError(f"{where}: {str(key)!r} is given twice", field=str(key))
            found[str(key)] = self.build(value_node, (*steps, str(key)))
            self.lines[(*steps, str(key))] = where
        return found


def _scalar(node: yaml.Node, where: str) -> Any:
    text, tag = node.value, node.tag
    try:
        if tag == _NULL:
            return None
        if tag == _BOOL:
            return text.lower() == "true"
        if tag == _INT:
            return int(text, 0) if text[:2] in ("0x", "0o") else int(text)
        if tag == _FLOAT:
            return float(text.replace(".inf", "inf").replace(".nan", "nan") if text[-1].isalpha() else text)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None
    if tag not in (_STR, "!"):
        raise ConfigError(f"{where}: tags such as {tag!r} are not read")
    return text


def _parse_json(text: str, name: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ConfigError(f"{name}: {twice!r} is given twice", field=twice)
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{name}:{error.lineno}: not valid JSON: {error.msg}") from None
    except RecursionError:
        raise ConfigError(f"{name}: nested too deeply") from None
    except ConfigError:
        raise
    except ValueError as error:  # an integer of thousands of digits
        raise ConfigError(f"{name}: not valid JSON: {error}") from None


# Overlays and flags


def resolve(
    cls: type[S],
    configs: Sequence[Path | str] = (),
    flags: Sequence[tuple[str, str]] = (),
    *,
    aliases: Mapping[str, str] | None = None,
) -> Resolved[S]:
    """The spec that `configs` (later wins) and then `flags` ("optim.lr", "2e-5") say.

    `aliases` maps familiar names to ours ({"learning_rate": "optim.lr"}); `-` and `_` are the same in flags and aliases.
    """
    whole, dropped = Tree(), []
    for path in configs:
        dropped += _lay(cls, whole, load(path))
    for name, text in flags:
        steps = _steps(cls, name, whole.data, aliases or {})
        value = _flag(text, _annotation(cls, steps, whole.data), name=f"--{name}")
        dropped += _lay(cls, whole, _single(steps, value, f"--{name}", whole.data))
    try:
        return Resolved(validate(cls, _complete(cls, whole.data)), tuple(dropped))
    except ConfigError as error:
        lines = [_with_origin(line, whole.lines) for line in str(error).splitlines()]
        raise ConfigError("\n".join(lines), field=error.field, value=error.value, choices=error.choices) from None


def _steps(cls: type[Spec], name: str, data: Any, aliases: Mapping[str, str]) -> Steps:
    """The way that a flag names. A `-` stays where the tree has such a key (a block called "full-attention")."""
    known = {alias.replace("-", "_"): target for alias, target in aliases.items()}
    words = known.get(name.replace("-", "_"), name).split(".")
    if words[0].replace("-", "_") not in cls.model_fields:
        choices = [*cls.model_fields, *aliases]
        raise ConfigError(f"--{name}: {unknown('option', words[0], choices)}", field=name, choices=choices)
    steps: list[str | int] = []
    for word in words:
        step: str | int = word if isinstance(data, Mapping) and word in data else word.replace("-", "_")
        if isinstance(data, list):
            if not word.isdigit() or int(word) >= len(data):
                raise ConfigError(f"--{name}: {word!r} is no index of a list of {len(data)}", field=name)
            step = int(word)
        steps.append(step)
        data = _at(data, step)
    return tuple(steps)


def _at(data: Any, step: str | int) -> Any:
    if isinstance(data, list) and isinstance(step, int):
        return data[step]
    return data.get(step) if isinstance(data, dict) else None


def _annotation(annotation: Any, steps: Steps, data: Any) -> Any:
    """The annotation of the value at the end of `steps`; None where only a default would tell."""
    for step in steps:
        annotation = _inside(annotation, _member(annotation, data if isinstance(data, Mapping) else {}), step)
        data = _at(data, step)
    return annotation


def _flag(text: str, annotation: Any, *, name: str) -> Any:
    """The value of a flag: a field of words keeps `2024` and `true` as words, one value is a list where a list is due."""
    every = list(_types(annotation))
    types = [t for t in every if t is not type(None)]
    if types == [str]:
        return None if text in ("null", "~") and len(types) < len(every) else text
    value = scalar(text, name=name)
    if value is None or isinstance(value, list | dict) or not types:
        return value
    return [_flag(text, get_args(types[0])[0], name=name)] if all(get_origin(t) in (list, tuple) for t in types) else value


def _single(steps: Steps, value: Any, origin: str, base: Any) -> Tree:
    """A tree with one value. Overlays replace lists, so inside a list everything else is copied."""

    def wrap(at: int, below: Any, copied: Mapping[str, Any]) -> Any:
        if at == len(steps):
            return value
        step = steps[at]
        if isinstance(step, int):
            item = {"kind": below[step]} if isinstance(below[step], str) and at + 1 < len(steps) else below[step]
            return [*below[:step], wrap(at + 1, item, item if isinstance(item, dict) else {}), *below[step + 1 :]]
        inside = below.get(step) if isinstance(below, dict) else None
        return {**copied, step: wrap(at + 1, inside, inside if copied and isinstance(inside, dict) else {})}

    return Tree(wrap(0, base, {}), {steps[:n]: origin for n in range(1, len(steps) + 1)})


def _lay(cls: type[Spec], whole: Tree, overlay: Tree) -> list[str]:
    """Lay `overlay` over `whole`, in place; returns what a change of kind dropped."""
    dropped: list[str] = []

    def merge(kind_of: Any, left: Any, right: Any, steps: Steps) -> Any:
        right = {"kind": right} if isinstance(right, str) and _root(kind_of) else right
        if not isinstance(left, dict) or not isinstance(right, dict):
            return right
        member = _member(kind_of, right if "kind" in right else left)
        if "kind" in right and left.get("kind") != right["kind"] and member is not None:
            lost = [key for key in left if key not in member.model_fields]
            dropped.extend(_path((*steps, key)) + f" ({whole.lines.get((*steps, key), 'default')})" for key in lost)
            left = {key: value for key, value in left.items() if key not in lost}
        merged = dict(left)
        for key, value in right.items():
            merged[key] = merge(_inside(kind_of, member, key), left.get(key), value, (*steps, key))
        return merged

    whole.data = merge(cls, whole.data, overlay.data, ())
    whole.lines.update(overlay.lines)
    return dropped


def _complete(annotation: Any, value: Any, default: Any = None) -> Any:
    """Lets `optim: {lr: 1}` mean the default optimizer with another lr: a default part's own values lie below."""
    if isinstance(value, list):
        return [_complete(_inside(annotation, None, 0), item) for item in value]
    if not isinstance(value, dict):
        return value
    below = default.to_dict() if isinstance(default, Spec) else {}
    if value.get("kind", below.get("kind")) != below.get("kind"):
        below, default = {}, None
    whole, member = {**below, **value}, _member(annotation, {**below, **value})
    for key in value:
        info = member.model_fields.get(key) if member else None
        inner = getattr(default, key) if info and isinstance(default, Spec) else info and info.get_default(call_default_factory=True)
        whole[key] = _complete(_inside(annotation, member, key), value[key], inner)
    return whole


def _types(annotation: Any) -> list[Any]:
    """The alternatives of an annotation: unions and Annotated are opened, containers are not."""
    if get_origin(annotation) in (dict, Mapping, list, tuple, None):
        return [annotation]
    return [found for argument in get_args(annotation) for found in _types(argument)]


def _spec(annotation: Any) -> type[Spec] | None:
    found = [t for t in _types(annotation) if get_origin(t) is None and isinstance(t, type) and issubclass(t, Spec)]
    return found[0] if found else None


def _root(annotation: Any) -> type[Part] | None:
    spec = _spec(annotation)
    return spec if spec is not None and issubclass(spec, Part) and "registry" in spec.__dict__ else None


def _member(annotation: Any, data: Mapping[str, Any]) -> type[Spec] | None:
    """The spec class that `data` would become, if that can be told."""
    root = _root(annotation)
    if root is None:
        return _spec(annotation)
    kind = data.get("kind")
    return root.registry.get(kind) if isinstance(kind, str) and kind in root.registry else None


def _inside(annotation: Any, member: type[Spec] | None, step: str | int) -> Any:
    """The annotation of the value at `step`: a spec's field, or what a mapping or a list holds."""
    if member is not None:
        return member.model_fields[step].annotation if step in member.model_fields else None
    origins = (list, tuple) if isinstance(step, int) else (dict, Mapping)
    held = [get_args(t) for t in _types(annotation) if get_origin(t) in origins]
    return held[0][0 if isinstance(step, int) else 1] if held else None


def _path(steps: Steps) -> str:
    return ".".join(str(step) for step in steps)


def _with_origin(line: str, lines: Mapping[Steps, str]) -> str:
    """Adds where the value stood to one line of a validation error, which begins with the full path."""
    steps = tuple(int(word) if word.isdigit() else word for word in line.split(": ", 1)[0].split("."))
    while steps and steps not in lines:
        steps = steps[:-1]
    return f"{line} ({lines[steps]})" if steps else line


# Differences


def diff(a: Spec | Mapping[str, Any], b: Spec | Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Rows (path, left, right) for each value that differs, defaults included; a side without the field is `ABSENT`."""
    left, right = (_flat(x.to_dict(defaults=True) if isinstance(x, Spec) else x) for x in (a, b))
    paths = [*left, *(path for path in right if path not in left)]
    rows = [(path, left.get(path, ABSENT), right.get(path, ABSENT)) for path in paths]
    return [row for row in rows if row[1] != row[2] or type(row[1]) is not type(row[2])]


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        items = [(str(i), item) for i, item in enumerate(value)]
    else:
        return {path: list(value) if isinstance(value, tuple) else value}
    return {found: leaf for key, item in items for found, leaf in _flat(item, f"{path}.{key}" if path else key).items()}
