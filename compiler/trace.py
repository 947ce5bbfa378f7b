"""Trace a loaded model with `torch.export` (non-strict) to the pre-decomposition ATen graph, and
normalise it."""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from attnopt.compiler.errors import Problem
from attnopt.compiler.intake.loaded import Loaded
from attnopt.compiler.program import Batch, Program, attribute
from attnopt.compiler.stack import every_call
from attnopt.compiler.untouched import untouched

aten = torch.ops.aten
_INLINED = ("wrap_with_set_grad_enabled", "wrap_with_autocast")
_ASSERTS = (
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten.sym_constrain_range_for_size.default,
)
_VIEWS = (
    aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.slice.Tensor,
    aten.select.int, aten.t.default, aten.transpose.int, aten.permute.default, aten.unbind.int,
)  # fmt: skip
_CASTS = (
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten.type_as.default,
    aten._to_copy.default, aten.float.default if hasattr(aten, "float") else None,
)  # fmt: skip


def trace(loaded: Loaded) -> Program:
    """The model as a Program of ATen operators, nothing raised yet.

    Raises `Problem` A201 when it cannot be traced.
    """
    example = Batch(tuple(loaded.args), dict(loaded.kwargs))
    exported = loaded.exported
    if exported is None:
        assert loaded.module is not None
        exported = _export(loaded.module, _two_rows(loaded.module, example))
    module = _functional(exported, loaded.name).module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    normalise(module)
    dynamic, fixed = _dims(module)
    return Program(
        module, example, name=loaded.name, prefix=loaded.root_prefix, dynamic=dynamic, fixed=fixed
    )


def _export(module: nn.Module, example: Batch) -> torch.export.ExportedProgram:
    failure: Exception | None = None
    convolves = any(isinstance(m, (nn.Conv2d, nn.Conv3d)) for m in module.modules())
    every = _not_images if convolves else _every_dim
    attempts = [every, _first_dim, _no_dim]
    if _one_batch(example):
        batch = torch.export.Dim("batch", min=1)
        attempts.insert(0, lambda value: every(value, batch))
    for shapes in attempts:
        dynamic = (
            pytree.tree_map(shapes, example.args),
            pytree.tree_map(shapes, dict(example.kwargs)),
        )
        try:
            with slow_paths(), every_call(), untouched(module), redirect_stderr(StringIO()) as told:
                exported = torch.export.export(
                    module,
                    example.args,
                    dict(example.kwargs),
                    dynamic_shapes=_by_signature(dynamic),
                    strict=False,
                )
            sys.stderr.write(told.getvalue())  # of a failed attempt it holds the whole graph
            return exported
        # Any failure of the model's own code under tracing lands here.
        except Exception as error:  # noqa: BLE001
            failure = error
    assert failure is not None
    raise Problem(
        "A201",
        f"torch.export could not trace {type(module).__name__}",
        where=_user_line(failure),
        why=f"{type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''}",
        help="models whose control flow depends on values of tensors cannot be traced; "
        "wrap the part that can be in a module and optimize that",
    ) from failure


def _functional(exported: torch.export.ExportedProgram, name: str) -> torch.export.ExportedProgram:
    """The same program without writes in place: every rewrite reads values, and a value that is
    written to later has two.

    Writes into the caller's inputs are left out. Raises `Problem` A204 for a model that writes into
    its own weights or buffers, whose next call would answer otherwise.
    """
    graphs = [m.graph for m in exported.graph_module.modules() if isinstance(m, fx.GraphModule)]
    if not any(writes(node) for graph in graphs for node in graph.nodes):
        return exported
    try:
        # With an empty table only the writes are rewritten.
        made: torch.export.ExportedProgram = exported.run_decompositions({})
    except Exception as error:
        raise Problem(
            "A204",
            f"the writes in place of {name} could not be rewritten",
            why=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
            help="make new tensors in the forward pass instead of writing into old ones",
        ) from error
    kept = made.graph_signature.buffers_to_mutate.values()
    if kept:
        raise Problem(
            "A204",
            f"{name} writes into its buffer `{next(iter(kept))}` whenever it runs",
            why="its next call answers otherwise, so no rewrite can be compared with it",
            help="give a model that keeps its buffers as they are in eval mode",
        )
    return made


def writes(node: fx.Node) -> bool:
    """Whether a node writes into one of its inputs."""
    return bool(getattr(getattr(node.target, "_schema", None), "is_mutable", False))


