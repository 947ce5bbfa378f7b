"""The index of a folder of emitted kernels: manifest.json for programs, README.md for people."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

import attnopt
from attnopt.codegen import c_header, c_loader
from attnopt.codegen.build import Built
from attnopt.codegen.emit import TRITON, public_name
from attnopt.codegen.target import Target

MANIFEST, README = "manifest.json", "README.md"
_C = f"""\
The binaries are compiled for {{capability}}. The `.json` beside each module tells, for every
launch, the symbol, the grid, the arguments in order, and what was taken for granted: numbers that
have to stay multiples of 16, and those that are compiled in. `{c_header.FILE}` has the same as
structs, checks and launching functions; `{c_loader.FILE}` is a program that launches one of them:
`{{library}} -o loader`."""


@dataclass(frozen=True)
class Placed:
    """One attention of the model, by its id and the path of its module, and the emitted module for
    it, or why there is none. `phase` says when it runs, on a prompt or at each new token (step);
    `spec` is empty for an attention that was not understood."""

    site: str
    at: str
    phase: str
    spec: str
    module: str = ""
    why_not: str = ""

    @property
    def title(self) -> str:
        """The attention in words."""
        step = " at each step" if self.phase == "step" else ""
        return self.site + (f" ({self.at})" if self.at else "") + step


def manifest(
    target: Target, placed: Sequence[Placed], built: Sequence[Built],
    files: Mapping[str, bytes], plan: str, package: str,
) -> dict[str, Any]:  # fmt: skip
    """The manifest: which module each attention has, what made it, and the files' hashes. `plan` is
    the hash of the run's plan.json, `package` the name of the AOTInductor package."""
    return {
        "format": 1, "attnopt": attnopt.__version__, "torch": torch.__version__,
        "triton": _triton(built), "triton_versions": list(TRITON), "target": target.name,
        "plan_sha256": plan, "sites": [asdict(each) for each in placed],
        "modules": [
            {
                "name": one.name, "function": public_name(one.picked.spec),
                "kernel": one.picked.kernel.name, "warnings": one.misfits,
                "files": list(one.files()),
            }
            for one in built
        ],
        "package": package or None,
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    }  # fmt: skip


def as_text(document: Mapping[str, Any]) -> bytes:
    """A JSON document as the bytes of its file."""
    return json.dumps(document, indent=1, ensure_ascii=False).encode() + b"\n"


def readme(target: Target, placed: Sequence[Placed], built: Sequence[Built], package: str) -> str:
    """The folder told to a person."""
    lines = [
        f"# Attention for {target.title}",
        "",
        f"Written by attnopt {attnopt.__version__}.",
        "",
    ]
    for one in built:
        lines += _module(one, [each.title for each in placed if each.module == one.name])
    lost = [each for each in placed if each.why_not]
    if lost:
        lines += ["## Without a kernel", ""]
        lines += [
            f"- {each.title}{', `' + each.spec + '`' if each.spec else ''}: {each.why_not}"
            for each in lost
        ]
        lines.append("")
    if built:
        name, oldest = built[0].name, TRITON[0]
        function = public_name(built[0].picked.spec)
        lines += [
            "## From Python", "",
            f"Each module needs torch and triton ({oldest} or newer), and nothing of attnopt:", "",
            "```python", f"from {name} import {function}", "```", "",
            "Its first lines say which tensors it takes. Triton compiles it at the first call.", "",
        ]  # fmt: skip
    if any(one.launches for one in built):
        library = "hipcc loader.c" if target.vendor == "amd" else "cc loader.c -lcuda"
        lines += [
            "## From C", "",
            *_C.format(capability=target.capability, library=library).splitlines(), "",
        ]  # fmt: skip
    if package:
        lines += [
            "## The whole model", "",
            f"`{package}` is the rewritten model as a package of AOTInductor:", "",
            "```python", f'model = torch._inductor.aoti_load_package("{package}")', "```", "",
        ]  # fmt: skip
    return "\n".join([*lines, "`manifest.json` holds the hashes of all files.", ""])


def _module(one: Built, of: Sequence[str]) -> list[str]:
    picked, load = one.picked, one.picked.load
    sizes = f"batch {load.batch}, {load.queries} queries, {load.keys} keys, {load.dtype}"
    lines = [
        f"## {one.name}", "", one.said, "",
        f"- computes `{getattr(picked.spec, 'text', picked.spec)}`",
        f"- at {', '.join(of)}",
        f"- as `{picked.kernel.text}`, chosen for {sizes}",
        f"- {picked.seconds * 1e6:.3g} µs by the roofline of {picked.target.title}: estimated",
    ]  # fmt: skip
    for at, launch in enumerate(one.launches):
        used, limit = launch.resources, picked.target.shared_per_block
        lines.append(
            f"- launch {at + 1}: `{launch.symbol}`, grid {' x '.join(map(str, launch.grid))}, "
            f"{launch.threads} threads, {used.registers} registers, {used.spills} bytes spilled, "
            f"{used.shared} of {limit} bytes of shared memory"
        )
    if one.operators:
        lines.append(f"- around its launches it runs {', '.join(one.operators)} of torch")
    return [*lines, ""]


def _triton(built: Sequence[Built]) -> str | None:
    """The version that compiled the binaries, where there are any."""
    if not any(one.launches for one in built):
        return None
    import triton

    return str(triton.__version__)
