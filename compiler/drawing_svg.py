"""A drawing as one SVG file, with a layout of its own: the stream runs down the left, sublayers
branch off to the right and are added back.

The file needs nothing else and follows the reader's light or dark theme. Colours stand both as
attributes, for programs that read no style sheets, and as classes, which win in browsers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from xml.sax.saxutils import escape, quoteattr

from attnopt.compiler.drawing import INPUTS, Branch, Card, Drawing, Fold, Step
from attnopt.compiler.drawing_dot import look

_LINE, _CHARACTER, _PAD, _GAP = 17, 7.0, 10, 16
_SPINE, _LEFT = 60, 100  # where the stream runs, and where sublayers begin
_LONGEST = 72  # characters of one line; what is cut is told in the tooltip
_LIGHT = {
    "page": "#ffffff", "ink": "#1f2328", "dim": "#59636e", "fold": "#f6f8fa", "edge": "#afb8c1",
    "stream": "#57606a", "branch": "#ffffff", "raised": "#d8ecfb", "missing": "#fdf0c8",
    "unraised": "#fbd9d5",
}  # fmt: skip
_DARK = {
    "page": "#0d1117", "ink": "#e6edf3", "dim": "#9198a1", "fold": "#151b23", "edge": "#3d444d",
    "stream": "#9198a1", "branch": "#0d1117", "raised": "#123a5c", "missing": "#4d3c0a",
    "unraised": "#67201a",
}  # fmt: skip
_STROKED = ("edge", "stream")


def svg(drawn: Drawing) -> str:
    """The drawing as an SVG document."""
    page = _Page()
    page.text(_PAD, 26, drawn.title, "ink", bold=True, size=16)
    page.text(_PAD, 46, f"{drawn.summary}; inputs: {drawn.inputs}", "dim")
    page.y = 64
    ends: dict[int, float] = {}
    for at, fold in enumerate(drawn.folds):
        joined = fold.stream == at - 1 != INPUTS
        if fold.stream == INPUTS:
            _inputs(page, fold.stem)
        top = page.y
        edge = _fold(page, fold, joined=joined)
        ends[at] = page.y
        page.links += [(ends[source], top + 16, edge) for source in fold.reads]
        if not joined and fold.stream != INPUTS:
            page.links.append((ends[fold.stream], top - 8, _SPINE))
            page.stream(top - 8, top)
        page.y += _GAP
    page.stream(page.y - _GAP, page.y + 8)
    page.dot(page.y + 8)
    page.text(_SPINE + 14, page.y + 13, "outputs", "dim")
    page.y += 36
    return page.document(f"{drawn.title}: {drawn.summary}")


def _inputs(page: _Page, stem: str) -> None:
    """The top of a stream: the inputs, and what they pass first."""
    page.y += 12
    page.dot(page.y)
    page.text(_SPINE + 14, page.y + 5, "inputs", "dim")
    if stem:
        page.text(_SPINE + 14, page.y + 24, stem, "dim", size=11)
    page.stream(page.y + 4, page.y + 36)
    page.y += 36


@dataclass
class _Page:
    """Shapes in the order in which they are painted, and how far the page reaches.

    `links` lead from the end of a fold, at a height, to a height and a place beside it.
    """

    y: float = 0.0
    right: float = 480.0
    shapes: list[str] = field(default_factory=list)
    links: list[tuple[float, float, float]] = field(default_factory=list)

    def text(
        self, x: float, y: float, said: str, look: str, *, bold: bool = False, size: int = 13
    ) -> None:
        """One line of text from a point on; a line too long is cut, and whole in its tooltip."""
        cut = said if len(said) <= _LONGEST else said[: _LONGEST - 1] + "…"
        tip = f"<title>{_safe(said)}</title>" if cut != said else ""
        weight = ' font-weight="bold"' if bold else ""
        self.right = max(self.right, x + len(cut) * _CHARACTER * size / 13 + _PAD)
        self.shapes.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}"{weight} {_fill(look)}>'
            f"{_safe(cut)}{tip}</text>"
        )

    def box(self, x: float, y: float, width: float, height: float, look: str) -> None:
        """A rounded box."""
        self.right = max(self.right, x + width + _PAD)
        self.shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" '
            f'class="{look} edge-line" fill="{_LIGHT[look]}" stroke="{_LIGHT["edge"]}"/>'
        )

    def stream(self, top: float, bottom: float) -> None:
        """A piece of the residual stream."""
        self.path(f"M{_SPINE} {top:g}V{bottom:g}", 3)

    def path(self, drawn: str, width: float = 1.5) -> None:
        """A line."""
        self.shapes.append(
            f'<path d="{drawn}" fill="none" class="stream" stroke="{_LIGHT["stream"]}" '
            f'stroke-width="{width:g}"/>'
        )

    def dot(self, y: float, sign: str = "") -> None:
        """A point on the stream, with a sign in it where two values are added."""
        radius = 8 if sign else 4
        self.shapes.append(
            f'<circle cx="{_SPINE}" cy="{y:g}" r="{radius}" class="page stream" '
            f'fill="{_LIGHT["page"]}" stroke="{_LIGHT["stream"]}" stroke-width="1.5"/>'
        )
        if sign:
            self.path(f"M{_SPINE - 4} {y:g}h8M{_SPINE} {y - 4:g}v8")

    def document(self, title: str) -> str:
        """All of it, on a page that is large enough."""
        for top, bottom, end in self.links:
            side = self.right + 6
            self.right += 10
            self.path(f"M{_SPINE} {top:g}H{side:g}V{bottom:g}H{end + 2:g}m6 -4l-6 4l6 4")
        width, height = round(self.right + 2 * _PAD), round(self.y)
        return "\n".join([
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" role="img" aria-label={quoteattr(_clean(title))} '
            'font-family="system-ui, Helvetica, Arial, sans-serif">',
            f"<style>{_sheet(_LIGHT)}",
            f"@media (prefers-color-scheme: dark) {{{_sheet(_DARK)}}}</style>",
            f'<rect width="100%" height="100%" class="page" fill="{_LIGHT["page"]}"/>',
            *self.shapes, "</svg>", "",
        ])  # fmt: skip


def _fold(page: _Page, fold: Fold, *, joined: bool) -> float:
    """A fold's frame and its steps; the stream is led into it where the fold before it ends in
    it. Returns where its right edge is."""
    top, slot = page.y, len(page.shapes)
    page.text(_LEFT, top + 18, fold.title, "dim", bold=True)
    page.y += 30
    widest = 0.0
    for block in fold.blocks:
        for step in block.steps:
            widest = max(widest, _step(page, step))
        if block.after:
            _on_stream(page, block.after)
    page.y += 4
    frame = _Page()
    left, width = _PAD + 18, max(widest, 300) + _LEFT - 10
    frame.box(left, top, width, page.y - top, "fold")
    page.right = max(page.right, frame.right)
    page.shapes[slot:slot] = frame.shapes
    page.shapes.insert(slot + 1, _piece(top - (_GAP if joined else 0), top + 30))
    page.shapes.insert(slot + 1, _piece(page.y - 4, page.y))
    return left + width


def _piece(top: float, bottom: float) -> str:
    made = _Page()
    made.stream(top, bottom)
    return made.shapes[0]


def _step(page: _Page, step: Step) -> float:
    """Branches side by side, and the sum that they end in; returns how wide they are."""
    if step.before:
        _on_stream(page, step.before)
    top, x, slot = page.y, float(_LEFT), len(page.shapes)
    sizes = [_size(branch) for branch in step.branches]
    bottom = top + max(height for _, height in sizes) + 30
    for branch, (width, height) in zip(step.branches, sizes, strict=True):
        _branch(page, branch, x, top + 12, width, height)
        middle = x + 24
        page.path(f"M{_SPINE} {top + 4:g}H{middle:g}V{top + 12:g}")
        page.path(f"M{middle:g} {top + 12 + height:g}V{bottom:g}H{_SPINE}")
        x += width + _GAP
    if step.residual:
        page.shapes.insert(slot, _piece(top, bottom + 14))
        page.dot(bottom, "+")
    else:
        page.shapes[slot:slot] = [_piece(top, top + 4), _piece(bottom, bottom + 14)]
    page.y = bottom + 14
    return x - _LEFT


def _on_stream(page: _Page, said: str) -> None:
    """What is done to the stream itself."""
    page.stream(page.y, page.y + _LINE + 8)
    page.text(_SPINE + 14, page.y + 14, said, "dim", size=11)
    page.y += _LINE + 8


def _size(branch: Branch) -> tuple[float, float]:
    """The width and height of a sublayer's box."""
    said = [_head(branch), branch.rest, *(line for card in branch.cards for line in _lines(card))]
    width = max(min(len(line), _LONGEST) for line in said) * _CHARACTER + 4 * _PAD
    cards = sum(len(_lines(card)) * _LINE + 2 * _PAD + 4 for card in branch.cards)
    return width, 28 + cards + (_LINE + 6 if branch.rest else 4)


