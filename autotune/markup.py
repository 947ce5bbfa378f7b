"""HTML and SVG by nesting calls; whatever is not markup already is escaped, so no text can
become a tag.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


class Markup(str):
    """Text that is markup and needs no escaping."""

    __slots__ = ()


def tag(name: str, *children: object, **attributes: object) -> Markup:
    """An element. Attribute names take `_` for `-` and a trailing `_` is dropped; None leaves
    one out.
    """
    listed = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(_text(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{listed}>{join(children)}</{name}>")


def join(children: Iterable[object]) -> Markup:
    """Children one after the other; strings are escaped, markup is kept, None is left out."""
    return Markup("".join(_child(child) for child in children if child is not None))


def table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> Markup | None:
    """A table that scrolls sideways on narrow screens; None without rows."""
    if not rows:
        return None
    top = tag("tr", *(tag("th", cell, scope="col") for cell in head))
    body = join(tag("tr", *(tag("td", cell) for cell in row)) for row in rows)
    made = tag("table", tag("thead", top), tag("tbody", body))
    return tag("div", made, class_="scroll")


def _child(child: object) -> str:
    return child if isinstance(child, Markup) else html.escape(str(child))


def _text(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
