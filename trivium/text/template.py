"""The one renderer of chat templates: jinja2's immutable sandbox, set up as transformers sets it up, with limits.

Templates come with models and are not trusted: besides what the sandbox forbids, every value that a template makes is
measured before or as it is made, and a clock is read in each loop, call and operation, so that no template runs for long
or takes much memory. Left out of what transformers offers: filters that are random (or no use to a prompt) and loaders.
"""

from __future__ import annotations

import datetime
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace, pass_context

from ..core.errors import DataError

MAX_SOURCE = 1 << 17  # characters of a template
MAX_VALUE = 1 << 24  # characters of one value, and of the text that comes out
MAX_MADE = 1 << 27  # characters of all values made on the way
MAX_NUMBER = 1 << 16  # as a width, a count, a precision
MAX_BITS = 1 << 12  # of an integer
MAX_DEPTH = 64  # of lists in lists
MAX_SECONDS = 2.0  # of this thread's own work

BEGIN, END = "\ufdd0", "\ufdd1"  # noncharacters around what {% generation %} holds
LEFT_OUT = ("pprint", "random", "urlize", "xmlattr")  # filters

STR_METHODS = """
capitalize casefold count endswith find format format_map index isalnum isalpha isascii isdecimal isdigit isidentifier islower isnumeric
isprintable isspace istitle isupper lower lstrip partition removeprefix removesuffix rfind rindex rpartition rsplit rstrip split splitlines
startswith strip swapcase title upper center ljust rjust zfill replace join
"""
METHODS: dict[type, frozenset[str]] = {
    str: frozenset(STR_METHODS.split()),
    dict: frozenset({"get", "items", "keys", "values", "copy", "fromkeys"}),
    list: frozenset({"index", "count", "copy"}),
    tuple: frozenset({"index", "count"}),
    range: frozenset({"index", "count"}),
}


class Stopped(DataError):
    """A template that would have taken too much time or memory."""


class TemplateLimit(jinja2.TemplateError):
    """What was too much."""


@dataclass(frozen=True)
class Rendered:
    """A text, and the spans of its characters that stood inside {% generation %}."""

    text: str
    spans: tuple[tuple[int, int], ...]


def render(source: str, values: Mapping[str, Any], *, date: datetime.datetime) -> Rendered:
    """Render a template with plain JSON `values`; `date` is what strftime_now tells. Raises `DataError`; `Stopped` at a limit."""
    code = compiled(source)
    try:
        environment = _Environment(values)
        given: dict[str, Any] = {name: value for name, value in environment.globals.items() if name != "lipsum"}
        given |= {"raise_exception": _raise, "namespace": _Namespace, "dict": _dict, "strftime_now": date.strftime}
        pieces = []
        for piece in jinja2.Template.from_code(environment, code, given).generate(values):
            environment.emit(piece)
            pieces.append(piece)
        return _unmark("".join(pieces))
    except TemplateLimit as error:
        raise Stopped(f"the chat template was stopped: {error}") from None
    except SecurityError as error:
        raise DataError(f"the chat template was stopped: it reaches for what no template may have: {error}") from None
    except RecursionError:
        raise Stopped("the chat template was stopped: it calls itself without an end") from None
    except Exception as error:  # a template can raise whatever it likes
        said = str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
        raise DataError(f"the chat template cannot write this conversation: {said:.500}") from None


@lru_cache(maxsize=32)
def compiled(source: str) -> CodeType:
    """The code of a template. Raises `DataError` for one that is too long or not well formed."""
    if len(source) > MAX_SOURCE:
        raise DataError(f"the chat template has {len(source)} characters; at most {MAX_SOURCE} are taken")
    try:
        return _Environment({}).compile(source, filename="<chat template>")
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"the chat template is not well formed: line {error.lineno}: {error.message}") from None
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise DataError(f"the chat template cannot be compiled: {type(error).__name__}: {error!s:.200}") from None


@dataclass(frozen=True)
class Facts:
    """What a template's source says: the variables it reads or sets, and whether it marks what is generated."""

    names: frozenset[str]
    marks: bool


@lru_cache(maxsize=32)
def facts(source: str) -> Facts:
    """Facts of a template. Raises `DataError`."""
    compiled(source)
    tree = _Environment({}).parse(source)
    marks = any(node.name == "marked" for node in tree.find_all(nodes.ExtensionAttribute))
    return Facts(frozenset(node.name for node in tree.find_all(nodes.Name)), marks)


class _Generation(Extension):
    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("marked"), [], [], body).set_lineno(line)

    def marked(self, caller: Callable[[], str]) -> str:
        return f"{BEGIN}{caller()}{END}"


