"""The recipe at the top of CONTRIBUTING.md works as it is written."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import attnopt.passes
from attnopt.compiler.contract import passes
from tests.tree import ROOT

_BLOCK = re.compile(r"<!-- file: (?P<path>\S+) -->\n```python\n(?P<code>.*?)```", re.DOTALL)


def _blocks() -> dict[str, str]:
    said = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return {found["path"]: found["code"] for found in _BLOCK.finditer(said)}


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Step 1 done: the pass lies in a folder where discovery looks; gives the code of its test."""
    (pass_path, code), (_, test_code) = _blocks().items()
    name = Path(pass_path).stem
    (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
    monkeypatch.setattr(attnopt.passes, "__path__", [*attnopt.passes.__path__, str(tmp_path)])
    passes.cache_clear()
    yield test_code
    passes.cache_clear()
    sys.modules.pop(f"attnopt.passes.{name}", None)
    vars(attnopt.passes).pop(name, None)


def test_the_recipe_opens_the_file_and_has_its_two_files() -> None:
    said = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert said.startswith("# Contributing\n\n## Add a pass in one file\n")
    first, second = map(Path, _blocks())
    assert first.parent == Path("passes")
    assert second == Path("tests/passes") / f"test_{first.name}"
    assert not (ROOT / first).exists(), "the recipe's pass must be one that the project lacks"


def test_every_test_of_the_recipe_passes(written: str) -> None:
    scope: dict[str, object] = {"__name__": "recipe"}
    exec(compile(written, "CONTRIBUTING.md", "exec"), scope)
    tests = {name: item for name, item in scope.items() if name.startswith("test_")}
    assert len(tests) >= 4
    for test in tests.values():
        assert callable(test)
        test()
