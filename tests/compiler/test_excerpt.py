"""Excerpts: what is pointed at, and what is not read out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import fx

from attnopt.compiler.excerpt import excerpt
from attnopt.compiler.stack import frames, own

aten = torch.ops.aten


def _node(trace: str, target: object = aten.add.Tensor) -> fx.Node:
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(target, (x, x))  # type: ignore[arg-type]
    node.meta["stack_trace"] = trace
    return node


def _call(path: Path, line: int, text: str, function: str = "forward") -> str:
    return f'  File "{path}", line {line}, in {function}\n    {text}\n'


def _pointed(path: Path, line: str, target: object) -> str:
    path.write_text(f"def f(a, b, c):\n{line}\n", encoding="utf-8")
    shown = excerpt(_node(_call(path, 2, line.strip()), target))
    assert shown is not None
    text = dict(shown.numbered)[2]
    return text[shown.start : shown.end]


@pytest.mark.parametrize(
    ("line", "target", "meant"),
    [
        ("    y = g(a) + b.exp()", aten.exp.default, "b.exp()"),
        ("    y = g(a) + b.exp()", aten.add.Tensor, "g(a) + b.exp()"),
        ("    y = a * b * c", aten.mul.Tensor, "a * b * c"),
        ("    y = a.softmax(-1) @ b", aten._softmax.default, "a.softmax(-1)"),
        ("    y = a >= b", aten.ge.Tensor, "a >= b"),
        ("    y = f(a.exp(), b.exp())", aten.exp.default, "y = f(a.exp(), b.exp())"),
        ("    y = a.sin()  # ä", aten.cos.default, "y = a.sin()  # ä"),
        ('    y = g("ää", a.exp())', aten.exp.default, "a.exp()"),
    ],
)
def test_the_expression_is_found_by_its_operator(
    tmp_path: Path, line: str, target: object, meant: str
) -> None:
    assert _pointed(tmp_path / "code.py", line, target) == meant


def test_a_file_that_changed_since_shows_the_line_that_ran(tmp_path: Path) -> None:
    path = tmp_path / "code.py"
    path.write_text("secret\nanother secret\n")
    shown = excerpt(_node(_call(path, 2, "y = a + b")))
    assert shown is not None and shown.lines == ("y = a + b",) and shown.first == 2


def test_a_trace_without_text_reads_nothing_out(tmp_path: Path) -> None:
    path = tmp_path / "code.py"
    path.write_text("secret\n")
    shown = excerpt(_node(f'  File "{path}", line 1, in forward\n'))
    assert shown is not None and shown.lines == ("",)


def test_control_characters_move_no_cursor(tmp_path: Path) -> None:
    shown = excerpt(_node(_call(tmp_path / "gone.py", 3, "y = \x1b[2J a")))
    assert shown is not None and shown.lines == ("y = ?[2J a",)


def test_torch_is_left_for_the_callers_line(tmp_path: Path) -> None:
    inside = Path(torch.__file__).parent / "nn" / "modules" / "activation.py"
    trace = _call(tmp_path / "mine.py", 7, "self.attention(x)") + _call(inside, 9, "return y")
    node = _node(trace)
    assert [frame.line for frame in frames(node)] == [7, 9]
    frame = own(node)
    assert frame is not None and frame.line == 7 and not frame.in_torch
    alone = own(_node(_call(inside, 9, "return y")))
    assert alone is not None and alone.line == 9


def test_a_node_without_trace_has_no_excerpt() -> None:
    assert excerpt(_node("")) is None