class _Generator(CodeGenerator):
    """Leads every operation that can make something large, or go on for long, through a method of the environment."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(tick).set_lineno(node.lineno))
        super().visit_For(node, frame)

    def visit_Filter(self, node: nodes.Filter, frame: Frame) -> None:
        self.write(f"environment.filtered(context, {node.name!r}, ")
        if node.node is None:
            self.write(f"concat({frame.buffer})")
        else:
            self.visit(node.node, frame)
        self.signature(node, frame)
        self.write(")")

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.joined('', (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        self._made(node, frame, super().visit_Getitem, when=isinstance(node.arg, nodes.Slice))

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._made(node, frame, super().visit_List)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._made(node, frame, super().visit_Dict)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        self._made(node, frame, super().visit_Tuple, when=node.ctx == "load")

    def _made(self, node: nodes.Node, frame: Frame, visit: Callable[[Any, Frame], None], *, when: bool = True) -> None:
        self.write("environment.made(" if when else "")
        visit(node, frame)
        self.write(")" if when else "")


class _Namespace(Namespace):
    """jinja's namespace without names that begin with an underscore."""

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"{name!r} on a namespace")
        super().__setitem__(name, value)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox of one rendering: what the input weighs, what was made so far, and when to stop."""

    code_generator_class = _Generator
    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self, values: Mapping[str, Any]):
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False, finalize=_written, extensions=[_Generation, loopcontrols])
        self.filters = {name: function for name, function in self.filters.items() if name not in LEFT_OUT} | {"tojson": _tojson}
        self.concat = lambda pieces: self.joined("", pieces)  # type: ignore[assignment]
        self.deadline = time.thread_time() + MAX_SECONDS
        self.total = self.written = 0
        self.weights: dict[int, int] = {}  # of the lists and objects given, so that they need not be measured again
        self._weigh(list(values.values()), remember=True)

    # What is counted.

    def tick(self) -> None:
        if time.thread_time() > self.deadline:
            raise TemplateLimit(f"it ran for more than {MAX_SECONDS:g} seconds")

    def spend(self, size: int) -> None:
        """Account for a value of `size` characters that is about to be made."""
        self.total += size
        if size > MAX_VALUE or self.total > MAX_MADE:
            raise TemplateLimit(f"it makes more text than {MAX_VALUE if size > MAX_VALUE else MAX_MADE} characters")

    def emit(self, piece: str) -> None:
        """Account for a piece of the final text."""
        self.tick()
        self.written += len(piece)
        if self.written > MAX_VALUE:
            raise TemplateLimit(f"it writes more than {MAX_VALUE} characters")

    def made(self, value: Any) -> Any:
        """`value`, accounted for: itself, not the lists that it only refers to."""
        self.tick()
        if isinstance(value, str):
            self.spend(len(value))
        elif isinstance(value, list | tuple | dict) and id(value) not in self.weights:
            items = value.values() if isinstance(value, dict) else value
            self.spend(8 * len(value) + sum(len(item) for item in items if isinstance(item, str)))
            self.weigh(value)
        return value

    def weigh(self, value: Any) -> int:
        """About how many characters it takes to write `value`, which must not be too many."""
        return self._weigh(value)

    def _weigh(self, value: Any, *, remember: bool = False) -> int:
        """Depth first, as far as `MAX_VALUE`; a list that stands in ten places weighs ten times."""
        self.tick()
        room = MAX_VALUE

        def walk(value: Any, depth: int) -> None:
            nonlocal room
            before = room
            room -= self.weights.get(id(value)) or (2 + len(value) if isinstance(value, str) else 16)
            if room < 0 or depth > MAX_DEPTH:
                raise TemplateLimit(f"it makes a value of more than {MAX_VALUE} characters, or lists deeper than {MAX_DEPTH}")
            if isinstance(value, list | tuple | dict) and id(value) not in self.weights:
                for item in [*value, *value.values()] if isinstance(value, dict) else value:
                    walk(item, depth + 1)
                if remember:
                    self.weights[id(value)] = before - room

        walk(value, 0)
        return MAX_VALUE - room

    # What a template does.

    # Two underscores, as in jinja, so that a template can pass any keyword.
    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self.tick()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str | bytes | int | float | list | tuple | dict | range):
            args = __self._method(owner, __obj.__name__, args, kwargs)
        return __self.made(super().call(__context, __obj, *args, **kwargs))

    def _method(self, owner: Any, name: str, args: tuple, kwargs: dict[str, Any]) -> tuple:
        """Check a method of a plain value before it runs; returns its arguments, which `join` has to read once."""
        if name not in METHODS.get(type(owner), ()):
            raise SecurityError(f"the method {name!r} of a {type(owner).__name__}")
        numbers([*args, *kwargs.values()])
        if isinstance(owner, str) and name == "replace":
            self._replaced(owner, *args, **kwargs)
        if isinstance(owner, str) and name == "join" and len(args) == 1:
            args = (list(args[0]),)
            self.spend(sum(self.weigh(item) for item in args[0]) + len(owner) * len(args[0]))
        return args

    def filtered(__self, __context: Context, __name: str, __value: Any, *args: Any, **kwargs: Any) -> Any:
        """A filter by name; jinja's `map` and `select` come here too, through `call_filter`."""
        return __self.call_filter(__name, __value, args, kwargs, __context)

    def call_filter(self, name: str, value: Any, args: Any = None, kwargs: Any = None, context: Any = None, eval_ctx: Any = None) -> Any:
        args, kwargs = tuple(args or ()), dict(kwargs or {})
        self.tick()
        numbers([*args, *kwargs.values()])
        if name == "join":
            return self._joined(value, *args, **kwargs)
        if name == "replace":
            self._replaced(str(value), *args, **kwargs)
        elif name == "indent":
            width = kwargs.get("width", args[0] if args else 4)
            self.spend(len(str(value)) + (str(value).count("\n") + 1) * (len(width) if isinstance(width, str) else int(width)))
        elif name == "wordwrap":
            self.spend((self.weigh(value) + 1) * max(1, self.weigh([*args, *kwargs.values()])))
        elif name == "format":
            self._formatted(str(value), [*args, *kwargs.values()])
        elif name == "sum" and not isinstance(kwargs.get("start", args[1] if len(args) > 1 else 0), int | float):
            raise TemplateLimit("it sums what is no number")
        elif name in ("string", "tojson", "e", "escape", "forceescape", "urlencode", "trim", "title", "upper", "lower"):
            self.spend(self.weigh(value))
        return self.made(super().call_filter(name, value, args, kwargs, context, eval_ctx))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        many = (str, list, tuple)
        if operator == "+" and isinstance(left, many) and isinstance(right, many):
            self.spend(len(left) + len(right))
        elif operator == "*" and (isinstance(left, many) or isinstance(right, many)):
            self.spend((len(left) if isinstance(left, many) else int(left)) * (len(right) if isinstance(right, many) else int(right)))
        elif operator == "%" and isinstance(left, str):
            self._formatted(left, right if isinstance(right, tuple) else [right])
        elif operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > MAX_BITS:
                raise TemplateLimit(f"it makes a number of more than {MAX_BITS} bits")
        return self.made(super().call_binop(context, operator, left, right))

    def joined(self, separator: str, parts: Iterable[Any]) -> str:
        """The text of all parts, one after the other."""
        parts = list(parts)
        self.tick()
        self.spend(sum(len(part) if isinstance(part, str) else self.weigh(part) for part in parts) + len(separator) * len(parts))
        return separator.join(map(str, parts))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def format(*args: Any, **kwargs: Any) -> str:
            self._formatted(value.__self__, [*args, *kwargs.values()])
            return self.made(wrapped(*args, **kwargs))

        return format

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        if attribute.startswith("_"):
            raise SecurityError(f"the attribute {attribute!r} of a {type(obj).__name__}")
        return super().unsafe_undefined(obj, attribute)

    def _joined(self, value: Iterable[Any], d: Any = "", attribute: Any = None) -> str:
        """The filter `join`."""
        if attribute is not None:
            value = [self.getitem(item, attribute) for item in value]
        return self.joined(str(d), value)

    def _replaced(self, text: str, old: Any = "", new: Any = "", count: Any = -1) -> None:
        self.spend(len(text) + (text.count(str(old)) + 1) * len(str(new)))

    def _formatted(self, text: str, values: Iterable[Any]) -> None:
        """Bound what formatting can give: widths as written, and every place taken by the largest value."""
        text = text.replace("{{", "")
        places = re.findall(r"%(?:\([^)]*\))?[^a-zA-Z%]*|\{[^{}]*", text)
        if any("*" in place and place[0] == "%" for place in places) or re.search(r"\{[^}]*\{", text):
            raise TemplateLimit("it formats with a computed width")
        widths = sum(min(int(digits[:9]), MAX_VALUE) for place in places for digits in re.findall(r"\d+", place))
        self.spend(len(text) + widths + len(places) * max((self.weigh(value) for value in values), default=0))


