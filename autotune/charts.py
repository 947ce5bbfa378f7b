"""The report's charts as inline SVG: no script, no network, and colours that follow the page's
theme.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from attnopt.autotune.markup import Markup, join, tag

WIDTH = 760
_LABEL = 190
_ROW = 34


@dataclass(frozen=True)
class Bar:
    """A bar from 0 to `value` with a whisker from `low` to `high`; `kind` is its colour class."""

    label: str
    value: float
    low: float
    high: float
    said: str
    kind: str = ""


@dataclass(frozen=True)
class Point:
    """A point of a scatter chart; `kind` is its class (try, miss, front, chosen), `said` its
    tip.
    """

    x: float
    y: float
    said: str
    kind: str = "try"


def bars(rows: Sequence[Bar], title: str) -> Markup:
    """Horizontal bars with whiskers and their value in words at the end."""
    most = max((max(row.value, row.high) for row in rows), default=1.0) or 1.0
    room = WIDTH - _LABEL - 190
    drawn = [_bar(row, at * _ROW, lambda value: _LABEL + room * value / most)
             for at, row in enumerate(rows)]  # fmt: skip
    return svg(drawn, len(rows) * _ROW + 4, title)


def interval(number: Bar, bound: float, title: str, shape: Callable[[float], str]) -> Markup:
    """One value with its interval on an axis that holds zero and, as a line, the bound."""
    ends = [0.0, bound, number.value, number.low, number.high]
    scale = _Scale([end for end in ends if math.isfinite(end)], 40, WIDTH - 40)
    low = scale(number.low if math.isfinite(number.low) else scale.least)
    high = scale(number.high if math.isfinite(number.high) else scale.most)
    shown = [
        tag("rect", x=40, y=34, width=max(0.0, scale(bound) - 40), height=20, class_="allowed"),
        tag("line", x1=scale(bound), x2=scale(bound), y1=24, y2=64, class_="bound"),
        tag("text", f"allowed {shape(bound)}", x=scale(bound), y=18, class_="mid small"),
        tag("line", x1=low, x2=high, y1=44, y2=44, class_="whisker thick"),
        tag("circle", tag("title", number.said), cx=scale(number.value), cy=44, r=6,
            class_=f"dot {number.kind}"),
    ]  # fmt: skip
    return svg([*shown, *_axis(scale, 70, shape)], 96, title)


def heatmap(
    rows: Mapping[str, Mapping[str, tuple[float, str]]],
    columns: Sequence[str],
    title: str,
    shape: Callable[[float], str],
) -> Markup:
    """A grid of values by row and column; the darker, the larger. A cell is (value, tip)."""
    label, top = 260, 24
    side = min(64.0, (WIDTH - label) / max(1, len(columns)))
    values = [cell[0] for row in rows.values() for cell in row.values()]
    most = max((abs(value) for value in values if math.isfinite(value)), default=0.0) or 1.0
    shown = [
        tag("text", name, x=label + (at + 0.5) * side, y=16, class_="mid small")
        for at, name in enumerate(columns)
        if side >= 18 or at % 2 == 0
    ]
    for line, (name, cells) in enumerate(rows.items()):
        y = top + line * 30
        shown.append(tag("text", tag("title", name), _cut(name, 40), x=label - 10, y=y + 18,
                         class_="end small"))  # fmt: skip
        for at, column in enumerate(columns):
            box = {"x": label + at * side + 1, "y": y + 1, "width": side - 2, "height": 26.0}
            if column not in cells:
                shown.append(tag("rect", rx=3, class_="empty", **box))
                continue
            value, tip = cells[column]
            shown += _cell(value, tip, most, box, shape)
    return svg(shown, top + 30 * len(rows) + 4, title)


def scatter(
    points: Sequence[Point],
    title: str,
    names: tuple[str, str],
    shapes: tuple[Callable[[float], str], Callable[[float], str]],
    wanted: tuple[float | None, float],
) -> Markup:
    """Points on two axes; `wanted` draws the budget (x) and the bound (y), and what meets both."""
    left, right, top, bottom = 70, WIDTH - 20, 36, 320
    budget, bound = wanted
    xs = [p.x for p in points if math.isfinite(p.x)] + [1.0] + ([budget] if budget else [])
    ys = [p.y for p in points if math.isfinite(p.y)] + [0.0, bound]
    across, up = _Scale(xs, left, right), _Scale(ys, bottom, top)
    limit = up(bound)
    start = across(budget) if budget else float(left)
    shown = [
        tag("rect", x=start, y=limit, width=right - start, height=bottom - limit, class_="allowed"),
        tag("line", x1=left, x2=right, y1=limit, y2=limit, class_="bound"),
        tag("text", f"allowed {shapes[1](bound)}", x=right, y=limit - 5, class_="end small"),
    ]
    if budget:
        shown += [
            tag("line", x1=start, x2=start, y1=top, y2=bottom, class_="bound"),
            tag("text", f"asked {shapes[0](budget)}", x=start - 5, y=top + 10, class_="end small"),
        ]
    shown += _axis(across, bottom, shapes[0])
    shown += [tag("text", shapes[1](mark), x=left - 8, y=up(mark) + 4, class_="end small")
              for mark in up.marks()]  # fmt: skip
    shown += [tag("line", x1=left, x2=right, y1=up(mark), y2=up(mark), class_="grid")
              for mark in up.marks()]  # fmt: skip
    ordered = sorted(points, key=lambda p: ("miss", "try", "front", "chosen").index(p.kind))
    line = sorted((p for p in points if p.kind in ("front", "chosen")), key=lambda p: p.x)
    path = " ".join(f"{across(p.x):.1f},{up(p.y):.1f}" for p in line)
    shown.append(tag("polyline", points=path, class_="front-line"))
    shown += [_point(p, across(p.x), up(p.y)) for p in ordered if math.isfinite(p.x + p.y)]
    shown.append(tag("text", names[0], x=right, y=bottom + 38, class_="end small muted"))
    shown.append(tag("text", names[1], x=left, y=20, class_="small muted"))
    return svg(shown, bottom + 44, title)


class _Scale:
    """Maps values to pixels, with room at both ends and round marks."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        self.start, self.end = start, end
        self.least, self.most = min(values), max(values)
        span = (self.most - self.least) or abs(self.most) or 1.0
        self.least -= 0.06 * span
        self.most += 0.06 * span

    def __call__(self, value: float) -> float:
        part = (value - self.least) / (self.most - self.least)
        return self.start + (self.end - self.start) * part

    def marks(self) -> list[float]:
        """At most seven round values inside the range."""
        raw = (self.most - self.least) / 5
        unit = 10.0 ** math.floor(math.log10(raw))
        step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= raw)
        first = math.ceil(self.least / step)
        return [at * step for at in range(first, math.floor(self.most / step) + 1)]


