"""The folders at the root install as attnopt.*: complete, and with nothing beside them."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import attnopt
from tests.tree import FOLDERS, ROOT, installed_files, project

_BUILD = "import sys; from setuptools import build_meta as b; print(getattr(b, sys.argv[1])('out'))"


def _build(kind: str, source: Path) -> Path:
    """Run one hook of the build backend in `source`; gives the archive that it made."""
    run = subprocess.run(
        [sys.executable, "-c", _BUILD, kind], cwd=source, capture_output=True, text=True
    )
    assert run.returncode == 0, f"{kind} failed:\n{run.stderr[-3000:]}"
    return source / "out" / run.stdout.split()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from an sdist built from a copy of the tree, as a release would be."""
    top = tmp_path_factory.mktemp("packaging")
    source = top / "source"
    source.mkdir()
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*_cache")
    for folder in ("attnopt", *FOLDERS):
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=skip)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    with tarfile.open(_build("build_sdist", source)) as sdist:
        sdist.extractall(top / "unpacked", filter="data")
    (unpacked,) = (top / "unpacked").iterdir()
    return zipfile.ZipFile(_build("build_wheel", unpacked))


def test_every_folder_with_code_is_a_listed_package() -> None:
    listed = set(project()["tool"]["setuptools"]["packages"])
    found = {str(Path(inside).parent).replace(os.sep, ".") for inside in installed_files()}
    assert not found - listed, (
        f"add {sorted(found - listed)} to [tool.setuptools] packages in pyproject.toml"
    )
    assert not listed - found, (
        f"pyproject.toml lists {sorted(listed - found)}, which have no files: remove them"
    )


def test_every_package_says_what_it_is() -> None:
    for package in project()["tool"]["setuptools"]["packages"]:
        place = ROOT / package.removeprefix("attnopt.").replace(".", "/")
        assert (place / "__init__.py").is_file(), f"{place.relative_to(ROOT)} has no __init__.py"


def test_the_links_serve_static_tools() -> None:
    for folder in FOLDERS:
        link = ROOT / "attnopt" / folder
        assert link.is_symlink(), f"attnopt/{folder} is not a link"
        assert os.readlink(link) == f"../{folder}"


def test_the_map_and_the_ban_name_the_five_folders() -> None:
    tool = project()["tool"]
    mapped = {v for k, v in tool["setuptools"]["package-dir"].items() if k != "attnopt"}
    banned = tool["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]
    assert mapped == set(banned) == set(FOLDERS)


def test_the_wheel_holds_the_tree_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
    wanted = set(installed_files())
    assert not wanted - inside, (
        f"not in the wheel: {sorted(wanted - inside)}; name a sub-package under packages, and the "
        "suffix of a data file under [tool.setuptools.package-data], in pyproject.toml"
    )
    assert not inside - wanted, f"in the wheel by mistake: {sorted(inside - wanted)}"


def test_the_wheel_imports_without_the_repository(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    asked = (
        "import sys; sys.path.insert(0, sys.argv[1]);"
        "import attnopt.codegen.targets, attnopt.passes as p; print(p.__file__)"
    )
    run = subprocess.run(
        [sys.executable, "-S", "-P", "-c", asked, str(tmp_path)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert Path(run.stdout.strip()) == tmp_path / "attnopt" / "passes" / "__init__.py"


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_folder_is_importable_without_the_prefix(folder: str) -> None:
    assert importlib.util.find_spec(folder) is None, (
        f"'{folder}' is importable at the top level: something put the repository on sys.path"
    )


def test_the_version_is_told_once() -> None:
    assert importlib.metadata.version("attnopt") == attnopt.__version__


def test_the_console_scripts_exist() -> None:
    for target in project()["project"]["scripts"].values():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize("name", attnopt.__all__)
def test_every_public_name_loads(name: str) -> None:
    assert getattr(attnopt, name) is not None
    assert name in dir(attnopt)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        attnopt.nothing  # noqa: B018
