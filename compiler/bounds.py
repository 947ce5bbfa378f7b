"""Whether a value stays moderate whatever the inputs: no infinities, none of the lowest numbers
that masks are filled with."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from attnopt.compiler.program import Program
from attnopt.compiler.raising.evaluate import Evaluator, Unknown

aten = torch.ops.aten
MODERATE = 1e6  # of a constant
_MOVES = (
    "alias contiguous clone detach expand flatten movedim narrow permute repeat repeat_interleave "
    "reshape select slice squeeze t to _to_copy transpose type_as unflatten unsqueeze view "
    "_unsafe_view"
)
# With these, what comes of sizes and constants grows no faster than a power of the sizes.
_GROWS = "add sub rsub mul neg abs arange ones zeros ones_like zeros_like new_ones new_zeros cumsum"
_ALLOWED = frozenset(f"aten.{name}" for name in f"{_MOVES} {_GROWS}".split())


def moderate(program: Program, node: fx.Node) -> bool:
    """Whether a value is made of sizes, whole numbers and moderate constants by sums and products
    alone. No such value comes near the lowest number of its dtype, which float32 puts at -3e38, at
    any length that fits into memory."""
    evaluate = Evaluator(program, {})
    open_nodes, seen = [node], set[fx.Node]()
    while open_nodes:
        at = open_nodes.pop()
        if at in seen or not isinstance(at.meta.get("val"), Tensor):
            continue
        seen.add(at)
        if _constant(at):
            try:
                value = evaluate(at)
            except Unknown:
                return False
            if not bool((value.abs() <= MODERATE).all()):
                return False
        elif at.op == "placeholder":
            if at.meta["val"].is_floating_point():
                return False
        elif str(getattr(at.target, "overloadpacket", "")) in _ALLOWED:
            numbers = [x for x in at.args if isinstance(x, float)]
            if any(not abs(x) <= MODERATE for x in numbers):
                return False
            open_nodes += at.all_input_nodes
        else:
            return False
    return True


def _constant(node: fx.Node) -> bool:
    """Whether no input and no size goes into a value."""
    stack = [node]
    while stack:
        at = stack.pop()
        if at.op == "placeholder":
            return False
        stack += at.all_input_nodes
    return True
