"""Whether a value stays moderate whatever the inputs: no infinities, none of the lowest numbers
that masks are filled with."""

from __future__ import annotations

from torch import Tensor, fx

from attnopt.compiler.packing import ancestors
from attnopt.compiler.program import Program
from attnopt.compiler.raising.evaluate import Evaluator, Unknown

MODERATE, PRODUCTS = 1e4, 4  # of a constant; of factors, sums along an axis included
_MOVES = (
    "alias contiguous clone detach expand flatten movedim narrow permute repeat repeat_interleave "
    "reshape select slice squeeze t to _to_copy transpose type_as unflatten unsqueeze view "
    "_unsafe_view"
)
# With these, what comes of sizes and constants grows no faster than a power of the sizes.
_GROWS = "add sub rsub mul neg abs arange ones zeros ones_like zeros_like new_ones new_zeros cumsum"
_SCALED = ("aten.add.", "aten.sub.", "aten.rsub.", "aten.mul.")  # these take numbers besides
_ALLOWED = frozenset(f"aten.{name}" for name in f"{_MOVES} {_GROWS}".split())


def moderate(program: Program, node: fx.Node) -> bool:
    """Whether a value is made of sizes, whole numbers and moderate constants by sums and products
    alone, of few factors: (1e4)^5 times a few lengths is far from the lowest number of its dtype,
    which float32 puts at -3e38."""
    evaluate = Evaluator(program, {})
    open_nodes, seen, products = [node], set[fx.Node](), 0
    while open_nodes:
        at = open_nodes.pop()
        if at in seen or not isinstance(at.meta.get("val"), Tensor):
            continue
        seen.add(at)
        if all(n.op != "placeholder" for n in ancestors([at])):  # of no input and no size
            try:
                value = evaluate(at)
            except Unknown:
                return False
            if not bool((value.double().abs() <= MODERATE).all()):
                return False
        elif at.op == "placeholder":
            if at.meta["val"].is_floating_point():
                return False
        elif str(getattr(at.target, "overloadpacket", "")) in _ALLOWED:
            numbers = _factors(at)
            products += str(at.target).startswith(("aten.mul.", "aten.cumsum."))
            if products > PRODUCTS or any(not abs(x) <= MODERATE for x in numbers):
                return False
            open_nodes += at.all_input_nodes
        else:
            return False
    return True


def _factors(node: fx.Node) -> list[float]:
    """The numbers that a sum or product is made with."""
    if not str(node.target).startswith(_SCALED):
        return []
    return [x for x in (*node.args, *node.kwargs.values()) if isinstance(x, (int, float))]
