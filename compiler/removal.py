"""Taking residual sublayers out of a graph, and running a program with one of them left out.

To compare many removals, the shared beginning runs once: at the exit of each candidate the run
forks, and only what comes after it is run again with the exit bypassed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from attnopt.compiler.program import Batch, Program, inputs
from attnopt.compiler.raising.blocks import carried, is_sum
from attnopt.compiler.site import Sublayer


def exit_of(program: Program, layer: Sublayer) -> fx.Node:
    """The add that reads the branch now. Raises KeyError when a rewrite has taken the branch away.

    After a parallel neighbour was removed this is another add than the recorded one.
    """
    branch = program.node(layer.branch)
    adds = [user for user in branch.users if is_sum(user)]
    recorded = [add for add in adds if add.name == layer.exit]
    if not adds:
        raise KeyError(f"the branch `{layer.branch}` is added to nothing")
    return (recorded or adds)[0]


def bypass_of(program: Program, layer: Sublayer) -> fx.Node:
    """What the exit becomes without the branch: the other operand of the add.

    In a plain residual this is the entry; in a scaled one the scaled entry; where several branches
    are added, the sum of the others.
    """
    exit, branch = exit_of(program, layer), program.node(layer.branch)
    others = [node for node in exit.all_input_nodes if node is not branch]
    if len(others) != 1:
        raise KeyError(f"`{exit.name}` adds `{layer.branch}` to itself")
    return others[0]


def remove(program: Program, layer: Sublayer) -> None:
    """Bypass one sublayer in this program's graph; `Program.clean` then drops what is dead."""
    exit, bypass = exit_of(program, layer), bypass_of(program, layer)
    exit.replace_all_uses_with(bypass)
    program.graph.erase_node(exit)


def without(program: Program, layers: Sequence[Sublayer]) -> Program:
    """A copy without these sublayers, its sites and sublayers brought up to date."""

    def edit(made: Program) -> None:
        for layer in layers:
            remove(made, layer)

    return edited(program, edit)


def edited(program: Program, edit: Callable[[Program], None]) -> Program:
    """A copy with a graph edit made and cleaned, its sites and sublayers brought up to date."""
    made = program.copy()
    edit(made)
    made.clean()
    made.sites = tuple(site for site in made.sites if made.has(site.node))
    made.sublayers = carried(made, made.sublayers)
    return made


def forks(
    program: Program, layers: Sequence[Sublayer], batch: Batch
) -> Iterator[tuple[Sublayer | None, Any]]:
    """The outputs with each sublayer removed on its own, in graph order; last those with none."""
    nodes = list(program.graph.nodes)
    at = {node: i for i, node in enumerate(nodes)}
    exits = sorted(((at[exit_of(program, layer)], layer) for layer in layers), key=lambda p: p[0])
    run = _Run(program, nodes, batch)
    done = 0
    for place, layer in exits:
        run.advance(done, place)
        done = place
        fork = run.fork()
        fork.values[nodes[place]] = fork.values[bypass_of(program, layer)]
        yield layer, fork.finish(place + 1)
    yield None, run.finish(done)


class _Run:
    """A graph being run node by node; `values` holds what later nodes still need."""

    def __init__(self, program: Program, nodes: list[fx.Node], batch: Batch) -> None:
        self.program, self.nodes = program, nodes
        self.interpreter = fx.Interpreter(program.module, garbage_collect_values=False)
        self.interpreter.args_iter = iter(inputs(program, batch))
        self.values: dict[fx.Node, Any] = {}
        self.last: dict[fx.Node, fx.Node] = {
            read: node for node in nodes for read in node.all_input_nodes
        }

    def fork(self) -> _Run:
        """The same state again; the tensors are shared."""
        made = object.__new__(_Run)
        made.__dict__.update(self.__dict__)
        made.values = dict(self.values)
        return made

    def advance(self, start: int, stop: int) -> Any:
        """Run nodes[start:stop]; the last one's value."""
        value: Any = None
        self.interpreter.env = self.values
        with torch.no_grad():
            for node in self.nodes[start:stop]:
                value = self.values[node] = self.interpreter.run_node(node)
                for read in node.all_input_nodes:
                    if self.last[read] is node:
                        self.values.pop(read, None)
        return value

    def finish(self, start: int) -> Any:
        """Run to the end; the outputs in the structure that the model returns."""
        return self.program.graph.process_outputs(self.advance(start, len(self.nodes)))
