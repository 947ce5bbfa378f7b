"""The packages that reading and writing ONNX needs, which come with an extra."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from attnopt.compiler.errors import Problem


def package(path: Path, *names: str) -> Any:
    """Import all of the names and return the first. Raises `Problem` A124 for one that is
    missing."""
    try:
        first, *_ = [importlib.import_module(name) for name in names]
    except ImportError as error:
        raise Problem(
            "A124", f"ONNX needs the package {error.name or names[0]}", where=str(path),
            why=str(error), help="pip install 'attnopt[onnx]'",
        ) from error  # fmt: skip
    return first
