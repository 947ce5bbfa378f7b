"""Heal: train the sites that approximate rewrites touched until the outputs come nearer to the
original's.

Closed forms such as `refit` solve for what is linear in a weight. What is left needs steps along
the gradient: of each touched site's output towards the original's at the same node, one site after
the other; then of KL(original || healed) of the logits (or the squared distance of the outputs)
through the whole program. Only the touched sites' own parameters are trained, so nothing is added
at run time. Held-out data decides whether the outcome is kept. The mathematics is in
`attnopt.compiler.healing`.

It takes minutes, so that it is made where it is asked for (`optimize --heal`), not by the search.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from attnopt.compiler.contract import Edit, Exactness, Miss, Notes, Pass, Scope, choice
from attnopt.compiler.healing.checkpoint import Checkpoint
from attnopt.compiler.healing.heal import heal
from attnopt.compiler.healing.settings import Settings
from attnopt.compiler.program import Program

CHECKPOINT = "healing.pt"


@dataclass(frozen=True)
class Heal(Pass):
    """Distil the original into the touched sites, on `tokens` tokens end to end after `local`
    tokens at every site alone; the other options are those of `healing.settings.Settings`."""

    name: ClassVar[str] = "heal"
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    scope: ClassVar[Scope] = "program"
    source: ClassVar[str] = (
        "Minitron (arXiv:2407.14679, section 3); Puzzle (arXiv:2411.19146, section 3); "
        "LoRA (arXiv:2106.09685) with a rank"
    )
    after: ClassVar[tuple[str, ...]] = ("refit",)
    heals: ClassVar[bool] = True
    trains: ClassVar[bool] = True
    asked: ClassVar[bool] = True

    tokens: int = choice(50_000, 200_000, 1_000_000, default=200_000)
    local: int = choice(0, 10_000, 50_000, default=50_000)
    rank: int = choice(0, 8, 32, default=0)
    rate: float = choice(0.005, 0.01, 0.02, default=0.01)

    def settings(self, seed: int) -> Settings:
        """What the engine is told."""
        return Settings(self.tokens, self.local, self.rank, self.rate, seed)

    def rewrite(self, target: Any, program: Program, notes: Notes) -> Edit | Miss:
        """The trained weights where the held-out loss fell, or why not."""
        made = heal(
            program, notes.original, notes.training or notes.calibration, notes.heldout,
            self.settings(notes.seed),
            Checkpoint(notes.work / CHECKPOINT) if notes.work is not None else None,
            notes.progress,
        )  # fmt: skip
        if isinstance(made, Miss):
            return made
        if not made.accepted:
            *_, last = made.stages.values()
            return Miss(
                f"the held-out loss would go from {made.before:.4g} to {last:.4g} {made.unit}",
                help="train on more text, or with a smaller rate",
            )
        evidence = {
            "loss_before": made.before, "loss_after": made.after, "trained_tokens": made.tokens,
            "trained_numbers": made.numbers, "sites": made.sites, "seconds": made.seconds,
        }  # fmt: skip
        said = f"held-out loss {made.before:.4g} -> {made.after:.4g} {made.unit}"
        how = ", with products in bfloat16" if made.narrow else ""
        return Edit(
            weights=made.weights,
            note=f"{said} after {made.tokens} tokens at {made.sites} sites{how}",
            evidence={key: float(value) for key, value in evidence.items()},
        )
