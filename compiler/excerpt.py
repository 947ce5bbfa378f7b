"""An excerpt of the user's source around the line that made a node, with the expression to point
at.

A trace says which line ran, and no column: the expression is looked for by its operator, and the
whole statement is pointed at where that leaves a choice. Lines are shown only where the file still
holds the text that ran; what a model file from elsewhere names is not read out.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import fx

from attnopt.compiler.stack import Frame, own

CONTEXT = 2  # lines shown before and after
_LARGEST = 2**22  # bytes of a source file that is read
_SIGNS: dict[str, tuple[type[ast.AST], ...]] = {
    "matmul": (ast.MatMult,), "bmm": (ast.MatMult,), "add": (ast.Add,), "sub": (ast.Sub,),
    "rsub": (ast.Sub,), "mul": (ast.Mult,), "div": (ast.Div,), "floor_divide": (ast.FloorDiv,),
    "pow": (ast.Pow,), "remainder": (ast.Mod,), "bitwise_and": (ast.BitAnd,),
    "__and__": (ast.BitAnd,), "bitwise_or": (ast.BitOr,), "__or__": (ast.BitOr,),
    "bitwise_not": (ast.Invert,), "logical_not": (ast.Invert,), "neg": (ast.USub,),
    "lt": (ast.Lt, ast.Gt), "gt": (ast.Gt, ast.Lt), "le": (ast.LtE, ast.GtE),
    "ge": (ast.GtE, ast.LtE), "eq": (ast.Eq,), "ne": (ast.NotEq,),
    "slice": (ast.Slice, ast.Subscript), "select": (ast.Subscript,), "index": (ast.Subscript,),
}  # fmt: skip


@dataclass(frozen=True)
class Excerpt:
    """Lines of `file` from number `first` on; the characters `start` to `end` of `line` are meant.

    `function` is what was running. Only the one line is held where the file is not there, or not
    the same any more.
    """

    file: str
    line: int
    function: str
    first: int
    lines: tuple[str, ...]
    start: int
    end: int

    @property
    def where(self) -> str:
        """The place as `file.py:12, in forward`."""
        inside = f", in {self.function}" if self.function else ""
        return f"{self.file}:{self.line}{inside}"

    @property
    def numbered(self) -> tuple[tuple[int, str], ...]:
        """The lines with their numbers."""
        return tuple(enumerate(self.lines, self.first))

    def as_json(self) -> dict[str, Any]:
        """The excerpt as a JSON object."""
        return {
            "file": self.file, "line": self.line, "function": self.function,
            "start": self.start, "end": self.end,
            "lines": [{"number": number, "text": text} for number, text in self.numbered],
        }  # fmt: skip


def excerpt(node: fx.Node) -> Excerpt | None:
    """The source around the line of the user's own code that made a node; None where the trace does
    not say."""
    frame = own(node)
    return None if frame is None else _shown(frame, operator(node))


def place(node: fx.Node) -> str:
    """That line in short, as `file.py:12`; empty where the trace does not say."""
    frame = own(node)
    return "" if frame is None else f"{Path(frame.file).name}:{frame.line}"


def operator(node: fx.Node) -> str:
    """The operator of a node as a user would call it: `softmax` for `aten._softmax.default`."""
    packet = getattr(node.target, "overloadpacket", node.target)
    return str(getattr(packet, "__name__", packet))


def _shown(frame: Frame, operator: str) -> Excerpt:
    source = _source(frame)
    shown = _relative(frame.file)
    if source is None:
        text = _printable(frame.text)
        return Excerpt(shown, frame.line, frame.function, frame.line, (text,), 0, len(text))
    lines = source.splitlines()
    start, end = _span(source, frame.line, operator)
    first = max(1, frame.line - CONTEXT)
    kept = tuple(_printable(line) for line in lines[first - 1 : frame.line + CONTEXT])
    return Excerpt(shown, frame.line, frame.function, first, kept, start, end)


def _source(frame: Frame) -> str | None:
    """The file's text, where its line is the one that ran."""
    path = Path(frame.file)
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST:
            return None
        source = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    lines = source.splitlines()
    if not frame.text or not 1 <= frame.line <= len(lines):
        return None
    return source if lines[frame.line - 1].strip() == frame.text else None


def _span(source: str, line: int, operator: str) -> tuple[int, int]:
    """The characters of a line from the start to the end of what made a node."""
    text = source.splitlines()[line - 1]
    whole = len(text) - len(text.lstrip()), len(text.rstrip())
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return whole
    found = [node for node in _starting(tree, line) if _makes(node, operator)]
    # One that holds the others, as `a * b * c` holds `a * b`; two apart leave a choice.
    outer = [one for one in found if all(_holds(one, other) for other in found)]
    if not outer:
        return whole
    start = _characters(text, outer[0].col_offset)
    last = outer[0].end_lineno == line
    return start, _characters(text, outer[0].end_col_offset or 0) if last else whole[1]


def _starting(tree: ast.AST, line: int) -> Iterator[ast.expr | ast.AugAssign]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.expr, ast.AugAssign)) and node.lineno == line:
            yield node


def _holds(one: ast.expr | ast.AugAssign, other: ast.expr | ast.AugAssign) -> bool:
    ends = [(node.end_lineno or 0, node.end_col_offset or 0) for node in (one, other)]
    return one.col_offset <= other.col_offset and ends[0] >= ends[1]


def _makes(node: ast.expr | ast.AugAssign, operator: str) -> bool:
    """Whether an expression is a call or a sign that is spelled like the operator."""
    name = operator.strip("_") or operator
    signs = _SIGNS.get(operator, _SIGNS.get(name, ()))
    if isinstance(node, (ast.BinOp, ast.AugAssign, ast.UnaryOp)):
        return isinstance(node.op, signs)
    if isinstance(node, ast.Compare):
        return any(isinstance(sign, signs) for sign in node.ops)
    if isinstance(node, ast.Subscript):
        return ast.Subscript in signs
    if not isinstance(node, ast.Call):
        return False
    called = node.func
    said = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
    return bool(said.strip("_") == name)


def _characters(text: str, column: int) -> int:
    """A column in bytes, as `ast` counts, in characters."""
    return len(text.encode()[:column].decode(errors="ignore"))


def _printable(text: str) -> str:
    """A line that moves no cursor: tabs stay, other control characters are shown as `?`."""
    return re.sub(r"[^\t\x20-\x7e\u00a0-\U0010ffff]", "?", text)


def _relative(file: str) -> str:
    """A path from the current directory where it lies there."""
    here = Path.cwd()
    path = Path(file)
    return str(path.relative_to(here)) if path.is_relative_to(here) else _printable(file)
