"""The raising pipeline: anchors, canonical ops, probes, masks, residual blocks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import fx

from attnopt.compiler.program import Program
from attnopt.compiler.raising.absolute import absolute_positions
from attnopt.compiler.raising.anchor import Anchor, anchors
from attnopt.compiler.raising.blocks import sublayers
from attnopt.compiler.raising.canonical import heads_of_rank3, place
from attnopt.compiler.raising.crossing import Stop
from attnopt.compiler.raising.facts import Facts, probe
from attnopt.compiler.raising.mask import classify
from attnopt.compiler.raising.mask_facts import MaskFacts
from attnopt.compiler.raising.projections import below
from attnopt.compiler.site import Site, Unraised
from attnopt.compiler.spec import parse_spec
from attnopt.compiler.stack import frames


def raise_program(
    program: Program, leave: Mapping[str, str] | None = None, facts: bool = True
) -> Program:
    """A copy with every understood attention as the canonical op, its sites, misses and residual
    sublayers recorded.

    `leave` maps the last node of an attention to the reason why it stays as it is. Without `facts`
    the sites have no projections and no position encoding, and there are no sublayers.
    """
    raised = program.copy()
    placed: list[tuple[Anchor, fx.Node]] = []
    unraised: list[Unraised] = []
    for found in anchors(raised.graph, raised.module):
        if isinstance(found, Anchor) and leave and found.out.name in leave:
            found = Stop(leave[found.out.name], found.out, passed=tuple(found.passed))
        answer = found if isinstance(found, Stop) else place(raised, found, _heads3(found))
        if isinstance(answer, Stop):
            unraised.append(_unraised(raised, answer, found.passed))
        else:
            assert isinstance(found, Anchor)
            placed.append((found, answer))
    raised.clean()
    raised.unraised = tuple(unraised)
    if not facts:
        pairs = enumerate(placed)
        raised.sites = tuple(_bare_site(raised, f"s{i}", *pair) for i, pair in pairs)
        return raised
    absolute = absolute_positions(raised)
    sites = [
        _site(raised, f"s{i}", anchor, node, absolute) for i, (anchor, node) in enumerate(placed)
    ]
    raised.sites = tuple(sites)
    raised.sublayers = sublayers(raised)
    return raised


def _heads3(anchor: Anchor) -> int | None:
    if anchor.q.meta["val"].dim() != 3:
        return None
    # The batch may hold windows besides, so the output projection is asked first.
    known = heads_of_rank3(anchor)
    after = below(anchor.out)
    v_dim = int(anchor.v.meta["val"].shape[-1])
    width = int(after[0].source.meta["val"].shape[-1]) if len(after) == 1 else 0
    heads = width // v_dim if width % v_dim == 0 else 0
    if heads > 1 and (known is None or known % heads == 0):
        return heads
    return known or heads or None


def _site(program: Program, id: str, anchor: Anchor, node: fx.Node, absolute: str) -> Site:
    facts = probe(program, node)
    mask = classify(program, node)
    if mask.reason:
        facts.missing["mask"] = mask.reason
    module, source = place_of(program, node)
    return Site(
        id=id, node=node.name, module=module, source=source, spec=parse_spec(str(node.args[4])),
        kv_heads=facts.kv_heads, q=facts.q, k=facts.k, v=facts.v, out=facts.out,
        rotary=facts.rotary, qk_norm=facts.qk_norm, gain=facts.gain,
        position=_position(facts, mask, absolute), mask=mask.text,
        mask_certainty=mask.certainty, spelling=anchor.spelling, missing=facts.missing,
    )  # fmt: skip


def _bare_site(program: Program, id: str, anchor: Anchor, node: fx.Node) -> Site:
    spec = parse_spec(str(node.args[4]))
    module, source = place_of(program, node)
    return Site(
        id=id, node=node.name, module=module, source=source, spec=spec, kv_heads=spec.kv_heads,
        mask_certainty="observed", spelling=anchor.spelling,
    )  # fmt: skip


def _position(facts: Facts, mask: MaskFacts, absolute: str) -> str:
    if facts.rotary is not None:
        return str(facts.rotary)
    if "rotary" in facts.missing:
        return "unknown"
    for bias in ("relative-bias", "alibi"):
        if bias in mask.text:
            return bias
    # Logits that are added, or operands that could not be probed, may hold positions.
    unseen = mask.bias or "q" in facts.missing or "k" in facts.missing
    return "unknown" if absolute == "none" and unseen else absolute


def _unraised(program: Program, stop: Stop, passed: Iterable[fx.Node]) -> Unraised:
    module, source = place_of(program, stop.node)
    names = tuple(node.name for node in passed)
    return Unraised(module, source, stop.node.name, stop.reason, stop.help, names)


def place_of(program: Program, node: fx.Node) -> tuple[str, str]:
    """The module path and the source line ("file.py:123") that a node was traced from."""
    stack = node.meta.get("nn_module_stack") or {}
    path = str(list(stack.values())[-1][0]) if stack else ""
    path = re.sub(r"^L\['self'\]\.?", "", path).removeprefix(program.prefix)
    calls = [call for call in frames(node) if "/torch/nn/functional.py" not in call.file]
    forwards = [call for call in calls if call.function == "forward"]
    if not calls:
        return path, ""
    last = (forwards or calls)[-1]
    return path, f"{last.file.rsplit('/', 1)[-1]}:{last.line}"