def without_own_writes(graph: fx.Graph) -> None:
    """Turn writes into values that nothing else reads afterwards into new values, in place."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if not writes(node) or not isinstance(node.args[0], fx.Node):
            continue
        written, packet = node.args[0], node.target.overloadpacket
        plain = getattr(aten, packet.__name__.removesuffix("_"), None)
        plain = getattr(plain, node.target._overloadname, None)
        others = [user for user in written.users if user is not node]
        later = any(order[user] > order[node] or _aliases(user) for user in others)
        fresh = written.op == "call_function" and not _aliases(written)
        if plain is not None and fresh and not later:
            node.target = plain


def _aliases(node: fx.Node) -> bool:
    """Whether a node's value may share memory with one of its inputs."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return True
    composite = node.target in (
        aten.reshape.default, aten.contiguous.default, aten.flatten.using_ints, *_CASTS,
    )  # fmt: skip
    return composite or any(result.alias_info is not None for result in schema.returns)


def _by_signature(dynamic: tuple[Any, dict[str, Any]]) -> Any:
    args, kwargs = dynamic
    if not args:
        return kwargs
    return args if not kwargs else (*args, *kwargs.values())


def _two_rows(module: nn.Module, example: Batch) -> Batch:
    """The example with its rows doubled when it has one: a size of 1 would be traced as a
    constant."""
    leaves = pytree.tree_leaves((example.args, dict(example.kwargs)))
    if not all(isinstance(x, Tensor) and x.dim() and x.shape[0] == 1 for x in leaves):
        return example
    doubled = pytree.tree_map(lambda x: torch.cat([x, x]), (example.args, dict(example.kwargs)))
    try:
        with torch.no_grad():
            module(*doubled[0], **doubled[1])
    except (RuntimeError, ValueError, IndexError):
        return example
    return Batch(*doubled)


def _one_batch(example: Batch) -> bool:
    """Whether several tensors come in and agree on the size of their first dim: then it is one
    batch dim."""
    leaves = pytree.tree_leaves((example.args, dict(example.kwargs)))
    sizes = [x.shape[0] for x in leaves if isinstance(x, Tensor) and x.dim()]
    return len(sizes) > 1 and len(set(sizes)) == 1 and sizes[0] > 1


def _every_dim(value: Any, first: Any = torch.export.Dim.AUTO) -> Any:
    """The batch and all lengths."""
    if not isinstance(value, Tensor) or not value.dim():
        return None
    return {0: first} | dict.fromkeys(range(1, value.dim()), torch.export.Dim.AUTO)


def _not_images(value: Any, first: Any = torch.export.Dim.AUTO) -> Any:
    """The same, but of images the batch alone: their size goes through strides, patches and
    windows, which takes minutes to trace as symbols."""
    if isinstance(value, Tensor) and value.dim() >= 4 and value.is_floating_point():
        return {0: first}
    return _every_dim(value, first)


def _first_dim(value: Any) -> Any:
    return {0: torch.export.Dim.AUTO} if isinstance(value, Tensor) and value.dim() else None


def _no_dim(value: Any) -> Any:
    return None


