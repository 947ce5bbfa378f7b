"""Compiling the C++ operators with the compiler that torch.compile uses, once per machine."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

SOURCES = (
    "few_rows.cpp", "many_rows.cpp", "memory.cpp", "one_token.cpp", "operators.cpp", "prompt.cpp",
)  # fmt: skip
HEADERS = ("gates.h", "operators.h", "panels.h", "prompt_units.h", "units.h", "vectors.h")
_loaded, _building = False, Lock()
_VECTORS = {  # flags by what torch says of the processor
    "AVX512": ("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mavx2", "-mfma", "-mf16c"),
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
}


def loaded() -> bool:
    """Whether `ready` has loaded the operators in this process."""
    return _loaded


def ready() -> str:
    """Build and load the operators; empty when they are in `torch.ops.attnopt`, else the reason why
    not. What was built lies in torch's folder of extensions."""
    with _building:
        return _ready()


@cache
def _ready() -> str:
    if sys.platform != "linux":
        return f"the operators are built on Linux alone, this is {sys.platform}"
    try:
        torch.ops.load_library(str(_built()))
    except (OSError, ImportError, RuntimeError, subprocess.SubprocessError) as error:
        told = getattr(error, "stderr", None) or str(error)
        lines = [line for line in told.splitlines() if line.strip()]
        return next((line for line in lines if "error" in line), (lines or ["no message"])[0])
    global _loaded
    for name, fake in _FAKES.items():
        torch.library.register_fake(f"attnopt::{name}", fake)
    _loaded = True
    return ""


def _built() -> Path:
    """The shared library of this source, torch and processor, compiled unless it is there."""
    from torch.utils import cpp_extension

    folder = Path(__file__).parent
    sources = [folder / name for name in SOURCES]
    compiler = shlex.split(cpp_extension.get_cxx_compiler())  # CXX may be "ccache g++"
    if not compiler or shutil.which(compiler[0]) is None:
        raise OSError(f"no C++ compiler `{' '.join(compiler)}`")
    command = [*compiler, *_flags(), *(f"-I{path}" for path in cpp_extension.include_paths())]
    links = [*(f"-L{path}" for path in cpp_extension.library_paths()), "-lc10", "-ltorch_cpu"]
    texts = [(folder / name).read_text(encoding="utf-8") for name in (*SOURCES, *HEADERS)]
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
    about = "\n".join((torch.__version__, version, *command, *links, *texts))
    root = Path(cpp_extension.get_default_build_root()) / "attnopt"
    made = root / f"{hashlib.sha256(about.encode()).hexdigest()[:24]}.so"
    if made.exists():
        return made
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as work:  # another process may build it as well
        out = Path(work) / made.name
        objects = [str(Path(work) / f"{source.stem}.o") for source in sources]
        calls = [
            [*command, "-c", str(source), "-o", each]
            for source, each in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor() as pool:
            list(pool.map(_run, calls))
        _run([*command, "-shared", *objects, "-o", str(out), *links])
        os.replace(out, made)
    return made


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def _flags() -> list[str]:
    capability = torch.backends.cpu.get_cpu_capability()
    wide = _VECTORS.get(capability)
    named = [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]
    vectors = [*wide, *named] if wide else []
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    openmp = ["-fopenmp", "-DAT_PARALLEL_OPENMP=1"]
    return ["-O3", "-std=c++20", "-fPIC", *openmp, *vectors, abi]


def _one_token(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return q.new_empty(*q.shape[:-1], v.shape[-1])


def _linear_maps(
    x: Tensor, weights: Tensor, biases: Tensor | None, at: list[int], outs: list[int], gate: int
) -> Tensor:
    return x.new_empty(*x.shape[:-1], sum(outs))


def _prompt(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    batch, heads, rows, _ = q.shape
    return q.new_empty(batch, rows, heads, v.shape[-1]).transpose(1, 2)


_FAKES: dict[str, Callable[..., object]] = {
    "few_rows": _linear_maps, "many_rows": _linear_maps, "one_token": _one_token, "prompt": _prompt,
}  # fmt: skip
