"""What is built beside a module: facts of launches that hold for the binary, and C that compiles
against the drivers' headers and gives a kernel the arguments it was compiled for."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import triton

from attnopt.codegen.c_header import FILE as HEADER
from attnopt.codegen.c_loader import FILE as LOADER
from attnopt.codegen.launch_facts import grid_formulas
from tests.codegen.compiling import compiling

TARGETS = ("h100", "mi300x")
_BACKENDS = Path(triton.__file__).parent / "backends"
_INCLUDES = {
    "h100": [f"-I{_BACKENDS}/nvidia/include"],
    "mi300x": [f"-I{_BACKENDS}/amd/include", "-D__HIP_PLATFORM_AMD__"],
}
_GCC = shutil.which("gcc")
needs_gcc = pytest.mark.skipif(_GCC is None, reason="there is no C compiler")

_CODE = f"""
from dataclasses import replace
from pathlib import Path
from attnopt.codegen import c_header, c_loader
from attnopt.codegen import pick as picking
from attnopt.codegen.kernel import Load, kernels
from attnopt.codegen.pick import Picked, pick
from attnopt.codegen.build import build
from attnopt.codegen.target import target
from attnopt.compiler.errors import Problem
from attnopt.compiler.spec import CAUSAL, AttentionSpec
from tests.codegen.doubling import Doubling, shifted

class Shifting(Doubling):
    launcher = staticmethod(shifted)

def _asks(on):
    picked = Picked(Shifting(), 2.0, on, Load(1, 8, 8), 0.0)
    return build("shifted_0", picked).facts()["torch_operators"]

