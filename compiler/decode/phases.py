"""The programs of a decoder, as graphs: the tables, the prompt (prefill), and what follows it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, fx
from torch.fx.graph import CodeGen

from attnopt.compiler import attend_step
from attnopt.compiler.decode.caches import Contiguous, Ring
from attnopt.compiler.decode.convolutions import Convolution, uncut
from attnopt.compiler.decode.last import LAST_QUERY, MIXES, Tokens, of_last
from attnopt.compiler.decode.latents import Latent, joined
from attnopt.compiler.decode.split import Split
from attnopt.compiler.layout import same_size
from attnopt.compiler.packed_form import arguments
from attnopt.compiler.program import Program, copy_module
from attnopt.compiler.route_graph import gate_of

aten = torch.ops.aten
Kind = Literal["prefill", "step"]
Cache = Contiguous | Ring | Latent
WRITES = "writes"  # the mark, in their meta, of nodes that fill a cache
GATED = "gated"  # and of attentions whose first argument says whose results are read


def tables(program: Program, split: Split) -> fx.GraphModule:
    """`(tokens..., masks...) -> [table, ...]`, in the order of `split`; of the tokens it reads the
    sizes alone."""
    module = _bare(program)
    made = _nodes(module)
    (output,) = module.graph.find_nodes(op="output")
    output.args = ([made[table.node] for table in split.tables],)
    return _finished(module, keep=(*split.tokens, *split.masks))


def phase(
    program: Program,
    split: Split,
    caches: Mapping[str, tuple[int, Cache | Convolution]],
    kind: Kind,
    last: bool,
) -> fx.GraphModule:
    """The graph that new tokens run through.

    "prefill": `(tokens..., [table, ...], [(keys, values), ...]) -> logits`, an empty cache;
    "step": `(tokens..., tables, caches, start) -> logits`. Tables reach over all positions,
    caches are written in place; `caches` says which one each attention or convolution reads. The
    logits are `[batch, S, vocabulary]`, those of the last position alone where `last`.
    """
    module = _bare(program)
    return _Writer(module, split, caches, kind).write(last)


class _Writer:
    def __init__(
        self,
        module: fx.GraphModule,
        split: Split,
        caches: Mapping[str, tuple[int, Cache | Convolution]],
        kind: Kind,
    ) -> None:
        self.module, self.graph = module, module.graph
        self.split, self.caches, self.kind = split, caches, kind
        self.nodes = _nodes(module)
        self.moving = {self.nodes[name] for name in split.moving}
        self.written: set[int] = set()

    def write(self, last: bool) -> fx.GraphModule:
        holders = self.graph.find_nodes(op="placeholder")
        with self.graph.inserting_after(holders[-1]):
            given = [self.graph.placeholder(name) for name in ("tables", "caches")[::-1]][::-1]
        if self.kind == "step":
            with self.graph.inserting_after(given[-1]):
                given.append(self.graph.placeholder("start"))
        self.given = given
        tokens = self.nodes[self.split.tokens[0]]
        with self.graph.inserting_after(given[-1]):
            self.seq = self.graph.call_function(aten.sym_size.int, (tokens, 1))
            self.batch = self.graph.call_function(aten.sym_size.int, (tokens, 0))
        self.at = self.seq
        self.start: Any = given[2] if self.kind == "step" else 0
        self.end = self._call(operator.add, self.start, self.seq) if self.start != 0 else self.seq
        self._sizes()
        self._tables()
        for name, (index, cache) in self.caches.items():
            if isinstance(cache, Convolution):
                self._convolution(self.nodes[name], index, cache)
            else:
                self._attention(self.nodes[name], index, cache)
        logits = self.nodes[self.split.logits]
        (output,) = self.graph.find_nodes(op="output")
        output.args = (logits,)
        if last:
            _without_dead(self.graph)
            moving = (self.nodes[name] for name in self.split.moving)
            symbols = self.split.batch, self.split.seq
            output.args = (of_last(logits, Tokens(moving, (self.batch, self.seq), symbols)),)
        return _finished(self.module, keep=(*self.split.tokens, *(n.name for n in given)))

    def _call(self, target: Callable[..., Any], *args: Any) -> fx.Node:
        with self.graph.inserting_after(self.at):
            self.at = self.graph.call_function(target, args)
        return self.at

    def _sizes(self) -> None:
        """Sizes of the sequence and the batch that moving nodes use are those of the new tokens."""
        for name, node in self.nodes.items():
            size = node.meta.get("val")
            if node.target is not aten.sym_size.int or not isinstance(size, torch.SymInt):
                continue
            for mine, known in ((self.seq, self.split.seq), (self.batch, self.split.batch)):
                if same_size(size, known):
                    node.replace_all_uses_with(mine)
                    self.nodes[name] = mine

    def _tables(self) -> None:
        for index, table in enumerate(self.split.tables):
            made = self._call(operator.getitem, self.given[0], index)
            source = self.nodes[table.node]
            for axis, start in ((table.rows, self.start), (table.keys, 0)):
                if axis is not None:
                    made = self._call(aten.slice.Tensor, made, axis, start, self.end)
            made.meta = dict(source.meta)
            source.replace_all_uses_with(made, delete_user_cb=lambda user: user in self.moving)

    def _attention(self, node: fx.Node, index: int, cache: Cache) -> None:
        q, k, v, extras, _ = cast(tuple[Any, ...], node.args)
        parts = self._call(operator.getitem, self.given[1], index)
        kept = [self._call(operator.getitem, parts, at) for at in range(len(cache.widths))]
        stored: list[Any] = [k, v]
        if isinstance(cache, Latent):
            sources = [self.nodes[name] for name in (cache.latent, cache.shared) if name]
            with self.graph.inserting_before(node):
                stored = [self.graph.call_function(joined, tuple(sources))]
        if self.kind == "prefill" or not isinstance(cache, Ring):
            self._store(node, index, cache, (*stored, *kept, self.start))
        if self.kind == "prefill":
            operands = [k, v, *stored] if isinstance(cache, Latent) else stored
            bound = prefilled(cache, len(operands))
        elif isinstance(cache, Ring):  # which may have to be read before it is written
            operands = stored
            bound = stepped(cache)
        else:
            operands = self._constants(node, cache) if isinstance(cache, Latent) else []
            bound = attending(cache, len(operands))
        given = (q, *operands, *kept, self.start, *extras)
        gate = gate_of(node) if self.kind == "step" and isinstance(cache, Contiguous) else None
        if gate is not None:
            bound, given = gated(bound), (gate.on, *given)
        with self.graph.inserting_before(gate.join if gate is not None else node):
            made = self.graph.call_function(bound, given)
        made.meta = {**node.meta, MIXES: node.name, GATED: gate is not None}
        if self.kind == "prefill" and _is_plain(cache):
            made.meta[LAST_QUERY] = True
        node.replace_all_uses_with(made)
        self.graph.erase_node(node)
        self.nodes[node.name] = made

    def _store(self, node: fx.Node, index: int, cache: Cache, given: tuple[Any, ...]) -> None:
        """Fill a cache before the first attention that reads it, whether or not that is used."""
        if index in self.written:
            return
        self.written.add(index)
        with self.graph.inserting_before(node):
            made = self.graph.call_function(storing(cache), given)
        made.meta[WRITES] = True

    def _convolution(self, node: fx.Node, index: int, cache: Convolution) -> None:
        kept = self._call(operator.getitem, self._call(operator.getitem, self.given[1], index), 0)
        uncut(self.nodes, cache)
        given = arguments(node)
        operands = (given["input"], given["weight"], given["bias"], kept, self.start)
        with self.graph.inserting_before(node):
            made = self.graph.call_function(convolved(cache, self.kind), operands)
        made.meta = {**node.meta, MIXES: node.name}
        node.replace_all_uses_with(made)
        self.graph.erase_node(node)
        self.nodes[node.name] = made

    def _constants(self, node: fx.Node, cache: Latent) -> list[fx.Node]:
        """The maps of a latent as constants of the graph, before the attention."""
        made = []
        for which in ("up_k", "up_v", "bias"):
            name = f"{node.name}_{which}"
            self.module.register_buffer(name, getattr(cache, which))
            with self.graph.inserting_before(node):
                made.append(self.graph.get_attr(name))
        return made


def places(
    program: Program, caches: Mapping[str, Cache], convolutions: Mapping[str, Convolution]
) -> dict[str, int]:
    """Which cache of a state each attention reads, then each convolution: attentions that read the
    same keys and values read the same one, which is written once. A ring is one
    attention's own, since what is written last replaces what another still has to read."""
    found: dict[object, int] = {}
    made = {
        name: found.setdefault(
            name if isinstance(cache, Ring) else program.node(name).args[1:3], len(found)
        )
        for name, cache in caches.items()
    }
    return made | {name: len(found) + at for at, name in enumerate(convolutions)}


