"""Comparing two programs that should compute the same, on the example and on variations of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from attnopt.compiler.ops import ATTENTION
from attnopt.compiler.packed_ops import PACKED_ATTENTION
from attnopt.compiler.program import Batch, Program
from attnopt.compiler.raising.evaluate import example_input, example_sizes, resized
from attnopt.compiler.raising.mask import classify
from attnopt.compiler.raising.mask_facts import Test
from attnopt.compiler.spec import parse_spec

LIMITS = {torch.float64: 60_000_000, torch.float32: 600_000_000}  # parameters compared in it
CELLS = 512  # positions per compared batch: rows beyond that are left out, longer rows are cut
BOUND = {torch.float64: 1e-8, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_TESTS = ("eq", "ne", "lt", "le", "gt", "ge")
RUN_ERRORS = (RuntimeError, IndexError, ValueError, TypeError, KeyError, AssertionError)


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


@dataclass(frozen=True)
class _Runs:
    """The batches that a program could be run on in `dtype`, wholly cast to it or as it is, and its
    outputs."""

    dtype: torch.dtype
    cast: bool
    batches: list[Batch]
    outputs: list[Any]


_LAST: WeakKeyDictionary[torch.nn.Module, _Runs] = WeakKeyDictionary()  # one program at most


def compare(before: Program, after: Program, valid_only: bool = False) -> Comparison:
    """Run both on every variation that `before` can run, in the widest dtype that both run in.

    What a wider dtype refutes is not asked again in a narrower one: rounding is no excuse there.
    """
    own = own_dtype(before)
    for dtype, cast in _forms(before):
        runs = _runs(before, dtype, cast)
        if runs is None:
            continue
        outputs = _outputs(widened(after, dtype) if cast else after, runs.batches)
        if outputs is None and cast:
            continue
        worst = math.inf
        if outputs is not None:
            worst = 0.0
            for batch, expected, actual in zip(runs.batches, runs.outputs, outputs, strict=True):
                valid = batch.valid if valid_only else None
                worst = max(worst, difference(expected, actual, valid))
        result = Comparison(worst, BOUND.get(dtype, 2e-5), dtype)
        _LAST.clear()  # the next pass is compared with the one of the two that stays
        kept = runs if outputs is None else replace(runs, outputs=outputs)
        _LAST[after.module if result.same else before.module] = kept if result.same else runs
        return result
    return Comparison(math.inf, 0.0, own)


def _forms(program: Program) -> list[tuple[torch.dtype, bool]]:
    """The dtypes to compare in, the widest first and the model's own last, each with whether the
    whole program is cast to it: a float64 model may have narrower parts."""
    count = sum(p.numel() for p in program.module.parameters())
    own = own_dtype(program)
    wider = [d for d, most in LIMITS.items() if count <= most and d.itemsize >= own.itemsize]
    cast = [dtype for dtype in wider if dtype is not own or own is torch.float64]
    return [*((dtype, True) for dtype in cast), (own, False)]


def _runs(program: Program, dtype: torch.dtype, cast: bool) -> _Runs | None:
    """The program on all variations that it takes, since not every size need be one that it takes;
    None when it does not run cast to this dtype."""
    known = _LAST.get(program.module)
    if known is not None and (known.dtype, known.cast) == (dtype, cast):
        return known
    made = widened(program, dtype) if cast else program
    batches, outputs = list[Batch](), list[Any]()
    wanted = dtype if cast else None

    for batch in variations(program, wanted):
        _run(made, batch, batches, outputs)
    if not batches:  # sizes that hang together in ways that no variation knows
        _run(made, _example(program, wanted), batches, outputs)
    return _Runs(dtype, cast, batches, outputs) if batches else None


def _run(program: Program, batch: Batch, batches: list[Batch], outputs: list[Any]) -> None:
    """Run a batch and keep it with its outputs, where the program takes it."""
    with suppress(*RUN_ERRORS):
        outputs.append(program.run(batch))
        batches.append(batch)


def _outputs(program: Program, batches: list[Batch]) -> list[Any] | None:
    try:
        return [program.run(batch) for batch in batches]
    except RUN_ERRORS:
        return None


def difference(expected: Any, actual: Any, valid: Tensor | None = None) -> float:
    """Largest |difference| of two output structures over the first one's root mean square; infinite
    when either has NaN.

    With `valid` `[batch, seq]`, outputs that begin with these two dims are compared at the valid
    positions only.
    """
    worst = 0.0
    pairs = zip(pytree.tree_leaves(expected), pytree.tree_leaves(actual), strict=True)
    for a, b in pairs:
        if not isinstance(a, Tensor):
            continue
        if a.shape != b.shape:
            return math.inf
        if valid is not None and a.dim() >= 2 and a.shape[:2] == valid.shape:
            a, b = a[valid], b[valid]
        if a.numel() == 0:
            continue
        a, b = a.double(), b.double()
        scale = max(float(a.square().mean().sqrt()), 1e-12)
        error = float((a - b).abs().max()) / scale
        if not math.isfinite(error) or not math.isfinite(scale):
            return math.inf
        worst = max(worst, error)
    return worst


def variations(program: Program, dtype: torch.dtype | None = None) -> Iterator[Batch]:
    """The example with at most `CELLS` positions, the same at two other sizes, and both paddings of
    the first."""
    names = [n for n in program.graph.nodes if n.op == "placeholder"]
    tree = pytree.tree_structure((program.example.args, dict(program.example.kwargs)))
    order = _in_call_order(program, names)
    padding = padding_input(program)
    for i, sizes in enumerate(_sizes(program)):
        leaves = []
        for node in order:
            value = example_input(program, node)
            if isinstance(value, Tensor):
                shape = list(value.shape)
                for dim, symbol in program.dynamic.get(node.name, {}).items():
                    shape[dim] = sizes.get(symbol, shape[dim])
                value = _cast(resized(value, shape), dtype)
            leaves.append(value)
        if padding is None:
            yield _batch(leaves, tree)
            continue
        at, test = order.index(padding[0]), padding[1]
        for mask in (leaves[at], *(_padded(leaves[at], test) if i == 0 else ())):
            leaves[at] = mask
            yield _batch(leaves, tree, _real(mask, test))


def _example(program: Program, dtype: torch.dtype | None) -> Batch:
    """The example as it is, in a dtype."""
    args, kwargs = pytree.tree_map(
        lambda x: _cast(x, dtype) if isinstance(x, Tensor) else x,
        (program.example.args, dict(program.example.kwargs)),
    )
    return Batch(args, kwargs, program.example.valid)


def _batch(leaves: list[Any], tree: Any, valid: Tensor | None = None) -> Batch:
    args, kwargs = pytree.tree_unflatten(leaves, tree)
    return Batch(args, kwargs, valid)


def padding_input(program: Program) -> tuple[fx.Node, Test] | None:
    """The input `[batch, seq]` that says which positions are real, and how it says so: by its name,
    or as the attentions were proved to read it."""
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name == "attention_mask" and _rank(node) == 2:
            return node, Test()
    for attention in program.attentions():
        facts = classify(program, attention)
        if facts.padding is None:
            continue
        source, test = program.node(facts.padding), facts.test
        name = str(getattr(source.target, "overloadpacket", "")).rpartition(".")[2]
        if name in _TESTS and isinstance(source.args[0], fx.Node) and len(source.args) == 2:
            test = Test(name, source.args[1])  # type: ignore[arg-type]
            source = source.args[0]
        if source.op == "placeholder" and _rank(source) == 2 and (test.batch, test.keys) == (0, 1):
            return source, test
    return None


def _rank(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else 0


def _real(value: Tensor, test: Test) -> Tensor:
    found: Tensor = getattr(torch, test.op)(value, test.value)
    return found


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


def _padded(mask: Tensor, test: Test) -> Iterator[Tensor]:
    """The padding input with the rows cut to different lengths, padded on the right and on the
    left."""
    samples = torch.tensor([0, 1, test.value, test.value + 1]).to(mask.dtype)
    says = _real(samples, test)
    if says.all() or not says.any():
        return
    length = mask.shape[1]
    ends = torch.tensor([max(1, length - i * 2) for i in range(len(mask))])
    right = torch.arange(length)[None, :] < ends[:, None]
    for keep in (right.to(mask.device), right.flip(1).to(mask.device)):
        real = torch.where(_real(mask, test), mask, samples[says][0])
        yield torch.where(keep, real, samples[~says][0])


def widened(program: Program, dtype: torch.dtype) -> Program:
    """The program computed in a wider dtype throughout: the dtypes that its graph fixes are widened
    as well."""
    module = copy.deepcopy(program.module).to(dtype)
    for node in module.graph.nodes:
        if node.target is not torch.ops.aten.view.dtype:  # that one reads bits
            node.args = map_aggregate(node.args, lambda a: _widened(a, dtype))
            node.kwargs = map_aggregate(node.kwargs, lambda a: _widened(a, dtype))
        if node.target in (ATTENTION, PACKED_ATTENTION):
            spec = parse_spec(str(node.args[4])).with_(softmax32=False)
            node.update_arg(4, spec.text)
    module.recompile()
    return replace(program, module=module)


def _widened(value: Any, dtype: torch.dtype) -> Any:
    return dtype if isinstance(value, torch.dtype) and value in FLOATS else value


def _cast(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    return value.to(dtype) if dtype is not None and value.is_floating_point() else value


def own_dtype(program: Program) -> torch.dtype:
    """The dtype of the first floating-point parameter."""
    return next(
        (p.dtype for p in program.module.parameters() if p.is_floating_point()), torch.float32
    )
