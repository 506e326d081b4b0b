"""The spec tree: frozen values that say what a model, a pass, an objective or a run is.

A `Spec` is a frozen pydantic model that refuses unknown fields. A `Part` is the root of an open union: its members
are told apart by `kind` and found in the root's registry, so kinds registered later are found as well.
Identity is the SHA-256 of the canonical JSON, which omits every field that equals its default.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Self, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from .errors import ConfigError, unknown
from .registry import Registry


class FrozenDict(dict):
    """A dict that cannot be changed after it was built, so that a frozen spec is frozen all the way down."""

    def _refuse(self, *_args: object, **_kwargs: object) -> Any:
        raise TypeError("specs are frozen; use spec.replace(...)")

    __setitem__ = __delitem__ = update = pop = popitem = clear = setdefault = __ior__ = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __copy__(self) -> FrozenDict:
        return self

    def __deepcopy__(self, _memo: object) -> FrozenDict:
        return self

    def __reduce__(self):
        return (FrozenDict, (dict(self),))


def _freeze(value: Any) -> Any:
    if isinstance(value, Mapping):
        return FrozenDict({key: _freeze(item) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return tuple(_freeze(item) for item in value)
    return value


class Spec(BaseModel):
    """A frozen value of the spec tree. Unknown fields are errors that name the full path and the nearest field."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=False, protected_namespaces=(), ser_json_inf_nan="constants")

    def model_post_init(self, _context: Any) -> None:
        for name in type(self).model_fields:
            value = getattr(self, name)
            if type(value) in (dict, list):
                object.__setattr__(self, name, _freeze(value))

    @model_validator(mode="wrap")
    @classmethod
    def _name_the_nearest_field(cls, data: Any, handler: Any) -> Any:
        if isinstance(data, Mapping):
            fields = cls.model_fields
            for key in data:
                if key not in fields and not _is_open_root(cls):
                    raise PydanticCustomError(
                        "unknown_field", "{message}", {"message": unknown("field", str(key), fields), "key": str(key)}
                    )
        return handler(data)

    def replace(self, **changes: Any) -> Self:
        """A validated copy with the named fields changed."""
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        for name in changes:
            if name not in fields:
                raise ConfigError(unknown("field", name, fields, field=type(self).__name__), field=name, choices=fields)
        return validate(type(self), {**fields, **changes})

    def to_dict(self, *, defaults: bool = False) -> dict[str, Any]:
        """Plain JSON values. Fields equal to their default are left out unless `defaults`; `kind` always stays."""
        return {
            name: _plain(getattr(self, name), defaults=defaults)
            for name, field in type(self).model_fields.items()
            if defaults or name == "kind" or field.is_required() or getattr(self, name) != field.get_default(call_default_factory=True)
        }

    def canonical(self) -> str:
        """Canonical JSON: sorted keys, no spaces, no defaults."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    def digest(self) -> str:
        """The spec's identity: SHA-256 of its canonical JSON, in hex."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()


class Part(Spec):
    """Root of an open union. Subclass once with `registry=`; members subclass the root with `kind: Literal[...]`."""

    registry: ClassVar[Registry[type[Any]]]
    kind: str

    def __init_subclass__(cls, registry: Registry | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if registry is not None:
            cls.registry = registry

    @classmethod
    def __pydantic_init_subclass__(cls, registry: Registry | None = None, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        kind = cls.model_fields["kind"].annotation
        if registry is None and (names := get_args(kind)):
            assert len(names) == 1, f"{cls.__name__}.kind must be one literal"
            cls.registry.add(names[0], cls)

    @property
    def exempt(self) -> Mapping[str, str]:
        """The contracts of tests/contracts that this part, as it is set, does not keep, each with the reason in words."""
        return {}

    @classmethod
    def exempted(cls) -> Self | None:
        """A form that does not keep some contract, for the table of exemptions; None: every form keeps all."""
        return None

    @model_validator(mode="wrap")
    @classmethod
    def _find_the_member(cls, data: Any, handler: Any) -> Any:
        if not _is_open_root(cls) or isinstance(data, cls):
            return handler(data)
        if isinstance(data, str):
            data = {"kind": data}
        if not isinstance(data, Mapping) or not isinstance(data.get("kind"), str):
            kinds = ", ".join(cls.registry.names())
            raise PydanticCustomError("no_kind", "{message}", {"message": f"a {cls.registry.what} needs a 'kind', one of: {kinds}"})
        try:
            member = cls.registry.get(data["kind"])
        except ConfigError as error:
            raise PydanticCustomError("unknown_kind", "{message}", {"message": str(error), "key": "kind"}) from None
        return member.model_validate(data)

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> Any:
        if not _is_open_root(cls):
            return handler(core_schema)
        members = [member.model_json_schema(ref_template="#/$defs/{model}") for _, member in cls.registry.items()]
        return {"oneOf": members}


def _is_open_root(cls: type) -> bool:
    return issubclass(cls, Part) and "registry" in cls.__dict__


def _plain(value: Any, *, defaults: bool) -> Any:
    if isinstance(value, Spec):
        return value.to_dict(defaults=defaults)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, defaults=defaults) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item, defaults=defaults) for item in value]
    return value


def parts(spec: Spec) -> Iterator[Part]:
    """Every part within `spec`, itself included, from the outside in."""
    if isinstance(spec, Part):
        yield spec
    for name in type(spec).model_fields:
        value = getattr(spec, name)
        for item in value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple) else (value,):
            if isinstance(item, Spec):
                yield from parts(item)


def exemptions(spec: Spec, path: str = "") -> list[tuple[str, str, str]]:
    """The one table of what a spec does not keep: (path of the part, contract, reason), of all parts in it."""
    rows = [(path, contract, reason) for contract, reason in spec.exempt.items()] if isinstance(spec, Part) else []
    for name in type(spec).model_fields:
        value = getattr(spec, name)
        inner = value.items() if isinstance(value, Mapping) else [("", value)]
        for key, item in inner:
            if isinstance(item, Spec):
                rows += exemptions(item, ".".join(part for part in (path, name, str(key)) if part))
    return rows


def validate(cls: type, data: Any, *, where: str = "") -> Any:
    """`cls.model_validate`, with errors as one `ConfigError` that names full paths."""
    with explained(where):
        return cls.model_validate(data)


@contextmanager
def explained(where: str = "") -> Iterator[None]:
    """What is wrong with specs that are made inside, as one `ConfigError` that names full paths from `where` on."""
    try:
        yield
    except ValidationError as error:
        lines = []
        for item in error.errors(include_url=False):
            path = ".".join(str(step) for step in item["loc"])
            key = (item.get("ctx") or {}).get("key")
            if item["type"] == "unknown_field" or item["type"] == "unknown_kind":
                path = f"{path}.{key}" if path else str(key)
            path = f"{where}.{path}" if where and path else (path or where)
            given = "" if item["type"] in ("unknown_field", "unknown_kind", "no_kind", "missing") else f" (given: {item['input']!r:.80})"
            lines.append((path, f"{path}: {item['msg']}{given}" if path else f"{item['msg']}{given}"))
        raise ConfigError("\n".join(line for _, line in lines), field=lines[0][0]) from None
