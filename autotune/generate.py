"""`generate`: the attentions of a finished run as kernels for one target, in a folder of their
own."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnopt.autotune.optimize import require_sites
from attnopt.codegen import c_header, c_loader
from attnopt.codegen.aoti import check_package, package
from attnopt.codegen.arguments import precision_argument
from attnopt.codegen.build import Built, build
from attnopt.codegen.index import MANIFEST, README, Placed, as_text, manifest, readme
from attnopt.codegen.pick import Picked, pick
from attnopt.codegen.sites import DTYPES, Wanted, steps, wanted
from attnopt.codegen.target import Target, target
from attnopt.compiler.artifact import PLAN, load, program_of, read_plan, source_sha256
from attnopt.compiler.contract import Miss, Notes, read_pass
from attnopt.compiler.errors import Problem
from attnopt.compiler.folder import Content, check_writable, write
from attnopt.compiler.intake.export_model import load_export
from attnopt.compiler.optimized import DECODE
from attnopt.compiler.pipeline import apply_pass, read
from attnopt.compiler.program import Program
from attnopt.compiler.trace import trace

Progress = Callable[[str, float], None]
PACKAGE = "model.pt2"
_RECOGNISE = ("simplify_mask", "fold_repeated_kv")


@dataclass(frozen=True)
class Generated:
    """What was written: the modules, and for each attention which of them it has or why none."""

    folder: Path
    target: Target
    built: tuple[Built, ...]
    placed: tuple[Placed, ...]
    document: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """The manifest, with the folder and each module's facts."""
        return {
            "folder": str(self.folder), **self.document,
            "kernels": [one.facts() for one in self.built],
        }  # fmt: skip


def generate(
    run: Path, out: Path, name: str, *, batch: int | None = None, length: int | None = None,
    dtype: str | None = None, aot: bool = True, with_package: bool = False,
    precision: str = "ieee", progress: Progress | None = None,
) -> Generated:  # fmt: skip
    """Write kernels for the attentions of the run in the folder `run`, for the target `name`.

    `batch`, `length` and `dtype` are what tile sizes are chosen for; None takes those of the run.
    Without `aot` nothing is compiled. `precision` "tf32" rounds the operands of products in
    float32. Raises `Problem` A505 where there is no run, A801 without triton, A802 on another
    precision, A804 in its interpreter, A805 and A831 where a kernel cannot be compiled or does not
    fit, A806 where no attention has a kernel, A807 on sizes, dtypes and precisions that cannot be,
    A808 for the CPU without a package, A809 where the package cannot be made, and A502, A508 and
    A830 for a place that cannot be written.
    """
    say = progress or (lambda what, share: None)
    home, on = run.parent if run.name == PLAN else run, target(name)
    plan = home / PLAN
    read_plan(home)
    _check(home, out, on, aot, with_package)
    _check_precision(precision, on)
    placed: tuple[Placed, ...] = ()
    built: tuple[Built, ...] = ()
    if not on.measured:
        say("reading the model", 0.05)
        program = recognised(home)
        if not program.attentions():
            require_sites(program)
        asked = wanted(program, batch, length, dtype)
        stepped, lost = _steps(home, asked)
        placed, built = _modules([*asked, *stepped], on, aot, precision, say)
        placed += lost
        placed += tuple(
            Placed(
                f"u{at}", missed.module, "prompt", "", why_not=f"not understood: {missed.reason}"
            )
            for at, missed in enumerate(program.unraised)
        )
    files = {key: data for one in built for key, data in one.files().items()}
    files |= _for_c(built, on)
    packed = PACKAGE if with_package else ""
    files[README] = readme(on, placed, built, packed).encode()
    made = manifest(on, placed, built, files, source_sha256(plan), packed)
    contents: dict[str, Content] = {**files, MANIFEST: as_text(made)}
    if with_package:
        say("compiling the model with AOTInductor", 0.8)
        exported = load(home).exported
        contents[PACKAGE] = lambda path: package(exported, path, on)
    folder = write(out, contents, stale=_earlier(out))
    return Generated(folder, on, built, placed, made)


def recognised(home: Path) -> Program:
    """The run's program with its attentions as specs. They are stored where the model can be
    decoded; else the model is read again, and its masks proved anew."""
    stored = home / DECODE
    if stored.is_file():
        return trace(load_export(stored))
    program = read(program_of(home))
    for name in _RECOGNISE:
        program, _ = apply_pass(program, read_pass(name), ("*",), Notes(program))
    return program


