"""Read and write the projections of a site by head and dim, whatever the model's own layout.

Reading answers float64 `[heads, dim, width]`; writing keeps the parameter's dtype and layout and
touches only the channels that belong to the site. A parameter that another node reads too is not
written: the site gets one of its own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, fx

from attnopt.compiler.program import Program
from attnopt.compiler.site import OutputPath, Path, Site

aten = torch.ops.aten
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_TRANSPOSES = (aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default)


def read_weight(program: Program, path: Path) -> tuple[Tensor, Tensor | None]:
    """The projection of q, k or v, float64.

    Weight `[heads, dim, width]`, and bias `[heads, dim]` or None.
    """
    weight = program.weight(path.weight).detach().double()
    rows = weight if path.layout == "out_in" else weight.T
    bias = program.weight(path.bias).detach().double()[path.channels] if path.bias else None
    return rows[path.channels], bias


def token_rows(program: Program, path: Path) -> fx.Node:
    """What a path's projection reads, as `[batch, seq, width]` where a view made rows of it."""
    source = program.node(path.source)
    if source.meta["val"].dim() == 2 and source.target in VIEWS:
        return cast(fx.Node, source.args[0])
    return source


def read_output(program: Program, path: OutputPath) -> Tensor:
    """The output projection as `[heads, v_dim, width]` float64.

    What (head, dim) of the attention's result adds.
    """
    weight = program.weight(path.weight).detach().double()
    rows = weight if path.layout == "in_out" else weight.T
    return rows[path.channels]


def write_query(program: Program, site: Site, weight: Tensor, bias: Tensor | None) -> Site:
    """Put `[heads, dim, width]` and `[heads, dim]` in the place of the query projection's.

    Answers the site's new facts.
    """
    path = cast(Path, site.q)
    name = _written(program, path.projection, path.weight, path.channels, weight, path.layout)
    bias_name = path.bias
    if bias is not None and path.bias is not None:
        bias_name = _written(program, path.projection, path.bias, path.channels, bias, "out_in")
    return replace(site, q=replace(path, weight=name, bias=bias_name))


def write_output(program: Program, site: Site, weight: Tensor, bias: Tensor | None = None) -> Site:
    """Put `[heads, v_dim, width]` (and a bias `[width]`) in the output projection's place."""
    path = cast(OutputPath, site.out)
    flipped = (
        "in_out" if path.layout == "out_in" else "out_in"
    )  # here the site's channels are inputs
    name = _written(program, path.projection, path.weight, path.channels, weight, flipped)
    bias_name = path.bias
    if bias is not None and path.bias is not None:
        all_of_it = torch.arange(bias.numel())
        bias_name = _written(program, path.projection, path.bias, all_of_it, bias, "out_in")
    return replace(site, out=replace(path, weight=name, bias=bias_name))


def write_output_whole(program: Program, site: Site, weight: Tensor, bias: Tensor | None) -> Site:
    """Replace the whole output projection by `[width in, width out]`, columns of no head too."""
    path = cast(OutputPath, site.out)
    whole = replace(path, channels=torch.arange(len(weight))[None])
    made = write_output(program, replace(site, out=whole), weight[None], bias)
    return replace(made, out=replace(cast(OutputPath, made.out), channels=path.channels))


def _written(
    program: Program, projection: str, name: str, channels: Tensor, value: Tensor, layout: str
) -> str:
    """Write rows (or columns, for "in_out") of a parameter; the name under which they now are."""
    old = program.weight(name).detach()
    new = old.clone()
    rows = new.T if layout == "in_out" else new
    rows[channels.reshape(-1)] = value.reshape(channels.numel(), *value.shape[channels.dim() :]).to(
        old.dtype
    )
    reader = program.node(projection)
    if _readers(program, name) <= {reader}:
        program.set_weight(name, new)
        return name
    return rewired(program, reader, name, new)


def rewired(program: Program, reader: fx.Node, name: str, value: Tensor) -> str:
    """Let one node read `value`, of any shape, where it read the parameter `name`, transposes and
    all; the name of the new parameter."""
    own = _free(program, name)
    for argument in [n for n in reader.all_input_nodes if _parameter(n) == name]:
        fresh = program.parameter(own, value, before=reader)
        if argument.op != "get_attr":
            fresh = program.call(argument.target, (fresh, *argument.args[1:]), before=reader)  # type: ignore[arg-type]
        reader.replace_input_with(argument, fresh)
    return own


def _readers(program: Program, name: str) -> set[fx.Node]:
    """The nodes that compute with a parameter, seen through its transposes."""
    found: set[fx.Node] = set()
    stack = [user for node in program.parameter_nodes(name) for user in node.users]
    while stack:
        user = stack.pop()
        if user.target in _TRANSPOSES:
            stack.extend(user.users)
        else:
            found.add(user)
    return found


def _parameter(node: fx.Node) -> str:
    while node.target in _TRANSPOSES:
        node = cast(fx.Node, node.args[0])
    return str(node.target) if node.op == "get_attr" else ""


def _free(program: Program, name: str) -> str:
    taken = {n for n, _ in program.module.named_parameters(remove_duplicate=False)}
    count = 0
    while f"{name}_{count}" in taken:
        count += 1
    return f"{name}_{count}"
