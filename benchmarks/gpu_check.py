"""Every kernel against its reference in float64, before anything is timed: on its examples at odd
lengths, and on random specs and sizes (`gpu_draws`).

Outputs are poisoned: torch fills new memory with NaN, so that what a kernel leaves unwritten shows.
Each launch is repeated, and has to give the same bits: what moves between runs is a race.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import torch
from torch import Tensor

from attnopt.autotune.kernel_race import poisoned
from attnopt.codegen.flash_attention import flash_attention
from attnopt.codegen.kernel import Kernel, Load, kernels
from attnopt.codegen.kernels.flash_prefill import FlashPrefill
from attnopt.codegen.kernels.flash_prefill_backward import FlashPrefillBackward
from attnopt.codegen.shipped import chosen
from attnopt.codegen.table import load_on
from attnopt.codegen.target import Target
from attnopt.compiler import attend
from attnopt.compiler.contract import Miss
from attnopt.compiler.spec import CAUSAL, AttentionSpec, Mask
from benchmarks.gpu_draws import Draw, Most, draw

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
                yield _tried(cls, Draw(spec, small), target, device, seed=length)


def check_random(
    target: Target,
    device: str = "cuda",
    seed: int = 0,
    count: int = 16,
    names: tuple[str, ...] = (),
    most: Most = Most(),  # noqa: B008 (frozen)
) -> Iterator[Checked]:
    """All kernels (or the named ones) on `count` random specs and sizes each. What is drawn for a
    kernel follows from the seed alone, whichever others are checked."""
    for name, cls in kernels().items():
        if names and name not in names:
            continue
        dice = Random(f"{seed} {name}")
        for at in range(count):
            drawn = draw(name, dice, most)
            if drawn is None:
                reason = "it is not of this package, and nothing is drawn for it"
                yield Checked(name, "random specs", Load(), 0.0, skipped=reason)
                break
            yield _tried(cls, drawn, target, device, seed=1000 * seed + at)


def _tried(cls: type[Kernel[Any]], drawn: Draw, target: Target, device: str, seed: int) -> Checked:
    drawn = replace(drawn, load=load_on(drawn.load, target))
    with torch.random.fork_rng(enabled=True):
        torch.manual_seed(seed)
        try:
            return check(cls, drawn, target, device)
        except Exception as error:  # noqa: BLE001 (a crash is a red check, and is told)
            return Checked(cls.name, drawn.text, drawn.load, float("inf"), failure(error))


def check(cls: type[Kernel[Any]], drawn: Draw, target: Target, device: str) -> Checked:
    """Launch several times on poisoned memory and compare."""
    spec, load = drawn.spec, drawn.load
    missed = cls.supports(spec, target)
    if isinstance(missed, Miss):
        return Checked(cls.name, drawn.text, load, 0.0, skipped=missed.reason)
    kernel = chosen(cls, spec, target, load)
    with poisoned():  # an output may be among the inputs
        inputs = cls.inputs(spec, load, device)
        if drawn.change is not None:
            inputs = drawn.change(inputs)
        runs = [flat(kernel.run(spec, _copied(inputs) | drawn.also)) for _ in range(REPEATS)]
    expected = flat(cls.reference(spec, wide(inputs) | drawn.plain))
    error = max(_error(got, want) for got, want in zip(runs[0], expected, strict=True))
    moved = any(
        not torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True)
    )
    wrong = "" if error <= ALLOWED[load.dtype] else f"an error of {error:.1e}"
    return Checked(
        cls.name, drawn.text, load, error, wrong or ("moves between runs" if moved else "")
    )


def check_gradients(
    target: Target,
    device: str = "cuda",
    lengths: tuple[int, ...] = (63, 1000),
    dtype: str = "bfloat16",
) -> Iterator[Checked]:
    """Attention forward and backward, the log-sum-exps handed on, against autograd in float64."""
    plain = AttentionSpec(8, 2, 64, 64, 0.125, CAUSAL)
    specs = (
        plain.with_(head_dim=128, v_dim=128, mask=Mask("window", left=200, sink=4)),
        plain.with_(softcap=20.0, extras=("padding", "sinks")),
        plain.with_(extras=("bias", "keep"), fill="min"),
    )
    missed = FlashPrefillBackward.supports(plain, target)
    for spec in specs:
        for length in lengths:
            load = Load(2, length, length, dtype)
            name, said = FlashPrefillBackward.name, f"forward and backward {spec.text}"
            if missed is not None:
                yield Checked(name, said, load, 0.0, skipped=missed.reason)
                continue
            try:
                error = _error_of_gradients(spec, load, target, device)
                wrong = "" if error <= 2 * ALLOWED[load.dtype] else f"an error of {error:.1e}"
            except Exception as failed:  # noqa: BLE001 (a crash is a red check, and is told)
                error, wrong = float("inf"), failure(failed)
            yield Checked(name, said, load, error, wrong)


def judged(
    name: str, spec: str, load: Load, outputs: Callable[[], list[Tensor]], wanted: list[Tensor]
) -> Checked:
    """What some way to run a kernel gives, against the reference."""
    try:
        error = max(_error(got, want) for got, want in zip(outputs(), wanted, strict=True))
    except Exception as failed:  # noqa: BLE001 (a crash is a red check, and is told)
        return Checked(name, spec, load, float("inf"), failure(failed))
    wrong = "" if error <= ALLOWED[load.dtype] else f"an error of {error:.1e}"
    return Checked(name, spec, load, error, wrong)


def _error_of_gradients(spec: AttentionSpec, load: Load, target: Target, device: str) -> float:
    given = FlashPrefill.inputs(spec, load, device)
    leaves, exact = _leaves(given), _leaves(wide(given))
    with poisoned():
        flash_attention(spec, target, *leaves).square().sum().backward()
    attend.reference(exact[0], exact[1], exact[2], exact[3:], spec).square().sum().backward()
    pairs = [(a.grad, b.grad) for a, b in zip(leaves, exact, strict=True)]
    return max(_error(a, b) for a, b in pairs if a is not None and b is not None)


def _leaves(inputs: Mapping[str, Any]) -> list[Tensor]:
    return [x.detach().requires_grad_(x.is_floating_point()) for x in inputs.values()]


def flat(outputs: Any) -> list[Tensor]:
    """What a kernel gives, without the outputs that it left out."""
    return [outputs] if isinstance(outputs, Tensor) else [x for x in outputs if x is not None]


def failure(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"


def _copied(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Kernels that write into a state or a cache get their own; parts of one tensor stay that."""
    memo: dict[int, Any] = {}
    return {k: deepcopy(v, memo) if isinstance(v, Tensor) else v for k, v in inputs.items()}


def wide(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs on the CPU, in float64."""

    def exact(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.detach().cpu().to(torch.float64 if x.is_floating_point() else x.dtype)

    return {key: exact(value) for key, value in inputs.items()}


def _error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm; infinite where a number is missing, or is there where
    the reference has an infinity."""
    got = got.detach().cpu().to(torch.float64)
    there = torch.isfinite(want)
    if got.shape != want.shape or not torch.isfinite(got[there]).all():
        return float("inf")
    if not torch.equal(got[~there], want[~there].to(got.dtype)):
        return float("inf")
    return float((got[there] - want[there]).norm() / want[there].norm().clamp_min(1e-30))
