"""Every kernel against its reference in float64, on random sizes, before anything is timed.

Outputs are poisoned: torch fills new memory with NaN, so that what a kernel leaves unwritten shows.
Each launch is repeated, and has to give the same bits: what moves between runs is a race.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnopt.autotune.kernel_race import poisoned
from attnopt.codegen.kernel import Kernel, Load, kernels
from attnopt.codegen.shipped import chosen
from attnopt.codegen.target import Target
from attnopt.compiler.contract import Miss

LENGTHS = (1, 63, 100, 257, 1000, 1500)  # the last is beyond the windows of the examples
REPEATS = 5
ALLOWED = {"float32": 1e-3, "float16": 5e-3, "bfloat16": 2e-2}
"""Norm of the error over the norm of the reference, in the operands' dtype."""


@dataclass(frozen=True)
class Checked:
    """One comparison: the relative error, and what is wrong, empty where nothing is; `skipped` says
    why there is none."""

    kernel: str
    spec: str
    load: Load
    error: float
    wrong: str = ""
    skipped: str = ""


def check_all(
    target: Target,
    device: str = "cuda",
    lengths: tuple[int, ...] = LENGTHS,
    names: tuple[str, ...] = (),
) -> Iterator[Checked]:
    """All kernels (or the named ones) on all of their examples, at other sizes."""
    for name, cls in kernels().items():
        if names and name not in names:
            continue
        seen = set()
        for spec, load in cls.examples():
            for length in lengths:
                queries = length if load.queries > 8 else load.queries
                small = replace(load, batch=2, queries=queries, keys=length)
                if (spec, queries, length) in seen:
                    continue
                seen.add((spec, queries, length))
                try:
                    yield check(cls, spec, small, target, device)
                except Exception as error:  # noqa: BLE001 (a crash is a red check, and is told)
                    told = f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
                    yield Checked(name, getattr(spec, "text", str(spec)), small, float("inf"), told)


def check(cls: type[Kernel[Any]], spec: Any, load: Load, target: Target, device: str) -> Checked:
    """Launch several times on poisoned memory and compare."""
    said = getattr(spec, "text", str(spec))
    missed = cls.supports(spec, target)
    if isinstance(missed, Miss):
        return Checked(cls.name, said, load, 0.0, skipped=missed.reason)
    kernel = chosen(cls, spec, target, load)
    inputs = cls.inputs(spec, load, device)
    with poisoned():
        runs = [_flat(kernel.run(spec, _copied(inputs))) for _ in range(REPEATS)]
    expected = _flat(cls.reference(spec, _wide(inputs)))
    error = max(_error(got, want) for got, want in zip(runs[0], expected, strict=False))
    moved = any(
        not torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True)
    )
    wrong = "" if error <= ALLOWED[load.dtype] else f"an error of {error:.1e}"
    return Checked(cls.name, said, load, error, wrong or ("moves between runs" if moved else ""))


def _flat(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else [x for x in outputs if x is not None]


def _copied(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Kernels that write into a state or a cache get their own."""
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}


def _wide(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs on the CPU, in float64."""

    def wide(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.detach().cpu().to(torch.float64 if x.is_floating_point() else x.dtype)

    return {key: wide(value) for key, value in inputs.items()}


def _error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm; infinite where a number is missing."""
    got = got.detach().cpu().to(torch.float64)
    if got.shape != want.shape or not torch.isfinite(got[torch.isfinite(want)]).all():
        return float("inf")
    there = torch.isfinite(want)
    return float((got[there] - want[there]).norm() / want[there].norm().clamp_min(1e-30))
