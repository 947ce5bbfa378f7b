"""Remove a residual sublayer, or put the closest linear map in its place.

A sublayer adds f(x) to the stream. *Deletion* adds nothing in its stead. The *linear* map adds
x W + b, the linear minimum mean square error estimate of what the original adds:

    W = S_xx^-1 S_xy,    b = m_y - m_x W,

over the real tokens of the calibration data (a small ridge on S_xx is chosen by the error on
held-out tokens where there are any). x is the stream at the entry or its normalised form,
whichever leaves less; y is the original's branch (`against="branch"`), or the original's stream
after the sublayer less the present stream beside it (`against="residual"`), which also mends the
drift of earlier rewrites. With `method="best"` both targets and deletion are run on held-out data
and the one that changes the model's outputs least is taken, deletion on a tie.

The map must cost less than the sublayer. With the sublayer go its projections, its keys and values,
and rotary tables or masks that nothing else reads. Order of removal: see `compiler.skip_order`.
Sources: FinerCut (arXiv 2405.18218), LLM-Drop (arXiv 2406.15786), NBL (arXiv 2505.21077).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from attnopt.compiler import lmmse
from attnopt.compiler.contract import Edit, Exactness, Miss, Notes, Pass, Scope, choice
from attnopt.compiler.damage import Damage
from attnopt.compiler.grams import Gram, real, rows, with_one
from attnopt.compiler.lmmse import LinearMap
from attnopt.compiler.program import Batch, Program, peek
from attnopt.compiler.raising.canonical import static
from attnopt.compiler.raising.evaluate import concrete, example_sizes
from attnopt.compiler.raising.projections import projection
from attnopt.compiler.removal import bypass_of, edited, exit_of, remove
from attnopt.compiler.site import Sublayer

aten = torch.ops.aten
_MOVES = (aten.view.default, aten.reshape.default, aten.contiguous.default, aten.clone.default,
          aten.transpose.int, aten.permute.default, aten._unsafe_view.default)  # fmt: skip


@dataclass(frozen=True)
class _Fit:
    """A fitted map: `source` is the node that it reads, `heldout` its residual on held-out rows."""

    source: str
    against: str
    map: LinearMap
    heldout: float | None


@dataclass(frozen=True)
class SkipSublayers(Pass):
    """Delete sublayers or replace them by linear maps; see the module's text for the options."""

    name: ClassVar[str] = "skip_sublayers"
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    scope: ClassVar[Scope] = "sublayer"
    source: ClassVar[str] = "FinerCut (arXiv 2405.18218); NBL (arXiv 2505.21077), section 3"
    after: ClassVar[tuple[str, ...]] = ("fuse_attention",)  # calibrates on the fast form
    greedy: ClassVar[bool] = True

    method: str = choice("delete", "linear", "best", default="best")
    against: str = choice("branch", "residual", default="residual")

    @classmethod
    def sketch(cls) -> Pass:
        """Deletion alone, which fits nothing."""
        return cls(method="delete")

    def rewrite(self, target: Sublayer, program: Program, notes: Notes) -> Edit | Miss:
        """The edit that takes one sublayer out, or why it stays."""
        try:
            exit_of(program, target), bypass_of(program, target)
        except KeyError as error:
            return Miss(f"an earlier rewrite changed it: {error.args[0]}", target.branch)
        if self.method == "delete":
            return _deletion(program, target)
        fits = self._fits(target, program, notes)
        if self.method == "linear":
            return fits if isinstance(fits, Miss) else _linear(target, fits[0])
        return self._best(target, program, notes, fits)

    def _best(
        self, target: Sublayer, program: Program, notes: Notes, fits: list[_Fit] | Miss
    ) -> Edit:
        deletion = _deletion(program, target)
        if isinstance(fits, Miss):
            return _noted(deletion, f"deleted; no linear map: {fits.reason}")
        if not notes.heldout:
            return _noted(deletion, "deleted; no held-out data to choose a linear map by")
        damage = Damage(notes.original, notes.heldout)
        deleted = damage(edited(program, _graph(deletion)))
        maps = [(damage(edited(program, _graph(edit))), edit) for edit in
                (_linear(target, fit) for fit in fits)]  # fmt: skip
        least, edit = min(maps, key=lambda item: item[0])
        numbers = {"heldout_deleted": deleted, "heldout_linear": least}
        said = f"{damage.unit} on held-out data: linear {least:.4g}, deleted {deleted:.4g}"
        if least < deleted:
            return _noted(edit, f"{edit.note}; {said}", numbers)
        return _noted(deletion, f"deleted; {said}", numbers)

    def _fits(self, target: Sublayer, program: Program, notes: Notes) -> list[_Fit] | Miss:
        """The best map per target, the one of `against` first."""
        if not notes.calibration:
            return Miss("a linear map needs calibration data", target.branch, "give --text FILE")
        if static(program.node(target.entry).meta["val"].shape[-1]) is None:
            return Miss("the last axis of its stream has no fixed width", target.entry)
        sources = _sources(program, target)
        width = int(program.node(target.branch).meta["val"].shape[-1])
        dear = _too_dear(program, target, width)
        if dear is not None:
            return dear
        flow = _Flow(program, notes.original, target, sources)
        try:
            sums = flow.sums(notes.calibration)
            checks = flow.sums(notes.heldout) if notes.heldout else {}
        except ValueError as error:
            why = f"the stream does not line up with the tokens: {error}"
            return Miss(why, target.entry)
        count = next(iter(sums.values())).rows
        if count < 2 * width:
            few = f"{count} calibration tokens are too few for a map of width {width}"
            return Miss(few, target.branch, f"give at least {2 * width}, better {10 * width}")
        made = [_fitted(sums[key], checks.get(key), key) for key in sums]
        wanted = ["branch", "residual"] if flow.drifted else ["branch"]
        best = [min((f for f in made if f.against == kind), key=_left)
                for kind in wanted]  # fmt: skip
        return sorted(best, key=lambda fit: fit.against != self.against)


