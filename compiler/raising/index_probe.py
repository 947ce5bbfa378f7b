"""The index probe: which projection channel is which (head, dim), found by what the graph computes.

Numbers that name channels are put at a projection's output and read at the attention's operand.
Rotary embeddings are the identity at position 0, and norms are held at fixed statistics, so what is
left there is an index map times one factor per dim; the factor is measured with ones and divided
out. Fused, split and interleaved QKV all come out alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx
from torch.utils._sympy.functions import FloorDiv

from attnopt.compiler.layout import same_size
from attnopt.compiler.program import Program, attribute
from attnopt.compiler.raising.evaluate import Evaluator, Unknown, concrete, example_sizes
from attnopt.compiler.raising.projections import Projection

aten = torch.ops.aten
CASTS = (
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten._to_copy.default,
    aten.type_as.default,
)  # fmt: skip
_STATISTICS = (
    aten.mean.dim, aten.mean.default, aten.sum.dim_IntList, aten.var.correction, aten.var.dim,
    aten.std.correction, aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim,
)  # fmt: skip
_CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.convolution.default)
_NORMS = (aten.rms_norm.default, aten.layer_norm.default)


class Linearised:
    """The graph downstream of one projection, in float64, with every norm held at fixed statistics.
    What is computed without weights, as tables of a rotary embedding are, is not rounded to 16
    bits.

    `at(y)` answers an evaluator in which the projection gives `y` (the projection node's own shape
    at `sizes`). `normed` turns True once a norm was met between the projection and what was
    evaluated.
    """

    def __init__(
        self, program: Program, source: Projection, between: set[fx.Node], sizes: dict[str, int]
    ) -> None:
        self.program, self.source, self.between = program, source, between
        self.sizes = {**example_sizes(program), **sizes}
        self.normed = False
        self._weightless: dict[fx.Node, bool] = {}

    def weightless(self, node: fx.Node) -> bool:
        """Whether a node's value depends on no parameter."""
        stack = [node]
        while stack:
            top = stack[-1]
            waiting = [n for n in top.all_input_nodes if n not in self._weightless]
            stack.extend(waiting)
            if not waiting:
                stack.pop()
                self._weightless[top] = not self._is_parameter(top) and all(
                    self._weightless[n] for n in top.all_input_nodes
                )
        return self._weightless[node]

    def _is_parameter(self, node: fx.Node) -> bool:
        held = node.op == "get_attr" and attribute(self.program.module, str(node.target))
        return isinstance(held, torch.nn.Parameter)

    def shape(self) -> list[int]:
        """The shape of the projection's output. Raises Unknown where nothing is left of it."""
        made = [concrete(size, self.sizes) for size in self.source.node.meta["val"].shape]
        if any(size < 1 for size in made):
            raise Unknown(f"`{self.source.node.name}` is empty at the sizes of the probe")
        return made

    def at(self, y: Tensor) -> Evaluator:
        """An evaluator with the projection's output given."""
        return _Held(self, y)


class _Held(Evaluator):
    def __init__(self, owner: Linearised, y: Tensor) -> None:
        super().__init__(owner.program, owner.sizes, {owner.source.node: y})
        self.owner = owner

    def _input(self, node: fx.Node) -> Any:
        """Positions that are given as an input are counted: what is asked is what they do."""
        value = super()._input(node)
        whole = isinstance(value, Tensor) and not value.is_floating_point() and value.dim() > 0
        if "position" not in node.name or not whole:
            return value
        return torch.arange(value.shape[-1], dtype=value.dtype).expand_as(value)

    def _run(self, node: fx.Node) -> Any:
        if node not in self.owner.between:
            wide = self._unrounded(node)
            return wide if wide is not None else super()._run(node)
        if node.target in _CONVOLUTIONS:
            raise Unknown(f"the convolution `{node.name}` stands behind the projection")
        source = self.values.get(node.args[0]) if isinstance(node.args[0], fx.Node) else None
        if node.target in CASTS and isinstance(source, Tensor) and source.is_floating_point():
            return source
        if node.target in _STATISTICS:
            self.owner.normed = True
            return torch.ones_like(super()._run(node))
        if node.target in _NORMS and source is not None:
            self.owner.normed = True
            weight = node.args[2] if len(node.args) > 2 else None
            return source * self.values[weight].double() if isinstance(weight, fx.Node) else source
        return super()._run(node)

    def _unrounded(self, node: fx.Node) -> Tensor | None:
        """What a cast to 16 bits is given, where it was computed without weights."""
        made = node.meta.get("val")
        narrow = isinstance(made, Tensor) and made.dtype in (torch.float16, torch.bfloat16)
        if node.target not in CASTS or not narrow or not self.owner.weightless(node):
            return None
        source = self.values.get(node.args[0]) if isinstance(node.args[0], fx.Node) else None
        wide = isinstance(source, Tensor) and source.is_floating_point()
        return source if wide else None


@dataclass(frozen=True)
class Channels:
    """`index` int64 `[heads, dim]`: the projection channel behind (head, dim) of an operand;
    `factor` `[heads, dim]` float64."""

    index: Tensor
    factor: Tensor


