"""One registry class for everything that has variants.

A registry knows the package (or module) whose import registers its parts and imports it once, on the first look-up
or listing. Parts of other packages come through the entry point group `trivium.parts`, which is read on a miss.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from .errors import ConfigError, unknown

T = TypeVar("T")
ENTRY_POINTS = "trivium.parts"


class Registry(Generic[T]):
    """Names to parts. `what` names the kind of part in errors; `home` is the module or package that registers them."""

    def __init__(self, what: str, home: str | None = None):
        self.what = what
        self.home = home
        self._parts: dict[str, T] = {}
        self._imported = home is None
        self._plugins_read = False

    def add(self, name: str, part: T) -> T:
        """Register `part`; a name can be taken once."""
        if name in self._parts and self._parts[name] is not part:
            raise ConfigError(f"{self.what} {name!r} is registered twice: {self._parts[name]!r} and {part!r}")
        self._parts[name] = part
        return part

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator form of `add`."""
        return lambda part: self.add(name, part)

    def get(self, name: str, *, field: str | None = None) -> T:
        """The part called `name`, or a `ConfigError` that names the nearest known one."""
        if name not in self._parts:
            self._import_home()
        if name not in self._parts:
            self._import_plugins()
        if name not in self._parts:
            raise ConfigError(unknown(self.what, name, self._parts, field=field), field=field, value=name, choices=self._parts)
        return self._parts[name]

    def names(self) -> list[str]:
        self._import_home()
        self._import_plugins()
        return sorted(self._parts)

    def items(self) -> list[tuple[str, T]]:
        return [(name, self._parts[name]) for name in self.names()]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: str) -> bool:
        return name in self.names()

    def _import_home(self) -> None:
        if self._imported:
            return
        self._imported = True
        assert self.home is not None
        module = importlib.import_module(self.home)
        for entry in pkgutil.iter_modules(module.__path__) if hasattr(module, "__path__") else ():
            importlib.import_module(f"{self.home}.{entry.name}")

    def _import_plugins(self) -> None:
        if self._plugins_read:
            return
        self._plugins_read = True
        for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
            entry.load()
