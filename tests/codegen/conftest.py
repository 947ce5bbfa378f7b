"""Golden files: what the tests of code generation expect as text, rewritten by --update-golden."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

_FOLDER = Path(__file__).parent / "golden"

Golden = Callable[[str, str], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write tests/codegen/golden anew")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """Hold a text against a golden file by its name, or write the file where that was asked for."""

    def same(name: str, text: str) -> None:
        path = _FOLDER / name
        if request.config.getoption("--update-golden"):
            path.write_text(text, encoding="utf-8")
        assert path.is_file(), f"there is no {path}: run pytest {__file__} --update-golden"
        kept = path.read_text(encoding="utf-8")
        assert text == kept, f"{path} differs; where that is meant, run with --update-golden"

    return same
