"""Compiling ahead of time: what a binary takes of its target, and that it depends on the source
alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from attnopt.codegen.aot import Resources
from attnopt.codegen.emit import emit
from attnopt.codegen.kernel import Load
from attnopt.codegen.target import target
from tests.codegen.compiling import compiling
from tests.codegen.doubling import Doubling

_TAKEN = """
from dataclasses import asdict
import torch
from attnopt.codegen.aot import compiled, launches, resources
from attnopt.codegen.kernel import Load
from attnopt.codegen.record import recording
from attnopt.codegen.target import target
from attnopt.compiler.errors import Problem
from tests.codegen.doubling import Doubling
from tests.codegen.product import product

def tile(rows, depth, dtype=torch.float16, **how):
    with recording() as noted:
        product(torch.empty(rows, depth, dtype=dtype, device="meta"),
                torch.empty(depth, rows, dtype=dtype, device="meta"), **how)
    return noted[0]

def taken(launch, name):
    return asdict(resources(compiled(launch, target(name)), target(name)))

def refused(name, launch):
    try:
        compiled(launch, target(name))
    except Problem as problem:
        return problem.as_json()

(small,) = launches(Doubling(), 2.0, Load(1, 1000, 1000))
told = {
    "small": {name: taken(small, name) for name in ("h100", "b200", "a100", "mi300x")},
    "grid": small.grid,
    "spilling": {
        name: taken(tile(rows, 16, warps=1), name)
        for name, rows in (("h100", 128), ("mi300x", 256))
    },
    "large": taken(tile(64, 1024), "mi300x"),
    "cpu": refused("cpu", small),
    "broken": refused("h100", tile(32, 16, broken=True)),
}
"""


@pytest.fixture(scope="module")
def told() -> Any:
    return compiling(_TAKEN)


@pytest.mark.slow
def test_what_fits_takes_registers_and_no_spills(told: Any) -> None:
    assert told["grid"] == [16]
    for name, found in told["small"].items():
        taken = Resources(**found)
        assert taken.kernel == "_double" and taken.warps == 1
        assert 4 <= taken.registers <= 64 and taken.stack == 0
        assert taken.misfit(target(name)) == ""
        assert not taken.serialized


@pytest.mark.slow
def test_what_spills_is_told(told: Any) -> None:
    for name, found in told["spilling"].items():
        taken = Resources(**found)
        assert taken.spills > 0 and taken.stack > 0, name
        assert taken.misfit(target(name)) == f"spills {taken.spills} bytes per thread"


@pytest.mark.slow
def test_shared_memory_that_an_amd_target_has_not_is_told(told: Any) -> None:
    taken = Resources(**told["large"])
    limit = target("mi300x").shared_per_block
    assert taken.shared > limit
    assert taken.misfit(target("mi300x")) == (
        f"exceeds shared memory: {taken.shared} of {limit} bytes"
    )


@pytest.mark.slow
def test_what_cannot_be_compiled_is_a_problem(told: Any) -> None:
    assert told["cpu"]["code"] == "A803"
    assert told["broken"]["code"] == "A805"
    assert "_product for NVIDIA H100" in told["broken"]["what"]
    assert "mismatch" in told["broken"]["why"] or "shape" in told["broken"]["why"]


@pytest.mark.slow
def test_the_interpreter_cannot_compile() -> None:
    code = """
from attnopt.codegen.aot import launches
from attnopt.codegen.kernel import Load
from attnopt.compiler.errors import Problem
from tests.codegen.doubling import Doubling
try:
    launches(Doubling(), 2.0, Load())
except Problem as problem:
    told = problem.as_json()
"""
    found = compiling(code, TRITON_INTERPRET="1")
    assert found["code"] == "A804" and "unset" in found["help"]


_HASHES = """
import hashlib, importlib, os
import torch
from attnopt.codegen.aot import compiled
from attnopt.codegen.record import recording
from attnopt.codegen.target import target
os.environ["TRITON_ALWAYS_COMPILE"] = "1"
told = {}
for folder in sys.argv[1:]:
    sys.path.insert(0, folder)
    sys.modules.pop("doubled", None)
    importlib.invalidate_caches()
    module = importlib.import_module("doubled")
    assert module.__file__.startswith(folder)
    with recording() as noted:
        module.run(torch.empty(1000, device="meta", dtype=torch.bfloat16))
    for name, kind in (("h100", "cubin"), ("mi300x", "hsaco")):
        binary = compiled(noted[0], target(name)).asm[kind]
        told.setdefault(name, []).append(hashlib.sha256(binary).hexdigest())
"""


@pytest.mark.slow
def test_the_same_source_gives_the_same_bytes_wherever_it_lies(tmp_path: Path) -> None:
    text = emit(Doubling(), 2.0, target("h100"), Load(1, 1000, 1000))
    folders = [tmp_path / "one", tmp_path / "another" / "place"]
    for at, folder in enumerate(folders):
        folder.mkdir(parents=True)
        (folder / "doubled.py").write_text(text.replace('"""', '"""' + "\n" * at, 1))
    found = compiling(_HASHES, *folders)
    for hashes in found.values():
        assert len(hashes) == 2 and len(set(hashes)) == 1
