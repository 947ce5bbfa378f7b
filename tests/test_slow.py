"""`tests/slow.txt` names tests that are there."""

from __future__ import annotations

import ast
from functools import cache

from tests.tree import ROOT


def test_every_slow_test_exists() -> None:
    for line in (ROOT / "tests/slow.txt").read_text(encoding="utf-8").split():
        file, *_, name = line.split("::")
        assert name in _functions(file), line


@cache
def _functions(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
