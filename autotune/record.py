"""Frozen dataclasses to JSON and back, with the JSON schema that both keep to.

Floats that are not finite become the words "nan", "inf" and "-inf", so that a record reads back
equal and the file stays valid JSON. `derived` properties are written for readers and ignored on
reading.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from attnopt.compiler.errors import Problem
from attnopt.compiler.plan import Plan

T = TypeVar("T")
_WORDS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_SCALARS = {str: "string", bool: "boolean", int: "integer"}
_NUMBER: dict[str, Any] = {"anyOf": [{"type": "number"}, {"enum": sorted(_WORDS)}]}


def dump(value: Any) -> Any:
    """A value as plain JSON data; fields with `repr=False` are not part of a record."""
    if isinstance(value, Plan):
        return value.as_json()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kept = {f.name: dump(getattr(value, f.name)) for f in _fields(type(value))}
        return kept | {name: dump(getattr(value, name)) for name in _derived(type(value))}
    if isinstance(value, Mapping):
        return {str(key): dump(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [dump(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    return str(value)


def read(cls: type[T], data: Any, where: str = "") -> T:
    """Read `dump`'s data back as `cls`. Raises `Problem` A504 naming the field that does not
    fit.
    """
    return cast(T, _value(cls, data, where))


def schema(cls: type[Any]) -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a dataclass; each class is one entry of `$defs`."""
    found: dict[str, Any] = {}
    top = _describe(cls, found)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **top, "$defs": found}


def _fields(cls: type[Any]) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(cls) if field.repr]


def _derived(cls: type[Any]) -> tuple[str, ...]:
    return tuple(getattr(cls, "derived", ()))


def _hints(cls: type[Any]) -> dict[str, Any]:
    return get_type_hints(cls)


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType)


def _value(kind: Any, data: Any, where: str) -> Any:
    if kind is Any:
        return data
    if _is_union(kind):
        (inner,) = [option for option in get_args(kind) if option is not type(None)]
        return None if data is None else _value(inner, data, where)
    if dataclasses.is_dataclass(kind):
        return _record(cast(type[Any], kind), _expect(dict, data, where), where)
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        listed = _expect(list, data, where)
        return tuple(_value(item, each, f"{where}[{at}]") for at, each in enumerate(listed))
    if get_origin(kind) is Literal:
        return data if data in get_args(kind) else _misfit(where, f"is {data!r}")
    if kind is float:
        return _float(data, where)
    if kind in _SCALARS:
        return _expect(kind, data, where)
    item = get_args(kind)[1]
    named = _expect(dict, data, where)
    return {key: _value(item, each, f"{where}.{key}") for key, each in named.items()}


def _record(cls: type[Any], data: dict[str, Any], where: str) -> Any:
    values: dict[str, Any] = {}
    for field in _fields(cls):
        path = f"{where}.{field.name}".lstrip(".")
        if field.name in data:
            values[field.name] = _value(_hints(cls)[field.name], data[field.name], path)
        elif _required(field):
            _misfit(path, "is missing")
    return cls(**values)


def _required(field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def _float(data: Any, where: str) -> float:
    if isinstance(data, str) and data in _WORDS:
        return _WORDS[data]
    if isinstance(data, bool) or not isinstance(data, (int, float)):
        _misfit(where, f"is {data!r}, not a number")
    return float(data)


def _expect(kind: type[Any], data: Any, where: str) -> Any:
    if not isinstance(data, kind) or (kind is int and isinstance(data, bool)):
        _misfit(where, f"is {type(data).__name__}, not {kind.__name__}")
    return data


def _misfit(where: str, why: str) -> Any:
    raise Problem(
        "A504",
        "the report cannot be read",
        why=f"`{where}` {why}",
        help="it was changed by hand or written by another version; run optimize again",
    )


def _describe(kind: Any, found: dict[str, Any]) -> dict[str, Any]:
    if kind is Any:
        return {}
    if _is_union(kind):
        (inner,) = [option for option in get_args(kind) if option is not type(None)]
        return {"anyOf": [_describe(inner, found), {"type": "null"}]}
    if dataclasses.is_dataclass(kind):
        return _reference(cast(type[Any], kind), found)
    if get_origin(kind) is tuple:
        return {"type": "array", "items": _describe(get_args(kind)[0], found)}
    if get_origin(kind) is Literal:
        return {"enum": list(get_args(kind))}
    if kind is float:
        return dict(_NUMBER)
    if kind in _SCALARS:
        return {"type": _SCALARS[kind]}
    return {"type": "object", "additionalProperties": _describe(get_args(kind)[1], found)}


def _reference(cls: type[Any], found: dict[str, Any]) -> dict[str, Any]:
    if cls.__name__ not in found:
        found[cls.__name__] = {}  # taken before the fields are described: classes may be recursive
        found[cls.__name__] = _object(cls, found)
    return {"$ref": f"#/$defs/{cls.__name__}"}


def _object(cls: type[Any], found: dict[str, Any]) -> dict[str, Any]:
    hints = {field.name: _hints(cls)[field.name] for field in _fields(cls)}
    for name in _derived(cls):
        hints[name] = get_type_hints(getattr(cls, name).fget)["return"]
    if cls is Plan:
        hints = {"format": int, **hints}
    return {
        "type": "object",
        "description": " ".join((cls.__doc__ or "").split("\n\n")[0].split()),
        "properties": {name: _describe(hint, found) for name, hint in hints.items()},
        "required": list(hints),
        "additionalProperties": False,
    }
