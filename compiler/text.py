"""The one grammar of specs, passes and plans: `name{key=value key=value}`.

Values are integers, floats, booleans (`true`, `false`), `none`, words, lists `[a,b]` and calls
`name(key=value,...)`. `dump` prints a frozen dataclass with the fields that differ from their
defaults; `parse` reads the text back into plain Python values, and `build` into the dataclass.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, TypeVar

from attnopt.compiler.errors import Problem

T = TypeVar("T")
_TOKEN = re.compile(r"\s*([A-Za-z_][\w.\-/]*|[-+]?(?:\d[\w.+\-]*|inf|nan)|[{}()\[\]=,])")


@dataclasses.dataclass(frozen=True)
class Call:
    """A parsed `name{...}` or `name(...)`: its name and its arguments by key."""

    name: str
    values: dict[str, Any]


def dump_value(value: Any) -> str:
    """One value as text; dataclasses with a `name` print as `name(key=value,...)`."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(dump_value(item) for item in value) + "]"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        inner = ",".join(f"{key}={dump_value(item)}" for key, item in changed(value).items())
        return f"{_name(value)}({inner})" if inner else _name(value)
    return str(value)


def dump(value: Any) -> str:
    """A dataclass instance as `name{key=value ...}`; fields at their default are left out."""
    inner = " ".join(f"{key}={dump_value(item)}" for key, item in changed(value).items())
    return f"{_name(value)}{{{inner}}}"


def changed(value: Any) -> dict[str, Any]:
    """The init fields of a dataclass instance that differ from their default, in order."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        if not field.init or field.name == "kind":
            continue
        item = getattr(value, field.name)
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if default is dataclasses.MISSING or item != default:
            found[field.name] = item
    return found


def parse(text: str) -> Call:
    """Read `name{key=value ...}`.

    Raises `Problem` A601 with the position of what could not be read.
    """
    tokens = _tokens(text)
    value, rest = _call_or_word(tokens, 0, text)
    if rest != len(tokens):
        raise _unreadable(text, tokens[rest][1])
    return value if isinstance(value, Call) else Call(str(value), {})


def build(cls: type[T], values: dict[str, Any], context: str = "") -> T:
    """Make the dataclass `cls` from parsed values; an unknown key is a `Problem` listing the known
    ones."""
    known = [field.name for field in dataclasses.fields(cls) if field.init]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise Problem(
                "A601",
                f"unknown option `{key}`" + (f" of {context}" if context else ""),
                help="known options: " + (", ".join(known) or "none"),
            )
    return cls(**values)


def _name(value: Any) -> str:
    return str(getattr(value, "kind", None) or value.name)


def _tokens(text: str) -> list[tuple[str, int]]:
    found, at = [], 0
    while at < len(text.rstrip()):
        match = _TOKEN.match(text, at)
        if match is None:
            raise _unreadable(text, at)
        found.append((match.group(1), match.start(1)))
        at = match.end()
    return found


def _call_or_word(tokens: list[tuple[str, int]], at: int, text: str) -> tuple[Any, int]:
    if at >= len(tokens):
        raise _unreadable(text, len(text))
    token, position = tokens[at]
    if token == "[":
        return _list(tokens, at + 1, text)
    if token in "{}()]=,":
        raise _unreadable(text, position)
    if at + 1 < len(tokens) and tokens[at + 1][0] in "{(":
        closing = {"{": "}", "(": ")"}[tokens[at + 1][0]]
        return _arguments(token, tokens, at + 2, closing, text)
    return _atom(token), at + 1


def _arguments(
    name: str, tokens: list[tuple[str, int]], at: int, closing: str, text: str
) -> tuple[Call, int]:
    values: dict[str, Any] = {}
    while at < len(tokens) and tokens[at][0] != closing:
        if tokens[at][0] == ",":
            at += 1
            continue
        if at + 2 >= len(tokens) or tokens[at + 1][0] != "=":
            raise _unreadable(text, tokens[at][1])
        values[tokens[at][0]], after = _call_or_word(tokens, at + 2, text)
        at = after
    if at >= len(tokens):
        raise _unreadable(text, len(text))
    return Call(name, values), at + 1


def _list(tokens: list[tuple[str, int]], at: int, text: str) -> tuple[tuple[Any, ...], int]:
    items: list[Any] = []
    while at < len(tokens) and tokens[at][0] != "]":
        if tokens[at][0] == ",":
            at += 1
            continue
        item, at = _call_or_word(tokens, at, text)
        items.append(item)
    if at >= len(tokens):
        raise _unreadable(text, len(text))
    return tuple(items), at + 1


def _atom(token: str) -> Any:
    words: dict[str, Any] = {"true": True, "false": False, "none": None}
    if token in words:
        return words[token]
    try:
        return int(token)
    except ValueError:
        pass
    try:
        return float(token)
    except ValueError:
        return token


def _unreadable(text: str, at: int) -> Problem:
    return Problem(
        "A601",
        f"cannot read `{text}`",
        where=f"column {at + 1}",
        help="the form is name{key=value key=value}",
    )
