"""The forms of a program that a healing runs: differentiable, in the dtype that is trained in, with
the trained weights handed in from outside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.func import functional_call
from torch.utils import _pytree as pytree

from attnopt.compiler import attend
from attnopt.compiler.healing.touched import site_nodes
from attnopt.compiler.lower import lower
from attnopt.compiler.ops import ATTENTION
from attnopt.compiler.program import Batch, Program, attribute
from attnopt.compiler.site import Site
from attnopt.compiler.spec import AttentionSpec, parse_spec
from attnopt.compiler.verify import own_dtype, widened


@dataclass(frozen=True)
class Working:
    """A program to train with: its attentions run on their backends (torch's fused attention where
    none was chosen), which torch differentiates itself, and whatever is not trained takes no
    gradient.

    On a CPU, and where the model is in float16, all of it is in float32 (its products may be in
    bfloat16, see `products`); a bfloat16 model on another device stays as it is, with float32
    masters beside it.
    """

    program: Program
    module: fx.GraphModule
    fixed: Mapping[str, Tensor]

    @staticmethod
    def of(program: Program) -> Working:
        """The working form of a program; it shares the weights where their dtype stays."""
        own = own_dtype(program)
        narrow = own in (torch.float16, torch.bfloat16)
        if narrow and (own is torch.float16 or program.device.type == "cpu"):
            program = widened(program, torch.float32)
        module = lower(program, _fast)
        named = module.named_parameters(remove_duplicate=False)
        return Working(program, module, {name: value.detach() for name, value in named})

    def __call__(self, batch: Batch, weights: Mapping[str, Tensor] | None = None) -> Any:
        """The outputs with some weights replaced, with gradients towards these."""
        values = {**self.fixed, **self.cast(weights or {})}
        return functional_call(
            self.module, values, batch.args, dict(batch.kwargs), tie_weights=False
        )

    def ready(self, batch: Batch) -> Batch:
        """The batch where this form runs, its floating-point inputs in its dtype."""
        device, dtype = self.program.device, own_dtype(self.program)

        def there(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return leaf.to(device, dtype if leaf.is_floating_point() else leaf.dtype)

        args, kwargs = pytree.tree_map(there, (batch.args, dict(batch.kwargs)))
        return replace(batch, args=args, kwargs=kwargs)

    def cast(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights in the dtype that this form computes in."""
        return {name: value.to(self.fixed[name].dtype) for name, value in weights.items()}

    def with_weights(self, weights: Mapping[str, Tensor]) -> Program:
        """The program with these weights in it, to run or to record from."""
        made = self.program.copy()
        for name, value in self.cast(weights).items():
            made.set_weight(name, value)
        return made


@dataclass(frozen=True)
class Region:
    """The part of a graph from a site's inputs to its output projection.

    `inputs` are the names of the nodes that it reads, `end` the name of its last one.
    """

    nodes: tuple[fx.Node, ...]
    inputs: tuple[str, ...]
    end: str

    @staticmethod
    def of(program: Program, site: Site, original: Program) -> Region:
        """The region of a site in a program that still has it."""
        inside = site_nodes(program, site, original)
        end = site.out.projection if site.out and program.has(site.out.projection) else site.node
        needed, nodes = {end}, list[fx.Node]()
        for node in reversed(list(program.graph.nodes)):
            if node.name in needed and node.name in inside:
                nodes.insert(0, node)
                needed.update(n.name for n in node.all_input_nodes)
        read = [n.name for node in nodes for n in node.all_input_nodes if n.name not in inside]
        return Region(tuple(nodes), tuple(dict.fromkeys(read)), end)

    @property
    def parameters(self) -> set[str]:
        """The names of what it reads from the module."""
        return {str(node.target) for node in self.nodes if node.op == "get_attr"}

    def __call__(
        self, module: fx.GraphModule, values: Mapping[str, Any], weights: Mapping[str, Tensor]
    ) -> Tensor:
        """The value of its end, given the values of its inputs, with gradients towards the
        weights."""
        known = dict(values)
        for node in self.nodes:
            if node.op == "get_attr":
                name = str(node.target)
                found = weights[name] if name in weights else attribute(module, name)
                known[node.name] = found.detach() if name not in weights else found
                continue
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: known[n.name])
            known[node.name] = _called(node, args, kwargs)
        return cast(Tensor, known[self.end])


def _fast(spec: AttentionSpec) -> Callable[..., Tensor]:
    def attention(q: Tensor, k: Tensor, v: Tensor, *extras: Tensor) -> Tensor:
        return attend.fast(q, k, v, extras, spec)

    return attention


def _called(node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    if node.target is ATTENTION:  # the op's own gradient computes the whole score matrix
        q, k, v, extras, line = args
        return attend.fast(q, k, v, extras, parse_spec(str(line)))
    return cast(Any, node.target)(*args, **kwargs)