def storing(cache: Cache) -> Callable[..., None]:
    """Writes what is stored of new tokens into the cache; it takes the operands of its `store`."""
    store = cast(Callable[..., None], cache.store)

    def write(*given: Any) -> None:
        store(*given)

    return write


def prefilled(cache: Cache, operands: int) -> Callable[..., Tensor]:
    """The attention among the tokens of a prompt, as it was.

    It takes q, the `operands` (k, v, and what else is stored), the cache's tensors, the number of
    tokens before these, and the extras. The last query may come alone, where that `_is_plain`.
    """
    before = operands + len(cache.widths) + 1

    def attention(q: Tensor, *rest: Any) -> Tensor:
        k, v, *stored = rest[:operands]
        if isinstance(cache, Latent):
            return cache.prompt(q, k, v, stored[0], rest[before:])
        if q.shape[2] != k.shape[2]:
            return attend_step.to_newest(q, k, v, rest[before:], cache.spec, cache.line)
        return attend_step.among(q, k, v, rest[before:], cache.spec, cache.line)

    return attention


def stepped(cache: Ring) -> Callable[..., Tensor]:
    """The attention of new tokens to the cache, which it fills, and among themselves; it takes what
    `prefilled` does."""

    def attention(
        q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, start: Any, *extras: Tensor
    ) -> Tensor:
        return cache.step(q, k, v, keys, values, start, extras)

    return attention


