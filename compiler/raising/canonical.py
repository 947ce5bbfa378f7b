"""Put the canonical op in the place of an attention that `anchor` has found."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from attnopt.compiler.layout import same_size
from attnopt.compiler.ops import ATTENTION
from attnopt.compiler.program import Program
from attnopt.compiler.raising.anchor import Anchor
from attnopt.compiler.raising.crossing import Stop
from attnopt.compiler.raising.einsum import Axes
from attnopt.compiler.spec import AttentionSpec

aten = torch.ops.aten
_COPIED = ("nn_module_stack", "stack_trace", "source_fn_stack")


def place(program: Program, anchor: Anchor, heads3: int | None) -> fx.Node | Stop:
    """Insert `attnopt::attention` for an anchor and give it the users of the old result.

    `heads3` is the head count where batch and heads are one axis (rank 3), None where it is not
    known.
    """
    rank = anchor.q.meta["val"].dim()
    if rank not in (3, 4):
        return Stop(f"q has rank {rank}; [batch, heads, seq, head_dim] was expected", anchor.q)
    for node, axes in ((anchor.keys, anchor.k_axes), (anchor.v, anchor.v_axes)):
        other = len(axes.target) if axes else node.meta["val"].dim()
        if other != rank:
            return Stop(f"q has rank {rank}, keys or values have rank {other}", node)
    if rank == 3 and heads3 is None:
        return Stop("batch and heads are one axis, and the head count could not be found", anchor.q)
    wide, narrow = anchor.q.meta["val"].dtype, anchor.v.meta["val"].dtype
    if wide != narrow and wide.itemsize <= narrow.itemsize:
        return Stop(f"the values are {narrow}, the scores {wide}", anchor.v)
    maker = _Maker(program, anchor, heads3 if rank == 3 else None)
    q, k, v = maker.query(), maker.keys(), maker.values()
    heads = [static(node.meta["val"].shape[1]) for node in (q, k, v)]
    dims = [static(node.meta["val"].shape[3]) for node in (q, k, v)]
    if None in heads or None in dims:
        return Stop("the head count or head_dim depends on the input", anchor.q)
    if heads[0] % heads[1] or heads[1] != heads[2]:  # type: ignore[operator]
        return Stop(f"{heads[0]} query heads over {heads[1]}/{heads[2]} key/value heads", anchor.q)
    for tensor, _ in anchor.temperatures:
        if not _fits(tensor, q):
            shape = list(tensor.meta["val"].shape)
            return Stop(
                f"a temperature {shape} has other axes than batch, heads and queries", tensor
            )
    q = maker.tempered(q)
    names, extras = maker.extras()
    for extra in extras:
        if not _fits(extra, q):
            shape = list(extra.meta["val"].shape)
            return Stop(f"a mask or bias {shape} has other axes than batch and heads", extra)
    spec = AttentionSpec(
        heads=heads[0], kv_heads=heads[1], head_dim=dims[0], v_dim=dims[2],  # type: ignore[arg-type]
        scale=anchor.scale, mask=anchor.mask, softcap=anchor.softcap, extras=tuple(names),
        fill=anchor.fill, softmax32=anchor.softmax32,
    )  # fmt: skip
    node = program.call(ATTENTION, (q, k, v, extras, spec.text), before=anchor.out)
    result = node if rank == 4 else maker.call(aten.flatten.using_ints, node, 0, 1)
    result = maker.ordered(result, anchor.out_axes)
    if wide != narrow:
        result = maker.call(aten.to.dtype, result, narrow)
    for key in _COPIED:
        if key in anchor.out.meta:
            node.meta[key] = anchor.out.meta[key]
    anchor.out.replace_all_uses_with(result)
    return node


def _fits(extra: fx.Node, q: fx.Node) -> bool:
    """Whether the axes of a mask, bias or temperature before queries and keys are q's batch and
    heads, or 1."""
    leading = list(extra.meta["val"].shape)[:-2]
    wanted = list(q.meta["val"].shape)[:2]
    return len(leading) <= 2 and all(
        static(size) == 1 or same_size(size, full)
        for size, full in zip(reversed(leading), reversed(wanted), strict=False)
    )


class _Maker:
    """Inserts the few layout nodes that bring an anchor's tensors to [batch, heads, seq, dim]."""

    def __init__(self, program: Program, anchor: Anchor, heads: int | None) -> None:
        self.program, self.anchor, self.heads = program, anchor, heads

    def call(self, target: Any, *args: Any) -> fx.Node:
        return self.program.call(target, args, before=self.anchor.out)

    def query(self) -> fx.Node:
        """Q as [batch, heads, S, head_dim]; a multiplication by a number right before it joins the
        scale."""
        return self.split(self._unscaled(self.ordered(self.anchor.q, self.anchor.q_axes)))

    def tempered(self, q: fx.Node) -> fx.Node:
        """Q as [batch, heads, S, head_dim] with the temperatures, all of which fit it."""
        for tensor, divides in self.anchor.temperatures:
            q = self.call(aten.div.Tensor if divides else aten.mul.Tensor, q, tensor)
        return q

    def keys(self) -> fx.Node:
        """K as [batch, kv_heads, T, head_dim]."""
        node = self.ordered(self.anchor.keys, self.anchor.k_axes)
        if self.anchor.transposed:
            node = self._untransposed(self._unscaled(node))
        return self.split(self._unscaled(node))

    def values(self) -> fx.Node:
        """V as [batch, kv_heads, T, v_dim], in q's dtype: scores may be wider than values."""
        v = self.ordered(self.anchor.v, self.anchor.v_axes)
        dtype = self.anchor.q.meta["val"].dtype
        wide = v if v.meta["val"].dtype == dtype else self.call(aten.to.dtype, v, dtype)
        return self.split(wide)

    def split(self, node: fx.Node) -> fx.Node:
        """[batch * heads, seq, dim] as [batch, heads, seq, dim]; rank 4 stays."""
        if self.heads is None:
            return node
        return self.call(aten.unflatten.int, node, 0, [-1, self.heads])

    def extras(self) -> tuple[list[str], list[fx.Node]]:
        """The mask and bias tensors, each kind joined into one."""
        names: list[str] = []
        nodes: list[fx.Node] = []
        bias: fx.Node | None = None
        for node, factor in self.anchor.added:
            one = self._scores(node)
            one = one if factor == 1.0 else self.call(aten.mul.Tensor, one, factor)
            bias = one if bias is None else self.call(aten.add.Tensor, bias, one)
        if self.anchor.lowered:
            assert bias is not None
            bias = self.call(aten.add.Tensor, bias, self._lowered(bias.meta["val"].dtype))
        if bias is not None and self.anchor.floor is not None:
            bias = self.call(aten.clamp_min.default, bias, self.anchor.floor)
        if bias is not None:
            names, nodes = ["bias"], [bias]
        return self._joined(names, nodes)

    def _lowered(self, dtype: torch.dtype) -> fx.Node:
        """What replaces logits as a term of the sum: the lowest number where they are replaced."""
        found: fx.Node | None = None
        for condition, dropped in self.anchor.lowered:
            one = self._scores(condition)
            one = one if dropped else self.call(aten.logical_not.default, one)
            found = one if found is None else self.call(aten.logical_or.default, found, one)
        assert found is not None
        zeros = self.program.call(
            aten.zeros_like.default, (found,), before=self.anchor.out, dtype=dtype
        )
        return self.call(aten.masked_fill.Scalar, zeros, found, self.anchor.lowest)

    def _joined(self, names: list[str], nodes: list[fx.Node]) -> tuple[list[str], list[fx.Node]]:
        keep: fx.Node | None = None
        parts = [self._scores(node) for node in self.anchor.keep]
        parts += [self.call(aten.logical_not.default, self._scores(n)) for n in self.anchor.dropped]
        for part in parts:
            keep = part if keep is None else self.call(aten.logical_and.default, keep, part)
        if keep is not None:
            names, nodes = [*names, "keep"], [*nodes, keep]
        if self.anchor.sinks is not None:
            names, nodes = [*names, "sinks"], [*nodes, self._scores(self.anchor.sinks)]
        return names, nodes

    def _scores(self, node: fx.Node) -> fx.Node:
        if node.meta["val"].dtype not in (torch.bool,) and node in self.anchor.dropped:
            node = self.call(aten.to.dtype, node, torch.bool)
        if self.heads is None or node.meta["val"].dim() != 3:
            return node
        if static(node.meta["val"].shape[0]) == 1:
            return self.call(aten.unsqueeze.default, node, 0)
        return self.call(aten.unflatten.int, node, 0, [-1, self.heads])

    def ordered(self, node: fx.Node, axes: Axes | None) -> fx.Node:
        """An operand of an einsum with its axes in order; others as they are."""
        return node if axes is None else axes.moved(node, self.call)

    def _unscaled(self, node: fx.Node) -> fx.Node:
        if self.anchor.spelling == "sdpa" or node.target not in (aten.mul.Tensor, aten.div.Tensor):
            return node
        args: Any = node.args
        source, number = args[0], args[1]
        if not isinstance(source, fx.Node) or isinstance(number, (fx.Node, bool)):
            return node
        factor = float(number)
        self.anchor.scale *= factor if node.target is aten.mul.Tensor else 1.0 / factor
        return source

    def _untransposed(self, node: fx.Node) -> fx.Node:
        rank = node.meta["val"].dim()
        if node.target is aten.transpose.int:
            source, *dims = node.args
            if sorted(int(d) % rank for d in dims) == [rank - 2, rank - 1]:  # type: ignore[arg-type]
                assert isinstance(source, fx.Node)
                return source
        return self.call(aten.transpose.int, node, -1, -2)


def static(size: int | torch.SymInt) -> int | None:
    """The size as a number, or None where it depends on the input."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    return int(size.node.expr) if size.node.expr.is_number else None


def heads_of_rank3(anchor: Anchor) -> int | None:
    """How many heads share the first axis [batch * heads]: from its size in terms of the batch
    symbol."""
    size = anchor.q.meta["val"].shape[0]
    if isinstance(size, torch.SymInt):
        expression = size.node.expr
        coefficient = expression.as_coeff_Mul()[0]
        return int(coefficient) if coefficient > 1 else None
    return None
