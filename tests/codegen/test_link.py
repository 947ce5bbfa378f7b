"""link: what a function reaches is written out, in order, once; what cannot be is refused."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from attnopt.codegen.kernel import kernels
from attnopt.codegen.link import CannotLink, Linked, link

Write = Callable[..., ModuleType]

_PIECES = '''"""Pieces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor

# Two to the tenth.
LIMIT: tl.constexpr = tl.constexpr(1024)
UNUSED = 3
HALF = 512  # of LIMIT


# Sizes of a tile.
@dataclass(frozen=True)
class Tile:
    rows: int = HALF

    def least(self) -> int:
        return min(self.rows, len("four"))


def even(n: int) -> bool:
    return n == 0 or odd(n - 1)


def odd(n: int) -> bool:
    return n != 0 and even(n - 1)


def shape(x: Tensor) -> Tile:
    tl = 4  # not the module
    return Tile(tl)
'''

_KERNEL = '''"""A kernel."""

import math

import torch
from {pieces} import HALF, LIMIT, even, shape

CAUSAL = "a parameter has this name too"


def helper(CAUSAL, x=LIMIT):
    HALVED = [HALF for HALF in range(3)]
    return HALVED if CAUSAL else x


def launcher(x):
    def inner(y):
        return helper(y)

    return inner(even(shape(x))) + torch.ones(math.floor(2.5))


def quiet():
    return helper(1)
'''


@pytest.fixture
def unique(request: pytest.FixtureRequest) -> str:
    """The end of a module's name that no other test has."""
    return f"_{hashlib.sha256(request.node.name.encode()).hexdigest()[:12]}"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write modules into a folder that can be imported from, and import the last of them."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(**texts: str) -> ModuleType:
        for name, text in texts.items():
            (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
        importlib.invalidate_caches()
        return importlib.import_module(list(texts)[-1])

    return make


@pytest.fixture
def pair(write: Write, unique: str) -> ModuleType:
    """A kernel's module that imports names of another."""
    kernel = _KERNEL.replace("{pieces}", f"pieces{unique}")
    return write(**{f"pieces{unique}": _PIECES, f"kernel{unique}": kernel})


def _run(found: Linked, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The linked text as a module."""
    file = folder / "linked_alone.py"
    file.write_text(f"{found.imports}\n\n{found.definitions}\n", encoding="utf-8")
    spec = importlib.util.spec_from_file_location("linked_alone", file)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "linked_alone", made)  # where dataclasses look names up
    spec.loader.exec_module(made)
    return made


def test_what_is_reached_is_defined_in_order(
    pair: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = link([pair.launcher])
    names = re.findall(r"^(?:def |class )?(\w+)", found.definitions, re.MULTILINE)
    assert names.index("HALF") < names.index("Tile") < names.index("shape")
    assert names[-1] == "launcher"
    assert sorted(names) == ["HALF", "LIMIT", "Tile", "even", "helper", "launcher", "odd", "shape"]
    assert "UNUSED" not in found.names and "CAUSAL" not in found.names
    made = _run(found, tmp_path, monkeypatch)
    assert made.even(4) and made.Tile().least() == 4 and made.helper(0).value == 1024


def test_source_is_copied_with_its_comments_and_decorators(pair: ModuleType) -> None:
    found = link([pair.launcher])
    assert "# Two to the tenth.\nLIMIT: tl.constexpr = tl.constexpr(1024)" in found.definitions
    assert "# Sizes of a tile.\n@dataclass(frozen=True)\nclass Tile:" in found.definitions
    assert "HALF = 512  # of LIMIT" in found.definitions
    assert found.imports == (
        "from __future__ import annotations\n\nimport math\nfrom dataclasses import dataclass\n\n"
        "import torch\nimport triton.language as tl\nfrom torch import Tensor"
    )


def test_only_what_is_used_is_imported(pair: ModuleType) -> None:
    found = link([pair.quiet])
    assert found.imports == ("from __future__ import annotations\n\nimport triton.language as tl")
    assert found.definitions.count("def ") == 2


def test_several_roots_share_what_they_reach(pair: ModuleType) -> None:
    found = link([pair.launcher, pair.quiet, pair.launcher])
    assert found.definitions.count("def helper(") == 1
    assert found == link([pair.launcher, pair.quiet])


_ONE = "LIMIT = 1\n\n\ndef f():\n    return LIMIT\n"


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ("`LIMIT` has two meanings: that of one.* and that of two",
         "from {one} import f\nfrom {two} import g\ndef root():\n    return f() + g()\n"),
        ("`tl` has two meanings: triton.language of .* and language of",
         "from {one} import f\nimport triton.language as tl\nfrom {two} import h\n"
         "def root():\n    return f() + h() + tl.x\n"),
        ("`np`, a module that is not", "import numpy as np\ndef root():\n    return np.ones(3)\n"),
        ("`{one}`, a module that", "import {one}\ndef root():\n    return {one}.f()\n"),
        ("reads `f` by another name, `h`",
         "from {one} import f as h\ndef root():\n    return h()\n"),
        ("`nowhere`, which .* neither defines", "def root():\n    return nowhere\n"),
        ("`X` is bound more than once", "X = 1\nX = 2\ndef root():\n    return X\n"),
        ("`f` is bound more than once",
         "from {one} import f\nimport torch as f\ndef root():\n    return f\n"),
    ],
)  # fmt: skip
def test_what_cannot_stand_alone_is_refused(
    write: Write, unique: str, said: str, text: str
) -> None:
    names = {"one": f"one{unique}", "two": f"two{unique}"}
    two = _ONE.replace("def f", "def g")
    two += "\n\nfrom triton import language as tl\n\n\ndef h():\n    return tl.y\n"
    text = text.replace("{one}", names["one"]).replace("{two}", names["two"])
    made = write(**{names["one"]: _ONE, names["two"]: two, f"root{unique}": text})
    with pytest.raises(CannotLink, match=said.replace("{one}", names["one"])):
        link([made.root])


def test_a_function_in_a_function_is_refused() -> None:
    def inner() -> None: ...

    with pytest.raises(CannotLink, match="not at the top of its file"):
        link([inner])


def test_a_kernel_stands_alone() -> None:
    """Every kernel that is found links to torch, triton and the standard library."""
    for kernel in kernels().values():
        found = link([kernel.launcher])
        assert "attnopt" not in found.imports
        assert f"def {kernel.launcher.__name__}(" in found.definitions
        ast.parse(found.definitions)
