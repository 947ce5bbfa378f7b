"""One run of a graph in which chosen nodes are shown, with what they read, to whoever watches them.

Values live no longer than the graph needs them, so that a watcher sees one attention at a time.
Attentions of the reference spelling run on the fused operator where it computes the same: the score
matrix of all heads is never in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import fx

from attnopt.compiler import attend
from attnopt.compiler.ops import ATTENTION
from attnopt.compiler.program import Batch, Program, inputs
from attnopt.compiler.spec import parse_spec

Watcher = Callable[[Mapping[fx.Node, Any], Any], None]


def walk(program: Program, watchers: Mapping[str, Sequence[Watcher]], batch: Batch) -> None:
    """Run one batch; each watcher of a named node gets the values of the node's inputs, and the
    node's own. What comes after the last watched node does not run.
    """
    with torch.no_grad(), suppress(_Enough):
        _Walk(program, watchers).run(*inputs(program, batch), enable_io_processing=False)


class _Enough(Exception):
    """Every watched node has been seen."""


class _Walk(fx.Interpreter):
    def __init__(self, program: Program, watchers: Mapping[str, Sequence[Watcher]]) -> None:
        super().__init__(program.module)
        self.watchers, self.left = watchers, len(watchers)

    def run_node(self, n: fx.Node) -> Any:
        watching = self.watchers.get(n.name)
        if watching is None:
            return super().run_node(n)
        read = {node: self.env[node] for node in n.all_input_nodes}
        value = super().run_node(n)
        for see in watching:
            see(read, value)
        self.left -= 1
        if not self.left:
            raise _Enough
        return value

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is ATTENTION:
            q, k, v, extras, line = args
            spec = parse_spec(str(line))
            if spec.backend == "reference" and not attend.runs_on_sdpa(spec):
                return attend.sdpa(q, k, v, extras, spec)
        return super().call_function(target, args, kwargs)
