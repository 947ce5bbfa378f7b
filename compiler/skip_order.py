"""In which order to take sublayers out: greedily by the measured change, or ranked once.

*Greedy* (FinerCut, arXiv 2405.18218): at each step every remaining candidate is removed on its own
from the program as it is by then, the outputs are compared with the *original* model's, and the
least damaging one goes. *One shot* ranks all candidates once, by block influence
1 - cos(x, x + f(x)) (ShortGPT, arXiv 2403.03853) or by the damage of its single removal; it does
not see that two sublayers may stand in for each other, and serves as baseline and pre-filter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from attnopt.compiler.contract import Edit, Notes, Pass
from attnopt.compiler.damage import Damage, Metric
from attnopt.compiler.grams import real, rows
from attnopt.compiler.program import Batch, Program, peek
from attnopt.compiler.removal import bypass_of, edited, exit_of, forks, without
from attnopt.compiler.site import Sublayer

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Choice:
    """One removal: the sublayer's id, the damage once it is gone, and the program without it.

    `damage` is against the original with all removals so far; `deletions` are the damages that the
    deletion of each candidate would have done at this step.
    """

    id: str
    damage: float
    program: Program = field(repr=False)
    deletions: Mapping[str, float] = field(default_factory=dict, repr=False)
    note: str = ""


@dataclass(frozen=True)
class Rank:
    """One sublayer in the one-shot ranking; small scores go first."""

    id: str
    score: float


def greedy(
    program: Program,
    notes: Notes,
    candidates: Sequence[str],
    count: int | None = None,
    until: float = math.inf,
    metric: Metric | None = None,
    progress: Progress | None = None,
    batches: Sequence[Batch] | None = None,
    rewrite: Pass | None = None,
) -> Iterator[Choice]:
    """Remove `count` of the candidates (ids), or as many as keep the damage at or under `until`.

    Damage is measured on `batches` (the calibration batches unless given) against `notes.original`
    by `metric` (see `damage`). A chosen sublayer is deleted, or rewritten by `rewrite` (for example
    `skip_sublayers{method=best}`); what that pass refuses is left in place and not asked again.
    Each step costs about half a forward per candidate and batch.
    """
    damage = Damage(notes.original, notes.calibration if batches is None else batches, metric)
    left = list(candidates)
    taken = 0
    while left and (count is None or taken < count):
        layers = [layer for layer in program.sublayers if layer.id in left]
        if not layers:
            return
        deletions = removals(program, layers, damage)
        best = min(layers, key=lambda layer: deletions[layer.id])
        left.remove(best.id)
        made, note = _taken(program, best, notes, rewrite)
        if made is None:
            continue
        cost = deletions[best.id] if rewrite is None else damage(made)
        if cost > until:
            return
        program, taken = made, taken + 1
        if progress is not None:
            progress(f"{best.id}: {damage.unit} {cost:.4g}")
        yield Choice(best.id, cost, made, deletions, note)


def _taken(
    program: Program, layer: Sublayer, notes: Notes, rewrite: Pass | None
) -> tuple[Program | None, str]:
    if rewrite is None:
        return without(program, [layer]), "deleted"
    answer = rewrite.rewrite(layer, program, notes)
    if not isinstance(answer, Edit) or answer.graph is None:
        return None, answer.reason if not isinstance(answer, Edit) else ""
    return edited(program, answer.graph), answer.note


def removals(program: Program, layers: Sequence[Sublayer], damage: Damage) -> dict[str, float]:
    """The damage of removing each sublayer on its own from the program."""
    sums: dict[str, list[tuple[float, float]]] = {layer.id: [] for layer in layers}
    for index, batch in enumerate(damage.batches):
        for layer, out in forks(program, layers, batch):
            if layer is not None:
                sums[layer.id].append(damage.sums(index, out))
    return {id: damage.total(each) for id, each in sums.items()}


def one_shot(
    program: Program,
    notes: Notes,
    candidates: Sequence[str],
    by: Literal["influence", "removal"] = "influence",
    metric: Metric | None = None,
    batches: Sequence[Batch] | None = None,
) -> list[Rank]:
    """All candidates ranked once, the least needed first."""
    data = notes.calibration if batches is None else batches
    layers = [layer for layer in program.sublayers if layer.id in candidates]
    if by == "removal":
        scores = removals(program, layers, Damage(notes.original, data, metric))
    else:
        scores = influence(program, layers, data)
    return sorted((Rank(id, score) for id, score in scores.items()), key=lambda r: r.score)


def influence(
    program: Program, layers: Sequence[Sublayer], batches: Sequence[Batch]
) -> dict[str, float]:
    """Block influence of each sublayer: the mean over real tokens of 1 - cos(bypass, exit)."""
    pairs = {
        layer.id: (bypass_of(program, layer).name, exit_of(program, layer).name) for layer in layers
    }
    sums = dict.fromkeys(pairs, 0.0)
    counts = dict.fromkeys(pairs, 0)
    for batch in batches:
        values = peek(program, sorted({name for pair in pairs.values() for name in pair}), batch)
        for id, (before, after) in pairs.items():
            valid = real(program, after, batch)
            far = apart(rows(values[before], valid), rows(values[after], valid))
            sums[id] += float(far.sum())
            counts[id] += len(far)
    return {id: total / max(1, counts[id]) for id, total in sums.items()}


def apart(a: Tensor, b: Tensor) -> Tensor:
    """1 - cos of rows `[rows, width]`, `[rows]` float64."""
    return 1.0 - torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1)
