"""The contract of every pass on every architecture: it applies or says why not; afterwards the
graph runs lowered at other sizes and paddings, and an exact pass has changed nothing.

    python -m tests.zoo.contract [--only TEXT] [--jobs 2]
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnopt.autotune.order import ordered
from attnopt.compiler.contract import Exactness, Notes, Pass, read_pass
from attnopt.compiler.errors import Problem
from attnopt.compiler.lower import lower
from attnopt.compiler.pipeline import apply_pass
from attnopt.compiler.program import Batch, Program
from attnopt.compiler.verify import RUN_ERRORS, difference
from tests.zoo.architecture import Architecture, Inputs
from tests.zoo.survey import ALL, ALLOWED, cast, held, named, read

OPTIONS = {  # small enough for these models
    "sliding_window": "sliding_window{left=4 sink=1}",
    "heal": "heal{tokens=64 local=64}",
}
CALIBRATION = ((4, 16), (4, 13), (5, 12), (6, 12))


@dataclass(frozen=True)
class Kept:
    """What one pass did on one model: at how many targets it applied, the largest difference after
    it, the reasons for the others, and what broke its contract."""

    rewrite: str
    exact: bool
    applied: int
    targets: int
    error: float
    reasons: tuple[str, ...]
    broken: str = ""


def contracts(architecture: Architecture, spelling: str) -> Iterator[Kept]:
    """Apply every pass to one architecture, exact ones each to what the ones before it left."""
    # Written-out softmaxes are in float32 whatever the model's dtype.
    architecture = replace(architecture, double=architecture.double and spelling == "sdpa")
    model, program = read(architecture, spelling)
    fixed = architecture.shapes[0][1] if held(architecture, program) else None
    cases = list(_cases(architecture, fixed))
    with torch.no_grad():
        outputs = [model(**inputs) for inputs in cases]
    notes = _notes(architecture, program, fixed)
    exact = program
    for kind in ordered():
        rewrite = read_pass(OPTIONS.get(kind.name, kind.name + "{}"))
        if kind.exactness is not Exactness.APPROXIMATE:
            exact, kept = _held(exact, rewrite, notes, cases, outputs, architecture.double)
        elif kind.heals:
            merged, _ = apply_pass(program, read_pass("merge_kv_heads{}"), ("*",), notes)
            _, kept = _held(merged, rewrite, notes, cases, None, architecture.double)
        else:
            _, kept = _held(program, rewrite, notes, cases, None, architecture.double)
        yield kept


def _held(
    program: Program,
    rewrite: Pass,
    notes: Notes,
    cases: Sequence[Inputs],
    outputs: Sequence[Any] | None,
    double: bool,
) -> tuple[Program, Kept]:
    try:
        made, outcomes = apply_pass(program, rewrite, ("*",), notes, verify=outputs is not None)
    except RUN_ERRORS as failure:
        said = f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0]}"
        return program, Kept(rewrite.name, outputs is not None, 0, 0, 0.0, (), said)
    applied = [outcome for outcome in outcomes if outcome.applied]
    reasons = tuple(outcome.reason for outcome in outcomes if not outcome.applied)
    broken, error = "", 0.0
    if not all(reasons) or any(not o.note for o in applied):
        broken = "an outcome without a word"
    if any("rolled back" in reason for reason in reasons):
        broken = next(reason for reason in reasons if "rolled back" in reason)
    if applied and not broken:
        made.graph.lint()
        lowered = lower(made)
        for i, inputs in enumerate(cases):
            try:
                with torch.no_grad():
                    found = lowered(**inputs)
            except RUN_ERRORS as failure:
                broken = f"it does not run at {_shapes(inputs)}: {str(failure).splitlines()[0]}"
                break
            valid = inputs.get("attention_mask")
            real = valid.bool() if valid is not None and rewrite.valid_only else None
            if outputs is not None:
                error = max(error, difference(outputs[i], found, real))
            elif not bool(found.isfinite().all()):
                broken = f"its output is not finite at {_shapes(inputs)}"
    if error > ALLOWED[torch.float64 if double else torch.float32]:
        broken = broken or f"it differs by {error:.1e}"
    kept = Kept(rewrite.name, outputs is not None, len(applied), len(outcomes), error, reasons,
                broken)  # fmt: skip
    return made, kept


def _cases(architecture: Architecture, fixed: int | None) -> Iterator[Inputs]:
    """Inputs at every size; where rows are padded, on either side, in the middle, and not at
    all."""
    torch.manual_seed(2)
    for at, (batch, length) in enumerate(architecture.shapes):
        inputs = cast(architecture, batch, fixed or length)
        yield inputs
        mask = inputs.get("attention_mask")
        if at == 0 and mask is not None:
            for other in _paddings(mask):
                yield {**inputs, "attention_mask": other}


def _paddings(mask: Tensor) -> Iterator[Tensor]:
    yield mask.flip(1)
    yield torch.ones_like(mask)
    holes = torch.ones_like(mask)
    holes[0, 3:5] = 0
    holes[-1, 1::3] = 0
    yield holes


def _notes(architecture: Architecture, program: Program, fixed: int | None) -> Notes:
    torch.manual_seed(3)
    made = []
    for batch, length in CALIBRATION * 2:
        inputs = cast(architecture, batch, fixed or length)
        mask = inputs.get("attention_mask")
        made.append(Batch((), inputs, None if mask is None else mask.bool()))
    return Notes(program, made[:6], made[6:])


def _shapes(inputs: Inputs) -> str:
    return ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())


def _one(at: tuple[int, str]) -> tuple[str, list[Kept] | str]:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    architecture, spelling = ALL[at[0]], at[1]
    name = f"{architecture.name} ({spelling})"
    try:
        return name, list(contracts(architecture, spelling))
    except (Problem, ImportError) as known:
        return name, str(known).splitlines()[0]


def main(arguments: list[str] | None = None) -> int:
    """Hold every pass to its contract on the zoo; exit code 1 when one is broken."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="", help="architectures whose name holds this")
    parser.add_argument("--jobs", type=int, default=2)
    chosen = parser.parse_args(arguments)
    cases = named(chosen.only)
    if not cases:
        parser.error(f"no architecture has {chosen.only!r} in its name")
    fired, models, worst, broken = Counter[str](), 0, Counter[str](), 0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(chosen.jobs, mp_context=context) as pool:
        for name, found in pool.map(_one, cases):
            if isinstance(found, str):
                print(f"  {name}: {found}", file=sys.stderr, flush=True)
                continue
            models += 1
            for kept in found:
                fired[kept.rewrite] += bool(kept.applied)
                worst[kept.rewrite] = max(worst[kept.rewrite], kept.error)
                broken += bool(kept.broken)
            told = [f"{k.rewrite} {k.applied}/{k.targets}" for k in found]
            said = [f"! {k.rewrite}: {k.broken}" for k in found if k.broken]
            print(f"  {name}: {', '.join(told)}", *said, sep="\n    ", file=sys.stderr, flush=True)
    for kind in ordered():
        print(f"{kind.name}: fired on {fired[kind.name]} of {models} models", end="")
        exact = kind.exactness is not Exactness.APPROXIMATE
        print(f", largest difference {worst[kind.name]:.1e}" if exact else "")
    return int(broken > 0)


if __name__ == "__main__":
    raise SystemExit(main())
