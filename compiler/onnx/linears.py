"""Products with a constant matrix become `Linear` nodes, bias included: what a projection is to the
rest of the compiler. And a softmax with its NaN replaced becomes one node.

ONNX has no linear layer. Exporters write x W and then + b, with W [in, out]; here the weight is
[out, in] as torch keeps it.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from attnopt.compiler.onnx.graph import STANDARD, Graph, Node

OWN = "attnopt"
LINEAR, SAFE_SOFTMAX = "Linear", "SafeSoftmax"


def with_linears(graph: Graph) -> Graph:
    """The graph with `Linear` nodes (domain `OWN`) for MatMul and Gemm with constants."""
    readers = graph.readers()
    constants = dict(graph.constants)
    replaced: dict[int, Node | None] = {}
    taken = {item.name for item in graph.inputs} | set(constants)
    taken |= {name for node in graph.nodes for name in node.outputs}
    weights: dict[tuple[str, bool], str] = {}
    for node in graph.nodes:
        weight = _weight(node, graph)
        if weight is None:
            continue
        bias, last = _bias(node, graph, readers)
        flipped = node.operator == "MatMul" or not node.get("transB", 0)
        name = weights.get((weight, flipped))
        if name is None:
            name = weights[weight, flipped] = _named(node, weight, flipped, taken)
            taken.add(name)
            matrix = graph.constants[weight]
            constants[name] = matrix.t().contiguous() if flipped else matrix
        inputs = (node.inputs[0], name) if bias is None else (node.inputs[0], name, bias)
        replaced[id(node)] = None
        replaced[id(last)] = replace(
            node, operator=LINEAR, domain=OWN, inputs=inputs, outputs=last.outputs
        )
    nodes = [replaced.get(id(node), node) for node in graph.nodes]
    kept = tuple(node for node in nodes if node is not None)
    return without_unread(replace(graph, nodes=kept, constants=constants))


def without_unread(graph: Graph) -> Graph:
    """The graph without constants that no node reads."""
    read = {name for node in graph.nodes for name in node.inputs} | set(graph.outputs)
    constants = {name: value for name, value in graph.constants.items() if name in read}
    return replace(graph, constants=constants)


def _weight(node: Node, graph: Graph) -> str | None:
    """The constant matrix that a node multiplies with, where it does nothing else."""
    if node.domain != STANDARD or node.operator not in ("MatMul", "Gemm"):
        return None
    value = graph.constants.get(node.inputs[1])
    if value is None or value.dim() != 2 or value.numel() == 1 or not value.is_floating_point():
        return None
    if node.inputs[0] in graph.constants:
        return None
    if node.operator == "Gemm":
        plain = node.get("alpha", 1.0) == node.get("beta", 1.0) == 1.0 and not node.get("transA", 0)
        given = [name for name in node.inputs[2:] if name]
        if not plain or not all(_is_bias(name, value, node, graph) for name in given):
            return None
    return node.inputs[1]


def _bias(
    node: Node, graph: Graph, readers: dict[str, list[Node]]
) -> tuple[str | None, Node]:  # fmt: skip
    """The constant that is added to the product, and the last of the nodes that do it all."""
    if node.operator == "Gemm":
        given = [name for name in node.inputs[2:] if name]
        return (given[0] if given else None), node
    (out,) = node.outputs
    after = readers.get(out, [])
    if len(after) != 1 or out in graph.outputs:
        return None, node
    add = after[0]
    if add.domain != STANDARD or add.operator != "Add":
        return None, node
    other = add.inputs[1] if add.inputs[0] == out else add.inputs[0]
    if not _is_bias(other, graph.constants[node.inputs[1]], node, graph):
        return None, node
    return other, add


def _is_bias(name: str, weight: Tensor, node: Node, graph: Graph) -> bool:
    """Whether a value is a constant with one number for each column of the product."""
    value = graph.constants.get(name)
    columns = weight.shape[0 if node.get("transB", 0) else 1]
    return value is not None and list(value.shape) == [columns] and columns > 1


def _named(node: Node, weight: str, flipped: bool, taken: set[str]) -> str:
    """A name for the matrix that no other value has: its own, or the node's where the exporter made
    one up."""
    scope = node.path.rpartition(".")[0]
    if "." in weight and "::" not in weight:
        if not flipped:
            return weight
        name = f"{weight}_T"
    else:
        name = f"{scope or node.path}.weight"
    made, count = name, 1
    while made in taken:
        count += 1
        made = f"{name}_{count}"
    return made


def with_safe_softmax(graph: Graph) -> Graph:
    """The graph with `SafeSoftmax` for Where(IsNaN(p), 0, p), where p is a softmax: rows that read
    no key give zeros.
    """
    makers = {name: node for node in graph.nodes for name in node.outputs}
    readers = graph.readers()
    dropped: set[int] = set()
    replaced: dict[int, Node] = {}
    for where in graph.nodes:
        if where.domain != STANDARD or where.operator != "Where":
            continue
        softmax, test = makers.get(where.inputs[2]), makers.get(where.inputs[0])
        if softmax is None or test is None or (softmax.operator, test.operator) != (
            "Softmax", "IsNaN",
        ):  # fmt: skip
            continue
        zero = graph.constants.get(where.inputs[1])
        only = {id(n) for n in readers[softmax.outputs[0]]} == {id(where), id(test)}
        if test.inputs != softmax.outputs or zero is None or zero.any() or not only:
            continue
        if len(readers[test.outputs[0]]) == 1 and zero.numel() == 1:
            dropped |= {id(softmax), id(test)}
            replaced[id(where)] = replace(
                softmax, operator=SAFE_SOFTMAX, domain=OWN, outputs=where.outputs
            )
    nodes = [replaced.get(id(n), n) for n in graph.nodes if id(n) not in dropped]
    return replace(graph, nodes=tuple(nodes))
