"""Give one operand of an attention a new projection, with other heads, in the graph.

`reproject` puts `linear(source, weight, bias)` beside the old projection, splits it into heads, and
clones every node between the site's split and the attention's operand (rotary, norms, transposes)
with the new head count; a repetition of key/value heads is dropped, since the attention reads
grouped heads by itself. The old nodes die when nobody else reads them. Whatever cannot be cloned is
a `Miss` that names the node; the program is then half edited and must be thrown away, so a pass
tries on a copy first.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, fx

from attnopt.compiler.contract import Miss
from attnopt.compiler.layout import same_size
from attnopt.compiler.program import Program, infer
from attnopt.compiler.raising.evaluate import Evaluator, Unknown, concrete, example_sizes
from attnopt.compiler.raising.index_probe import small_sizes
from attnopt.compiler.site import Path, Site
from attnopt.compiler.site_weights import VIEWS, token_rows
from attnopt.compiler.view_sizes import Changed, one_axis

aten = torch.ops.aten
Which = Literal["q", "k", "v"]
_REPEATS = (aten.repeat_interleave.self_int,)
_REFUSALS = (RuntimeError, TypeError, ValueError, IndexError)


class Cut(Protocol):
    """How nodes are cloned where heads lose dims; see `attnopt.compiler.cut_dims`."""

    def clone(self, node: fx.Node, values: dict[fx.Node, fx.Node]) -> fx.Node | str:
        """The node on the new values, or why it cannot be."""

    def differs(self, split: fx.Node, operand: fx.Node) -> str:
        """Why the new operand is not the old one at the dims that are left; empty when it is."""


def reproject(
    program: Program, site: Site, which: Which, weight: Tensor, bias: Tensor | None, heads: int
) -> Site | Miss:
    """Make operand `which` of a site from a new projection, in this program's graph.

    `weight` `[heads * dim, width]` and `bias` `[heads * dim]` give the channels of head h at h *
    dim. Answers the site with its new facts. The specs of k and v must agree in the end: reproject
    both.
    """
    if which != "q" and site.spec.heads % heads:
        return Miss(f"{site.spec.heads} query heads cannot share {heads}", site.node)
    made = rebuilt(program, site, which, weight, bias, heads)
    if isinstance(made, Miss):
        return made
    operand, path = made
    attention = program.node(site.node)
    attention.update_arg("qkv".index(which), operand)
    dim = weight.shape[0] // heads
    sizes = {
        "q": {"heads": heads, "head_dim": dim},
        "k": {"kv_heads": heads, "head_dim": dim},
        "v": {"kv_heads": heads, "v_dim": dim},
    }[which]
    spec = program.spec(site).with_(**sizes)
    attention.update_arg(4, spec.text)
    infer(attention)
    kv_heads = site.kv_heads if which == "q" else heads
    changed: dict[str, Any] = {which: path}
    return replace(site, spec=spec, kv_heads=kv_heads, **changed)


def rebuilt(
    program: Program,
    site: Site,
    which: Which,
    weight: Tensor,
    bias: Tensor | None,
    heads: int,
    cut: Cut | None = None,
    name: str = "heads",
) -> tuple[fx.Node, Path] | Miss:
    """Operand `which` from a new projection, beside the old one, which the attention still reads.

    `weight` and `bias` as in `reproject`. With `cut` the heads keep their number and lose dims:
    what stands between is cut to the dims that are left, and compared with what it was. New
    parameters are named after `name`. Answers the new operand and how it comes out of its
    projection.
    """
    path: Path | None = getattr(site, which)
    if path is None:
        return Miss(site.missing.get(which, f"the projection of {which} is not known"), site.node)
    if not path.split:
        return Miss(site.unsplit(which), path.projection)
    stale = [name for name in (path.source, path.split) if not program.has(name)]
    if stale:
        return Miss("an earlier rewrite took this node away", stale[0])
    split = program.node(path.split)
    operand = cast(fx.Node, program.node(site.node).args["qkv".index(which)])
    between = between_nodes(split, operand)
    if between is None:
        return Miss("the operand does not come from the split alone", operand.name)
    factor = split_scale(program, path)
    if factor is None:
        why = "between the projection and its heads stands more than a scale (a norm, say)"
        return Miss(why, path.split)
    made = projected(program, path, weight, bias, heads, f"{which}_{name}", factor)
    if isinstance(made, Miss):
        return made
    linear, fresh = made
    dim = weight.shape[0] // heads
    axis = 2 if path.order == "bthd" else 1
    begin, times = fresh, _copies(program, path)
    if cut is not None and times > 1:  # it tells dims apart, not heads
        begin = program.call(aten.repeat_interleave.self_int, (fresh, times, axis), before=split)
    result = clone_all(program, between, {split: begin}, cut, axis)
    if isinstance(result, Miss):
        return result
    new = result.get(operand, begin)
    wrong = _unlike(new, operand, int(operand.meta["val"].shape[1]) if cut else heads, dim)
    if not wrong and cut is not None:
        wrong = cut.differs(begin, new)
    if wrong:
        return Miss(wrong, operand.name)
    return new, _path(path, linear, fresh, heads, dim)


def clone_all(
    program: Program,
    nodes: list[fx.Node],
    values: dict[fx.Node, fx.Node],
    cut: Cut | None = None,
    axis: int | None = None,
) -> dict[fx.Node, fx.Node] | Miss:
    """Each node again on new inputs, in graph order; `values` maps old inputs to new ones, whose
    `axis` has another size (None: the first that differs)."""
    found, changed = dict(values), Changed(program, values, axis)
    for node in nodes:
        clone = _clone(program, node, found, cut, changed)
        if isinstance(clone, Miss):
            return clone
        found[node] = clone
    return found


def _path(old: Path, linear: fx.Node, split: fx.Node, heads: int, dim: int) -> Path:
    args = cast(tuple[fx.Node, ...], linear.args)
    return replace(
        old,
        projection=linear.name,
        source=args[0].name,
        weight=str(args[1].target),
        bias=str(args[2].target) if len(args) > 2 else None,
        layout="out_in",
        channels=torch.arange(heads * dim).view(heads, dim),
        split=split.name,
    )


def between_nodes(split: fx.Node, operand: fx.Node) -> list[fx.Node] | None:
    """The nodes after `split` that the operand is made through, in graph order.

    None when it is not made from it.
    """
    above: set[fx.Node] = set()
    stack = [operand]
    while stack:
        node = stack.pop()
        if node in above or node is split:
            continue
        above.add(node)
        stack.extend(node.all_input_nodes)
    below = {split}
    ordered = [node for node in split.graph.nodes if node in above]
    for node in ordered:
        if any(source in below for source in node.all_input_nodes):
            below.add(node)
    if operand not in below:
        return None
    return [node for node in ordered if node in below]


def projected(
    program: Program,
    path: Path,
    weight: Tensor,
    bias: Tensor | None,
    heads: int,
    name: str,
    factor: float = 1.0,
) -> tuple[fx.Node, fx.Node] | Miss:
    """A new projection `[batch, seq, heads dim]` of what a path's reads, and its split into heads
    in the path's order, times `factor`."""
    split, name = program.node(path.split), _free_name(program, path, name)
    source = token_rows(program, path)
    shape = source.meta["val"].shape
    if len(shape) != 3 or shape[-1] != weight.shape[1]:
        return Miss(f"the projection reads {tuple(shape)}, not [batch, seq, width]", source.name)
    out = split.meta["val"].shape
    batch, seq = (out[0], out[1]) if path.order == "bthd" else (out[0], out[2])
    straight = same_size(shape[0], batch) and same_size(shape[1], seq)
    crossed = same_size(shape[0], seq) and same_size(shape[1], batch)
    if not straight and not crossed:
        return Miss(f"batch and seq of {tuple(shape)} are not those of the heads", source.name)

    dtype = program.weight(path.weight).dtype
    parameters = [program.parameter(f"{name}_weight", weight.to(dtype), before=split)]
    if bias is not None:
        parameters.append(program.parameter(f"{name}_bias", bias.to(dtype), before=split))
    linear = program.call(aten.linear.default, (source, *parameters), before=split)
    scaled = linear
    if factor != 1.0:
        scaled = program.call(aten.mul.Tensor, (linear, factor), before=split)
    fresh = program.call(
        aten.unflatten.int, (scaled, -1, [heads, weight.shape[0] // heads]), before=split
    )
    if not straight:
        fresh = program.call(aten.transpose.int, (fresh, 0, 1), before=split)
    if path.order == "bhtd":
        fresh = program.call(aten.transpose.int, (fresh, 1, 2), before=split)
    return linear, fresh


def _copies(program: Program, path: Path) -> int:
    """How often each head of a path stands in its split."""
    shape = program.node(path.split).meta["val"].shape
    return int(shape[2 if path.order == "bthd" else 1]) // len(path.channels)


def split_scale(program: Program, path: Path) -> float | None:
    """The number by which the split node holds the projection's channels; None where it holds
    something else. Run, not read: a norm with weights of one looks like nothing."""
    sizes = small_sizes(program)
    known = {**example_sizes(program), **sizes}
    projection, split = program.node(path.projection), program.node(path.split)
    dtype = projection.meta["val"].dtype
    try:
        shape = [concrete(size, known) for size in projection.meta["val"].shape]
        y = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        found = Evaluator(program, sizes, {projection: y})(split).double()
    except Unknown:
        return None
    value = found if path.order == "bthd" else found.transpose(1, 2)
    channels = path.channels.repeat_interleave(_copies(program, path), 0)
    wanted = y.double().flatten(0, -2)[:, channels]
    if value.dim() != 4 or value.numel() != wanted.numel():
        return None
    for rows in (value, value.transpose(0, 1)):
        given = rows.flatten(0, 1)
        at = wanted.abs().flatten().argmax()
        factor = given.flatten()[at] / wanted.flatten()[at]
        slack = 64 * torch.finfo(dtype).eps * float(given.abs().max() + 1e-30)
        if float((given - factor * wanted).abs().max()) <= slack:
            return float(factor)
    return None


def _free_name(program: Program, path: Path, name: str) -> str:
    """A parameter name beside the old weight's that nothing has yet."""
    owner = path.weight.rpartition(".")[0].rpartition(".")[0]
    base, count = f"{owner}.{name}" if owner else name, 0
    names = {name for name, _ in program.module.named_parameters(remove_duplicate=False)}
    while f"{base}{count}_weight" in names:
        count += 1
    return f"{base}{count}"


def _clone(
    program: Program,
    node: fx.Node,
    values: dict[fx.Node, fx.Node],
    cut: Cut | None,
    changed: Changed,
) -> fx.Node | Miss:
    """The node again, on the new values, just before the old one."""
    if node.op != "call_function":
        return Miss(f"a {node.op} node stands between the heads and the attention", node.name)
    if cut is not None:
        cloned = cut.clone(node, values)
        if isinstance(cloned, fx.Node):
            return cloned
        return Miss(f"it does not adapt to fewer dims: {cloned}", node.name)
    if node.target in _REPEATS:
        return values.get(cast(fx.Node, node.args[0])) or Miss("it repeats no heads", node.name)
    args = fx.map_arg(node.args, lambda n: values.get(n, n))
    kwargs = fx.map_arg(dict(node.kwargs), lambda n: values.get(n, n))
    tries: Iterator[Any] = iter([args])
    if node.target is aten.expand.default:
        tries = iter([(args[0], changed.expanded(node, values), *args[2:])])
    elif node.target in VIEWS and node.args[0] in values:
        tries = ((args[0], sizes, *args[2:]) for sizes in changed.viewed(node, values))
    elif node.target is aten.unflatten.int and node.args[0] in values:
        tries = ((*args[:2], sizes) for sizes in changed.viewed(node, values))
    said = "no size fits the new head count"
    if node.target is operator.getitem:
        said = "heads are taken apart here, and each goes a way of its own (a norm, say)"
    for given in tries:
        made = attempt(program, node, given, kwargs)
        if not isinstance(made, fx.Node):
            said = said if node.target is operator.getitem else made
        elif node.target in (*VIEWS, aten.unflatten.int) and not one_axis(node, made):
            said = "its sizes mix heads with other axes"
            program.graph.erase_node(made)
        else:
            return made
    return Miss(f"it does not adapt to the new head count: {said}", node.name)


def attempt(program: Program, node: fx.Node, args: Any, kwargs: Any) -> fx.Node | str:
    target = cast(Any, node.target)
    with program.graph.inserting_before(node):
        made = program.graph.call_function(target, args, kwargs)
    try:
        infer(made)
    except _REFUSALS as error:
        program.graph.erase_node(made)
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    if "nn_module_stack" in node.meta:
        made.meta["nn_module_stack"] = node.meta["nn_module_stack"]
    return made


def _unlike(result: fx.Node, operand: fx.Node, heads: int, dim: int) -> str:
    """Why the new operand is not [batch, heads, seq, dim] like the old one; empty when it is."""
    new, old = result.meta["val"], operand.meta["val"]
    wanted = (old.shape[0], heads, old.shape[2], dim)
    if len(new.shape) == 4 and all(same_size(a, b) for a, b in zip(new.shape, wanted, strict=True)):
        return "" if new.dtype == old.dtype else f"the new operand is {new.dtype}, not {old.dtype}"
    return f"the new operand would be {tuple(new.shape)}, not {wanted}"
