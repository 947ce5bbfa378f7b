"""Splitting the graph of a language model: what every new token runs through, and the tables, which
depend on positions and padding alone and are known for all positions beforehand."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, fx

from attnopt.compiler.errors import Problem
from attnopt.compiler.layout import is_symbol, same_size
from attnopt.compiler.ops import ATTENTION
from attnopt.compiler.pack_graph import placeholder_dim
from attnopt.compiler.program import Program
from attnopt.compiler.raising.evaluate import example_input, resized
from attnopt.compiler.spec import parse_spec
from attnopt.compiler.stack import own
from attnopt.compiler.verify import padding_input

aten = torch.ops.aten
SHORTEST, USUAL, LONGEST = 4, 12, 256  # tokens that a derived decoder is tried on


@dataclass(frozen=True)
class Table:
    """A value `[..., seq, ...]` that new tokens read and that depends on none of them.

    `rows` is the axis along the new tokens, `keys` the one along all tokens so far (of a mask or a
    bias, which may have both); None where it has no such axis. `batched` says that its first axis
    is that of the batch in whatever reads it.
    """

    node: str
    rows: int | None
    keys: int | None
    batched: bool = False


@dataclass(frozen=True)
class Split:
    """`tokens` are the inputs `[batch, seq, ...]` that come token by token, `masks` the one
    `[batch, seq]`, if any, that says which positions are `real` and which `padded`, by these
    values; `batch` and `seq` the symbols of the axes, `logits` the output node
    `[batch, seq, vocabulary]`. `moving` are the nodes that depend on the tokens.
    """

    tokens: tuple[str, ...]
    masks: tuple[str, ...]
    real: Any
    padded: Any
    batch: Any
    seq: Any
    logits: str
    moving: frozenset[str]
    tables: tuple[Table, ...]


def split(program: Program) -> Split:
    """Split the graph of a raised program.

    Raises `Problem` A701 where it is no language model over one sequence, and A702 where an
    attention was not understood or a mask is computed from the tokens.
    """
    if program.unraised:
        first = program.unraised[0]
        raise Problem(
            "A702", f"{first.module or first.node} cannot be given a cache",
            where=first.source, why=f"it was not recognised: {first.reason}",
            help="attnopt inspect --why shows what stood in the way",
        )  # fmt: skip
    if not program.attentions():
        raise Problem("A701", f"{program.name} has no attention, so there is nothing to cache")
    tokens, masks = _inputs(program)
    batch, seq = _axes(program, tokens)
    real, padded = _values(program, masks, batch, seq)
    moving = _moving(program, tokens)
    return Split(
        tuple(node.name for node in tokens), tuple(node.name for node in masks), real, padded,
        batch, seq,
        _logits(program, batch, seq, moving), frozenset(node.name for node in moving),
        _tables(program, moving, seq),
    )  # fmt: skip


def sample(program: Program, parts: Split, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """A few rows like the example's by name of input, of random tokens and without padding, long
    enough to be read in parts, in a dtype."""
    found: dict[str, Any] = {}
    for node in program.graph.find_nodes(op="placeholder"):
        value = example_input(program, node)
        if isinstance(value, Tensor) and node.name in (*parts.tokens, *parts.masks):
            rows = min(len(value), 2) if is_symbol(parts.batch) else len(value)
            length = min(value.shape[1] if value.shape[1] >= SHORTEST else USUAL, LONGEST)
            value = resized(value, [rows, length, *value.shape[2:]])
            if node.name in parts.masks:
                value = torch.full_like(value, parts.real)
            elif "position" not in node.name:
                value = _drawn(node, value)
        if isinstance(value, Tensor) and dtype is not None and value.is_floating_point():
            value = value.to(dtype)
        found[node.name] = value
    return found


def _drawn(node: fx.Node, value: Tensor) -> Tensor:
    """Random tokens of a shape: rows of the tables that the input looks up, or normal numbers."""
    generator = torch.Generator().manual_seed(0)
    if value.is_floating_point():
        return torch.randn(value.shape, generator=generator).to(value)
    rows = vocabulary(node)
    if rows is None:
        return value
    return torch.randint(0, rows, value.shape, generator=generator).to(value)


def _inputs(program: Program) -> tuple[list[fx.Node], list[fx.Node]]:
    """The inputs that come token by token, and those that tell which positions are real."""
    tokens, masks = list[fx.Node](), list[fx.Node]()
    for node in program.graph.nodes:
        if node.op != "placeholder" or not node.users:
            continue
        (masks if "mask" in node.name else tokens).append(node)
    return tokens, masks


def _axes(program: Program, tokens: list[fx.Node]) -> tuple[Any, Any]:
    """The symbols of the batch and of the sequence, which must be free in the trace."""
    for node in tokens:
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.dim() < 2:
            raise Problem(
                "A701", f"the input `{node.name}` is no sequence of tokens [batch, seq]",
                help="a model that maps input_ids to logits can be decoded with a cache",
            )  # fmt: skip
    if not tokens:
        raise Problem("A701", f"{program.name} has no input of tokens")
    batch, seq = tokens[0].meta["val"].shape[:2]
    if not is_symbol(seq):
        why = "; ".join(program.fixed) or f"`{tokens[0].name}` is traced at {int(seq)} tokens"
        raise Problem("A701", f"the sequence length of {program.name} is fixed", why=why)
    for node in tokens[1:]:
        if not _begins(node, batch, seq):
            raise Problem(
                "A701", f"the inputs `{tokens[0].name}` and `{node.name}` are two sequences",
                why="a cache is derived for models that read one",
            )  # fmt: skip
    return batch, seq


def _values(program: Program, masks: list[fx.Node], batch: Any, seq: Any) -> tuple[Any, Any]:
    """The values by which the input of the masks tells real positions from padding."""
    if not masks:
        return 1, 0
    found = padding_input(program)
    for node in masks:
        value = node.meta["val"]
        known = found is not None and found[0].name == node.name
        if not known or value.is_floating_point() or value.dim() != 2:
            raise Problem(
                "A702", f"what the input `{node.name}` says of the tokens is not known",
                why=f"it is {value.dtype} {list(value.shape)}, and not shown to tell real "
                "positions [batch, seq] from padding",
            )  # fmt: skip
        if not _begins(node, batch, seq):
            raise Problem("A702", f"the input `{node.name}` is not as long as the tokens")
    assert found is not None
    test = found[1]
    samples = torch.tensor([1, 0, test.value, test.value + 1]).to(masks[0].meta["val"].dtype)
    says = getattr(torch, test.op)(samples, test.value)
    if says.all() or not says.any():
        raise Problem("A702", f"the input `{masks[0].name}` tells no position from another")
    return samples[says][0].item(), samples[~says][0].item()


def _begins(node: fx.Node, batch: Any, seq: Any) -> bool:
    """Whether a value is `[batch, seq, ...]`."""
    first, second = node.meta["val"].shape[:2]
    return same_size(first, batch) and same_size(second, seq)


def _moving(program: Program, tokens: list[fx.Node]) -> set[fx.Node]:
    """The nodes that depend on the values of the tokens, not on their number alone."""
    found = set(tokens)
    for node in program.graph.nodes:
        if node.op == "call_function" and any(n in found for n in node.all_input_nodes):
            if isinstance(node.meta.get("val"), (torch.SymInt, int, torch.SymBool, bool)):
                continue
            found.add(node)
    return found


def merged(program: Program) -> Program:
    """The program with what does not depend on tokens computed once, however often it is written
    (each layer may work out its own positions), and with sizes read off the inputs."""
    made = program.copy()
    for node in made.graph.find_nodes(op="call_function", target=aten.sym_size.int):
        held = placeholder_dim(made.graph, node.meta["val"])
        if held is not None:
            node.args = held
    moving = _moving(made, _inputs(made)[0])
    seen: dict[str, fx.Node] = {}
    for node in list(made.graph.nodes):
        if node.op != "call_function" or node in moving:
            continue
        key = f"{node.target} {node.args} {node.kwargs}"
        if seen.setdefault(key, node) is not node:
            node.replace_all_uses_with(seen[key])
            made.graph.erase_node(node)
    made.module.recompile()
    return made


def _logits(program: Program, batch: Any, seq: Any, moving: set[fx.Node]) -> str:
    (output,) = program.graph.find_nodes(op="output")
    for node in output.all_input_nodes:
        value = node.meta.get("val")
        rank = value.dim() if isinstance(value, Tensor) else 0
        if node in moving and rank == 3 and _begins(node, batch, seq):
            return str(node.name)
    raise Problem(
        "A701", f"{program.name} returns no logits [batch, seq, vocabulary]",
        help="a model that maps input_ids to logits can be decoded with a cache",
    )  # fmt: skip


def _tables(program: Program, moving: set[fx.Node], seq: Any) -> tuple[Table, ...]:
    """The tables that moving nodes read, each once however often the graph computes it."""
    found: dict[str, Table] = {}
    for node in program.graph.nodes:
        if node.op != "call_function" or node not in moving:
            continue
        for source in node.all_input_nodes:
            if source in moving or not isinstance(source.meta.get("val"), Tensor):
                continue
            table = _table(node, source, seq)
            if table is None:
                continue
            known = found.get(source.name, table)
            batched = known.batched and table.batched
            found[source.name] = replace(known, batched=batched)
            if found[source.name] != replace(table, batched=batched):
                raise Problem(
                    "A702", f"`{source.name}` is read both as a mask and as something else",
                    where=where_of(source),
                )  # fmt: skip
        if node.target is ATTENTION:
            _check_attention(node, moving, seq)
    return tuple(found.values())


def _table(user: fx.Node, source: fx.Node, seq: Any) -> Table | None:
    """How `user` reads a value that no token went into; None where it has no axis of positions."""
    shape = source.meta["val"].shape
    if user.target is ATTENTION:
        # What its axes mean is known, whatever their sizes are written as.
        names = parse_spec(str(user.args[4])).extras
        extras = cast(list[fx.Node], user.args[3])
        if source in extras and names[extras.index(source)] == "padding":  # [batch, keys]
            return Table(source.name, None, 1)
        along = [axis for axis, size in enumerate(shape) if size != 1]
        rows, keys = len(shape) - 2, len(shape) - 1
        made = Table(source.name, rows if rows in along else None, keys if keys in along else None)
        return None if made.rows is made.keys is None else made
    # An axis of batch and sequence together counts new tokens, not positions.
    along = token_axes(source, seq)
    if len(along) > 1:
        raise Problem(
            "A702", f"`{user.name}` reads `{source.name}`, which relates positions",
            where=where_of(user), why="only an attention may do so",
        )  # fmt: skip
    batched = len(shape) == user.meta["val"].dim() and (shape[0] == 1 or along != [0])
    return Table(source.name, along[0], None, batched) if along else None


def _check_attention(attention: fx.Node, moving: set[fx.Node], seq: Any) -> None:
    for operand in cast(tuple[fx.Node, ...], attention.args[:3]):
        if operand not in moving or not same_size(operand.meta["val"].shape[2], seq):
            raise Problem(
                "A702", f"`{attention.name}` does not read the tokens of the sequence alone",
                where=where_of(attention),
                why=f"`{operand.name}` has shape {list(operand.meta['val'].shape)}",
            )  # fmt: skip
    for extra in cast(list[fx.Node], attention.args[3]):
        if extra in moving:
            raise Problem(
                "A702", f"a mask or bias of `{attention.name}` is computed from the tokens",
                where=where_of(extra),
                why="what it is for the keys of the cache is not known",
            )  # fmt: skip


def token_axes(node: fx.Node, seq: Any) -> list[int]:
    """The axes of a value that run along the tokens."""
    fake = node.meta.get("val")
    shape = fake.shape if isinstance(fake, Tensor) else ()
    return [axis for axis, size in enumerate(shape) if same_size(size, seq)]


def vocabulary(node: fx.Node) -> int | None:
    """How many rows the tables have that an input of tokens looks up; None where there are none."""
    tables = [
        user.args[0] for user in node.users
        if user.target is aten.embedding.default and user.args[1] is node
    ]  # fmt: skip
    return min(
        (int(t.meta["val"].shape[0]) for t in tables if isinstance(t, fx.Node)), default=None
    )


def where_of(node: fx.Node) -> str:
    """The source line that made a node, or its name."""
    return str(own(node) or node.name)
