"""`make coverage`: raises every architecture of the zoo and writes `docs/coverage.md`.

    python -m tests.zoo.survey [--only TEXT] [--out docs/coverage.md] [--jobs 2]

What is compared, at three shapes each, is the raised program with the model as given.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import multiprocessing
import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from attnopt.compiler.errors import Problem
from attnopt.compiler.intake.loaded import Loaded
from attnopt.compiler.program import Program
from attnopt.compiler.raising import raise_program
from attnopt.compiler.trace import trace
from attnopt.compiler.verify import difference
from tests.zoo.architecture import Architecture, Inputs
from tests.zoo.decoders import DECODERS
from tests.zoo.encoders import AUDIO, ENCODERS, SEQ2SEQ, VISION
from tests.zoo.others import DIFFUSERS, TORCH, VIT_PYTORCH, X_TRANSFORMERS

ALL = (
    *DECODERS, *ENCODERS, *SEQ2SEQ, *VISION, *AUDIO, *DIFFUSERS, *X_TRANSFORMERS, *VIT_PYTORCH,
    *TORCH,
)  # fmt: skip
LIBRARIES = ("torch", "transformers", "diffusers", "x-transformers", "vit-pytorch")
NOT_INSTALLED = "not installed"
ALLOWED = {torch.float64: 1e-10, torch.float32: 1e-5}


@dataclass(frozen=True)
class Row:
    """What was found in one architecture in one spelling.

    `facts` are the distinct kinds of its sites in words, `error` the largest difference from the
    model relative to the outputs' rms, `reasons` what was not found and why.
    """

    name: str
    library: str
    spelling: str
    found: int
    expected: int
    facts: tuple[str, ...] = ()
    error: float = 0.0
    dtype: str = "float64"
    reasons: tuple[str, ...] = ()
    problem: str = ""
    failed: tuple[str, ...] = ()

    @property
    def installed(self) -> bool:
        """Whether its library is there."""
        return not self.problem.startswith(NOT_INSTALLED)

    @property
    def complete(self) -> bool:
        """Whether every attention was raised with all its facts, exactly, at any size."""
        return self.exact and self.found == self.expected and not self.reasons

    @property
    def exact(self) -> bool:
        """Whether the outputs are the model's."""
        allowed = ALLOWED[torch.float64 if self.dtype == "float64" else torch.float32]
        return not self.problem and not self.failed and self.error <= allowed


def read(architecture: Architecture, spelling: str) -> tuple[nn.Module, Program]:
    """The model in evaluation mode, and its raised program."""
    model = architecture.build(spelling)
    model = model.double() if architecture.double else model
    torch.manual_seed(1)
    inputs = cast(architecture, *architecture.shapes[0])
    loaded = Loaded(model, None, (), inputs, architecture.name, "hf", root_prefix="hf.")
    return model, raise_program(trace(loaded))


def cast(architecture: Architecture, batch: int, length: int) -> Inputs:
    """Inputs of an architecture in the dtype that it is looked at in."""
    made = architecture.inputs(batch, length)
    if not architecture.double:
        return made
    return {k: v.double() if v.is_floating_point() else v for k, v in made.items()}


def survey(architecture: Architecture, spelling: str) -> Row:
    """Raise one architecture and compare it at its shapes."""
    dtype = "float64" if architecture.double else "float32"
    bare = Row(architecture.name, architecture.library, spelling, 0, architecture.sites,
               dtype=dtype)  # fmt: skip
    try:
        model, program = read(architecture, spelling)
    except Problem as problem:
        at = f", at {problem.where.rpartition('/')[2]}" if problem.where else ""
        return replace(bare, problem=f"{problem.what}: {problem.why}{at}")
    except ImportError as missing:
        return replace(bare, problem=f"{NOT_INSTALLED}: {missing.name}")
    error, failed = 0.0, list[str]()
    stuck = held(architecture, program)
    for batch, length in architecture.shapes:
        length = architecture.shapes[0][1] if stuck else length
        inputs = cast(architecture, batch, length)
        with torch.no_grad():
            expected = model(**inputs)
        try:
            actual = program(**inputs)
        except (RuntimeError, ValueError, AssertionError) as refusal:
            failed.append(f"{batch} x {length}: {str(refusal).splitlines()[0]}")
            continue
        error = max(error, difference([expected], [actual]))
    return replace(
        bare, found=len(program.sites), facts=tuple(dict.fromkeys(_facts(program))), error=error,
        reasons=tuple(dict.fromkeys((*stuck, *_reasons(program)))), failed=tuple(failed),
    )  # fmt: skip


