"""Causal depthwise convolutions over a site's queries and keys, before their norm and rotary.

    q'_(h,t) = sum_j w_j q_(h, t - kernel + 1 + j),    w = (0, ..., 0, 1) to begin with

so that a site computes what it did until w is trained. What lies before the first token is zero,
and so is padding, where an input of the program tells of it: a prompt means the same however it is
padded.
Source: compressed convolutional attention (CCA, Figliolia et al. 2025, arXiv:2510.04476, section
3), of whose two convolutions this is the one over the sequence.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import fx

from attnopt.compiler.contract import Miss
from attnopt.compiler.decode.phase_cost import mask_of
from attnopt.compiler.layout import same_size
from attnopt.compiler.program import Program
from attnopt.compiler.reproject import Which
from attnopt.compiler.site import Path, Site
from attnopt.compiler.verify import padding_input

aten = torch.ops.aten
WHY = "a convolution over the sequence stands behind its projection"
_CONVOLVED: tuple[Which, ...] = ("q", "k")


def no_past(program: Program, site: Site) -> Miss | None:
    """Why queries and keys may not read earlier tokens; None where they may."""
    mask = mask_of(program, site)
    if mask is not None and mask.kind != "full" and mask.causal:
        return None
    return Miss(f"its mask is {site.mask}: queries and keys that read earlier tokens are for "
                "causal attentions", site.node)  # fmt: skip


def convolve(program: Program, site: Site, kernel: int) -> Site | Miss:
    """Put convolutions of `kernel` tokens behind the projections of queries and keys, in this
    program's graph; the site without the facts of these, which describe projections alone.

    Each parameter `[heads head_dim, 1, kernel]` is the site's own. A `Miss` says what stood in the
    way; the program is then half edited.
    """
    for which in _CONVOLVED:
        path = cast(Path, getattr(site, which))
        split = program.node(path.split)
        if split.meta["val"].dim() != 4:
            return Miss(f"no node holds {which} with one axis per head", path.split)
        _convolve(program, path, split, kernel)
    missing = site.missing | dict.fromkeys(map(str, _CONVOLVED), WHY)
    return replace(site, q=None, k=None, missing=missing)


def _convolve(program: Program, path: Path, split: fx.Node, kernel: int) -> None:
    users, before = list(split.users), split.next
    flipped = path.order == "bhtd"
    rows = program.call(aten.transpose.int, (split, 1, 2), before=before) if flipped else split
    heads, dim = (int(size) for size in rows.meta["val"].shape[2:])
    delta = torch.zeros(heads * dim, 1, kernel, dtype=split.meta["val"].dtype)
    delta[..., -1] = 1.0
    name = path.weight.removesuffix("weight").rstrip("_") + "_conv_weight"
    weight = program.parameter(name, delta, before=before)
    flat = program.call(aten.flatten.using_ints, (_real(program, rows, before), 2), before=before)
    flat = program.call(aten.transpose.int, (flat, 1, 2), before=before)
    flat = program.call(aten.pad.default, (flat, [kernel - 1, 0]), before=before)
    made = program.call(
        aten.conv1d.default, (flat, weight, None, [1], [0], [1], heads * dim), before=before
    )
    made = program.call(aten.transpose.int, (made, 1, 2), before=before)
    made = program.call(aten.unflatten.int, (made, -1, [heads, dim]), before=before)
    if flipped:
        made = program.call(aten.transpose.int, (made, 1, 2), before=before)
    for user in users:
        user.replace_input_with(split, made)


def _real(program: Program, rows: fx.Node, before: fx.Node) -> fx.Node:
    """Queries or keys `[batch, seq, heads, dim]`, zero at padding where the program knows it."""
    known = padding_input(program)
    if known is None:
        return rows
    source, test = known
    sizes, mine = source.meta["val"].shape, rows.meta["val"].shape
    if not all(same_size(a, b) for a, b in zip(sizes, mine[:2], strict=True)):
        return rows  # the mask is of another sequence, as an encoder's is
    operator = getattr(aten, test.op).Scalar
    real = program.call(operator, (source, test.value), before=before)
    for _ in range(2):
        real = program.call(aten.unsqueeze.default, (real, -1), before=before)
    return program.call(aten.where.ScalarOther, (real, rows, 0.0), before=before)
