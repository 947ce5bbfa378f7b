"""`torch.compile(model, backend="attnopt")`: exact rewrites of the attentions of the graph that
Dynamo hands over, then Inductor for all of it.

The graph is traced once more to ATen operators with its fake inputs, parameters and buffers held as
attributes meanwhile, so that masks in buffers can be proved. Only rewrites that read no weights are
made: weights stay inputs, gradients flow and updates in place are seen. What was rewritten is
compared with the graph as given on the inputs at hand; on any doubt Inductor gets that graph, and
one warning says why. A buffer that a mask was read from is watched: once it is another or written
to, the graph runs as it was given.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx

from attnopt.codegen.target import at_hand
from attnopt.compiler.backend_plan import GraphInputs, SavedPlan, of_module
from attnopt.compiler.contract import Notes, read_pass
from attnopt.compiler.errors import Problem
from attnopt.compiler.lower import lower
from attnopt.compiler.pipeline import apply_pass
from attnopt.compiler.program import Batch, Program, attribute
from attnopt.compiler.raising import raise_program
from attnopt.compiler.raising.anchor import SDPA, SOFTMAX
from attnopt.compiler.trace import normalise, without_own_writes, writes
from attnopt.compiler.verify import RUN_ERRORS, difference

PASSES = ("simplify_mask", "fold_repeated_kv", "toeplitz_bias", "fuse_attention")
ON_A_GPU = ("generate_kernel",)
# What another order of sums may do; another function does more.
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.25}
_log = logging.getLogger("attnopt.backend")


@dataclass(frozen=True)
class Options:
    """`torch.compile(..., backend="attnopt", options={...})`.

    `check` compares the exactly rewritten graph with the one as given, once per compilation, on the
    inputs at hand. `inductor` holds options for Inductor itself (see
    `torch._inductor.list_options()`). `plan` is the folder of a finished run, or the plan.json in
    it: its approximate steps are made as well, fitted on the batches that the run kept.
    """

    check: bool = True
    inductor: Mapping[str, Any] | None = None
    plan: str | Path | None = None

    @staticmethod
    def read(options: Mapping[str, Any] | None) -> Options:
        """Options as a user gives them. Raises `Problem` A212 on unknown or mistyped ones."""
        given = dict(options or {})
        known = [f.name for f in fields(Options)]
        for name in given:
            if name not in known:
                raise Problem(
                    "A212",
                    f"the backend attnopt has no option `{name}`",
                    help=f"it takes {', '.join(known)}; options of Inductor go into `inductor`",
                )
        made = Options(**given)
        if not isinstance(made.check, bool):
            raise Problem("A212", f"the option `check` is True or False, not {made.check!r}")
        if made.inductor is not None and not isinstance(made.inductor, Mapping):
            raise Problem("A212", f"the option `inductor` is a mapping, not {made.inductor!r}")
        if made.plan is not None and not isinstance(made.plan, (str, Path)):
            raise Problem("A212", f"the option `plan` is a path, not {made.plan!r}")
        return made


def attnopt(
    graph: fx.GraphModule, inputs: Sequence[Any], options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """The backend that `torch.compile` calls with each graph and its inputs.

    Raises `Problem` A212 on unknown options, and those of `SavedPlan` where a plan cannot be used.
    """
    from torch._inductor.compile_fx import compile_fx

    chosen = Options.read(options)
    saved = None if chosen.plan is None else SavedPlan.read(chosen.plan)
    # Sizes as they are now: computing with symbols here would fix them.
    numbers = [x.node.hint if isinstance(x, torch.SymInt) else x for x in inputs]
    rewritten = _rewritten(graph, numbers, chosen.check, saved)
    module, watched = (graph, []) if rewritten is None else rewritten
    patches = dict(chosen.inductor) if chosen.inductor else None
    compiled: Any = compile_fx(module, list(inputs), config_patches=patches)
    return _guarded(compiled, graph, watched, inputs) if watched else compiled


def _rewritten(
    graph: fx.GraphModule, inputs: Sequence[Any], check: bool = True, saved: SavedPlan | None = None
) -> tuple[fx.GraphModule, list[int]] | None:
    """The graph with its attentions rewritten, and the places of the inputs whose values went into
    it; None where the graph stays as it is, which a plan allows of graphs without attention."""
    try:
        program, lifted = _read(graph, inputs, facts=saved is not None)
        if not program.attentions():
            if saved is not None:
                _log.warning("the plan is not applied to a graph that holds no known attention")
            return None
        watched = _read_by_masks(program, graph, lifted)
        program = _applied(program)
        lowered = _with_inputs(lower(program), graph, lifted)
    except Problem as problem:
        _left(problem.what, saved)
        return None
    except RUN_ERRORS as error:
        _left(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}", saved)
        return None
    wrong = _wrong(graph, lowered, inputs) if check else ""
    if wrong:
        _left(wrong, saved)
        return None
    if saved is None:
        return lowered, watched
    made = saved.applied(program, GraphInputs(graph, lifted.values(), inputs))
    fitted = _fitted(program, made, lifted)
    kept = {name: holder for name, holder in lifted.items() if holder not in fitted}
    watched += [at for at, name in enumerate(_holders(graph)) if name in fitted]
    return _with_inputs(lower(made), graph, lifted, kept), sorted(set(watched))


def _fitted(before: Program, after: Program, lifted: Mapping[str, str]) -> set[str]:
    """The names of the inputs whose weights a fit has replaced."""
    read = {str(node.target) for node in after.graph.nodes if node.op == "get_attr"} & lifted.keys()
    return {lifted[name] for name in read
            if attribute(after.module, name) is not attribute(before.module, name)}  # fmt: skip


def _guarded(
    compiled: Callable[..., Any],
    graph: fx.GraphModule,
    watched: Sequence[int],
    inputs: Sequence[Any],
) -> Callable[..., Any]:
    """The compiled graph as long as the watched inputs are the tensors that they were."""
    known = [(at, weakref.ref(inputs[at]), _version(inputs[at])) for at in watched]
    said = False

    def run(*args: Any) -> Any:
        nonlocal said
        if all(args[at] is then() and _version(args[at]) == version for at, then, version in known):
            return compiled(*args)
        if not said:
            _log.warning(
                "a buffer that holds a mask, or a weight that was replaced by a fitted one, has "
                "changed: the graph runs as it was given"
            )
            said = True
        return graph(*args)

    return run


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _left(why: str, saved: SavedPlan | None) -> None:
    """Tell why a graph is compiled as it was given. Raises `Problem` A213 where a plan was to be
    applied to it."""
    if saved is not None:
        raise Problem("A213", "the plan cannot be applied to this graph",
                      where=str(saved.home), why=why)  # fmt: skip
    _log.warning("attnopt left a graph as it is, Inductor compiles it alone: %s", why)


def _read(
    graph: fx.GraphModule, inputs: Sequence[Any], facts: bool
) -> tuple[Program, dict[str, str]]:
    """The graph of ATen operators, raised, and attribute name -> input name of the weights."""
    holders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    fakes = [node.meta.get("example_value", x) for node, x in zip(holders, inputs, strict=True)]
    # Dynamo's own mode, not the one that it has made for backends since.
    mode = next((x.fake_mode for x in fakes if isinstance(x, FakeTensor)), None)
    # Composite operators read sizes, which may be symbols: the Python dispatcher takes those.
    with mode or nullcontext(), enable_python_dispatcher():
        traced = make_fx(graph, pre_dispatch=True, _allow_non_fake_inputs=True)(*fakes)
    without_own_writes(traced.graph)
    if any(writes(node) for node in traced.graph.nodes):
        raise Problem("A204", "the graph writes into tensors in place")
    if not any(node.target in (SDPA, *SOFTMAX) for node in traced.graph.nodes):
        return Program(traced, Batch()), {}
    lifted, rest = {}, []
    nodes = [node for node in traced.graph.nodes if node.op == "placeholder"]
    for node, holder, value in zip(nodes, holders, inputs, strict=True):
        if not _is_weight(holder, value):
            rest.append(value)
            continue
        name = f"lifted_{holder.name}"
        if isinstance(value, torch.nn.Parameter):
            traced.register_parameter(name, value)
        else:
            traced.register_buffer(name, value)
        with traced.graph.inserting_before(node):
            read = traced.graph.get_attr(name)
        read.meta = dict(node.meta)
        node.replace_all_uses_with(read)
        traced.graph.erase_node(node)
        lifted[name] = holder.name
    normalise(traced, fold_views=False)
    return raise_program(Program(traced, Batch(tuple(rest))), facts=facts), lifted


def _is_weight(holder: fx.Node, value: Any) -> bool:
    """Whether an input of Dynamo's graph is a parameter or buffer of a module."""
    if isinstance(value, torch.nn.Parameter):
        return True
    return isinstance(value, Tensor) and of_module(holder, "UnspecializedParamBufferSource")


