"""emit: the text of a module, against golden files; and that it means what the kernel means."""

from __future__ import annotations

import ast
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import attnopt
from attnopt.codegen.emit import TRITON, emit, literal
from attnopt.codegen.kernel import Kernel, Load, kernels
from attnopt.codegen.link import CannotLink
from attnopt.codegen.target import target
from tests.codegen.conftest import Golden
from tests.codegen.doubling import Doubling, halved
from tests.tree import ROOT, project

H100 = target("h100")


def _emitted(kernel: type[Kernel[Any]]) -> str:
    spec, load = kernel.examples()[0]
    return emit(kernel.default(spec, H100, load), spec, H100, load)


def _plain(text: str) -> str:
    """Without what changes with each release."""
    return text.replace(f"attnopt {attnopt.__version__}", "attnopt VERSION")


def _outline(text: str) -> str:
    """The text with every definition before the last as its first line: what was linked, in which
    order, without the code, which the kernel's own file shows."""
    tree, lines = ast.parse(text), text.splitlines()
    found = [*lines[: tree.body[0].end_lineno], ""]
    found += [lines[node.lineno - 1] for node in tree.body[1:-1]]
    return "\n".join([*found, "", *lines[tree.body[-1].lineno - 1 :]]) + "\n"


def test_a_module_as_text(golden: Golden) -> None:
    golden("double.py.txt", _plain(_emitted(Doubling)))


def test_a_module_with_a_hook(golden: Golden) -> None:
    text = emit(Doubling(block=32), 2.5, H100, Load(1, 8, 8), {"hook": halved})
    golden("double_hooked.py.txt", _plain(text))


@pytest.mark.parametrize("name", sorted(kernels()))
def test_the_outline_of_every_kernel(name: str, golden: Golden) -> None:
    golden(f"{name}.outline.txt", _plain(_outline(_emitted(kernels()[name]))))


def test_the_same_input_gives_the_same_bytes_in_another_process() -> None:
    code = (
        "from tests.codegen.test_emit import _emitted, kernels; import hashlib;"
        "print(*[hashlib.sha256(_emitted(k).encode()).hexdigest() for k in kernels().values()])"
    )
    said = [
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=ROOT,
            check=True, env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT), "PATH": ""},
        ).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert said[0] == said[1] != ""


def test_lines_are_short_and_attnopt_is_not_imported() -> None:
    for kernel in kernels().values():
        tree = ast.parse(_emitted(kernel))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").partition(".")[0] != "attnopt"
        assert isinstance(tree.body[-1], ast.FunctionDef)


def test_the_triton_versions_are_those_of_the_package() -> None:
    extras = project()["project"]["optional-dependencies"]["gpu"]
    assert f"triton>={TRITON[0]};" in extras[0]
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert f"triton=={TRITON[1]}." in pinned


def test_constants_are_written_as_python() -> None:
    for value in (1, True, None, 0.1, "a\"b'c", (1, (2.5, "x")), (3,), (), -0.0):
        assert eval(literal(value)) == value and type(eval(literal(value))) is type(value)
    assert eval(literal(float("inf"))) == math.inf and math.isnan(eval(literal(math.nan)))
    assert literal(torch.bfloat16) == "torch.bfloat16" and literal(halved) == "halved"
    with pytest.raises(TypeError, match="cannot be written"):
        literal(object())


def test_a_public_name_that_is_taken_is_refused() -> None:
    class Taken(Doubling):
        launcher = staticmethod(run)

    with pytest.raises(CannotLink, match="`run`, the public function"):
        emit(Taken(), 2.0, H100, Load())


def run(x: Any, factor: float, block: int, warps: int) -> Any:
    """A launcher with the name of what launches it."""


def test_golden_files_have_a_test() -> None:
    names = {"double.py.txt", "double_hooked.py.txt", "kernels.md"}
    names |= {f"{name}.outline.txt" for name in kernels()}
    assert {p.name for p in (Path(__file__).parent / "golden").iterdir()} == names