def attending(cache: Contiguous | Latent, operands: int) -> Callable[..., Tensor]:
    """The attention of new tokens to a cache that holds them; it takes what `prefilled` does, with
    the operands of the cache's `attend`."""
    known, attend = operands + len(cache.widths) + 1, cast(Callable[..., Tensor], cache.attend)

    def attention(q: Tensor, *rest: Any, **more: Tensor) -> Tensor:
        return attend(q, *rest[:known], rest[known:], **more)

    return attention


def convolved(cache: Convolution, kind: Kind) -> Callable[..., Tensor]:
    """The convolution of new tokens `[batch, channels, S]`; it takes them, the weight, the bias or
    None, the cache's tensor and the number of tokens before these."""
    run = cache.prefill if kind == "prefill" else cache.step

    def convolution(
        x: Tensor, weight: Tensor, bias: Tensor | None, kept: Tensor, start: Any
    ) -> Tensor:
        return run(x, weight, bias, kept, start)

    return convolution


def gated(attending: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """As `attending`, after `on`, which says whose results are read; see `Contiguous.attend`."""

    def attention(on: Tensor, *rest: Any) -> Tensor:
        return attending(*rest, on=on)

    return attention


def _is_plain(cache: Cache) -> bool:
    """Whether an attention's extras are none, or tell of keys alone."""
    return isinstance(cache, Contiguous) and {*cache.spec.extras} <= {"padding"}


def _bare(program: Program) -> fx.GraphModule:
    """A copy whose inputs and outputs are plain."""
    module = copy_module(program.module)
    module.graph._codegen = CodeGen()
    return module


def _nodes(module: fx.GraphModule) -> dict[str, fx.Node]:
    return {node.name: node for node in module.graph.nodes}


def _finished(module: fx.GraphModule, keep: Iterable[str]) -> fx.GraphModule:
    """The module without what is dead; the inputs that are not to be kept go too."""
    names = set(keep)
    _without_dead(module.graph)
    for node in module.graph.find_nodes(op="placeholder"):
        if node.name not in names:
            module.graph.erase_node(node)
    module.delete_all_unused_submodules()
    module.graph.lint()
    module.recompile()
    return module


def _without_dead(graph: fx.Graph) -> None:
    graph.eliminate_dead_code(
        is_impure_node=lambda node: node.op in ("placeholder", "output") or WRITES in node.meta
    )
