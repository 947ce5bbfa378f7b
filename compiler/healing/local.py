"""Layer-local distillation: the output of each touched site is fitted to the original's at the same
node, one site after the other in the order of the graph.

A site sees its inputs as the program gives them that is healed up to there, so that it also mends
what reaches it changed. The values at its border are recorded for some batches and gone through
several times; only one site's are held at once. What does not lower the error on held-out data is
taken back. Source: blockwise local distillation, Puzzle (Bercovich et al. 2024, arXiv:2411.19146,
section 3), with the original's outputs as the target and the healed program's inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from attnopt.compiler.grams import real, rows
from attnopt.compiler.healing import schedule
from attnopt.compiler.healing.draw import Draw, tokens
from attnopt.compiler.healing.factors import Factors
from attnopt.compiler.healing.products import Products
from attnopt.compiler.healing.working import Region, Working
from attnopt.compiler.program import Batch, Program, peek

EPOCHS = 4  # how often a recorded batch is gone through
_BYTES = 1 << 30  # of recorded values held at once


@dataclass(frozen=True)
class Pair:
    """A site's border on one batch: the values it reads by node name, what the original gives
    `[tokens, width]`, and which positions are real."""

    values: dict[str, object]
    target: Tensor
    valid: Tensor | None


@dataclass(frozen=True)
class SiteHealed:
    """The relative squared error of a site's output on held-out data, before and after; kept only
    where it fell."""

    site: str
    before: float
    after: float
    tokens: int = 0

    @property
    def kept(self) -> bool:
        """Whether the training of this site was kept."""
        return self.after < self.before


@dataclass(frozen=True)
class Local:
    """The fitting of single sites. `draw` gives what is trained on, `heldout` decides; `shared` are
    parameters that several sites read: to fit one of them would spoil the others."""

    student: Working
    teacher: Working
    factors: Factors
    draw: Draw
    heldout: Sequence[Batch]
    shared: frozenset[str] = frozenset()
    products: Products = field(default_factory=Products)

    def fit(self, id: str, names: Sequence[str], budget: int, stage: int) -> SiteHealed | None:
        """Train one site on about `budget` tokens; None where it cannot be compared with the
        original, or shares all its weights with another site."""
        program = self.student.with_weights(self.factors.merged())
        site = program.site(id)
        region = Region.of(program, site, self.teacher.program)
        own = self._own(region, names)
        if not own or not self.teacher.program.has(region.end):
            return None
        size = tokens(self.draw(0, stage))
        steps = max(1, -(-budget // max(1, size)))
        pairs = self._recorded(program, region, steps, stage)
        start = self.factors.state()
        self._train(program, region, own, pairs, steps)
        before, after = self._heldout(program, region, own)
        if not after < before:
            self.factors.restore(start)
        return SiteHealed(id, before, after, steps * size)

    def step(self, id: str, names: Sequence[str]) -> int:
        """One recording and one step, for the clock; the weights stay. The tokens it took."""
        program = self.student.with_weights(self.factors.merged())
        region = Region.of(program, program.site(id), self.teacher.program)
        own = self._own(region, names)
        if not own or not self.teacher.program.has(region.end):
            return 0
        start = self.factors.state()
        self._train(program, region, own, self._recorded(program, region, 1, 0), EPOCHS)
        self.factors.restore(start)
        return EPOCHS * tokens(self.draw(0, 0))

    def _own(self, region: Region, names: Sequence[str]) -> list[str]:
        return [name for name in names if name in region.parameters and name not in self.shared]

    def _recorded(self, program: Program, region: Region, steps: int, stage: int) -> list[Pair]:
        found, held = list[Pair](), 0
        for step in range(-(-steps // EPOCHS)):
            pair = self._pair(program, region, self.draw(step, stage))
            found.append(pair)
            held += sum(t.nbytes for t in pytree.tree_leaves(pair.values) if isinstance(t, Tensor))
            if held + pair.target.nbytes * len(found) > _BYTES:
                break
        return found

    def _pair(self, program: Program, region: Region, batch: Batch) -> Pair:
        batch = self.student.ready(batch)
        values = peek(program, region.inputs, batch, there=True)
        target = peek(self.teacher.program, [region.end], batch, there=True)[region.end]
        valid = real(self.teacher.program, region.end, batch)
        return Pair(values, rows(target, valid), valid)

    def _train(
        self, program: Program, region: Region, names: Sequence[str], pairs: Sequence[Pair],
        steps: int,
    ) -> None:  # fmt: skip
        optimizer = schedule.optimizer(self.factors.groups(names))
        for step in range(steps):
            schedule.pace(optimizer, step, steps)
            with self.products():
                wrong, norm = self._error(program, region, names, pairs[step % len(pairs)])
            (wrong / norm.clamp_min(1e-30)).backward()
            optimizer.step()
            optimizer.zero_grad()

    def _error(
        self, program: Program, region: Region, names: Sequence[str], pair: Pair
    ) -> tuple[Tensor, Tensor]:
        """The squared error over the real tokens of one batch, and the square of the target."""
        weights = self.student.cast(self.factors.weights(names, torch.float32))
        made = rows(region(program.module, pair.values, weights), pair.valid).float()
        target = pair.target.float()
        return (made - target).square().sum(), target.square().sum()

    def _heldout(
        self, program: Program, region: Region, names: Sequence[str]
    ) -> tuple[float, float]:
        """The relative squared error with the weights before (no name is replaced) and now."""
        found = torch.zeros(3, dtype=torch.float64)
        for pair in self._judged(program, region):
            with torch.no_grad():
                before, norm = self._error(program, region, (), pair)
                after, _ = self._error(program, region, names, pair)
            found += torch.stack((before, after, norm)).double().cpu()
        before_sum, after_sum, norm_sum = found.tolist()
        return before_sum / max(norm_sum, 1e-300), after_sum / max(norm_sum, 1e-300)

    def _judged(self, program: Program, region: Region) -> Iterator[Pair]:
        for batch in self.heldout:
            yield self._pair(program, region, batch)
