"""The project's own tree, read as files: what the packaging and layering tests look at."""

from __future__ import annotations

import sys
import tomllib
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("autotune", "cli", "codegen", "compiler", "passes")

_LEFT_OUT = ("__pycache__", ".mypy_cache", ".ruff_cache")


def project() -> dict[str, Any]:
    """The parsed `pyproject.toml`."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def installed_files(root: Path = ROOT) -> dict[str, Path]:
    """Every file that must be in a wheel, by its path there (`attnopt/compiler/spec.py`)."""
    files = {f"attnopt/{p.name}": p for p in (root / "attnopt").iterdir() if p.is_file()}
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*")):
            if path.is_file() and not set(path.parts) & set(_LEFT_OUT):
                files[f"attnopt/{path.relative_to(root).as_posix()}"] = path
    return files


def benchmarks() -> None:
    """Make the package `benchmarks` importable, without the root on `sys.path`."""
    place = ROOT / "benchmarks"
    found = spec_from_file_location(
        "benchmarks", place / "__init__.py", submodule_search_locations=[str(place)]
    )
    assert found is not None and found.loader is not None
    sys.modules.setdefault("benchmarks", module_from_spec(found))


def modules() -> dict[str, Path]:
    """Every module under the five folders, by its dotted name below `attnopt`."""
    named = {}
    for inside, path in installed_files().items():
        if path.suffix == ".py" and path.parent != ROOT / "attnopt":
            dotted = inside.removeprefix("attnopt/").removesuffix(".py").replace("/", ".")
            named[dotted.removesuffix(".__init__")] = path
    return named
