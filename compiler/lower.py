"""Lowering: the canonical op becomes a plain call of its backend, so that what is timed, compiled
and saved is aten alone. (What is dispatched to kernels on a GPU stays the op when it is saved.)"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from attnopt.compiler import attend, attend_step
from attnopt.compiler.errors import Problem
from attnopt.compiler.ops import ATTENTION
from attnopt.compiler.program import Batch, Program, copy_module
from attnopt.compiler.spec import AttentionSpec, parse_spec

Bind = Callable[[AttentionSpec], Callable[..., Tensor]]
"""A spec as a function of q, k, v and the extras."""


def lower(program: Program, bind: Bind | None = None) -> fx.GraphModule:
    """The program's module with every `attnopt::attention` replaced by its backend, or by what
    `bind` makes of its spec.

    Shares the weights.
    """
    module = copy_module(program.module)
    for node in list(module.graph.nodes):
        if node.target is not ATTENTION:
            continue
        q, k, v, extras, line = node.args
        with module.graph.inserting_before(node):
            call = module.graph.call_function(
                (bind or _bound)(parse_spec(str(line))), (q, k, v, *extras)
            )
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        module.graph.erase_node(node)
    module.graph.lint()
    module.recompile()
    return module


def _bound(spec: AttentionSpec) -> Callable[..., Tensor]:
    backend = attend.BACKENDS[spec.backend]
    if spec.backend == "triton":
        return _dispatched(spec)

    def attention(q: Tensor, k: Tensor, v: Tensor, *extras: Tensor) -> Tensor:
        return backend(q, k, v, extras, spec)

    return attention


def _dispatched(spec: AttentionSpec) -> Callable[..., Tensor]:
    """The canonical op where a compiler looks on; otherwise the backend itself, with its gradients
    and without the op's own time."""
    line = spec.text

    def attention(q: Tensor, k: Tensor, v: Tensor, *extras: Tensor) -> Tensor:
        return attend_step.among(q, k, v, extras, spec, line)

    return attention


def export(program: Program, bind: Bind | None = None) -> torch.export.ExportedProgram:
    """The lowered program through `torch.export`, with the dims that may vary.

    Raises `Problem` A503.
    """
    module = lower(program, bind)
    example = _rows(program)
    shapes = _shapes(program, example)
    failure: Exception | None = None
    for dynamic in (shapes, None):
        try:
            return torch.export.export(
                module, example.args, dict(example.kwargs), dynamic_shapes=dynamic, strict=False
            )
        except (RuntimeError, ValueError, torch._dynamo.exc.UserError) as error:
            failure = error
    raise Problem(
        "A503",
        f"the rewritten {program.name} could not be exported",
        why=str(failure).splitlines()[0] if failure else "",
        help="save with fewer rewrites: leave out the last step of the plan",
    ) from failure


def _rows(program: Program) -> Batch:
    """The example, its rows doubled where there is one and the batch may vary."""
    leaves = pytree.tree_leaves((program.example.args, dict(program.example.kwargs)))
    single = all(isinstance(x, Tensor) and x.dim() and x.shape[0] == 1 for x in leaves)
    if not single or not all(0 in dims for dims in program.dynamic.values()):
        return program.example
    args, kwargs = pytree.tree_map(
        lambda x: torch.cat([x, x]), (program.example.args, dict(program.example.kwargs))
    )
    return Batch(args, kwargs)


def _shapes(program: Program, example: Batch) -> Any:
    """`dynamic_shapes` for a re-export: equal symbols of the trace share one dim, everything else
    is left to it."""
    names = [n.name for n in program.graph.nodes if n.op == "placeholder"]
    leaves, tree = pytree.tree_flatten((example.args, dict(example.kwargs)))
    if set(names) == set(example.kwargs):
        dims: list[Any] = [_auto(program, name) for name in example.kwargs]
    else:
        dims = [_auto(program, name) for name in names]
    if len(dims) != len(leaves):
        return None
    args, kwargs = pytree.tree_unflatten(dims, tree)
    return kwargs if not args else (*args, *kwargs.values())


def _auto(program: Program, name: str) -> Any:
    dims = program.dynamic.get(name, {})
    return dict.fromkeys(dims, torch.export.Dim.AUTO) or None
