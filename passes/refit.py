"""Refit the output projection, so that a changed attention adds what the original one added.

After heads, masks or keys have changed, the rows z that enter the output projection differ from the
original's. With Z those rows in the program as it now is, and Y what the original attention gave
for the same tokens,

    W = W0 + (Z^T Z + lambda I)^-1 Z^T (Y - Z W0),    lambda = damping * mean diag(Z^T Z),

with a constant column where the projection has a bias. This is ridge regression that leans towards
the weight W0 at hand, not towards zero: the calibration error cannot rise, and directions that
calibration never saw stay as they were. It is solved layer by layer in the order of the graph, each
layer seeing the drift of those before. With `against="residual"` the target is the original's
stream before and after the attention summed up, less the present stream before it, which also mends
drift.

Three ridges are tried, and the one with the least error on held-out data is kept, where that error
falls at all. Only second moments are held, never the activations. Source: ridge regression, as in
OSSCAR (Meng et al. 2024, section 3).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, fx

from attnopt.compiler.contract import Edit, Exactness, Miss, Notes, Pass, choice
from attnopt.compiler.grams import Gram, real, rows, with_one
from attnopt.compiler.program import Batch, Program
from attnopt.compiler.ridge import solve
from attnopt.compiler.site import OutputPath, Site
from attnopt.compiler.site_weights import write_output_whole

aten = torch.ops.aten
# Of the target's energy: an error below it is rounding, and there is nothing to mend.
_FLOOR = 1e-12
_STRONGER = (1.0, 10.0, 100.0)  # ridges that are tried, as multiples of `damping`


@dataclass(frozen=True)
class Refit(Pass):
    """Least squares for the output projection.

    `damping` is the weakest ridge that is tried, `against` says what the target is.
    """

    name: ClassVar[str] = "refit"
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    source: ClassVar[str] = "ridge regression on calibration activations; OSSCAR (Meng et al. 2024)"
    heals: ClassVar[bool] = True

    damping: float = choice(1e-4, 1e-3, 1e-2, default=1e-3)
    against: str = choice("branch", "residual", default="branch")

    def rewrite(self, target: Site, program: Program, notes: Notes) -> Edit | Miss:
        """New weights for one output projection where they help on held-out data, or why not."""
        if target.out is None:
            why = target.missing.get("out", "not known")
            return Miss(f"the output projection was not found: {why}", target.node)
        if not notes.calibration or not notes.heldout:
            return Miss(
                "a refit needs calibration data and held-out data",
                target.node,
                help="give --text FILE",
            )
        flow = self._flow(target, program, notes)
        if isinstance(flow, Miss):
            return flow
        with_bias = target.out.bias is not None
        fit = flow.sums(notes.calibration, with_bias)
        check = flow.sums(notes.heldout, with_bias)
        old = _weight(program, target.out)
        if not fit.yy or not check.yy:
            return Miss("the original attention adds nothing", target.node)
        before, trained = check.error(old) / check.yy, fit.error(old) / fit.yy
        if trained < _FLOOR:
            return Miss("its output is the original's already: nothing to refit", target.node)
        dtype = program.weight(target.out.weight).dtype
        tried = [(*solve(fit, old, self.damping * by), self.damping * by) for by in _STRONGER]
        rounded = [new.to(dtype).double() for new, _, _ in tried]
        errors = [check.error(new) / check.yy for new in rounded]
        best = min(range(len(tried)), key=lambda at: errors[at])
        if not errors[best] < before:
            return Miss(
                f"the held-out error would go from {before:.3g} to {errors[best]:.3g}",
                target.node,
            )
        new, gradient, damping = tried[best]
        return self._edit(target, program, new, with_bias, {
            "heldout_before": before, "heldout_after": errors[best], "calibration_before": trained,
            "calibration_after": fit.error(rounded[best]) / fit.yy, "gradient": gradient,
            "damping": damping,
        })  # fmt: skip

    def _edit(
        self, site: Site, program: Program, new: Tensor, with_bias: bool, evidence: dict[str, float]
    ) -> Edit:
        weight, bias = (new[:-1], new[-1]) if with_bias else (new, None)

        def edit(copy: Program) -> None:
            write_output_whole(copy, site, weight, bias)

        note = f"held-out error {evidence['heldout_before']:.3g} -> {evidence['heldout_after']:.3g}"
        facts = write_output_whole(program.copy(), site, weight, bias)
        return Edit(graph=edit, sites={site.id: facts}, note=note, evidence=evidence)

    def _flow(self, site: Site, program: Program, notes: Notes) -> _Flow | Miss:
        path = cast(OutputPath, site.out)
        if not program.has(path.projection):
            return Miss("an earlier rewrite took the output projection away", path.projection)
        entering = _entering(program.node(path.projection)).name
        if self.against == "branch":
            if not notes.original.has(path.projection):
                return Miss("the original program has no such output projection", path.projection)
            return _Flow(program, notes, entering, (path.projection,))
        layer = next((s for s in program.sublayers if site.id in s.sites), None)
        teacher = next((s for s in notes.original.sublayers if site.id in s.sites), None)
        if layer is None or teacher is None:
            return Miss("the site is in no residual sublayer", site.node)
        if not _ends_in(program, path.projection, layer.branch):
            return Miss(
                "something stands between the projection and the residual sum", layer.branch
            )
        return _Flow(program, notes, entering, (teacher.entry, teacher.branch), layer.entry)


@dataclass(frozen=True)
class _Flow:
    """Where the rows come from.

    Z is node `z` of the program; Y is the sum of nodes `y` of the original, less node `less` of
    the program.
    """

    program: Program
    notes: Notes
    z: str
    y: tuple[str, ...]
    less: str = ""

    def sums(self, batches: Sequence[Batch], with_bias: bool) -> Gram:
        """The moments of Z and Y over the batches, one batch at a time."""
        found: Gram | None = None
        for z, y in self._pairs(batches):
            z = with_one(z) if with_bias else z
            found = found or Gram.empty(z.shape[1], y.shape[1])
            found.add(z, y)
        assert found is not None
        return found

    def _pairs(self, batches: Sequence[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
        names = [self.z, self.less] if self.less else [self.z]
        student = self.notes.record(self.program, names, batches)
        teacher = self.notes.record(self.notes.original, self.y, batches)
        for (mine, batch), (theirs, _) in zip(student, teacher, strict=True):
            valid = real(self.program, self.z, batch)
            y: Any = sum(rows(theirs[name].double(), valid) for name in self.y)
            if self.less:
                y = y - rows(mine[self.less].double(), valid)
            yield rows(mine[self.z].double(), valid), y


def _weight(program: Program, path: OutputPath) -> Tensor:
    """The whole output projection `[width in (+ 1), width out]` float64, the bias as last row."""
    weight = program.weight(path.weight).detach().double()
    weight = weight if path.layout == "in_out" else weight.T
    if path.bias is None:
        return weight
    return torch.cat((weight, program.weight(path.bias).detach().double()[None]))


def _entering(projection: fx.Node) -> fx.Node:
    """The node of activations that a projection reads."""
    at = 1 if projection.target is aten.addmm.default else 0
    return cast(fx.Node, projection.args[at])


def _ends_in(program: Program, projection: str, branch: str) -> bool:
    """Whether the branch is the projection itself, seen through changes of shape."""
    node = program.node(branch)
    while node.name != projection:
        if node.target not in (aten.view.default, aten.reshape.default, aten._unsafe_view.default):
            return False
        node = cast(fx.Node, node.args[0])
    return True
