"""Whether the raised program computes what the model as given does: asked once, after reading it.

What raising made of an attention is taken back where it computes something else; a trace that does
so itself is refused. Everything later is compared with the raised program alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from attnopt.compiler.errors import Problem
from attnopt.compiler.intake.loaded import Loaded, describe
from attnopt.compiler.program import Batch, Program
from attnopt.compiler.raising import raise_program
from attnopt.compiler.raising.anchor import Anchor, anchors
from attnopt.compiler.trace import slow_paths
from attnopt.compiler.verify import (
    LIMITS,
    RUN_ERRORS,
    compare,
    difference,
    own_dtype,
    variations,
)

# What another order of sums may do to a deep model; another function does more.
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.25}


def faithful(loaded: Loaded, traced: Program, raised: Program) -> Program:
    """The raised program, less the attentions whose raised form computes something else.

    Raises `Problem` A205 when the trace itself does not compute what the model does.
    """
    if loaded.weights == "meta":
        return raised
    given = list(_given(loaded, traced))
    allowed = ROUNDING.get(own_dtype(traced), 1e-3)
    if all(_apart(raised, batch, outputs) <= allowed for batch, outputs in given):
        # Half precision hides what a wider dtype shows of the sites.
        half = own_dtype(traced).itemsize < 4 and _size(traced) <= LIMITS[torch.float32]
        return _without_wrong_sites(traced, raised, given) if half else raised
    for batch, outputs in given:
        error = _apart(traced, batch, outputs)
        if error > allowed:
            raise Problem(
                "A205",
                f"the traced graph of {loaded.name} does not compute what the model does",
                why=f"its outputs differ by {error:.1e} of their rms on "
                f"{describe(batch.args, dict(batch.kwargs))}",
                help="a forward pass that draws random numbers, keeps state between calls or "
                "branches on sizes cannot be traced",
            )
    return _without_wrong_sites(traced, raised, given)


def _given(loaded: Loaded, traced: Program) -> Iterator[tuple[Batch, Any]]:
    """Batches that the model takes, with its own outputs."""
    model: Any = loaded.module
    if model is None:
        assert loaded.exported is not None
        model = loaded.exported.module(check_guards=False)
    first, *more = variations(traced)
    some = (
        more[-3:-1] if _size(traced) <= LIMITS[torch.float32] else []
    )  # padded, and of another size
    for batch in (first, *some):
        args, kwargs = _copied((batch.args, dict(batch.kwargs)))
        try:
            with torch.no_grad(), slow_paths():
                outputs = model(*args, **kwargs)
        except RUN_ERRORS:
            continue  # not a size that it takes
        yield batch, outputs


def _size(program: Program) -> int:
    return sum(p.numel() for p in program.module.parameters())


def _apart(program: Program, batch: Batch, expected: Any) -> float:
    """The difference from the model's outputs wherever these are numbers."""
    args, kwargs = _copied((batch.args, dict(batch.kwargs)))
    try:
        actual = program.run(Batch(args, kwargs))
    except RUN_ERRORS:
        return float("inf")
    both = [_tensors(expected), _tensors(actual)]
    if [x.shape for x in both[0]] != [x.shape for x in both[1]]:
        return float("inf")
    pairs = [_numbers(a, b) for a, b in zip(*both, strict=True)]
    return difference([a for a, _ in pairs], [b for _, b in pairs])


def _numbers(expected: Tensor, actual: Tensor) -> tuple[Tensor, Tensor]:
    free = expected.isnan() | (expected.isinf() & (expected == actual))
    return expected.masked_fill(free, 0), actual.masked_fill(free, 0)


def _without_wrong_sites(
    traced: Program, raised: Program, given: Sequence[tuple[Batch, Any]]
) -> Program:
    """Raise each attention alone, and leave those that differ as they were traced."""
    if _off(traced, raised, given) is None:
        return raised
    found = anchors(traced.graph, traced.module)
    names = [anchor.out.name for anchor in found if isinstance(anchor, Anchor)]
    wrong: dict[str, str] = {}
    for name in names:
        alone = raise_program(traced, dict.fromkeys(set(names) - {name}, ""))
        error = _off(traced, alone, given)
        if error is not None:
            wrong[name] = f"its raised form computes something else (difference {error:.1e})"
    kept = raise_program(traced, wrong)
    error = _off(traced, kept, given)
    if error is None:
        return kept
    reason = f"the raised forms together compute something else (difference {error:.1e})"
    return raise_program(traced, dict.fromkeys(names, reason) | wrong)


def _off(traced: Program, raised: Program, given: Sequence[tuple[Batch, Any]]) -> float | None:
    """The difference where it is more than rounding; infinite where it does not run as it is."""
    if any(math.isinf(_apart(raised, batch, outputs)) for batch, outputs in given):
        return math.inf
    result = compare(traced, raised)
    return None if result.error <= ROUNDING.get(result.dtype, 1e-3) else result.error


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _copied(inputs: Any) -> Any:
    return pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, inputs)
