"""Curves as inline SVG: how much of the energy the first singular values hold."""

from __future__ import annotations

from collections.abc import Sequence

from attnopt.autotune.charts import WIDTH, svg
from attnopt.autotune.markup import Markup, tag

_LEFT, _RIGHT, _TOP, _BOTTOM = 60, WIDTH - 130, 14, 214
_POINTS = 96


def energy(curves: Sequence[tuple[str, Sequence[float]]], title: str) -> Markup:
    """Cumulated shares of energy by number of singular values, one line per site: the paler, the
    earlier. Each curve holds singular values, descending, whose squares add up to 1."""
    longest = max((len(values) for _, values in curves), default=1)
    shown = [part for share in (0.0, 0.25, 0.5, 0.75, 1.0) for part in _level(share)]
    for at in sorted({0, longest // 4, longest // 2, 3 * longest // 4, longest}):
        x = _LEFT + (_RIGHT - _LEFT) * at / longest
        shown.append(tag("text", str(at), x=x, y=_BOTTOM + 18, class_="mid small"))
    for order, (name, values) in enumerate(curves):
        strength = 0.25 + 0.75 * (order + 1) / len(curves)
        shown.append(_curve(name, values, longest, strength))
    words = f"singular values, of {longest} →"
    shown.append(tag("text", words, x=_RIGHT, y=_BOTTOM + 36, class_="end small"))
    return svg(shown, _BOTTOM + 42, title)


def _level(share: float) -> list[Markup]:
    y = _height(share)
    return [
        tag("line", x1=_LEFT, x2=_RIGHT, y1=y, y2=y, class_="grid"),
        tag("text", f"{share:.0%}", x=_LEFT - 8, y=y + 4, class_="end small"),
    ]


def _curve(name: str, values: Sequence[float], longest: int, strength: float) -> Markup:
    total, points = 0.0, [f"{_LEFT},{_height(0.0):.1f}"]
    step = max(1, len(values) // _POINTS)
    for at, value in enumerate(values, start=1):
        total += value * value
        if at % step == 0 or at == len(values):
            x = _LEFT + (_RIGHT - _LEFT) * at / longest
            points.append(f"{x:.1f},{_height(min(1.0, total)):.1f}")
    line = " ".join(points)
    return tag("polyline", tag("title", name), points=line, class_="curve", stroke_opacity=strength)


def _height(share: float) -> float:
    return _BOTTOM - (_BOTTOM - _TOP) * share