def _read_by_masks(program: Program, graph: fx.GraphModule, lifted: Mapping[str, str]) -> list[int]:
    """The places of the inputs that are buffers above a mask or bias."""
    places = _holders(graph)
    seen: set[fx.Node] = set()
    stack = [extra for node in program.attentions() for extra in cast(list[fx.Node], node.args[3])]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    parameters = {name for name, _ in program.module.named_parameters()}
    names = {str(node.target) for node in seen if node.op == "get_attr"} - parameters
    return sorted(places.index(lifted[name]) for name in names if name in lifted)


def _applied(program: Program) -> Program:
    notes = Notes(program, target=_target(program))
    for name in (*PASSES, *(() if notes.target == "cpu" else ON_A_GPU)):
        program, outcomes = apply_pass(program, read_pass(name), ("*",), notes, verify=False)
        for outcome in outcomes:
            said = outcome.note if outcome.applied else f"left alone: {outcome.reason}"
            _log.info("%s at %s: %s", outcome.rewrite, outcome.target, said)
    return program


def _target(program: Program) -> str:
    """The name of the GPU that the graph's inputs lie on, or "cpu"."""
    for node in program.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.device.type == "cuda":
            return at_hand(value.device.index or 0).name
    return "cpu"


def _holders(graph: fx.GraphModule) -> list[str]:
    """The names of the graph's inputs, in order."""
    return [node.name for node in graph.graph.nodes if node.op == "placeholder"]