def _steps(home: Path, asked: list[Wanted]) -> tuple[list[Wanted], tuple[Placed, ...]]:
    """What the run's decoder asks for at each new token, and what of it no kernel can give."""
    if not (home / DECODE).is_file():
        return [], ()
    try:
        answers: list[Wanted | Miss] = steps(asked, load(home).decoder.caches)
    except Problem as problem:  # the kernels for prompts do not need it
        answers = [Miss(f"the run has no decoder here: {problem.what}") for _ in asked]
    lost = tuple(
        Placed(each.site, each.module, "step", each.spec.text, why_not=answer.reason)
        for each, answer in zip(asked, answers, strict=True) if isinstance(answer, Miss)
    )  # fmt: skip
    return [answer for answer in answers if isinstance(answer, Wanted)], lost


def _check(home: Path, out: Path, on: Target, aot: bool, with_package: bool) -> None:
    """What can be refused before any work."""
    if with_package:
        check_package(on)
    if on.measured and not with_package:
        raise Problem(
            "A808", "there are no Triton kernels for the CPU",
            why="there the model runs as it is, or compiled as a whole by AOTInductor",
            help=f"attnopt codegen {home} --target cpu --package --out {out}, or name a GPU",
        )  # fmt: skip
    if not on.measured:
        from attnopt.codegen.kernel import require_triton

        require_triton()
        if aot:
            from attnopt.codegen.aot import require_compiler

            require_compiler()
    if (out / PLAN).exists():
        raise Problem(
            "A830", f"the kernels cannot go to {out}",
            why="it holds a run, whose model would be lost",
            help="give --out a new or empty folder",
        )  # fmt: skip
    check_writable(out)


def _check_precision(precision: str, on: Target) -> None:
    precision_argument(precision)
    if precision != "ieee" and precision not in on.peak:
        raise Problem("A807", f"{on.title} has no products in {precision}")


def _modules(
    asked: list[Wanted], on: Target, aot: bool, precision: str, say: Progress
) -> tuple[tuple[Placed, ...], tuple[Built, ...]]:
    """For each attention its module; attentions with one spec at one size share theirs."""
    answers: dict[tuple[Any, Any], Picked | Miss] = {}
    for each in asked:
        if each.load.dtype not in on.peak:
            there = [dtype for dtype in DTYPES.values() if dtype in on.peak]
            raise Problem(
                "A807", f"{on.title} has no arithmetic in {each.load.dtype}",
                help=f"--dtype {' or '.join(there)}",
            )  # fmt: skip
        if precision != "ieee" and each.load.dtype != "float32":
            raise Problem(
                "A807", f"{precision} is for products in float32, not in {each.load.dtype}",
                help="--dtype float32, or leave --precision out",
            )  # fmt: skip
        key = each.spec, each.load
        answers.setdefault(key, pick(each.spec, on, each.load, each.kernels, precision))
    picked = {key: found for key, found in answers.items() if isinstance(found, Picked)}
    if not picked:
        reasons = dict.fromkeys(miss.reason for miss in answers.values() if isinstance(miss, Miss))
        raise Problem(
            "A806", f"no attention has a kernel for {on.title}", why="; ".join(reasons),
            help="torch's own attention runs them: model.pt2 of the run, with torch.compile",
        )  # fmt: skip
    built: dict[tuple[Any, Any], Built] = {}
    for at, (key, found) in enumerate(picked.items()):
        say(f"compiling {found.kernel.name}", 0.1 + 0.7 * at / len(picked))
        count = sum(one.picked.kernel.name == found.kernel.name for one in built.values())
        built[key] = build(f"{found.kernel.name}_{count}", found, aot)
    placed = []
    for each in asked:
        key, answer = (each.spec, each.load), answers[each.spec, each.load]
        reason = answer.reason if isinstance(answer, Miss) else ""
        module = built[key].name if key in built else ""
        phase = "step" if each.step else "prompt"
        placed.append(Placed(each.site, each.module, phase, each.spec.text, module, reason))
    return tuple(placed), tuple(built.values())


def _for_c(built: tuple[Built, ...], on: Target) -> dict[str, bytes]:
    """The header and the loader, where anything was compiled."""
    modules = [
        c_header.Module(one.name, one.said, one.launches, one.buffers)
        for one in built if one.launches
    ]  # fmt: skip
    if not modules:
        return {}
    return {
        c_header.FILE: c_header.header(modules, on.vendor).encode(),
        c_loader.FILE: c_loader.loader(modules[0], on.vendor).encode(),
    }


def _earlier(out: Path) -> list[str]:
    """The files of an earlier call in the same folder."""
    try:
        told = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        return [*told["files"], MANIFEST, *filter(None, [told["package"]])]
    except (OSError, ValueError, KeyError):
        return []
