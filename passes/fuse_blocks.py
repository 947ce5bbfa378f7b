"""Cut a run of sublayers and let the projection before the run make up for it, at no run-time cost.

With m the branch output of the sublayer before the run, s the stream beside it, and L the stream
after the run in the original, the map T of ridge regression that leans towards the identity

    T = I + (M^T M + lambda I)^-1 M^T (L - S - M),    lambda = ridge * mean diag(M^T M),

gives s + m T, the best stream that can be had from m alone (with a constant where the projection
has a bias). m = z W + b is itself a projection, so that T is folded into it exactly: W T and b T.
The graph then lacks the run and has nothing in its place. Directions that calibration never shows
keep their plain output; the published form leans towards zero there.
Source: ReplaceMe (arXiv 2505.02819), least-squares form.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnopt.compiler.contract import Edit, Exactness, Miss, Notes, Pass, Scope, choice
from attnopt.compiler.grams import Gram, real, rows, with_one
from attnopt.compiler.program import Batch, Program, peek
from attnopt.compiler.raising.projections import Projection, projection
from attnopt.compiler.removal import bypass_of, exit_of, remove
from attnopt.compiler.site import Sublayer, WeightLayout

aten = torch.ops.aten
_SAME = (aten.view.default, aten.reshape.default, aten.contiguous.default, aten.clone.default,
         aten._unsafe_view.default)  # fmt: skip


@dataclass(frozen=True)
class FuseBlocks(Pass):
    """Cut `length` sublayers from the target on; the one before them takes up their map."""

    name: ClassVar[str] = "fuse_blocks"
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    scope: ClassVar[Scope] = "sublayer"
    source: ClassVar[str] = "ReplaceMe (arXiv 2505.02819)"
    after: ClassVar[tuple[str, ...]] = ("fuse_attention",)  # calibrates on the fast form

    length: int = choice(1, 2, 4, 6, 8, default=2)
    ridge: float = choice(1e-4, 1e-2, 1e-1, default=1e-2)

    def rewrite(self, target: Sublayer, program: Program, notes: Notes) -> Edit | Miss:
        """The cut from one sublayer on, or why it cannot be made there."""
        if not notes.calibration:
            return Miss("the map needs calibration data", target.branch, "give --text FILE")
        run = _run(program, target, self.length)
        if isinstance(run, Miss):
            return run
        before, cut = run
        folded = _foldable(program, before)
        if isinstance(folded, Miss):
            return folded
        end = exit_of(program, cut[-1]).name
        if not notes.original.has(end):
            return Miss("the original has no such stream after the run", end)
        try:
            sums = _sums(program, notes, before, end, folded.bias is not None)
        except ValueError as error:
            return Miss(f"the stream does not line up with the tokens: {error}", before.exit)
        made = solve(sums, self.ridge, folded.bias is not None)
        return _edit(program, folded, cut, made, sums)


def solve(sums: Gram, ridge: float, with_one: bool) -> Tensor:
    """T `[in (+ 1), out]` by ridge regression that leans towards the identity and no constant."""
    start = torch.eye(*sums.xy.shape, dtype=torch.float64)
    size = len(sums.xx) - with_one
    shift = torch.zeros(len(sums.xx), dtype=torch.float64)
    shift[:size] = ridge * sums.xx.diagonal()[:size].mean()
    shift[size:] = 1e-9 * float(sums.rows)
    step: Tensor = torch.linalg.solve(sums.xx + shift.diag(), sums.xy - sums.xx @ start)
    return start + step


def fold(
    weight: Tensor, bias: Tensor | None, made: Tensor, layout: WeightLayout
) -> tuple[Tensor, Tensor | None]:
    """The projection z W + b followed by T as one projection, in the weight's dtype and layout."""
    size = made.shape[1]
    matrix = weight.double().T if layout == "out_in" else weight.double()
    new = matrix @ made[:size]
    new = (new.T if layout == "out_in" else new).contiguous().to(weight.dtype)
    if bias is None:
        return new, None
    return new, (bias.double() @ made[:size] + made[size]).to(bias.dtype)