found = {{"double": Doubling, **kernels()}}
picking.kernels = lambda: found
padded = AttentionSpec(4, 2, 32, 32, 0.25, CAUSAL, extras=("padding",))
told = {{}}
for name in {TARGETS!r}:
    folder, on = Path(sys.argv[1]) / name, target(name)
    folder.mkdir()
    made = [
        build("attention_0", pick(padded, on, Load(2, 200, 200, "float16")), True),
        build("double_0", pick(2.0, on, Load(1, 999, 999)), True),
    ]
    for one in made:
        for file, data in one.files().items():
            (folder / file).write_bytes(data)
    modules = [c_header.Module(m.name, m.said, m.launches, m.buffers) for m in made]
    (folder / c_header.FILE).write_text(c_header.header(modules, on.vendor))
    (folder / c_loader.FILE).write_text(c_loader.loader(modules[0], on.vendor))
    told[name] = [one.facts() for one in made]
    told[name].append(_asks(on))
    try:
        none = replace(on, shared_per_block=64)
        build("over_0", pick(padded, none, Load(2, 200, 200, "float16")), True)
    except Problem as problem:
        told[name].append(problem.as_json())
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder per target, and the facts of its modules."""
    folder = tmp_path_factory.mktemp("built")
    return folder, compiling(_CODE, folder)


@pytest.mark.slow
def test_facts_of_a_small_launch(built: tuple[Path, Any]) -> None:
    for name in TARGETS:
        facts = built[1][name][1]
        (launch,) = facts["launches"]
        assert launch["symbol"] == "_double" and launch["grid"] == [16]
        assert launch["grid_formula"] == "(triton.cdiv(x.shape[0], block),)"
        named = {one["name"]: one for one in launch["arguments"]}
        assert list(named) == ["x", "out", "size", "factor"]
        assert named["x"] == {
            "name": "x", "type": "*bf16", "buffer": "x", "offset": 0, "value": None,
            "aligned": True,
        }  # fmt: skip
        assert named["size"]["value"] == 999 and not named["size"]["aligned"]
        assert named["factor"]["type"] == "fp32" and named["factor"]["value"] == 2.0
        # A stride of 1, what is not given, and the tile are constants now.
        assert launch["compiled_in"] == {"stride": 1, "data": None, "HOOK": None, "BLOCK": 64}
        assert facts["torch_operators"] == []
        roles = {one["name"]: (one["role"], one["shape"]) for one in facts["buffers"]}
        assert roles == {"x": ("input", [999]), "out": ("output", [999])}
        assert launch["null_pointers"] == ["global_scratch", "profile_scratch"]
        assert launch["threads"] == (64 if name == "mi300x" else 32)


@pytest.mark.slow
def test_facts_of_an_attention(built: tuple[Path, Any]) -> None:
    for name in TARGETS:
        facts = built[1][name][0]
        (launch,) = facts["launches"]
        named = {one["name"]: one for one in launch["arguments"]}
        assert named["padding_0"]["buffer"] == "padding" and named["padding_0"]["type"] == "*i1"
        assert named["padding_1"]["value"] == 200
        assert launch["compiled_in"]["padding_2"] == 1
        assert named["q_batch"]["value"] == 4 * 200 * 32 and named["q_batch"]["aligned"]
        assert facts["function"] == "attention" and facts["kernel"] == "flash_prefill"
        assert facts["sizes"] == {"batch": 2, "queries": 200, "keys": 200, "dtype": "float16"}
        buffers = {one["name"]: one for one in facts["buffers"]}
        assert buffers["out"]["role"] == "output" and buffers["out"]["bytes"] == 2 * 4 * 200 * 64
        binary = (built[0] / name / launch["file"]).read_bytes()
        assert binary[:4] == b"\x7fELF"
        assert json.loads((built[0] / name / "attention_0.json").read_text()) == facts


@pytest.mark.slow
def test_what_is_asked_of_torch_besides_is_told(built: tuple[Path, Any]) -> None:
    for name in TARGETS:
        assert built[1][name][2] == ["aten.zeros.default", "aten.add.Tensor"]


@pytest.mark.slow
@needs_gcc
@pytest.mark.parametrize("name", TARGETS)
def test_the_c_files_compile_without_a_warning(name: str, built: tuple[Path, Any]) -> None:
    folder = built[0] / name
    run = subprocess.run(
        ["gcc", "-std=c11", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", *_INCLUDES[name],
         LOADER],
        cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    text = (folder / HEADER).read_text()
    assert "double_0_0_launch(" in text and "attention_0_0_fits(" in text


@pytest.mark.slow
def test_a_kernel_that_needs_more_shared_memory_than_there_is_is_refused(
    built: tuple[Path, Any],
) -> None:
    for name in TARGETS:
        problem = built[1][name][3]
        assert problem["code"] == "A831" and "does not fit" in problem["what"]
        assert problem["why"].startswith("exceeds shared memory: ")


_DRIVER = """
/* A driver that launches nothing: it prints what it is asked for. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cuda.h>
static unsigned long long next = 4096;
CUresult cuInit(unsigned f) { (void)f; return 0; }
CUresult cuDeviceGet(CUdevice *d, int at) { *d = at; return 0; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) { *c = 0; (void)d; return 0; }
CUresult cuCtxSetCurrent(CUcontext c) { (void)c; return 0; }
CUresult cuCtxSynchronize(void) { return 0; }
CUresult cuGetErrorString(CUresult e, const char **s) { (void)e; *s = "failed"; return 0; }
CUresult cuMemAlloc(CUdeviceptr *p, size_t n) {
  *p = next; next += (n + 255) / 256 * 256; printf("alloc %llu %zu\\n", *p, n); return 0; }
CUresult cuMemsetD8(CUdeviceptr p, unsigned char c, size_t n) {
  (void)p; (void)c; (void)n; return 0; }
CUresult cuModuleLoad(CUmodule *m, const char *file) {
  FILE *f = fopen(file, "rb"); *m = 0; if (!f) return 301; fclose(f);
  printf("load %s\\n", file); return 0; }
CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *symbol) {
  *f = 0; (void)m; printf("symbol %s\\n", symbol); return 0; }
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int value) {
  (void)f; (void)a; printf("attribute %d\\n", value); return 0; }
CUresult cuLaunchKernel(CUfunction f, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by,
                        unsigned bz, unsigned shared, CUstream s, void **given, void **extra) {
  (void)f; (void)s; (void)extra;
  printf("launch %u %u %u %u %u %u %u\\n", x, y, z, bx, by, bz, shared);
  const char *types = getenv("TYPES");
  for (int i = 0; types[i]; i++) {
    if (types[i] == 'p') printf("p %llu\\n", *(unsigned long long *)given[i]);
    if (types[i] == 'i') printf("i %d\\n", *(int *)given[i]);
    if (types[i] == 'f') printf("f %g\\n", *(float *)given[i]);
  }
  return 0;
}
"""


@pytest.mark.slow
@needs_gcc
def test_the_loader_gives_the_kernel_what_it_was_compiled_for(
    built: tuple[Path, Any], tmp_path: Path
) -> None:
    folder = built[0] / "h100"
    (launch,) = built[1]["h100"][0]["launches"]
    (tmp_path / "driver.c").write_text(_DRIVER)
    made = tmp_path / "loader"
    run = subprocess.run(
        ["gcc", "-std=gnu11", *_INCLUDES["h100"], f"-I{folder}", str(folder / LOADER),
         str(tmp_path / "driver.c"), "-o", str(made)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    letters = {"i32": "i", "fp32": "f"}
    types = "".join(letters.get(one["type"], "p") for one in launch["arguments"])
    types += "p" * len(launch["null_pointers"])
    run = subprocess.run(
        [str(made)], cwd=folder, capture_output=True, text=True, env={"TYPES": types}
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert f"load {launch['file']}" in lines and "symbol _flash_prefill" in lines
    x, y, z = [*launch["grid"], 1, 1][:3]
    at = lines.index(f"launch {x} {y} {z} {launch['threads']} 1 1 {launch['shared']}")
    given = lines[at + 1 : -1]
    places = [line.split()[1] for line in lines if line.startswith("alloc")]
    assert len(given) == len(types) and lines[-1] == "done"
    for one, line in zip(launch["arguments"], given, strict=False):
        kind, value = line.split()
        if one["buffer"]:
            assert kind == "p" and value in places
        else:
            assert float(value) == pytest.approx(float(one["value"]))
    assert given[len(launch["arguments"]) :] == ["p 0"] * len(launch["null_pointers"])
    # A folder without the binary is told.
    run = subprocess.run(
        [str(made)], cwd=tmp_path, capture_output=True, text=True, env={"TYPES": ""}
    )
    assert run.returncode == 1 and launch["file"] in run.stderr


def test_grids_are_found_in_the_source() -> None:
    text = """
def launcher(x):
    grid = (cdiv(x.shape[0], 4), 2)
    first[grid](x, num_warps=4)
    second[(x.shape[1],)](x)
    third[lambda meta: (meta["B"],)](x)
"""
    assert grid_formulas(text) == {
        "first": "(cdiv(x.shape[0], 4), 2)", "second": "(x.shape[1],)",
        "third": "lambda meta: (meta['B'],)",
    }  # fmt: skip
