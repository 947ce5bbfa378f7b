"""Absolute positions: whether a table of positions is added to the tokens, and where it is from.

A table is added as it stands (a parameter, or sines worked out from the sizes), or looked up by
indices that count along the sequence; the indices may depend on which tokens are padding.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from attnopt.compiler.layout import same_size
from attnopt.compiler.program import Program
from attnopt.compiler.raising.evaluate import Evaluator, Unknown, example_input
from attnopt.compiler.raising.index_probe import small_sizes
from attnopt.compiler.raising.logits import is_score

aten = torch.ops.aten


def absolute_positions(program: Program) -> str:
    """ "learned" or "sinusoidal" when a position-dependent table is added to the tokens, else
    "none"."""
    data = _of_data(program.graph)
    for node in program.graph.nodes:
        if node.target is not aten.add.Tensor or len(node.all_input_nodes) != 2:
            continue
        for table, tokens in (node.all_input_nodes, reversed(node.all_input_nodes)):
            if table in data or tokens not in data:
                continue
            kind = _table(program, table, tokens)
            if kind:
                return kind
    return _looked_up(program)


def _looked_up(program: Program) -> str:
    """The same for a table that is looked up: with one token everywhere, the indices still vary
    along the sequence."""
    run: Evaluator | None = None
    for node in program.graph.nodes:
        if node.target not in (aten.embedding.default, aten.index_select.default):
            continue
        table, index = node.args[0], node.args[1 if node.target is aten.embedding.default else 2]
        if not isinstance(index, fx.Node) or table.op != "get_attr":
            continue
        run = run or Evaluator(program, small_sizes(program), inputs=_one_token(program))
        try:
            positions = run(index)
        except Unknown:
            continue
        if positions.dim() not in (1, 2) or positions.numel() == 0:
            continue
        rows = positions.reshape(-1, positions.shape[-1])
        # The same for every sequence: buckets of distances differ between rows.
        if bool((rows == rows[0]).all()) and bool((rows[:, 1:] != rows[:, :-1]).all()):
            if rows.shape[1] < 2:
                continue
            return "learned" if _parameters(program, table) else "sinusoidal"
    return "none"


def _one_token(program: Program) -> dict[str, Tensor]:
    """Whole-number inputs with one value everywhere: the largest one in the example, so a token
    that is no padding, and a mask that drops nothing."""
    found = {}
    sizes = small_sizes(program)
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op != "placeholder" or not isinstance(value, Tensor) or value.is_floating_point():
            continue
        given = Evaluator(program, sizes)(node)
        example = example_input(program, node)
        if "position" not in node.name and example.numel():
            found[node.name] = torch.full_like(given, example.max().item())
    return found


def _table(program: Program, table: fx.Node, tokens: fx.Node) -> str:
    value, other = table.meta.get("val"), tokens.meta.get("val")
    if not isinstance(value, Tensor) or not isinstance(other, Tensor):
        return ""
    rank = other.dim()  # [batch, seq, width], or [batch, rows, columns, width]
    if rank not in (3, 4) or not value.is_floating_point() or value.dim() not in (rank - 1, rank):
        return ""
    if not all(same_size(value.shape[n], other.shape[n]) for n in range(-1, -rank, -1)):
        return ""
    if rank == 4 and is_score(tokens):
        return ""
    if _parameters(program, table):
        return "learned"
    return "sinusoidal"


def reads_data(node: fx.Node) -> bool:
    """Whether a node depends on the values (not only the sizes) of float or token inputs."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        top = stack.pop()
        if top in seen or _is_size(top):
            continue
        seen.add(top)
        if _is_data(top):
            return True
        stack.extend(top.all_input_nodes)
    return False


def _of_data(graph: fx.Graph) -> set[fx.Node]:
    """All nodes that `reads_data` is true of, in one walk."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if not _is_size(node) and (
            _is_data(node) or any(above in found for above in node.all_input_nodes)
        ):
            found.add(node)
    return found


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (torch.SymInt, int))


def _is_data(node: fx.Node) -> bool:
    return node.op == "placeholder" and "position" not in node.name and "mask" not in node.name


def _parameters(program: Program, node: fx.Node) -> bool:
    seen: set[fx.Node] = set()
    stack = [node]
    names = {name for name, _ in program.module.named_parameters()}
    while stack:
        top = stack.pop()
        if top in seen:
            continue
        seen.add(top)
        if top.op == "get_attr" and str(top.target) in names:
            return True
        stack.extend(top.all_input_nodes)
    return False
