"""What a candidate has to beat: the model as given, and `torch.compile` of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from attnopt.autotune import outputs as out
from attnopt.autotune.timing import Contender
from attnopt.compiler.program import Batch

EAGER, COMPILED = "eager", "torch.compile"
_RECOMPILES = 64


@dataclass(frozen=True)
class Baselines:
    """The baselines that run and agree with eager, and for those left out the reason.

    `compile_s` is the wall-clock time that compiling took, with its first run, in seconds;
    `distance` the relative distance of its outputs from eager's.
    """

    contenders: tuple[Contender, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    compile_s: float | None = None
    distance: float | None = None


def baselines(
    model: Callable[..., object],
    batches: Sequence[Batch],
    *,
    dynamic: bool | None = None,
    progress: Callable[[str], None] | None = None,
) -> Baselines:
    """Eager and compiled forms of a model, each run once on every batch.

    A machine without a C++ compiler, or a model that torch.compile cannot take, is no error: the
    compiled form is left out and the reason recorded. So is one whose outputs differ from eager's.
    """
    eager = Contender(EAGER, model)
    expected = [out.call(model, batch) for batch in batches]
    if progress is not None:
        progress("compiling the baseline with torch.compile")
    compiled, reason, taken = compiled_form(model, batches, dynamic=dynamic)
    if compiled is None:
        return Baselines((eager,), {COMPILED: reason})
    gaps = [
        out.difference(out.call(compiled, batch), reference, out.valid_of(batch))
        for batch, reference in zip(batches, expected, strict=True)
    ]
    allowed = max(out.same_within(out.floats(reference)) for reference in expected)
    if max(gaps) > allowed:
        reason = f"its outputs are {max(gaps):.1e} off eager's (relative, {allowed:.0e} allowed)"
        return Baselines((eager,), {COMPILED: reason}, taken, max(gaps))
    return Baselines((eager, Contender(COMPILED, compiled)), {}, taken, max(gaps))


def compiled_form(
    model: Callable[..., object], batches: Sequence[Batch], *, dynamic: bool | None = None
) -> tuple[Callable[..., object] | None, str, float]:
    """`torch.compile` of a model, warmed on every batch: (the callable, or None and why, seconds).

    A recompile limit would silently fall back to eager; here it counts as a failure instead.
    """
    start = time.perf_counter()
    settings: dict[str, Any] = {"recompile_limit": _RECOMPILES, "fail_on_recompile_limit_hit": True}
    try:
        with torch._dynamo.config.patch(**settings):
            made = torch.compile(model, dynamic=dynamic, fullgraph=False)
            for batch in batches:
                out.call(made, batch)
    except (RuntimeError, OSError, ImportError) as error:
        return None, _reason(error), time.perf_counter() - start
    return made, "", time.perf_counter() - start


def _reason(error: BaseException) -> str:
    """The first line that says something, without torch's advice on debugging flags."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300]