def _left(fit: _Fit) -> float:
    return fit.map.residual if fit.heldout is None else fit.heldout


class _Flow:
    """Where the rows x and y come from: x of the present program, y of the original."""

    def __init__(
        self, program: Program, original: Program, target: Sublayer, sources: list[str]
    ) -> None:
        exit = exit_of(program, target).name
        known = original.has(exit) and original.has(target.branch)
        self.program, self.teacher = program, original if known else program
        self.drifted = self.teacher.module is not program.module
        self.sources, self.exit, self.branch = sources, exit, target.branch
        self.bypass = bypass_of(program, target).name

    def sums(self, batches: Any) -> dict[tuple[str, str], Gram]:
        """Sums by (source node, target) over the batches."""
        found: dict[tuple[str, str], Gram] = {}
        for batch in batches:
            student, teacher = self._values(batch)
            goals = {"branch": teacher[self.branch]}
            if self.drifted:
                goals["residual"] = teacher[self.exit].double() - student[self.bypass].double()
            valid = real(self.program, self.exit, batch)
            for source in self.sources:
                x = with_one(rows(student[source].double(), valid))
                for kind, goal in goals.items():
                    y = rows(goal.double(), valid)
                    key = (source, kind)
                    found.setdefault(key, Gram.empty(x.shape[1], y.shape[1])).add(x, y)
        return found

    def _values(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if not self.drifted:
            both = peek(self.program, [*self.sources, self.branch], batch)
            return both, both
        student = peek(self.program, [*self.sources, self.bypass], batch)
        return student, peek(self.teacher, [self.branch, self.exit], batch)


def _fitted(sums: Gram, check: Gram | None, key: tuple[str, str]) -> _Fit:
    if check is None:
        return _Fit(key[0], key[1], lmmse.fit(sums), None)
    made = lmmse.fits(sums)
    left = [lmmse.residual(check, item.weight, item.bias) for item in made]
    best = left.index(min(left))
    return _Fit(key[0], key[1], made[best], left[best])


def _sources(program: Program, target: Sublayer) -> list[str]:
    """The entry, and the normalised stream that the branch's first projection reads."""
    entry = program.node(target.entry)
    inside = set(target.inner)
    shape = str(entry.meta["val"].shape)
    found = [entry.name]
    for node in program.graph.nodes:
        made = projection(node) if node.name in inside else None
        if made is None:
            continue
        source = made.source
        while str(source.meta["val"].shape) != shape and source.target in _MOVES:
            source = source.args[0]  # type: ignore[assignment]
        if source is not entry and str(source.meta["val"].shape) == shape:
            found.append(source.name)
        break
    return found


def _too_dear(program: Program, target: Sublayer, width: int) -> Miss | None:
    """A Miss when the map would multiply as much per token as the sublayer does."""
    inside = [node for node in program.graph.nodes if node.name in set(target.inner)]
    cost = sum(_products(program, node) for node in inside)
    if width * width < cost:
        return None
    return Miss(f"a linear map takes {width * width} products per token, the sublayer {cost}",
                target.branch, "delete it, or leave it")  # fmt: skip


def _products(program: Program, node: fx.Node) -> int:
    made = projection(node)
    if made is not None:
        return made.width * int(made.source.meta["val"].shape[-1])
    if "attention" not in str(node.target) or len(node.all_input_nodes) < 3:
        return 0
    q, k, v = (item.meta["val"] for item in node.all_input_nodes[:3])
    keys = concrete(k.shape[2], example_sizes(program))
    return int(q.shape[1]) * keys * (int(q.shape[3]) + int(v.shape[3]))


def _deletion(program: Program, target: Sublayer) -> Edit:
    return Edit(graph=lambda made: remove(made, target), note="deleted",
                evidence={"kv_values_per_token": _kept_values(program, target)})  # fmt: skip


def _kept_values(program: Program, target: Sublayer) -> float:
    """Key and value numbers per token that a cache no longer holds."""
    gone = [site for site in program.sites if site.id in target.sites]
    return float(sum(s.kv_heads * (s.spec.head_dim + s.spec.v_dim) for s in gone))


def _linear(target: Sublayer, fit: _Fit) -> Edit:
    def edit(made: Program) -> None:
        _replace(made, target, fit)

    numbers = {"residual": fit.map.residual, "rows": float(fit.map.rows)}
    if fit.heldout is not None:
        numbers["residual_heldout"] = fit.heldout
    where = "the entry" if fit.source == target.entry else "the normalised entry"
    note = f"linear map of {where}, {fit.map.residual:.3g} of the variance left"
    return Edit(graph=edit, note=note, evidence=numbers)


def _replace(made: Program, target: Sublayer, fit: _Fit) -> None:
    exit, branch = exit_of(made, target), made.node(target.branch)
    source = made.node(fit.source)
    dtype = source.meta["val"].dtype
    name = f"linear_maps.{target.id.replace('.', '_')}"
    weight = made.parameter(f"{name}.weight", fit.map.weight.T.contiguous().to(dtype), exit)
    bias = made.parameter(f"{name}.bias", fit.map.bias.to(dtype), exit)
    mapped = made.call(aten.linear.default, (source, weight, bias), exit)
    if branch.meta["val"].dtype != dtype:
        mapped = made.call(aten.to.dtype, (mapped, branch.meta["val"].dtype), exit)
    exit.replace_input_with(branch, mapped)


def _graph(edit: Edit) -> Callable[[Program], None]:
    assert edit.graph is not None
    return edit.graph


def _noted(edit: Edit, note: str, numbers: dict[str, float] | None = None) -> Edit:
    return Edit(graph=edit.graph, note=note, evidence={**edit.evidence, **(numbers or {})})
