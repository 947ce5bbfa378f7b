"""Comparing two programs that should compute the same, on the example and on variations of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from attnopt.compiler.program import Batch, Program
from attnopt.compiler.raising.evaluate import example_input, example_sizes, resized

DOUBLE_LIMIT = 60_000_000  # parameters up to which programs are also compared in float64
CELLS = 512  # positions per compared batch: rows beyond that are left out, longer rows are cut
BOUND = {torch.float64: 1e-8, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}
_KNOWN: WeakKeyDictionary[torch.nn.Module, dict[torch.dtype, list[Any]]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Comparison:
    """`error` is max |difference| over the outputs' root mean square; `bound` what was allowed, in
    `dtype`."""

    error: float
    bound: float
    dtype: torch.dtype

    @property
    def same(self) -> bool:
        """Whether the two programs agree; NaN never does."""
        return self.error <= self.bound


def compare(before: Program, after: Program, valid_only: bool = False) -> Comparison:
    """Run both on every variation: in float64 where it fits and the graph allows it, else in the
    model's dtype."""
    parameters = sum(p.numel() for p in before.module.parameters())
    if parameters <= DOUBLE_LIMIT:
        double = _compare(before, after, torch.float64, valid_only)
        if double.same:
            return double
    return _compare(before, after, _dtype(before), valid_only)


def _compare(before: Program, after: Program, dtype: torch.dtype, valid_only: bool) -> Comparison:
    worst = 0.0
    batches = list(variations(before, dtype))
    pairs = zip(_outputs(before, batches, dtype), _outputs(after, batches, dtype), strict=True)
    for batch, (expected, actual) in zip(batches, pairs, strict=True):
        error = difference(expected, actual, batch.valid if valid_only else None)
        if not error <= worst:
            worst = error
    return Comparison(worst, BOUND.get(dtype, 2e-5), dtype)


def _outputs(program: Program, batches: list[Batch], dtype: torch.dtype) -> list[Any]:
    """The program's outputs; kept while it lives, since the next pass is compared with the same
    one."""
    known = _KNOWN.setdefault(program.module, {})
    if dtype not in known:
        run = _double(program) if dtype is torch.float64 else program
        known[dtype] = [run.run(batch) for batch in batches]
    return known[dtype]


def difference(expected: Any, actual: Any, valid: Tensor | None = None) -> float:
    """Largest |difference| of two output structures over the first one's root mean square; NaN when
    either has NaN.

    With `valid` `[batch, seq]`, outputs that begin with these two dims are compared at the valid
    positions only.
    """
    worst = 0.0
    pairs = zip(pytree.tree_leaves(expected), pytree.tree_leaves(actual), strict=True)
    for a, b in pairs:
        if not isinstance(a, Tensor):
            continue
        if a.shape != b.shape:
            return float("inf")
        if valid is not None and a.dim() >= 2 and a.shape[:2] == valid.shape:
            a, b = a[valid], b[valid]
        if a.numel() == 0:
            continue
        a, b = a.double(), b.double()
        scale = max(float(a.square().mean().sqrt()), 1e-12)
        error = float((a - b).abs().max()) / scale
        if not error <= worst:
            worst = error
    return worst


def variations(program: Program, dtype: torch.dtype | None = None) -> Iterator[Batch]:
    """The example with at most `CELLS` positions, the same at two other sizes, and both paddings of
    the first."""
    names = [n for n in program.graph.nodes if n.op == "placeholder"]
    tree = pytree.tree_structure((program.example.args, dict(program.example.kwargs)))
    for i, sizes in enumerate(_sizes(program)):
        leaves = []
        for node in _in_call_order(program, names):
            value = example_input(program, node)
            if isinstance(value, Tensor):
                shape = list(value.shape)
                for dim, symbol in program.dynamic.get(node.name, {}).items():
                    shape[dim] = sizes.get(symbol, shape[dim])
                value = _cast(resized(value, shape), dtype)
            leaves.append(value)
        args, kwargs = pytree.tree_unflatten(leaves, tree)
        batch = Batch(args, kwargs, _valid(kwargs))
        yield batch
        if batch.valid is not None and i == 0:
            yield from _padded(batch)


def _sizes(program: Program) -> list[dict[str, int]]:
    """Symbol sizes to compare at: the example's with rows left out, about half of every length, and
    a few more."""
    sizes = example_sizes(program)
    rows = {dims[0] for dims in program.dynamic.values() if 0 in dims}
    sizes = {s: n if s in rows else min(n, CELLS) for s, n in sizes.items()}
    longest = max((n for s, n in sizes.items() if s not in rows), default=1)
    few = max(2, CELLS // longest)
    first = {s: min(n, few) if s in rows else n for s, n in sizes.items()}
    half = {s: n if s in rows else max(2, n // 2 + 1) for s, n in first.items()}
    more = {s: n + 1 if s in rows else min(n, 64) + 3 for s, n in first.items()}
    return [first, half, more]


def _in_call_order(program: Program, nodes: list[Any]) -> list[Any]:
    if {n.name for n in nodes} != set(program.example.kwargs):
        return nodes
    by_name = {n.name: n for n in nodes}
    return [by_name[name] for name in program.example.kwargs]


def _padded(batch: Batch) -> Iterator[Batch]:
    """The batch with its rows cut to different lengths, padded on the right and on the left."""
    mask = batch.kwargs["attention_mask"]
    length = mask.shape[1]
    real = (
        torch.arange(length)[None, :]
        < torch.tensor([max(1, length - i * 2) for i in range(len(mask))])[:, None]
    )
    for keep in (real, real.flip(1)):
        kwargs = {**batch.kwargs, "attention_mask": keep.to(mask.dtype)}
        yield Batch(batch.args, kwargs, keep)


def _valid(kwargs: Any) -> Tensor | None:
    mask = kwargs.get("attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _double(program: Program) -> Program:
    return replace(program, module=copy.deepcopy(program.module).double())


def _cast(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    return value.to(dtype) if dtype is not None and value.is_floating_point() else value


def _dtype(program: Program) -> torch.dtype:
    return next(
        (p.dtype for p in program.module.parameters() if p.is_floating_point()), torch.float32
    )
