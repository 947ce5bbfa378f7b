"""What a mask looks like at a few lengths and paddings: no proof, but a name for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, fx

from attnopt.compiler.program import Program
from attnopt.compiler.raising.evaluate import (
    Evaluator,
    Unknown,
    concrete,
    example_input,
    example_sizes,
)
from attnopt.compiler.raising.mask_facts import MaskFacts, mask_text
from attnopt.compiler.spec import CAUSAL, FULL, AttentionSpec, Fill, Mask

LENGTHS = (9, 14, 23)
DROPPED = -1e4


def observe(
    program: Program, attention: fx.Node, spec: AttentionSpec, named: Mapping[str, fx.Node]
) -> MaskFacts:
    """The class that the mask has at every length tried, or `mask=None` when it has none of them at
    some.
    """
    found: set[tuple[Mask | None, str | None, bool]] = set()
    fill = spec.fill
    try:
        for length in LENGTHS:
            seen, fill = _seen(program, attention, spec, named, length)
            found.add(seen)
    except Unknown as error:
        return MaskFacts(None, text="tensor", reason=str(error), certainty="observed")
    if len(found) > 1:
        return MaskFacts(None, text="tensor", bias="bias" in named, certainty="observed")
    ((mask, padding, bias),) = found
    kind = bias_kind(program, attention, named["bias"]) if bias else ""
    facts = MaskFacts(mask, padding, fill, bias, "observed")
    return replace(facts, text=mask_text(facts, kind))


def bias_kind(program: Program, attention: fx.Node, node: fx.Node) -> str:
    """ "alibi" (linear in j - i), "relative-bias" (a function of j - i) or "tensor", per head, as
    seen at one length.
    """
    length = LENGTHS[1]
    try:
        value = Evaluator(program, small_sizes(program, attention, length))(node)
    except Unknown:
        return "tensor"
    if value.dim() < 2 or value.shape[-2] < 3 or value.shape[-1] < 3:
        return "tensor"
    value = torch.where(value <= DROPPED, float("nan"), value.double())
    if not _same(value[..., 1:, 1:], value[..., :-1, :-1]):
        return "tensor"
    ramps = value[..., 1:] - value[..., :-1]
    first = ramps[..., 1:2, 0:1] if value.dim() > 1 else ramps
    linear = _same(ramps, first.expand_as(ramps)) and bool((first != 0).any())
    return "alibi" if linear else "relative-bias"


def drops(program: Program, attention: fx.Node, node: fx.Node) -> bool:
    """Whether an added tensor was seen to drop keys, with whole inputs and with padded ones, or
    could not be run.
    """
    sizes = small_sizes(program, attention, LENGTHS[1])
    whole = {n.name: _ones(program, n, sizes) for n in _masks_among_inputs(program, {"": node})}
    padded = {name: _planted(value) for name, value in whole.items()}
    try:
        values = [Evaluator(program, sizes, inputs=given)(node) for given in (whole, padded)]
    except Unknown:
        return True
    return any(bool((value <= DROPPED).any()) for value in values)


def small_sizes(program: Program, attention: fx.Node, length: int) -> dict[str, int]:
    """Symbol sizes that set every symbol with the example's number of queries or keys to
    `length`.
    """
    sizes = example_sizes(program)
    lengths: set[int] = set()
    for operand, dim in ((0, 2), (1, 2)):
        size = attention.args[operand].meta["val"].shape[dim]  # type: ignore[union-attr]
        if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
            lengths.add(sizes.get(str(size.node.expr), -1))
    return {name: length for name, size in sizes.items() if size in lengths}


def _seen(
    program: Program,
    attention: fx.Node,
    spec: AttentionSpec,
    named: Mapping[str, fx.Node],
    length: int,
) -> tuple[tuple[Mask | None, str | None, bool], Fill]:
    sizes = small_sizes(program, attention, length)
    sources = _masks_among_inputs(program, named)
    whole = {node.name: _ones(program, node, sizes) for node in sources}
    keep, bias, fill = _evaluate(program, sizes, whole, named, spec, attention)
    mask = _class_of(keep)
    padding: str | None = None
    for node in sources:
        planted = dict(whole)
        planted[node.name] = real = _planted(whole[node.name])
        padded, _, _ = _evaluate(program, sizes, planted, named, spec, attention)
        if torch.equal(padded, keep):
            continue
        if padding is not None or not torch.equal(padded, keep & real.bool()[:, None, None, :]):
            return (None, None, bias), fill
        padding = node.name
    return (mask, padding, bias), fill


def _evaluate(
    program: Program,
    sizes: Mapping[str, int],
    inputs: Mapping[str, Tensor],
    named: Mapping[str, fx.Node],
    spec: AttentionSpec,
    attention: fx.Node,
) -> tuple[Tensor, bool, Fill]:
    """Which keys are kept [batch, heads, S, T], whether real numbers are added, and what the
    dropped become.
    """
    run = Evaluator(program, sizes, inputs=inputs)
    shapes = [_concrete(run, attention.args[n]) for n in (0, 1)]
    keep = spec.mask.dense(shapes[0][2], shapes[1][2])[None, None]
    bias, fill = False, spec.fill
    for name, node in named.items():
        value = run(node)
        if name == "bias":
            dropped = value <= DROPPED
            bias = bool((value.masked_fill(dropped, 0) != 0).any())
            fill = "min" if bool((value[dropped] > float("-inf")).any()) else fill
            value = ~dropped
        keep = keep & (value[:, None, None, :] if name == "padding" else value)
    return keep.expand(shapes[0][0], -1, -1, -1), bias, fill


def _concrete(run: Evaluator, node: object) -> list[int]:
    assert isinstance(node, fx.Node)
    return [concrete(size, run.sizes) for size in node.meta["val"].shape]


def _class_of(keep: Tensor) -> Mask | None:
    """The class of a mask [batch, heads, S, T] that is the same for every sequence and head."""
    first = keep[0, 0]
    if not bool((keep == first).all()):
        return None
    return next((m for m in _classes(first) if torch.equal(m.dense(*first.shape), first)), None)


def _classes(keep: Tensor) -> Iterator[Mask]:
    yield from (FULL, CAUSAL)
    most = int(keep.sum(-1).max())
    for sink in range(most):
        for left in range(1, most + 1):
            yield Mask("window", left, sink)
            yield Mask("window", left, sink, causal=False)


def _masks_among_inputs(program: Program, named: Mapping[str, fx.Node]) -> list[fx.Node]:
    """The truth-valued or whole-number inputs [batch, keys] that the mask reads and that look like
    masks.
    """
    seen: set[fx.Node] = set()
    waiting = list(named.values())
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += node.all_input_nodes
    found = []
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node not in seen or node.op != "placeholder" or not isinstance(value, Tensor):
            continue
        if value.dim() == 2 and not value.is_floating_point() and _zero_one(program, node):
            found.append(node)
    return found


def _zero_one(program: Program, node: fx.Node) -> bool:
    value = example_input(program, node)
    return isinstance(value, Tensor) and bool(((value == 0) | (value == 1)).all())


def _ones(program: Program, node: fx.Node, sizes: Mapping[str, int]) -> Tensor:
    value = Evaluator(program, sizes)(node)
    return torch.ones_like(value)


def _planted(ones: Tensor) -> Tensor:
    """Right padding in the first sequence, left padding in the second."""
    real = ones.clone()
    third = max(1, ones.shape[1] // 3)
    real[0, -third:] = 0
    if len(real) > 1:
        real[1, :third] = 0
    return real


def _same(a: Tensor, b: Tensor) -> bool:
    return bool(torch.isclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True).all())
