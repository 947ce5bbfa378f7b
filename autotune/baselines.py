"""What a candidate has to beat: the model as given, and `torch.compile` of it."""

from __future__ import annotations

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
    """The baselines that run and agree with eager, and for those left out the reason."""

    contenders: tuple[Contender, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)


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
    out.call(model, batches[0])  # what fails here is no fault of the compiler
    if progress is not None:
        progress("compiling the baseline with torch.compile")
    compiled, reason = compiled_form(model, batches, dynamic=dynamic)
    if compiled is not None:
        reason = differs(compiled, model, batches)
    if compiled is None or reason:
        return Baselines((eager,), {COMPILED: reason})
    return Baselines((eager, Contender(COMPILED, compiled)))


def differs(
    compiled: Callable[..., object], eager: Callable[..., object], batches: Sequence[Batch]
) -> str:
    """How far a compiled form's outputs are off where that is more than rounding, else nothing."""
    for batch in batches:
        expected, made = out.call(eager, batch), out.call(compiled, batch)
        gap = out.difference(made, expected, out.valid_of(batch))
        allowed = out.same_within(out.floats(expected))
        if not gap <= allowed:
            return f"its outputs are {gap:.1e} off eager's (relative, {allowed:.0e} allowed)"
    return ""


def compiled_form(
    model: Callable[..., object], batches: Sequence[Batch], *, dynamic: bool | None = None
) -> tuple[Callable[..., object] | None, str]:
    """`torch.compile` of a model, warmed on every batch: the callable, or None and why.

    A recompile limit would silently fall back to eager; here it counts as a failure instead.
    """
    settings: dict[str, Any] = {"recompile_limit": _RECOMPILES, "fail_on_recompile_limit_hit": True}
    try:
        with torch._dynamo.config.patch(**settings):
            made = torch.compile(model, dynamic=dynamic, fullgraph=False)
            for batch in batches:
                out.call(made, batch)
    except (RuntimeError, OSError, ImportError) as error:
        return None, _reason(error)
    return made, ""


def _reason(error: BaseException) -> str:
    """The first line that says something, without torch's advice on debugging flags."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300]
