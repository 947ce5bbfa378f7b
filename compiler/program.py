"""`Program`: a traced model as an FX graph with its example inputs, its attention sites and its
residual sublayers.

Copies share the weights: a rewrite sets attributes of the copy and never writes into a tensor.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch.utils import _pytree as pytree

from attnopt.compiler import attend
from attnopt.compiler.device import CPU, Carried, move_graph
from attnopt.compiler.ops import ATTENTION, as_tokens
from attnopt.compiler.site import Site, Sublayer, Unraised
from attnopt.compiler.spec import AttentionSpec, parse_spec


@dataclass(frozen=True)
class Batch:
    """One call of the model: inputs, and which positions are real.

    `valid` is bool `[batch, seq]`, True at real tokens, or None when every position is real. It
    need not be where the inputs are.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    valid: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The batch with its inputs on a device."""
        args, kwargs = pytree.tree_map_only(
            Tensor, lambda x: x.to(device), (tuple(self.args), dict(self.kwargs))
        )
        return replace(self, args=args, kwargs=kwargs)


@dataclass
class Program:
    """A model as a graph.

    `module` is called like the model, with `args` and `kwargs` shaped like the example.
    `dynamic` maps input name -> {dim: symbol name} for what may vary; `fixed` says in words which
    dims may not. `prefix` is dropped from module names that are shown.
    """

    module: fx.GraphModule
    example: Batch
    name: str = "model"
    prefix: str = ""
    dynamic: dict[str, dict[int, str]] = field(default_factory=dict)
    fixed: tuple[str, ...] = ()
    sites: tuple[Site, ...] = ()
    unraised: tuple[Unraised, ...] = ()
    sublayers: tuple[Sublayer, ...] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def run(self, batch: Batch) -> Any:
        """The outputs for one batch, without gradients."""
        with torch.no_grad():
            return self.module(*batch.args, **batch.kwargs)

    @property
    def graph(self) -> fx.Graph:
        """The FX graph."""
        return self.module.graph

    def node(self, name: str) -> fx.Node:
        """The node called `name`.

        Raises KeyError when a rewrite has removed it.
        """
        found = self.find(name)
        if found is None:
            raise KeyError(f"no node `{name}` in the graph of {self.name}")
        return found

    def find(self, name: str) -> fx.Node | None:
        """The node called `name`, or None."""
        return next((node for node in self.graph.nodes if node.name == name), None)

    def has(self, name: str) -> bool:
        """Whether a node called `name` is still in the graph."""
        return self.find(name) is not None

    def attentions(self) -> list[fx.Node]:
        """All nodes of the canonical op, in graph order."""
        return [node for node in self.graph.nodes if node.target is ATTENTION]

    def site(self, id: str) -> Site:
        """The site with this id.

        Raises KeyError.
        """
        return next(site for site in self.sites if site.id == id)

    def spec(self, site: Site) -> AttentionSpec:
        """The spec that the graph holds now for a site."""
        return parse_spec(str(self.node(site.node).args[4]))

    @property
    def device(self) -> torch.device:
        """Where its weights are and it runs; without weights, where its example is."""
        held = chain(self.module.parameters(), self.module.buffers(), self._given())
        return next((tensor.device for tensor in held if not tensor.is_meta), CPU)

    def _given(self) -> Iterator[Tensor]:
        leaves = pytree.tree_leaves((self.example.args, dict(self.example.kwargs)))
        yield from (leaf for leaf in leaves if isinstance(leaf, Tensor))

    def weight(self, name: str) -> Tensor:
        """A parameter or buffer by dotted name, to compute with: on the CPU, wherever it lies."""
        found: Tensor = attribute(self.module, name)
        return found if found.is_meta else found.cpu()

    def parameter_nodes(self, name: str) -> list[fx.Node]:
        """The get_attr nodes that read the parameter `name`."""
        return [n for n in self.graph.nodes if n.op == "get_attr" and n.target == name]

    def copy(self) -> Program:
        """A copy with a graph of its own and shared weights."""
        return replace(self, module=copy_module(self.module))

    def to(self, device: torch.device, carried: Carried | None = None) -> Program:
        """The same program on a device: weights (those that were `carried` there already are
        shared), the example, and what its graph makes."""
        there = carried or Carried(device)
        made = replace(self, module=copy_module(self.module), example=self.example.to(device))
        tensors = (*self.module.named_parameters(remove_duplicate=False),
                   *self.module.named_buffers(remove_duplicate=False))  # fmt: skip
        for name, value in tensors:
            made._put(name, there(value))
        move_graph(made.graph, device)
        made.module.recompile()
        return made

    def with_sites(self, sites: Iterable[Site]) -> Program:
        """The same program with other sites recorded."""
        return replace(self, sites=tuple(sites))

    def set_weight(self, name: str, value: Tensor) -> None:
        """Replace the parameter `name` (the shape may change), or add it, in this copy alone; it is
        put where the others are."""
        self._put(name, value.to(self.device))

    def _put(self, name: str, value: Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        owner = _own_submodule(self.module, path) if path else self.module
        is_buffer = leaf in owner._buffers
        for table in (owner._parameters, owner._buffers, owner.__dict__):
            table.pop(leaf, None)
        if is_buffer or not value.is_floating_point():
            owner.register_buffer(leaf, value.detach())
        else:
            owner.register_parameter(leaf, torch.nn.Parameter(value.detach(), requires_grad=False))

    def drop_weight(self, name: str) -> None:
        """Forget the parameter `name` in this copy alone, unless a node still reads it."""
        if self.parameter_nodes(name):
            return
        path, _, leaf = name.rpartition(".")
        owner = _own_submodule(self.module, path) if path else self.module
        for table in (owner._parameters, owner._buffers):
            table.pop(leaf, None)

    def parameter(self, name: str, value: Tensor, before: fx.Node) -> fx.Node:
        """Add a parameter and a get_attr node that reads it, placed before a node."""
        self.set_weight(name, value)
        with self.graph.inserting_before(before):
            node = self.graph.get_attr(name)
        node.meta["val"] = _fake_like(before, attribute(self.module, name))
        return node

    def call(
        self, target: Callable[..., Any], args: tuple[Any, ...], before: fx.Node, **kwargs: Any
    ) -> fx.Node:
        """Insert a call_function node before a node, with its fake value worked out in
        `meta["val"]`."""
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, args, kwargs)
        infer(node)
        if "nn_module_stack" in before.meta:
            node.meta["nn_module_stack"] = before.meta["nn_module_stack"]
        return node

    def clean(self) -> None:
        """Drop dead nodes and unused weights, check the graph and recompile.

        Call once after a rewrite.
        """
        self.graph.eliminate_dead_code(
            is_impure_node=lambda node: node.op in ("placeholder", "output")
        )
        self.module.delete_all_unused_submodules()
        self.graph.lint()
        self.module.recompile()


def copy_module(module: fx.GraphModule) -> fx.GraphModule:
    """A GraphModule with a copied graph that shares every tensor with the given one."""
    made = fx.GraphModule(module, copy.deepcopy(module.graph))
    made.graph._codegen = copy.copy(module.graph._codegen)
    made.recompile()
    return made


def attribute(module: torch.nn.Module, name: str) -> Any:
    """A nested attribute by dotted name."""
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part)
    return found


def infer(node: fx.Node) -> Any:
    """Work out and store `meta["val"]` of a call_function node from its inputs' fake values."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    fakes = [x for x in pytree.tree_leaves((args, kwargs)) if hasattr(x, "fake_mode")]
    if not fakes:
        raise ValueError(f"no input of `{node.name}` has a fake value")
    # Composite operators read sizes, which may be symbols: torch 2.11 takes those in Python only.
    with fakes[0].fake_mode, enable_python_dispatcher():
        node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]
    return node.meta["val"]


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps the values of named nodes.

    Attention that no rewrite has given a backend yet runs on torch's fused one where that computes
    it: the same values up to rounding, several times as fast.
    """

    def __init__(self, module: fx.GraphModule, names: Sequence[str], stop: bool = False) -> None:
        super().__init__(module)
        self.names, self.found, self.stop = set(names), dict[str, Any](), stop

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is not ATTENTION:
            return super().call_function(target, args, kwargs)
        q, k, v, extras, line = args
        return as_tokens(attend.fast(q, k, v, extras, parse_spec(str(line))))

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.names:
            self.found[n.name] = value
            if self.stop and len(self.found) == len(self.names):
                raise _Enough
        return value


class _Enough(Exception):
    """Every wanted value is there; the rest of the graph need not run."""


def record(program: Program, names: Sequence[str], batch: Batch) -> tuple[dict[str, Any], Any]:
    """The values of the named nodes for one batch, and the model's outputs.

    Raises KeyError on unknown names.
    """
    for name in names:
        program.node(name)
    recorder = _Recorder(program.module, names)
    flat, _ = pytree.tree_flatten((batch.args, dict(batch.kwargs)))
    with torch.no_grad():
        out = recorder.run(*_ordered(program, batch, flat), enable_io_processing=False)
    return recorder.found, out


def peek(
    program: Program, names: Sequence[str], batch: Batch, there: bool = False
) -> dict[str, Any]:
    """The values of the named nodes for one batch, on the CPU, or `there` where the program runs;
    what comes after the last of them does not run."""
    for name in names:
        program.node(name)
    recorder = _Recorder(program.module, names, stop=True)
    flat, _ = pytree.tree_flatten((batch.args, dict(batch.kwargs)))
    with torch.no_grad(), suppress(_Enough):
        recorder.run(*_ordered(program, batch, flat), enable_io_processing=False)
    if there:
        return recorder.found
    return dict(pytree.tree_map_only(Tensor, Tensor.cpu, recorder.found))


def inputs(program: Program, batch: Batch) -> list[Any]:
    """The batch's values in the order of the graph's placeholders."""
    flat, _ = pytree.tree_flatten((batch.args, dict(batch.kwargs)))
    return _ordered(program, batch, flat)


def _ordered(program: Program, batch: Batch, flat: list[Any]) -> list[Any]:
    codegen: Any = program.graph._codegen
    if not hasattr(codegen, "process_inputs"):
        return flat
    names = [n.name for n in program.graph.nodes if n.op == "placeholder"]
    kwargs = dict(batch.kwargs)
    if batch.args or len(kwargs) != len(names) or set(kwargs) != set(names):
        return flat
    return [kwargs[name] for name in names]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run a block with this many torch threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _fake_like(node: fx.Node, value: Tensor) -> Any:
    for other in node.graph.nodes:
        fake = other.meta.get("val")
        if hasattr(fake, "fake_mode"):
            return fake.fake_mode.from_tensor(value, static_shapes=True)
    raise ValueError("the graph holds no fake values")


def _own_submodule(module: torch.nn.Module, path: str) -> torch.nn.Module:
    """The submodule at `path`, made private to this copy (its tensors stay shared)."""
    owner = module
    for part in path.split("."):
        child = owner._modules.get(part)
        fresh = torch.nn.Module() if child is None else copy.copy(child)
        fresh._parameters = dict(getattr(child, "_parameters", {}))
        fresh._buffers = dict(getattr(child, "_buffers", {}))
        fresh._modules = dict(getattr(child, "_modules", {}))
        owner._modules[part] = fresh
        owner = fresh
    return owner
