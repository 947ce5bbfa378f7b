"""Load an ONNX file: its graph through torch, with example inputs made from the inputs it declares.

What comes out is an exported program, like that of a `.pt2`, whose nodes know their ONNX nodes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from attnopt.compiler.errors import Problem
from attnopt.compiler.intake.checkpoint import first_line
from attnopt.compiler.intake.export_model import symbolic_dims
from attnopt.compiler.intake.inputs import Batch
from attnopt.compiler.intake.loaded import Loaded, Task, check_runs, describe
from attnopt.compiler.intake.onnx_inputs import made_up
from attnopt.compiler.onnx import OnnxModule, read_onnx
from attnopt.compiler.onnx.graph import Graph

_TOKENS, _MASK = "input_ids", "attention_mask"


def load_onnx(path: Path, given: Batch | None, rows: int | None, length: int | None) -> Loaded:
    """Read an ONNX file, run it once, and trace it with the sizes that it leaves open.

    Raises `Problem` A103 and A124 to A129 for files that cannot be read, A111 and A116 for inputs
    that cannot be made, A109 where it does not run on them, and A211 where it cannot be traced.
    """
    module = read_onnx(path)
    graph = module.graph
    notes: tuple[str, ...] = ()
    if given is None:
        args, kwargs = (), made_up(graph, rows, length, str(path))
        notes = (f"example inputs made from the graph's inputs: {describe(args, kwargs)}, random",)
    else:
        args, kwargs = given
    loaded = Loaded(module, None, args, kwargs, path.stem, "onnx", notes=notes)
    check_runs(loaded, str(path))
    loaded.task = _task(module, args, kwargs)
    loaded.exported = _exported(module, graph, (args, kwargs), str(path))
    loaded.sequence_dims = symbolic_dims(loaded.exported)
    loaded.module = None
    return loaded


def _exported(
    module: OnnxModule, graph: Graph, batch: Batch, where: str
) -> torch.export.ExportedProgram:
    """The module through `torch.export`; sizes that turn out to be fixed are fixed."""
    args, kwargs = _two_rows(graph, batch)
    failure: Exception | None = None
    for dims in (_open_dims(graph, shared=True), _open_dims(graph, shared=False), None):
        try:
            made = torch.export.export(
                module, args, kwargs, dynamic_shapes=_for(args, kwargs, dims), strict=False
            )
        # Any failure of an operator under tracing lands here.
        except Exception as error:  # noqa: BLE001
            failure = error
            continue
        for node in made.graph.nodes:
            node.meta.pop("stack_trace", None)  # lines of this reader, not of the model
        return made
    assert failure is not None
    raise Problem(
        "A217",
        "the ONNX graph could not be traced",
        where=where,
        why=f"{type(failure).__name__}: {first_line(failure)}",
        help="shapes that depend on the values of tensors cannot be traced",
    ) from failure


def _open_dims(graph: Graph, *, shared: bool) -> dict[str, Any]:
    """`dynamic_shapes` by input: what the file leaves open. With `shared`, a symbol that leads
    several inputs is one batch."""
    first = [item.shape[0] for item in graph.inputs if item.shape and item.shape[0] != ""]
    batch = torch.export.Dim("batch", min=1)
    found, names = dict[str, Any](), graph.input_names
    for item in graph.inputs:
        dims: dict[int, Any] = {
            dim: torch.export.Dim.AUTO
            for dim, size in enumerate(item.shape)
            if isinstance(size, str)
        }
        if shared and 0 in dims and first.count(item.shape[0]) > 1:
            dims[0] = batch
        found[names[item.name]] = dims or None
    return found


def _for(args: tuple[Any, ...], kwargs: dict[str, Any], dims: dict[str, Any] | None) -> Any:
    """The dims of all inputs in the structure of a call: by name."""
    if dims is None:
        return None
    names = [*list(dims)[: len(args)], *kwargs]
    return {name: dims.get(name) for name in names}


def _two_rows(graph: Graph, batch: Batch) -> Batch:
    """The example with its rows doubled when it has one and may have more: a size of 1 would be
    traced as a constant."""
    leaves = pytree.tree_leaves(batch)
    varies = all(item.shape and isinstance(item.shape[0], str) for item in graph.inputs)
    single = all(isinstance(x, Tensor) and x.dim() and x.shape[0] == 1 for x in leaves)
    if not varies or not single:
        return batch
    doubled: Batch = pytree.tree_map(lambda x: torch.cat([x, x]), batch)
    return doubled


def _task(module: OnnxModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Task:
    """A causal language model gives logits for tokens, and no token changes those before it; that
    is tried out."""
    tokens = kwargs.get(_TOKENS)
    if any(isinstance(x, Tensor) and x.dim() == 4 for x in (*args, *kwargs.values())):
        return "vision"
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.shape[1] < 2:
        return "other"
    if "decoder_input_ids" in kwargs:
        return "seq2seq"
    with torch.no_grad():
        logits = module(*args, **kwargs).get("logits")
        if logits is None or logits.dim() != 3 or logits.shape[:2] != tokens.shape:
            return "encoder" if _MASK in kwargs else "other"
        changed = tokens.clone()
        changed[:, -1] = torch.where(tokens[:, -1] == tokens[:, 0], tokens[:, 1], tokens[:, 0])
        again = module(*args, **{**kwargs, _TOKENS: changed})["logits"]
    same = torch.allclose(logits[:, :-1], again[:, :-1], rtol=1e-4, atol=1e-5)
    return "causal-lm" if same else "encoder"
