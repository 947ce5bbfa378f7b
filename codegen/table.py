"""What every kernel takes of every GPU at its defaults, and how fast it would be: docs/kernels.md.

    python -m attnopt.codegen.table [--kernels a,b] [--targets h100,a100] [--out docs/kernels.md]

Compiles each kernel's examples ahead of time, in two processes. Times are estimated by the
roofline of each launch; nothing is measured. Beside the document the rows are written as JSON, each
with the digest of what was compiled, and the next call compiles only what is another text since.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from importlib.metadata import version
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import attnopt
from attnopt.codegen.emit import emit
from attnopt.codegen.kernel import Kernel, Load, kernels
from attnopt.codegen.roofline import estimated
from attnopt.codegen.target import Target, known, target
from attnopt.compiler.errors import Problem

JOBS = 2
_FORMAT = 1  # other resources of the same text are told by another number
_HEAD = """# Kernels on every target

Written by `python -m attnopt.codegen.table`: each kernel's examples at the default tile sizes,
compiled ahead of time with triton {version}. Nothing here was run on a device.

Registers and spilled bytes are those of a thread; shared memory is that of a block, and what a
block may have. On AMD, registers count those of matrix instructions too. *Serialized* are Hopper's
matrix instructions that could not overlap. Times are **estimated**: the least arithmetic and memory
traffic of the example over the target's peaks, at the shares that good kernels reach
(`codegen/roofline.py`); launch times are left out.

{good} of {here} fit their target and spill nothing; {absent} more are not for their target, as
their lines say.
"""


@dataclass(frozen=True)
class Row:
    """One example of a kernel on one target at its default tile sizes: `parts` has the resources of
    each launch, `why_not` says why there are none, `bad` what is wrong with them. `digest` is that
    of the emitted text, the compiler's version and the target's code and shared memory."""

    kernel: str
    example: int
    target: str
    tiles: str = ""
    parts: tuple[Any, ...] = ()
    estimated_s: float = 0.0
    why_not: str = ""
    bad: str = ""
    digest: str = ""

    @property
    def place(self) -> tuple[str, int, str]:
        """Which kernel, example and target it is of."""
        return self.kernel, self.example, self.target


def rows(names: Iterable[str], targets: Iterable[str], recorded: Iterable[Row] = ()) -> list[Row]:
    """The examples of these kernels, compiled for these targets; in the order of kernels, examples
    and targets. Of `recorded` is taken what would be compiled from the same text again.

    Raises `Problem` A804 in triton's interpreter.
    """
    before = {row.place: row for row in recorded}
    asked = planned(names, targets)
    found = {row.place: _known(row, before.get(row.place)) for row in asked}
    missing = [row for row in asked if found[row.place] is None]
    tasks = [
        list(group)
        for _, group in groupby(sorted(missing, key=_code), key=_code)
    ]  # fmt: skip
    if missing:
        from attnopt.codegen.aot import require_compiler

        require_compiler()
    if len(tasks) < 2:
        made = [_compiled(task) for task in tasks]
    else:
        with ProcessPoolExecutor(JOBS, mp_context=get_context("spawn")) as pool:
            made = list(pool.map(_compiled, tasks))
    found |= {row.place: row for part in made for row in part}
    return [row for row in (found[each.place] for each in asked) if row is not None]


def planned(names: Iterable[str], targets: Iterable[str]) -> list[Row]:
    """The rows of these kernels and targets without what compiling tells, which is enough to know
    whether a recorded one is of the same text."""
    on = [target(name) for name in targets]
    return [
        _planned(kernels()[name], at, each)
        for name in names
        for at in range(len(kernels()[name].examples()))
        for each in on
    ]


def _planned(kernel: type[Kernel[Any]], at: int, on: Target) -> Row:
    """The row without what compiling tells."""
    spec, load = kernel.examples()[at]
    load = load_on(load, on)
    seconds = estimated(kernel.work(spec, load), load.dtype, on)
    row = Row(kernel.name, at, on.name, estimated_s=seconds)
    miss = kernel.supports(spec, on)
    if miss is not None:
        return replace(row, why_not=miss.reason)
    chosen = kernel.default(spec, on, load)
    text = emit(chosen, spec, on, load).replace(attnopt.__version__, "")
    told = (_FORMAT, version("triton"), on.capability, on.shared_per_block, text)
    return replace(row, tiles=chosen.text, digest=sha256(repr(told).encode()).hexdigest()[:16])


def _joined(found: Sequence[Row], before: Sequence[Row]) -> list[Row]:
    """The rows, and those of earlier calls that were not asked for now."""
    order, made = list(kernels()), {row.place: row for row in [*before, *found]}
    there = [row for row in made.values() if row.kernel in order and row.target in known()]
    return sorted(there, key=lambda row: (order.index(row.kernel), row.example, row.target))


def _known(row: Row, before: Row | None) -> Row | None:
    """The row where nothing has to be compiled for it."""
    if row.why_not:
        return row
    if before is None or before.digest != row.digest:
        return None
    return replace(row, parts=before.parts, bad=before.bad)


def _code(row: Row) -> tuple[str, int, str]:
    """What decides the code: rows that share it are compiled one after the other, and found in
    triton's cache."""
    return row.kernel, row.example, target(row.target).capability


