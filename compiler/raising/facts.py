"""The facts of one raised attention: its projections, channel maps and rotary embedding."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx

from attnopt.compiler.program import Program
from attnopt.compiler.raising.evaluate import Unknown
from attnopt.compiler.raising.index_probe import (
    Linearised,
    channels,
    distinct,
    output_channels,
    small_sizes,
    split_node,
)
from attnopt.compiler.raising.projections import above, below
from attnopt.compiler.raising.rotation_probe import rotary
from attnopt.compiler.site import OutputPath, Path, Rotary


@dataclass
class Facts:
    """What the probes found for one attention; `missing` says why for what they did not."""

    q: Path | None = None
    k: Path | None = None
    v: Path | None = None
    out: OutputPath | None = None
    rotary: Rotary | None = None
    qk_norm: bool = False
    gain: float = 1.0
    kv_heads: int = 0
    missing: dict[str, str] = field(default_factory=dict)


def probe(program: Program, attention: fx.Node) -> Facts:
    """Probe one attention of a raised program."""
    facts = Facts()
    sizes = small_sizes(program)
    turned: dict[str, Rotary | None] = {}
    for which, operand in zip("qkv", attention.args[:3], strict=True):
        assert isinstance(operand, fx.Node)
        try:
            path, held, gain = _path(program, operand, sizes, repeats=which != "q")
        except Unknown as reason:
            facts.missing[which] = str(reason)
            continue
        setattr(facts, which, path)
        if which == "v":
            continue
        facts.qk_norm |= held.normed
        facts.gain *= gain
        try:
            turned[which] = rotary(held, operand)
        except Unknown as reason:
            facts.missing["rotary"] = str(reason)
    _join_rotary(facts, turned)
    k = attention.args[1]
    assert isinstance(k, fx.Node)
    facts.kv_heads = len(facts.k.channels) if facts.k else int(k.meta["val"].shape[1])
    if facts.k and facts.v and len(facts.k.channels) != len(facts.v.channels):
        facts.missing["v"] = (
            f"{len(facts.k.channels)} key heads and {len(facts.v.channels)} value heads"
        )
    try:
        facts.out = _output(program, attention, sizes)
    except Unknown as reason:
        facts.missing["out"] = str(reason)
    return facts


def _path(
    program: Program, operand: fx.Node, sizes: dict[str, int], repeats: bool
) -> tuple[Path, Linearised, float]:
    found, between = above(operand)
    if not found:
        raise Unknown(f"`{operand.name}` comes from no projection")
    if len(found) > 1:
        names = ", ".join(f"`{p.node.name}`" for p in found[:3])
        raise Unknown(f"`{operand.name}` joins {len(found)} projections: {names}")
    source = found[0]
    held = Linearised(program, source, between, sizes)
    found_map = channels(held, operand)
    index, factor = found_map.index, found_map.factor
    uniform = float((factor - factor.flatten()[0]).abs().max()) <= 1e-6 * float(factor.abs().max())
    copies = index
    if repeats:
        index = distinct(index)
    split = split_node(held, operand, index)
    if split is None and len(index) < len(copies):
        split = split_node(held, operand, copies)  # no node holds each head once
    name, order = split if split else ("", "bthd")
    path = Path(
        source.node.name,
        source.source.name,
        source.weight,
        source.bias,
        source.layout,
        index,
        name,
        order,
    )
    return path, held, float(factor.flatten()[0]) if uniform and not held.normed else 1.0


def _join_rotary(facts: Facts, turned: dict[str, Rotary | None]) -> None:
    if "rotary" in facts.missing or set(turned) != {"q", "k"}:
        if any(turned.values()):
            facts.missing.setdefault("rotary", "only one of q and k could be probed")
        return
    q, k = turned["q"], turned["k"]
    if (q is None) != (k is None):
        facts.missing["rotary"] = "only one of q and k is rotated"
    elif q is not None and k is not None:
        same = torch.equal(q.pairs, k.pairs) and torch.allclose(
            q.frequencies, k.frequencies, atol=1e-3
        )
        if not same:
            facts.missing["rotary"] = "q and k are rotated differently"
        else:
            facts.rotary = k


def _output(program: Program, attention: fx.Node, sizes: dict[str, int]) -> OutputPath:
    found = below(attention)
    if len(found) != 1:
        raise Unknown(f"`{attention.name}` feeds {len(found)} projections")
    made = found[0]
    index = output_channels(program, attention, made.source, sizes)
    return OutputPath(made.node.name, made.weight, made.bias, made.layout, index)
