"""Read an ONNX file as a `Graph`: protobuf, weights beside it, local functions. Nothing is run.

Weights in other files have to lie in the model's directory or below it.
"""

from __future__ import annotations

import ast
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnopt.compiler.errors import Problem
from attnopt.compiler.onnx.dtypes import torch_dtype
from attnopt.compiler.onnx.graph import STANDARD, Graph, Input, Node, dotted
from attnopt.compiler.onnx.host import constant
from attnopt.compiler.onnx.package import package
from attnopt.compiler.onnx.table import FIRST, LAST

_MAKE = "export the model again, for instance with torch.onnx.export(..., dynamo=True)"
_SCOPES = "pkg.torch.onnx.name_scopes"
_MOST_SCOPES = 1 << 16  # characters of them


def read(path: Path) -> Graph:
    """The graph of a file.

    Raises `Problem` A124 (the package onnx is missing), A103 (damaged), A125 (an opset that cannot
    be read), A128 (a type that cannot) and A129 (weights in other files).
    """
    onnx = package(path, "onnx", "onnx.inliner")
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(str(path), load_external_data=False)
        if not model.HasField("graph") or not model.opset_import:
            raise DecodeError("it holds no graph")
        if model.functions:
            model = onnx.inliner.inline_local_functions(model)
    except (DecodeError, ValueError, RuntimeError, onnx.checker.ValidationError) as error:
        raise Problem(
            "A103", "the ONNX file is damaged or cut off", where=str(path),
            why=str(error).split("\n")[0], help="download or save it again",
        ) from error  # fmt: skip
    opset = _opset(model, path)
    constants = {t.name: _tensor(t, path) for t in model.graph.initializer}
    if model.graph.sparse_initializer:
        raise Problem("A128", "sparse weights cannot be read", where=str(path), help=_MAKE)
    nodes: list[Node] = []
    for i, proto in enumerate(model.graph.node):
        made = _node(proto, i, opset, path)
        value = made.get("value")
        if made.operator == "Constant" and isinstance(value, Tensor):
            constants[made.outputs[0]] = value
        else:
            nodes.append(made)
    inputs = tuple(_input(i, path) for i in model.graph.input if i.name not in constants)
    graph = Graph(
        path.stem, inputs, tuple(o.name for o in model.graph.output), tuple(nodes), constants, opset
    )
    _check_whole(graph, path)
    return graph


def _opset(model: Any, path: Path) -> int:
    """The version of the standard operators."""
    for item in model.opset_import:
        if item.domain in (STANDARD, "ai.onnx"):
            if FIRST <= item.version <= LAST:
                return int(item.version)
            raise Problem(
                "A125", f"opset {item.version} cannot be read", where=str(path),
                why=f"operators are read as opsets {FIRST} to {LAST} define them",
                help=f"{_MAKE} with opset_version={FIRST + 1}, or convert it with "
                "onnx.version_converter.convert_version",
            )  # fmt: skip
    raise Problem("A125", "the file names no opset", where=str(path), help=_MAKE)


def _node(proto: Any, index: int, opset: int, path: Path) -> Node:
    import onnx

    name = proto.name or f"{proto.op_type}_{index}"
    attributes: dict[str, Any] = {}
    for attribute in proto.attribute:
        if attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS):
            attributes[attribute.name] = None  # of If, Loop and Scan: not in the table
            continue
        if attribute.type == onnx.AttributeProto.TENSOR:
            value = _tensor(attribute.t, path)
            whole = proto.op_type == "Constant"
            attributes[attribute.name] = value if whole else constant(value)
            continue
        value = onnx.helper.get_attribute_value(attribute)
        attributes[attribute.name] = list(value) if not isinstance(value, _PLAIN) else value
    domain = STANDARD if proto.domain == "ai.onnx" else proto.domain
    return Node(
        name, proto.op_type, domain, tuple(proto.input), tuple(proto.output), attributes, opset,
        _path(proto, name),
    )  # fmt: skip


_PLAIN = (int, float, str, bytes)


def _path(proto: Any, name: str) -> str:
    """The module that a node came from, as its exporter tells, and the node's name below it."""
    for item in proto.metadata_props:
        if item.key == _SCOPES:
            scopes = _literal(item.value)
            if isinstance(scopes, list) and len(scopes) > 1:
                return dotted(f"{scopes[-2]}.{name.rpartition('/')[2]}")
    return dotted(name)