def svg(shown: Sequence[Markup], height: float, title: str) -> Markup:
    """The chart itself: `WIDTH` by `height` units, scaled to the page, named for screen readers."""
    box = f"0 0 {WIDTH} {height:g}"
    return tag("svg", tag("title", title), join(shown), viewBox=box, role="img", aria_label=title)


def _bar(row: Bar, y: int, scale: Callable[[float], float]) -> Markup:
    end, low, high = scale(row.value), scale(max(0.0, row.low)), scale(row.high)
    middle = y + 15
    return tag(
        "g",
        tag("title", f"{row.label}: {row.said}"),
        tag("text", _cut(row.label, 28), x=_LABEL - 12, y=middle + 4, class_="end"),
        tag(
            "rect", x=_LABEL, y=y + 4, width=end - _LABEL, height=22, rx=3, class_=f"bar {row.kind}"
        ),
        *(_whisker(low, high, middle) if row.high > row.low else ()),
        tag("text", row.said, x=max(end, high) + 10, y=middle + 4),
    )


def _whisker(low: float, high: float, y: int) -> list[Markup]:
    ends = ((low, high, 0), (low, low, 5), (high, high, 5))
    return [tag("line", x1=a, x2=b, y1=y - up, y2=y + up, class_="whisker") for a, b, up in ends]


def _cell(
    value: float, tip: str, most: float, box: Mapping[str, float], shape: Callable[[float], str]
) -> list[Markup]:
    strength = min(1.0, math.sqrt(abs(value) / most)) if math.isfinite(value) else 1.0
    kind = "heat" if value >= 0 or not math.isfinite(value) else "heat gain"
    attributes: dict[str, object] = {**box, "fill_opacity": 0.08 + 0.82 * strength, "rx": 3}
    made = [tag("rect", tag("title", tip), class_=kind, **attributes)]
    if box["width"] >= 44:
        ink = "mid tiny on" if strength > 0.6 else "mid tiny"
        x, y = box["x"] + box["width"] / 2, box["y"] + 17
        made.append(tag("text", shape(value), x=x, y=y, class_=ink))
    return made


def _axis(scale: _Scale, y: float, shape: Callable[[float], str]) -> list[Markup]:
    marks = [
        tag("text", shape(mark), x=scale(mark), y=y + 18, class_="mid small")
        for mark in scale.marks()
    ]
    return [tag("line", x1=scale.start, x2=scale.end, y1=y, y2=y, class_="axis"), *marks]


def _point(point: Point, x: float, y: float) -> Markup:
    radius = {"chosen": 8, "front": 5}.get(point.kind, 4)
    return tag("circle", tag("title", point.said), cx=x, cy=y, r=radius, class_=f"dot {point.kind}")


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
