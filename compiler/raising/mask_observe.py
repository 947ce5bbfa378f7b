"""What a mask looks like at a few lengths and paddings: no proof, but a name for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from attnopt.compiler.program import Program
from attnopt.compiler.raising.absolute import reads_data
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
    try:
        seen = [
            _seen(program, spec, named, sizes, attention) for sizes in _trials(program, attention)
        ]
    except Unknown as error:
        return MaskFacts(None, text="tensor", reason=str(error), certainty="observed")
    mask = _class_of([one.keep for one in seen])
    padding, bias, fill = seen[0].padding, seen[0].bias, seen[0].fill
    same = all((one.padding, one.bias) == (padding, bias) and not one.mixed for one in seen)
    if mask is None or not same:
        return MaskFacts(None, text="tensor", bias="bias" in named, certainty="observed")
    kind = bias_kind(program, attention, named["bias"]) if bias else ""
    facts = MaskFacts(mask, padding, fill, bias, "observed")
    return replace(facts, text=mask_text(facts, kind))


def bias_kind(program: Program, attention: fx.Node, node: fx.Node) -> str:
    """ "alibi" (linear in j, where a number per query makes no difference), "relative-bias" (a
    function of j - i, or of the two distances on a grid) or "tensor", per head, as seen at one
    length.
    """
    if reads_data(node):
        return "tensor"
    try:
        value = Evaluator(program, small_sizes(program, attention, LENGTHS[1]))(node)
    except Unknown:
        return "tensor"
    if value.dim() < 2 or value.shape[-1] < 3:
        return "tensor"
    value = torch.where(value <= DROPPED, float("nan"), value.double())
    ramps = value[..., 1:] - value[..., :-1]
    slopes = ramps[..., -1:, :1].expand_as(ramps)
    if _same(ramps, torch.where(ramps.isnan(), ramps, slopes)) and bool(slopes.abs().sum() > 0):
        return "alibi"
    if value.shape[-2] < 3 or value.shape[-2] != value.shape[-1]:
        return "tensor"
    # A token of the whole image may come before those of the grid.
    grids = (value, value[..., 1:, 1:]) if value.shape[-1] > 4 else (value,)
    return "relative-bias" if any(_on_grid(each) for each in grids) else "tensor"


def _on_grid(value: Tensor) -> bool:
    """Whether `[.., S, S]` depends on the distance of query and key alone, for some width of a grid
    that they lie on row by row."""
    length = value.shape[-1]
    for width in (w for w in range(1, length + 1) if length % w == 0):
        laid = value.unflatten(-1, (-1, width)).unflatten(-3, (-1, width))  # [.., y, x, y', x']
        down = _same(laid[..., 1:, :, 1:, :], laid[..., :-1, :, :-1, :])
        if down and _same(laid[..., 1:, :, 1:], laid[..., :-1, :, :-1]):
            return True
    return False


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
    lengths = {sizes.get(_symbol(attention, operand, 2), -1) for operand in (0, 1)}
    return {name: length for name, size in sizes.items() if size in lengths}


def _trials(program: Program, attention: fx.Node) -> list[dict[str, int]]:
    """Symbol sizes to look at: as many keys as queries, the example's own lengths, and other
    numbers of keys than queries where the two are free.
    """
    found = [small_sizes(program, attention, length) for length in LENGTHS]
    rows, queries, keys = (_symbol(attention, *at) for at in ((0, 0), (0, 2), (1, 2)))
    found.append({rows: min(2, example_sizes(program).get(rows, 2))} if rows else {})
    if queries and keys and queries != keys:
        few, many = LENGTHS[:2]
        found += [{queries: few, keys: many}, {queries: many, keys: few}]
    return found


def _symbol(attention: fx.Node, operand: int, dim: int) -> str:
    """The symbol that one size of an operand is, empty where it is none."""
    size = attention.args[operand].meta["val"].shape[dim]  # type: ignore[union-attr]
    free = isinstance(size, torch.SymInt) and size.node.expr.is_Symbol
    return str(size.node.expr) if free else ""


@dataclass(frozen=True)
class _Seen:
    """A mask at given sizes: the keys kept, `[batch, heads, S, T]`, with all inputs real.

    `padding` names the one input that drops its padded keys, and `mixed` says that some input does
    something else; `bias` says that real numbers are added.
    """

    keep: Tensor
    bias: bool
    fill: Fill
    padding: str | None = None
    mixed: bool = False


def _seen(
    program: Program,
    spec: AttentionSpec,
    named: Mapping[str, fx.Node],
    sizes: Mapping[str, int],
    attention: fx.Node,
) -> _Seen:
    sources = _masks_among_inputs(program, named)
    whole = {node.name: _ones(program, node, sizes) for node in sources}
    keep, bias, fill = _evaluate(program, sizes, whole, named, spec, attention)
    padding: str | None = None
    for node in sources:
        planted = dict(whole)
        planted[node.name] = real = _planted(whole[node.name])
        padded, _, _ = _evaluate(program, sizes, planted, named, spec, attention)
        if torch.equal(padded, keep):
            continue
        if padding is not None or not torch.equal(padded, keep & real.bool()[:, None, None, :]):
            return _Seen(keep, bias, fill, mixed=True)
        padding = node.name
    return _Seen(keep, bias, fill, padding)


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


def _class_of(seen: Sequence[Tensor]) -> Mask | None:
    """The class of masks [batch, heads, S, T] that are the same for every sequence and head."""
    firsts = [keep[0, 0] for keep in seen]
    if not all(bool((keep == first).all()) for keep, first in zip(seen, firsts, strict=True)):
        return None
    longest = firsts[len(LENGTHS) - 1]
    for mask in _classes(longest):
        if all(torch.equal(mask.dense(*first.shape), first) for first in firsts):
            return mask
    return None


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