def _branch(page: _Page, branch: Branch, x: float, y: float, width: float, height: float) -> None:
    page.box(x, y, width, height, "branch")
    page.text(x + _PAD, y + 19, _head(branch), "ink", bold=True)
    at = y + 28
    for card in branch.cards:
        lines = _lines(card)
        tall = len(lines) * _LINE + 2 * _PAD - 4
        page.box(x + _PAD, at, width - 2 * _PAD, tall, look(card))
        for number, line in enumerate(lines):
            where = at + _PAD + 11 + number * _LINE
            page.text(x + 2 * _PAD, where, line, "ink", bold=number == 0)
        at += tall + 8
    if branch.rest:
        page.text(x + _PAD, at + 14, branch.rest, "dim")


def _head(branch: Branch) -> str:
    return f"{branch.kind}  {branch.module}".strip()


def _lines(card: Card) -> list[str]:
    missing = [f"not found: {', '.join(card.missing)}"] if card.missing else []
    return [card.title, *(line for line in card.lines if line), *missing]


def _sheet(colours: dict[str, str]) -> str:
    fills = "".join(f".{k}{{fill:{v}}}" for k, v in colours.items() if k not in _STROKED)
    lines = f".stream{{stroke:{colours['stream']}}}.edge-line{{stroke:{colours['edge']}}}"
    return fills + lines


def _fill(look: str) -> str:
    return f'class="{look}" fill="{_LIGHT[look]}"'


def _safe(text: str) -> str:
    return escape(_clean(text))


def _clean(text: str) -> str:
    """Text without the characters that XML does not know."""
    return re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?", text)