def channels(held: Linearised, operand: fx.Node) -> Channels:
    """The channel map of an operand `[batch, heads, seq, dim]`.

    Raises Unknown with the reason when it is not one.
    """
    code, ones, zero = (held.at(y)(operand).double() for y in _codes(held))
    code, ones = code - zero, ones - zero
    if code.dim() != 4:
        raise Unknown(f"`{operand.name}` has rank {code.dim()}")
    touched = (ones != 0).any(dim=3).any(dim=1).nonzero()
    if len(touched) != 1:
        raise Unknown(
            f"one token of `{held.source.node.name}` reaches {len(touched)} tokens "
            f"of `{operand.name}`"
        )
    batch, token = (int(i) for i in touched[0])
    factor, value = ones[batch, :, token, :], code[batch, :, token, :]
    if (factor == 0).any():
        raise Unknown(f"some dims of `{operand.name}` do not depend on `{held.source.node.name}`")
    index = value / factor - 1
    rounded = index.round()
    off = float((index - rounded).abs().max())
    if off > 0.01 or rounded.min() < 0 or rounded.max() >= held.source.width:
        raise Unknown(f"`{operand.name}` is not an index map of `{held.source.node.name}`")
    return Channels(rounded.long(), factor)


def _codes(held: Linearised) -> tuple[Tensor, Tensor, Tensor]:
    zero = torch.zeros(held.shape(), dtype=torch.float64)
    ones, code = zero.clone(), zero.clone()
    width = held.source.width
    ones.view(-1, width)[0] = 1.0
    code.view(-1, width)[0] = torch.arange(1, width + 1, dtype=torch.float64)
    return code, ones, zero


def distinct(index: Tensor) -> Tensor:
    """The distinct heads of a channel map whose heads repeat in groups [a a b b ..]; the map itself
    when they do not."""
    heads = index.shape[0]
    groups = len(torch.unique(index, dim=0))
    if heads % groups:
        return index
    kept = index[:: heads // groups]
    repeated = kept.repeat_interleave(heads // groups, dim=0)
    return kept if torch.equal(repeated, index) else index


def split_node(
    held: Linearised, operand: fx.Node, index: Tensor
) -> tuple[str, Literal["bthd", "bhtd"]] | None:
    """The earliest node between projection and operand that is `index`, times one number where a
    scale comes first, with one axis per head; None when there is none."""
    code, _, _ = _codes(held)
    evaluator = held.at(code)
    wanted = index + 1
    batch, _, seq, dim = operand.meta["val"].shape
    for node in held.program.graph.nodes:
        value = node.meta.get("val")
        if node not in held.between or not isinstance(value, Tensor) or value.dim() != 4:
            continue
        if not (same_size(value.shape[0], batch) and same_size(value.shape[3], dim)):
            continue
        for order, axis in (("bthd", 1), ("bhtd", 2)):
            heads = value.shape[3 - axis]
            if not (same_size(value.shape[axis], seq) and same_size(heads, len(wanted))):
                continue
            try:
                found = evaluator(node)
            except Unknown:
                return None
            if _is_scaled(found.select(axis, 0)[0].double(), wanted):
                return node.name, order  # type: ignore[return-value]
    return None


def _is_scaled(value: Tensor, wanted: Tensor) -> bool:
    """Whether a value is the wanted one times one number other than zero."""
    factor = value.flatten()[0] / wanted.flatten()[0]
    return bool(factor != 0) and torch.equal((value / factor).round().long(), wanted)


def output_channels(
    program: Program, attention: fx.Node, source: fx.Node, sizes: dict[str, int]
) -> Tensor:
    """Input column of the output projection that (head, dim) of the attention feeds, int64 `[heads,
    v_dim]`."""
    merged = {**example_sizes(program), **sizes}
    shape = [concrete(size, merged) for size in attention.meta["val"].shape]
    heads, dim = shape[1], shape[3]
    codes = torch.arange(1, heads * dim + 1, dtype=torch.float64).view(heads, dim)
    given = torch.zeros(shape, dtype=torch.float64)
    given[0, :, 0, :] = codes
    value: Tensor = Evaluator(program, sizes, {attention: given})(source).double()
    rows = value.reshape(-1, value.shape[-1])
    touched = (rows != 0).any(dim=1).nonzero()
    if len(touched) != 1:
        raise Unknown(
            f"one token of `{attention.name}` reaches {len(touched)} tokens of `{source.name}`"
        )
    row = rows[int(touched[0])]
    order = row.sort()
    if (
        not torch.equal(order.values[-heads * dim :], codes.flatten())
        or int((row != 0).sum()) != heads * dim
    ):
        raise Unknown(f"`{source.name}` is not an index map of `{attention.name}`")
    return order.indices[-heads * dim :].view(heads, dim)


def small_sizes(program: Program) -> dict[str, int]:
    """Small sizes for a probe: 2 for batch symbols (first dims of inputs), about 5 for the
    others; what is divided (an image into patches) stays as it is in the example."""
    sizes: dict[str, int] = {}
    divided = _divided(program)
    for dims in program.dynamic.values():
        for dim, symbol in dims.items():
            if symbol.isidentifier() and symbol not in divided:
                sizes.setdefault(symbol, 2 if dim == 0 else 5 + len(sizes))
    example = example_sizes(program)
    return {symbol: min(size, example.get(symbol, size)) for symbol, size in sizes.items()}


_DIVIDED: WeakKeyDictionary[fx.Graph, set[str]] = WeakKeyDictionary()


def _divided(program: Program) -> set[str]:
    """The size symbols that occur in a quotient; rewrites bring no new ones."""
    if program.graph in _DIVIDED:
        return _DIVIDED[program.graph]
    found = _DIVIDED[program.graph] = set()
    for node in program.graph.nodes:
        value = node.meta.get("val")
        sizes: tuple[Any, ...] = tuple(value.shape) if isinstance(value, Tensor) else ()
        for size in sizes:
            if isinstance(size, torch.SymInt):
                for part in size.node.expr.atoms(FloorDiv):
                    found |= {str(symbol) for symbol in part.free_symbols}
    return found