def _facts(program: Program) -> Iterator[str]:
    for site in program.sites:
        heads = f"{site.spec.heads}/{site.kv_heads}"
        yield f"{heads} heads, {site.mask} ({site.mask_certainty}), {site.position}"


def held(architecture: Architecture, program: Program) -> list[str]:
    """What the trace holds fast of the sizes that are tried: the library has made a number of
    it."""
    small, other = (cast(architecture, *shape) for shape in architecture.shapes[:2])
    varied = [
        f"dim {dim} of `{name}`"
        for name, value in small.items()
        for dim in range(1, value.dim())
        if value.shape[dim] != other[name].shape[dim]
    ]
    return [words for words in program.fixed if words.partition(" is ")[0] in varied]


def _reasons(program: Program) -> Iterator[str]:
    for site in program.sites:
        yield from (f"{what}: {why}" for what, why in site.missing.items())
    for miss in program.unraised:
        yield f"not raised: {miss.reason}, at `{miss.node}` ({miss.source})"


def _one(at: tuple[int, str]) -> Row:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    architecture, spelling = ALL[at[0]], at[1]
    try:
        return survey(architecture, spelling)
    except Exception as error:  # noqa: BLE001  (a library may fail in any way; the table tells it)
        said = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        return Row(architecture.name, architecture.library, spelling, 0, architecture.sites,
                   problem=said)  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """The page as Markdown."""
    found, expected = _raised(rows)
    lines = [
        "# Coverage",
        "",
        "Written by `make coverage`: random tiny models of each architecture, every attention that",
        "they have, and what raising found of it. *Difference* is the largest one between the",
        "raised program and the model at three shapes, relative to the outputs' rms. A mask that",
        "is *observed* was seen at a few sizes and is not relied on by any exact rewrite.",
        "",
        f"{versions()}. **{found} of {expected} attentions raised"
        f" ({100 * found / max(1, expected):.1f}%)** in {len({r.name for r in rows})}"
        f" architectures, {len(rows)} spellings; in {sum(r.complete for r in rows)} of these every"
        " fact was found as well.",
        "",
        "| architecture | library | spelling | raised | facts | difference | not found, and why |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        facts = "<br>".join(row.facts).replace("|", "\\|")
        reasons = "<br>".join((*row.failed, *row.reasons, *([row.problem] if row.problem else [])))
        error = "" if row.problem else f"{row.error:.0e} ({row.dtype})"
        lines.append(
            f"| {row.name} | {row.library} | {row.spelling} | {row.found}/{row.expected} |"
            f" {facts} | {error} | {reasons.replace('|', chr(92) + '|')} |"
        )
    return "\n".join(lines) + "\n"


def versions() -> str:
    """Those of the libraries that models come from."""
    found = []
    for name in LIBRARIES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)


def named(part: str) -> list[tuple[int, str]]:
    """The places in `ALL` of the architectures whose name holds `part`, with each spelling."""
    return [
        (i, spelling)
        for i, architecture in enumerate(ALL)
        if part.lower() in architecture.name.lower()
        for spelling in architecture.spellings
    ]


def main(arguments: list[str] | None = None) -> int:
    """Survey the zoo; exit code 1 when a raised program differs or under 95% is raised."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="", help="architectures whose name holds this")
    parser.add_argument("--out", type=Path, help="the page to write; printed when left out")
    parser.add_argument("--jobs", type=int, default=2)
    chosen = parser.parse_args(arguments)
    cases = named(chosen.only)
    if not cases:
        parser.error(f"no architecture has {chosen.only!r} in its name")
    rows: list[Row] = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(chosen.jobs, mp_context=context) as pool:
        for row in pool.map(_one, cases):
            rows.append(row)
            flag = "  " if row.complete else "! "
            print(f"{flag}{row.name} ({row.spelling}): {row.found}/{row.expected}", *row.facts,
                  f"{row.error:.0e}", *row.failed, *row.reasons, row.problem,
                  sep=" | ", file=sys.stderr, flush=True)  # fmt: skip
    page = table(rows)
    if chosen.out is None:
        print(page)
    else:
        chosen.out.write_text(page, encoding="utf-8")
    found, expected = _raised(rows)
    return int(found < 0.95 * expected or any(not r.problem and not r.exact for r in rows))


def _raised(rows: Sequence[Row]) -> tuple[int, int]:
    """How many attentions were raised, of how many in the libraries that are there."""
    there = [row for row in rows if row.installed]
    return sum(min(r.found, r.expected) for r in there), sum(r.expected for r in there)


if __name__ == "__main__":
    raise SystemExit(main())
