"""The attentions of a program as work for kernels: what each computes, and at which sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.codegen.decode_spec import DecodeSpec
from attnopt.codegen.kernel import Load
from attnopt.codegen.latent_ways import latent_spec, why_not_absorbed
from attnopt.compiler.contract import Miss
from attnopt.compiler.decode.caches import Contiguous, Ring
from attnopt.compiler.decode.latents import Latent
from attnopt.compiler.errors import Problem
from attnopt.compiler.program import Program, inputs
from attnopt.compiler.spec import AttentionSpec, parse_spec

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class Wanted:
    """One attention: its id, the path of its module, its node, its spec and its sizes. `spec` says
    what a prompt needs, or with `step` what each new token does: attention over a cache. `kernels`
    are those that may compute it, all that take such specs where it is empty."""

    site: str
    module: str
    node: str
    spec: Any
    load: Load
    step: bool = False
    kernels: tuple[str, ...] = ()


def wanted(
    program: Program, batch: int | None = None, length: int | None = None, dtype: str | None = None
) -> list[Wanted]:
    """The program's attentions in order, at a batch and length and in a dtype; None keeps those of
    the example.

    Raises `Problem` A807 on a dtype that no kernel takes, and a size that the program fixes.
    """
    held = None if dtype is None else DTYPES.get(dtype, dtype)
    if held not in (None, *DTYPES.values()):
        raise Problem(
            "A807", f"kernels do not take {dtype}", help=f"one of {', '.join(DTYPES.values())}"
        )
    sizes = _sizes(program, batch, length)
    names = {site.node: (site.id, site.module) for site in program.sites}
    found = []
    for at, node in enumerate(program.attentions()):
        site, module = names.get(node.name, (f"s{at}", _module(node)))
        q, k = (arg.meta["val"] for arg in node.args[:2])  # type: ignore[union-attr]
        load = Load(
            _size(q.shape[0], sizes), _size(q.shape[2], sizes), _size(k.shape[2], sizes),
            held or str(q.dtype).removeprefix("torch."),
        )  # fmt: skip
        found.append(
            Wanted(site, module, node.name, canonical(parse_spec(str(node.args[4]))), load)
        )
    return found


def steps(found: Sequence[Wanted], caches: Mapping[str, Any]) -> list[Wanted | Miss]:
    """The same attentions for one new token after as many as their keys, over the caches that a
    decoder has, by node; a Miss for a cache that no kernel reads."""
    return [_step(each, caches.get(each.node)) for each in found]


def _step(each: Wanted, cache: Any) -> Wanted | Miss:
    step = replace(each, load=replace(each.load, queries=1), step=True)
    if isinstance(cache, Latent):
        width, rank = cache.widths[0][1], cache.rank
        missed = why_not_absorbed(each.spec, width, rank)
        if missed is None and each.spec.extras:
            missed = Miss(f"over latents there is no module that takes {each.spec.extras[0]}")
        if missed is not None:
            return missed
        spec = latent_spec(each.spec, width, rank)
        return replace(step, spec=spec, kernels=("latent_decode",))
    if not isinstance(cache, (Contiguous, Ring)):
        kind = type(cache).__name__.lower()
        return Miss(f"its cache is a {kind}, for which there is no choice of kernels yet")
    return replace(
        step, spec=DecodeSpec(each.spec, "ring" if isinstance(cache, Ring) else "contiguous")
    )


def canonical(spec: AttentionSpec) -> AttentionSpec:
    """The spec without what does not concern a kernel: which backend ran it, and the precision of a
    softmax that kernels always do in float32."""
    return spec.with_(backend="reference", softmax32=False)


def _module(node: fx.Node) -> str:
    """The path of the module that made a node."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]) if stack else ""


def _sizes(program: Program, batch: int | None, length: int | None) -> dict[str, int]:
    """The size that each symbol of the program's shapes stands for."""
    nodes = [node for node in program.graph.nodes if node.op == "placeholder"]
    found: dict[str, int] = {}
    shapes: list[tuple[int, ...]] = []
    open_dims = set()
    for node, value in zip(nodes, inputs(program, program.example), strict=True):
        if not isinstance(value, Tensor):
            continue
        shapes.append(tuple(value.shape))
        for dim in program.dynamic.get(node.name, {}):
            given = {0: batch, 1: length}.get(dim)
            found[str(node.meta["val"].shape[dim])] = value.shape[dim] if given is None else given
            open_dims.add(dim)
    for dim, given, what in ((0, batch, "batch"), (1, length, "length")):
        fixed = sorted({shape[dim] for shape in shapes if len(shape) > dim})
        if given is not None and dim not in open_dims and given not in fixed:
            raise Problem(
                "A807", f"the program has a fixed {what} of {', '.join(map(str, fixed))}",
                help=f"leave --{what} out",
            )  # fmt: skip
    return found


def _size(dim: Any, sizes: dict[str, int]) -> int:
    """A size, symbols replaced; what has none keeps the size of the example."""
    if not isinstance(dim, torch.SymInt):
        return int(dim)
    expression = dim.node.expr
    known = {s: sizes[str(s)] for s in expression.free_symbols if str(s) in sizes}
    settled = expression.subs(known)
    return int(settled) if not settled.free_symbols else int(dim.node.hint)