def _with_inputs(
    module: fx.GraphModule,
    graph: fx.GraphModule,
    lifted: Mapping[str, str],
    kept: Mapping[str, str] | None = None,
) -> fx.GraphModule:
    """The module with its weights as inputs again, all in the order of Dynamo's graph; those that
    are not among the `kept` stay constants, and their inputs are not read."""
    weights = {holder: name for name, holder in lifted.items()}
    rest = iter([node for node in module.graph.nodes if node.op == "placeholder"])
    last: fx.Node | None = None
    for holder in _holders(graph):
        # Before nothing in particular is at the beginning.
        with module.graph.inserting_after(last) if last else module.graph.inserting_before():
            given = last = module.graph.placeholder(holder)
        name = weights.get(holder)
        if name is not None and kept is not None and name not in kept:
            continue
        olds = [next(rest)] if name is None else _readers(module, name)
        for old in olds:
            given.meta = dict(old.meta)
            old.replace_all_uses_with(given)
            module.graph.erase_node(old)
    module.delete_all_unused_submodules()
    module.graph.lint()
    module.recompile()
    return module


def _readers(module: fx.GraphModule, name: str) -> list[fx.Node]:
    return [node for node in module.graph.nodes if node.op == "get_attr" and node.target == name]


def _wrong(graph: fx.GraphModule, made: fx.GraphModule, inputs: Sequence[Any]) -> str:
    """What the rewritten graph does otherwise on the inputs at hand, or nothing."""
    with torch.no_grad():
        expected, actual = graph(*inputs), made(*inputs)
    dtypes = [x.dtype for x in expected if isinstance(x, Tensor) and x.is_floating_point()]
    allowed = max((_ROUNDING.get(dtype, 1e-3) for dtype in dtypes), default=0.0)
    error = difference(list(expected), list(actual))
    if error <= allowed:
        return ""
    return f"the rewritten graph computes something else (difference {error:.1e})"