def _run(program: Program, target: Sublayer, length: int) -> tuple[Sublayer, list[Sublayer]] | Miss:
    """The sublayer before the run, and the run; all on one stream without a break."""
    known = [layer for layer in program.sublayers if program.has(layer.branch)]
    at = next((i for i, layer in enumerate(known) if layer.id == target.id), None)
    if at is None:
        return Miss("an earlier rewrite changed it", target.branch)
    if at == 0:
        return Miss("no sublayer before the run could take up the map", target.branch)
    chain = known[at - 1 : at + length]
    if len(chain) < length + 1:
        return Miss(f"fewer than {length} sublayers from here on", target.branch)
    for left, right in pairwise(chain):
        if not _joined(program, left, right):
            return Miss("the stream between the sublayers passes a norm, or they are parallel",
                        right.entry, "a run can be cut in sequential pre-norm models")  # fmt: skip
    return chain[0], chain[1:]


def _joined(program: Program, left: Sublayer, right: Sublayer) -> bool:
    """Whether the right sublayer adds to what the left one gives."""
    node, end = bypass_of(program, right), exit_of(program, left)
    while node is not end and node.target in _SAME:
        node = node.all_input_nodes[0]
    return node is end and program.node(right.entry) in (end, bypass_of(program, right))


def _foldable(program: Program, before: Sublayer) -> Projection | Miss:
    """The projection that makes the branch, if its weight is its own and nothing else reads it."""
    node = program.node(before.branch)
    while node.target in _SAME and len(node.users) == 1:
        node = node.all_input_nodes[0]
    made = projection(node)
    if made is None:
        return Miss("the branch before the run does not end in a projection", node.name)
    if len(node.users) != 1:
        return Miss("something else reads the projection before the run", node.name)
    for name in filter(None, (made.weight, made.bias)):
        reads = [user for item in program.parameter_nodes(name) for user in item.users]
        if len(reads) != 1:
            return Miss(f"the weight `{name}` is shared", node.name)
    return made


def _sums(program: Program, notes: Notes, before: Sublayer, end: str, constant: bool) -> Gram:
    beside = bypass_of(program, before).name
    found: Gram | None = None
    for batch in notes.calibration:
        m, s, after = _values(program, notes.original, before, beside, end, batch)
        valid = real(program, end, batch)
        x = rows(m.double(), valid)
        x = with_one(x) if constant else x
        y = rows(after.double(), valid) - rows(s.double(), valid)
        found = found or Gram.empty(x.shape[1], y.shape[1])
        found.add(x, y)
    assert found is not None
    return found


def _values(
    program: Program, original: Program, before: Sublayer, beside: str, end: str, batch: Batch
) -> tuple[Any, Any, Any]:
    if program.module is original.module:
        found = peek(program, [before.branch, beside, end], batch)
        return found[before.branch], found[beside], found[end]
    student = peek(program, [before.branch, beside], batch)
    return student[before.branch], student[beside], peek(original, [end], batch)[end]


def _edit(
    program: Program, folded: Projection, cut: list[Sublayer], made: Tensor, sums: Gram
) -> Edit:
    bias = program.weight(folded.bias) if folded.bias else None
    weight, constant = fold(program.weight(folded.weight), bias, made, folded.layout)
    weights = {folded.weight: weight}
    if folded.bias and constant is not None:
        weights[folded.bias] = constant

    def edit(copy: Program) -> None:
        for layer in reversed(cut):
            remove(copy, layer)

    plain = torch.eye(*made.shape, dtype=torch.float64)
    left, deleted = (sums.error(m) / max(sums.yy, 1e-300) for m in (made, plain))
    return Edit(
        weights=weights,
        graph=edit,
        note=f"cut {', '.join(layer.id for layer in cut)}; folded a map into {folded.weight}",
        evidence={"residual": left, "residual_deleted": deleted, "rows": float(sums.rows)},
    )