@pass_context
def _written(context: Context, value: Any) -> Any:
    """What `{{ value }}` writes. That it takes the context keeps jinja from computing it while compiling."""
    environment = context.environment
    assert isinstance(environment, _Environment)
    environment.spend(len(value) if isinstance(value, str) else environment.weigh(value))
    return value


def numbers(values: Iterable[Any]) -> None:
    """Refuse arguments that would ask for a great width, count or precision."""
    for value in values:
        if isinstance(value, int) and abs(value) > MAX_NUMBER:
            raise TemplateLimit(f"it passes a number over {MAX_NUMBER}")


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:  # noqa: FBT001
    """As transformers writes JSON: nothing is escaped for HTML."""
    if (isinstance(indent, int) and indent > 16) or any(isinstance(part, str) and len(part) > 16 for part in (indent, *(separators or ()))):
        raise TemplateLimit("it indents JSON by more than 16")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _dict(*pairs: Any, **named: Any) -> dict[str, Any]:
    """In place of the class, which has attributes."""
    return dict(*pairs, **named)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _unmark(text: str) -> Rendered:
    pieces: list[str] = []
    spans: list[tuple[int, int]] = []
    length, open_at = 0, None
    for piece in re.split(f"([{BEGIN}{END}])", text):
        if piece == BEGIN:
            open_at = length
        elif piece == END and open_at is not None:
            spans.append((open_at, length))
        elif piece != END:
            pieces.append(piece)
            length += len(piece)
    return Rendered("".join(pieces), tuple(spans))
