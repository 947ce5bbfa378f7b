"""Heat maps on a fixed scale as inline SVG: sites by heads, and heads by heads."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from attnopt.autotune.charts import WIDTH, svg
from attnopt.autotune.markup import Markup, tag

_LABEL, _TOP, _ROW = 150, 22, 24
_WIDEST, _WRITTEN = 56.0, 34.0  # a cell at most; from here on it holds its number


@dataclass(frozen=True)
class Shade:
    """Values from `low` (nothing) to `high` (full colour), and how a value is written."""

    low: float
    high: float
    said: Callable[[float], str]

    def __call__(self, value: float) -> float:
        """How strong the colour is, 0 to 1."""
        if not math.isfinite(value):
            return 0.0
        span = (self.high - self.low) or 1.0
        return min(1.0, max(0.0, (value - self.low) / span))


def grid(rows: Sequence[tuple[str, Sequence[float]]], title: str, shade: Shade) -> Markup:
    """One row of cells per site, one cell per head; the stronger the colour, the larger."""
    columns = max((len(values) for _, values in rows), default=1)
    side = min(_WIDEST, (WIDTH - _LABEL) / columns)
    shown = [_heading(str(at), _LABEL + (at + 0.5) * side) for at in _marked(columns, side)]
    for line, (name, values) in enumerate(rows):
        y = float(_TOP + line * _ROW)
        shown.append(tag("text", name, x=_LABEL - 10, y=y + 16, class_="end small"))
        for at, value in enumerate(values):
            tip = f"{title}: {name}, head {at}: {shade.said(value)}"
            shown += _cell(value, tip, _LABEL + at * side, y, side, _ROW, shade)
    return svg(shown, _TOP + _ROW * len(rows) + 4, title)


def matrix(values: Sequence[Sequence[float]], title: str, shade: Shade) -> Markup:
    """A square of heads by heads."""
    count = max(1, len(values))
    side = min(_WIDEST, (WIDTH - _LABEL) / count)
    height = max(6.0, min(float(_ROW), side))
    shown = [_heading(str(at), _LABEL + (at + 0.5) * side) for at in _marked(count, side)]
    for line, row in enumerate(values):
        y = _TOP + line * height
        if line in _marked(count, height * 1.2):
            text = tag("text", f"head {line}", x=_LABEL - 10, y=y + height / 2 + 4,
                       class_="end small")  # fmt: skip
            shown.append(text)
        for at, value in enumerate(row):
            tip = f"{title}: heads {line} and {at}: {shade.said(value)}"
            shown += _cell(value, tip, _LABEL + at * side, y, side, height, shade)
    return svg(shown, _TOP + height * count + 4, title)


def _cell(
    value: float, tip: str, x: float, y: float, width: float, height: float, shade: Shade
) -> list[Markup]:
    gap = 2.0 if width > 12 else 0.5
    strength = shade(value)
    box = {"x": x + gap / 2, "y": y + gap / 2, "width": width - gap, "height": height - gap}
    opacity = 0.06 + 0.86 * strength
    made = [tag("rect", tag("title", tip), class_="cool", fill_opacity=opacity, rx=2, **box)]
    if width >= _WRITTEN and height >= 16:
        ink = "mid tiny on" if strength > 0.55 else "mid tiny"
        told = {"x": x + width / 2, "y": y + height / 2 + 4, "class_": ink}
        made.append(tag("text", shade.said(value), **told))
    return made


def _heading(text: str, x: float) -> Markup:
    return tag("text", text, x=x, y=15, class_="mid small")


def _marked(count: int, room: float) -> range:
    """Which of `count` columns have space for their number."""
    return range(0, count, max(1, math.ceil(20 / room)))