def _literal(text: str) -> Any:
    """The Python value that a text spells, None for what is none."""
    try:
        return ast.literal_eval(text) if len(text) <= _MOST_SCOPES else None
    # Text that nests deeply exhausts the parser.
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None


def _input(value: Any, path: Path) -> Input:
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        raise Problem("A128", f"the input {value.name} is no tensor", where=str(path), help=_MAKE)
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        raise Problem("A128", f"the input {value.name} has no shape", where=str(path), help=_MAKE)
    shape = tuple(
        int(dim.dim_value) if dim.HasField("dim_value") else str(dim.dim_param)
        for dim in tensor.shape.dim
    )
    return Input(value.name, torch_dtype(tensor.elem_type, value.name), shape)


def _tensor(proto: Any, path: Path) -> Tensor:
    """A tensor of the file, or of a file beside it."""
    import onnx

    dtype = torch_dtype(proto.data_type, f"{path}: {proto.name}")
    if any(size < 0 for size in proto.dims):
        raise _damaged(proto, path, f"its sizes are {list(proto.dims)}")
    if proto.data_location == onnx.TensorProto.EXTERNAL:
        raw = _external(proto, path)
        wanted = math.prod(proto.dims) * dtype.itemsize
        if len(raw) != wanted:
            raise _outside(proto, path, f"{len(raw)} bytes were found, {wanted} are needed")
        made = torch.frombuffer(raw, dtype=dtype) if wanted else torch.empty(0, dtype=dtype)
        return made.reshape(tuple(proto.dims))
    try:
        array = onnx.numpy_helper.to_array(proto)
    except (ValueError, TypeError) as error:
        raise _damaged(proto, path, str(error).split("\n")[0]) from error
    if dtype == torch.bfloat16:
        bits = np.ascontiguousarray(array).view(np.int16)
        return torch.from_numpy(bits.copy()).view(dtype).reshape(tuple(proto.dims))
    return torch.from_numpy(np.array(array))


def _damaged(proto: Any, path: Path, why: str) -> Problem:
    return Problem(
        "A103", f"the tensor {proto.name} is damaged", where=str(path), why=why,
        help="download or save it again",
    )  # fmt: skip


def _external(proto: Any, path: Path) -> bytearray:
    """The bytes of a tensor that lies in another file of the model's directory."""
    entries = {item.key: item.value for item in proto.external_data}
    home = path.resolve().parent
    location = entries.get("location", "")
    file = (home / location).resolve()
    if not location or Path(location).is_absolute() or not file.is_relative_to(home):
        raise _outside(proto, path, f"`{location}` is not in the model's directory")
    try:
        offset = int(entries.get("offset", 0) or 0)
        wanted = math.prod(proto.dims) * torch_dtype(proto.data_type, proto.name).itemsize
        length = int(entries.get("length", wanted) or wanted)
        with file.open("rb") as stream:
            if min(offset, length) < 0 or offset + length > file.stat().st_size:
                raise _outside(proto, path, f"{location} ends before byte {offset + length}")
            stream.seek(offset)
            return bytearray(stream.read(length))
    except (OSError, ValueError) as error:
        raise _outside(proto, path, str(error)) from error


def _outside(proto: Any, path: Path, why: str) -> Problem:
    return Problem(
        "A129", f"the weights {proto.name} lie in another file and cannot be read",
        where=str(path), why=why, help="put the file of weights beside the model, as it was saved",
    )  # fmt: skip


def _check_whole(graph: Graph, path: Path) -> None:
    """Raise `Problem` A103 where a node or an output reads what nothing writes."""
    known = {item.name for item in graph.inputs} | set(graph.constants) | {""}
    if len({item.name for item in graph.inputs}) < len(graph.inputs):
        raise Problem("A103", "two inputs have one name", where=str(path), help=_MAKE)
    for node in graph.nodes:
        for name in node.inputs:
            if name not in known:
                raise _unwritten(path, f"{node.name} ({node.type}) reads `{name}`")
        known.update(node.outputs)
    for name in graph.outputs:
        if name not in known:
            raise _unwritten(path, f"the output `{name}` is not there")


def _unwritten(path: Path, why: str) -> Problem:
    return Problem(
        "A103", "the graph is not whole: a value is read before anything has written it",
        where=str(path), why=why, help=_MAKE,
    )  # fmt: skip
