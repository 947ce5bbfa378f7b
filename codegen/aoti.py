"""The whole model as one package of AOTInductor: compiled code and weights, which torch loads and
runs without attnopt.

Attention that a run dispatches to generated kernels is torch's fused attention in a package (the
reference, where that has no soft cap): what dispatch chooses is chosen on the device, by sizes that
a package does not fix.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from attnopt.codegen.target import Target
from attnopt.compiler import attend
from attnopt.compiler.errors import Problem
from attnopt.compiler.ops import ATTENTION
from attnopt.compiler.spec import parse_spec


def check_package(target: Target) -> None:
    """Make sure, before any work, that a package for the target can be made here.

    Raises `Problem` A809: AOTInductor compiles for the device at hand.
    """
    if target.measured:
        return
    why = ""
    if target.vendor == "amd" and torch.version.hip is None:
        why = "this is no ROCm build of torch"
    elif target.vendor == "nvidia" and torch.version.cuda is None:
        why = "this is no CUDA build of torch"
    elif not torch.cuda.is_available():
        why = "torch sees no GPU here"
    elif target.vendor == "nvidia":
        found = ".".join(map(str, torch.cuda.get_device_capability()))
        why = "" if found == target.capability else f"the GPU here has capability {found}"
    if why:
        raise Problem(
            "A809", f"no package for {target.title} can be made here", why=why,
            help="run the command on a machine with that GPU and a build of torch for it; "
            "the kernels need none: leave --package out",
        )  # fmt: skip


def package(exported: torch.export.ExportedProgram, path: Path, target: Target) -> None:
    """Compile an exported program into the package `path` (.pt2).

    Raises `Problem` A809 where it cannot be compiled.
    """
    check_package(target)
    exported = rebound(exported)
    called = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    own = sorted(name for name in called if name.startswith("attnopt."))
    if own:
        raise Problem(
            "A809", "the model cannot be packaged", why=f"it calls attnopt's own {', '.join(own)}",
            help="optimize without `unpad`, the rewrite that puts them there",
        )  # fmt: skip
    if not target.measured:
        from torch.export.passes import move_to_device_pass

        exported = move_to_device_pass(exported, "cuda")
    inductor = importlib.import_module("torch._inductor")
    try:
        inductor.aoti_compile_and_package(exported, package_path=str(path))
    except RuntimeError as error:  # all of inductor's errors are
        raise Problem(
            "A809", "AOTInductor cannot compile the model",
            why=(str(error).strip().splitlines() or [type(error).__name__])[0],
            help="it needs a C++ compiler, as torch.compile does",
        ) from error  # fmt: skip


def rebound(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The same program with its canonical attentions in torch's operators."""
    if all(node.target is not ATTENTION for node in exported.graph.nodes):
        return exported
    made: torch.export.ExportedProgram = exported.run_decompositions({ATTENTION: _in_torch})
    return made


def _in_torch(q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], spec: str) -> Tensor:
    read = parse_spec(spec)
    out = attend.in_torch(read)(q, k, v, extras, read).transpose(1, 2)
    # The memory that the op promises to what reads it; a copy that is none here may be one on the
    # device that the program is moved to.
    return out.clone(memory_format=torch.contiguous_format).transpose(1, 2)