@contextmanager
def slow_paths() -> Iterator[None]:
    """Trace nn.MultiheadAttention through its plain operators, not through its fused inference
    kernel."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def normalise(module: fx.GraphModule, fold_views: bool = True) -> None:
    """Inline no-grad regions; drop shape assertions, inactive dropout and casts that change
    nothing; make views of parameters parameters, unless told not to.

    In place.
    """
    graph = module.graph
    while _inline_regions(module):
        pass
    for node in list(graph.nodes):
        if (node.op == "call_module" and str(node.target).startswith("_guards_fn")) or (
            node.target in _ASSERTS and not node.users
        ):
            graph.erase_node(node)
        elif node.target is aten.copy_.default and node.args[0].op == "placeholder":
            node.replace_all_uses_with(node.args[1])  # a write into the caller's input
            graph.erase_node(node)
        elif _changes_nothing(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target is aten.view.default:
            node.target = aten.reshape.default  # a rewrite may change strides, never shapes
    if fold_views:
        _fold_parameter_views(module)
    graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
    module.delete_all_unused_submodules()
    graph.lint()
    module.recompile()


def _fold_parameter_views(module: fx.GraphModule) -> None:
    """Views of a parameter alone (a slice of a packed weight, a transpose) become parameters,
    sharing its memory."""
    for node in list(module.graph.nodes):
        if node.target not in _VIEWS or not _from_parameter(node.all_input_nodes):
            continue
        args, kwargs = fx.map_arg(
            (node.args, dict(node.kwargs)), lambda n: attribute(module, str(n.target))
        )
        value = node.target(*args, **kwargs)
        parts = value if isinstance(value, (list, tuple)) else [value]
        for i, part in enumerate(parts):
            name = f"{node.all_input_nodes[0].target}__{node.name}_{i}".replace(".", "__")
            module.register_parameter(name, nn.Parameter(part.detach(), requires_grad=False))
            readers = [u for u in node.users if u.args[1] == i] if part is not value else [node]
            for reader in readers:
                with module.graph.inserting_before(reader):
                    read = module.graph.get_attr(name)
                read.meta["val"] = reader.meta["val"]
                reader.replace_all_uses_with(read)


def _from_parameter(nodes: list[fx.Node]) -> bool:
    return (
        len(nodes) == 1
        and nodes[0].op == "get_attr"
        and isinstance(nodes[0].meta.get("val"), Tensor)
    )


def _changes_nothing(node: fx.Node) -> bool:
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.target in (aten.dropout.default, aten.feature_dropout.default):
        return bool(node.args[2] is False or node.args[1] == 0.0)
    if node.target in (aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default):
        return True
    if node.target in _CASTS:
        before, after = node.args[0].meta.get("val"), node.meta.get("val")
        return (
            isinstance(before, Tensor)
            and isinstance(after, Tensor)
            and before.dtype == after.dtype
            and before.device == after.device
        )
    return node.target is aten.slice.Tensor and _whole_slice(node)


def _whole_slice(node: fx.Node) -> bool:
    arguments = [*node.args, *(None,) * (5 - len(node.args))]
    _, _, start, end, step = arguments[:5]
    return start in (None, 0) and end in (None, 2**63 - 1) and step in (None, 1)


def _inline_regions(module: fx.GraphModule) -> bool:
    """Inline the first remaining no-grad or autocast region; False when there is none."""
    for node in module.graph.nodes:
        name = getattr(node.target, "__name__", "")
        if node.op != "call_function" or name not in _INLINED:
            continue
        if name == "wrap_with_autocast" and node.args[2]:
            raise Problem(
                "A202",
                "the model runs a region under torch.autocast",
                where=node.name,
                help="optimize the model without autocast, in the dtype it should run in",
            )
        at = next(
            i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a.op == "get_attr"
        )
        body = getattr(module, str(node.args[at].target))
        _inline(module, node, body, node.args[at + 1 :])
        return True
    return False


def _inline(
    module: fx.GraphModule, node: fx.Node, body: fx.GraphModule, inputs: tuple[Any, ...]
) -> None:
    values: dict[fx.Node, Any] = {}
    given = iter(inputs)
    result: Any = None
    for inner in body.graph.nodes:
        if inner.op == "placeholder":
            values[inner] = next(given)
        elif inner.op == "output":
            result = fx.map_arg(inner.args[0], lambda n: values[n])
        else:
            if inner.op == "get_attr" and not hasattr(module, str(inner.target)):
                setattr(module, str(inner.target), getattr(body, str(inner.target)))
            with module.graph.inserting_before(node):
                values[inner] = module.graph.node_copy(inner, lambda n: values[n])
    for user in list(node.users):
        if user.target is operator.getitem:
            user.replace_all_uses_with(result[user.args[1]])
            module.graph.erase_node(user)
    if node.users:
        node.replace_all_uses_with(result if isinstance(result, fx.Node) else result[0])
    module.graph.erase_node(node)


def _dims(module: fx.GraphModule) -> tuple[dict[str, dict[int, str]], tuple[str, ...]]:
    dynamic: dict[str, dict[int, str]] = {}
    fixed: list[str] = []
    for node in module.graph.nodes:
        value = node.meta.get("val")
        if node.op != "placeholder" or not isinstance(value, Tensor):
            continue
        dynamic[node.name] = {}
        shape: tuple[Any, ...] = tuple(value.shape)
        for dim, size in enumerate(shape):
            if isinstance(size, torch.SymInt) and not size.node.expr.is_number:
                dynamic[node.name][dim] = str(size.node.expr)
            else:
                fixed.append(f"dim {dim} of `{node.name}` is fixed at {int(size)}")
    return dynamic, tuple(fixed)


def _user_line(error: Exception) -> str:
    frames = []
    trace: Any = error.__traceback__
    while trace is not None:
        frames.append((trace.tb_frame.f_code.co_filename, trace.tb_lineno))
        trace = trace.tb_next
    own = [f for f in frames if "/torch/" not in f[0] and "/compiler/trace.py" not in f[0]]
    return f"{own[-1][0]}:{own[-1][1]}" if own else ""
