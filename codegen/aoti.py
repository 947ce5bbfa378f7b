"""The whole model as one package of AOTInductor: compiled code and weights, which torch loads and
runs without attnopt."""

from __future__ import annotations

import importlib
from pathlib import Path

import torch

from attnopt.codegen.target import Target
from attnopt.compiler.errors import Problem


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
    called = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    own = sorted(name for name in called if name.startswith("attnopt."))
    if own:
        raise Problem(
            "A809", "the model cannot be packaged", why=f"it calls attnopt's own {', '.join(own)}",
            help="optimize without the rewrites that need them (unpad)",
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