def _compiled(rows: Sequence[Row]) -> list[Row]:
    return [_filled(row) for row in rows]


def _filled(row: Row) -> Row:
    from attnopt.codegen.aot import compiled, launches, resources

    kernel, on = kernels()[row.kernel], target(row.target)
    spec, load = kernel.examples()[row.example]
    load = load_on(load, on)
    chosen = kernel.default(spec, on, load)
    try:
        parts = tuple(resources(compiled(one, on), on) for one in launches(chosen, spec, load))
    except Problem as problem:
        return replace(row, bad=f"{problem.what}: {problem.why}")
    bad = [f"{part.kernel} {part.misfit(on)}" for part in parts if part.misfit(on)]
    return replace(row, parts=parts, bad="; ".join(bad))


def load_on(load: Load, on: Target) -> Load:
    """The load in float16 where the target has no arithmetic in its dtype."""
    return load if load.dtype in on.peak else replace(load, dtype="float16")


def record(found: Sequence[Row]) -> str:
    """The rows as JSON, one in a line."""
    return "[\n" + ",\n".join(json.dumps(asdict(row)) for row in found) + "\n]\n"


def read(path: Path) -> list[Row]:
    """The rows that `record` made; none where there is no such file."""
    from attnopt.codegen.aot import Resources

    if not path.is_file():
        return []
    told = json.loads(path.read_text(encoding="utf-8"))
    return [Row(**{**row, "parts": tuple(Resources(**p) for p in row["parts"])}) for row in told]


def page(found: Sequence[Row]) -> str:
    """The rows as a document."""
    here, bad = [row for row in found if not row.why_not], [row for row in found if row.bad]
    lines = [
        _HEAD.format(version=version("triton"), good=len(here) - len(bad), here=len(here),
                     absent=len(found) - len(here)),
        *(f"- `{row.kernel}`, example {row.example + 1}, {row.target}: {row.bad}" for row in bad),
        *([""] if bad else []),
    ]  # fmt: skip
    for (name, at), group in groupby(found, key=lambda row: (row.kernel, row.example)):
        lines += _section(name, at, list(group))
    return "\n".join(lines)


def _section(name: str, at: int, found: Sequence[Row]) -> Iterator[str]:
    kernel = kernels()[name]
    spec, load = kernel.examples()[at]
    if at == 0:
        yield from (f"## {name}", "")
    sizes = f"batch {load.batch}, {load.queries} queries, {load.keys} keys, {load.dtype}"
    yield from (f"**{at + 1}.** `{getattr(spec, 'text', spec)}`, {sizes}", "")
    yield "| target | tiles | registers | spills | shared memory | estimated |"
    yield "|---|---|---|---|---|---|"
    for row in found:
        on = target(row.target)
        if row.why_not:
            yield f"| {row.target} | not here: {row.why_not} | | | | |"
            continue
        each = [
            " + ".join(str(part) for part in column)
            for column in (
                [f"{part.registers}{', serialized' * part.serialized}" for part in row.parts],
                [part.spills for part in row.parts],
                [_kib(part.shared) for part in row.parts],
            )
        ]  # fmt: skip
        tiles = row.tiles.removeprefix(name).strip("{}") or "as declared"
        other = "" if load_on(load, on) == load else " in float16"
        yield (
            f"| {row.target} | {tiles}{other} | {each[0] or '–'} | {each[1] or '–'} | "
            f"{each[2] or '–'} of {_kib(on.shared_per_block)} | {_time(row.estimated_s)} |"
        )
    yield ""


def _kib(size: int) -> str:
    return f"{size / 1024:.4g} KiB" if size else "0"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def main(argv: Sequence[str]) -> int:
    """The command; gives 1 where a kernel spills or does not fit."""
    gpus = [name for name in known() if not target(name).measured]
    parser = argparse.ArgumentParser(prog="attnopt.codegen.table", description=__doc__)
    parser.add_argument("--kernels", default=",".join(kernels()), help="names, with commas")
    parser.add_argument("--targets", default=",".join(gpus), help="names, with commas")
    parser.add_argument("--out", type=Path, help="the file to write (default: stdout)")
    asked = parser.parse_args(argv)
    if unknown := sorted({*asked.kernels.split(",")} - {*kernels()}):
        parser.error(f"unknown kernel {unknown[0]}; known: {', '.join(kernels())}")
    before = [] if asked.out is None else read(asked.out.with_suffix(".json"))
    try:
        found = rows(asked.kernels.split(","), asked.targets.split(","), before)
    except Problem as problem:
        parser.error(str(problem))
    found = _joined(found, before)
    text = page(found)
    if asked.out is None:
        print(text)
    else:
        asked.out.write_text(text, encoding="utf-8")
        asked.out.with_suffix(".json").write_text(record(found), encoding="utf-8")
    return int(any(row.bad for row in found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
