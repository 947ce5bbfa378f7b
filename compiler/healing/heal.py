"""`heal`: train what approximate rewrites touched, by distillation from the original.

First each touched site alone (`local`), then all of them end to end (KL of the logits, or the
distance of the outputs). Only the touched sites' own parameters are trained, in float32, and
written back in their dtype, so that nothing is added at run time. The loss on held-out batches
decides: the best of the checks is kept, and where none is below the start nothing is changed.
Source: distillation of logits after pruning, Minitron (Muralidharan et al. 2024, arXiv:2407.14679,
section 3).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnopt.compiler.contract import Miss
from attnopt.compiler.healing import loss, schedule
from attnopt.compiler.healing.checkpoint import Checkpoint, key_of
from attnopt.compiler.healing.draw import Draw, tokens
from attnopt.compiler.healing.factors import Factors
from attnopt.compiler.healing.local import Local
from attnopt.compiler.healing.products import Products
from attnopt.compiler.healing.settings import Settings
from attnopt.compiler.healing.touched import Touched, touched
from attnopt.compiler.healing.working import Working
from attnopt.compiler.packed_ops import PACKED_ATTENTION
from attnopt.compiler.program import Batch, Program, attribute

Progress = Callable[[str, float], None]
CHECKS = 2  # how often the held-out loss is taken on the way
_NOTHING = 1e-12  # a loss below it is rounding


@dataclass(frozen=True)
class Healed:
    """What a healing did.

    `weights` are the trained parameters by name, in their own dtype; empty where it was thrown
    away. `before` and `after` are the held-out loss in `unit`, `stages` the loss after each stage.
    `tokens` were trained on, each counted once for all sites that it trained; `numbers` is how many
    numbers were trained, `sites` of how many sites, `fitted` of how many the local stage was kept.
    `narrow` says that it was trained with products in bfloat16.
    """

    weights: Mapping[str, Tensor]
    before: float
    after: float
    unit: str
    tokens: int
    seconds: float
    sites: int
    numbers: int
    fitted: int = 0
    stages: Mapping[str, float] = field(default_factory=dict)
    narrow: bool = False

    @property
    def accepted(self) -> bool:
        """Whether the held-out loss fell."""
        return self.after < self.before


def heal(
    program: Program,
    original: Program,
    batches: Sequence[Batch],
    heldout: Sequence[Batch],
    settings: Settings,
    checkpoint: Checkpoint | None = None,
    progress: Progress | None = None,
) -> Healed | Miss:
    """Train the touched sites of a program towards the original on batches, judged by held-out
    ones; or say why there is nothing to do.

    Neither program is changed. With a checkpoint an interrupted healing goes on where it was, with
    the same outcome.
    """
    made = start(program, original, batches, heldout, settings, checkpoint, progress)
    return made if isinstance(made, Miss) else made.run()


def start(
    program: Program,
    original: Program,
    batches: Sequence[Batch],
    heldout: Sequence[Batch],
    settings: Settings,
    checkpoint: Checkpoint | None = None,
    progress: Progress | None = None,
) -> Healing | Miss:
    """A healing that has not begun; or why there is nothing to do."""
    if not batches or not heldout:
        return Miss("healing needs calibration data and held-out data", help="give --text FILE")
    if any(node.target is PACKED_ATTENTION for node in program.graph.nodes):
        return Miss("the program runs on packed tokens, through which nothing is trained",
                    help="heal before `unpad`")  # fmt: skip
    found = touched(program, original)
    names = found.names
    if not names:
        return Miss("no site differs from the original's: there is nothing to heal")
    saved = checkpoint or Checkpoint()
    weights = {name: attribute(program.module, name) for mine in names.values() for name in mine}
    student, teacher = Working.of(program), Working.of(original)
    factors = Factors(weights, settings)
    products = Products.of(student, teacher, factors, heldout[0])
    if saved.path is not None:
        saved.key = key_of((settings, products), program, original, (*batches, *heldout))
    return Healing(
        student, teacher, found, factors, Draw.of(batches, settings.seed), heldout, settings,
        saved, progress or (lambda what, share: None), products,
    )  # fmt: skip


@dataclass
class Healing:
    """One healing on its way."""

    student: Working
    teacher: Working
    touched: Touched
    factors: Factors
    draw: Draw
    heldout: Sequence[Batch]
    settings: Settings
    checkpoint: Checkpoint
    progress: Progress
    products: Products
    losses: dict[str, float] = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)
    fitted: int = 0
    spent: float = 0.0
    judged: loss.Heldout | None = None

    @property
    def names(self) -> Mapping[str, tuple[str, ...]]:
        """The parameters to train, by site."""
        return self.touched.names

    @property
    def local(self) -> Local:
        """The fitting of its single sites."""
        return Local(
            self.student, self.teacher, self.factors, self.draw, self.heldout,
            self.touched.shared, self.products,
        )  # fmt: skip

    def run(self) -> Healed | Miss:
        """Both stages, from the checkpoint where there is one."""
        self._begun = time.monotonic()
        saved = self.checkpoint.load() or {}
        self._restore(saved)
        if "start" not in self.losses:
            self._check("start")
        if self.losses["start"] < _NOTHING:
            return Miss("the outputs are the original's already: there is nothing to heal")
        stage, at = int(saved.get("stage", 0)), int(saved.get("at", 0))
        if stage == 0:
            self._sites(at)
            at = 0
        if self.settings.tokens:
            self._whole(at, saved.get("optimizer"))
        return self._ended()

    def _sites(self, first: int) -> None:
        """The local stage, from the site with this number on."""
        local = self.local
        for at, (id, names) in enumerate(self.names.items()):
            if at < first or not self.settings.local:
                continue
            self.progress("healing site by site", at / len(self.names))
            done = local.fit(id, names, self.settings.local, stage=2 + at)
            self.fitted += done is not None and done.kept
            if self.checkpoint.due():
                self._save(0, at + 1)
        if self.settings.local:
            self._check("local")
            if self.losses["local"] > self.losses["start"]:  # each site is closer, the whole not
                self.factors.restore(self.best)
        self._save(1, 0)

    def _whole(self, first: int, state: dict[str, Any] | None) -> None:
        """The stage end to end, from this step on."""
        names = [name for mine in self.names.values() for name in mine]
        optimizer = schedule.optimizer(self.factors.groups(names))
        if state is not None:
            optimizer.load_state_dict(state)
        steps = self.steps
        checks = {round(steps * (i + 1) / CHECKS) for i in range(CHECKS)}
        for step in range(first, steps):
            self.progress("healing end to end", step / steps)
            self.step(optimizer, step, steps)
            if step + 1 in checks:
                self._check("end" if step + 1 == steps else f"step {step + 1}")
            if self.checkpoint.due():
                self._save(1, step + 1, optimizer.state_dict())

    def step(self, optimizer: torch.optim.Optimizer, step: int, steps: int) -> int:
        """One step end to end; the tokens it took."""
        batch = self.student.ready(self.draw(step, 1))
        schedule.pace(optimizer, step, steps)
        with self.products():
            with torch.no_grad():
                expected = self.teacher(batch)
            actual = self.student(batch, self.factors.weights(dtype=torch.float32))
        loss.distance(expected, actual, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        return tokens(batch)

    @property
    def size(self) -> int:
        """About how many tokens a step takes: the mean of the batches."""
        batches = self.draw.batches
        return max(1, sum(tokens(batch) for batch in batches) // len(batches))

    @property
    def steps(self) -> int:
        """How many steps the stage end to end has."""
        return -(-self.settings.tokens // self.size)

    def judge(self) -> float:
        """The held-out loss as the weights now stand, in the dtype that they are kept in."""
        if self.judged is None:
            ready = [self.student.ready(batch) for batch in self.heldout]
            self.judged = loss.Heldout(self.teacher, ready)
        weights = self.factors.merged()
        return self.judged(lambda batch: self.student(batch, weights))

    def _check(self, name: str) -> None:
        """Take the held-out loss, and keep what is trained where it is the least so far."""
        least = min(self.losses.values(), default=float("inf"))
        self.losses[name] = self.judge()
        if self.losses[name] < least:
            self.best = self.factors.state()

    def _ended(self) -> Healed:
        self.factors.restore(self.best)
        before, after = self.losses["start"], min(self.losses.values())
        unit = loss.unit(self.teacher(self.student.ready(self.heldout[0])))
        self.checkpoint.clear()
        trained = self.settings.local * (self.fitted > 0) + self.steps * self.size
        return Healed(
            self.factors.merged() if after < before else {}, before, after, unit, trained,
            self.spent + time.monotonic() - self._begun, len(self.names), self.factors.count,
            self.fitted, dict(self.losses), self.products.narrow,
        )  # fmt: skip

    def _save(self, stage: int, at: int, optimizer: dict[str, Any] | None = None) -> None:
        self.checkpoint.save({
            "stage": stage, "at": at, "held": self.factors.state(), "best": self.best,
            "losses": self.losses, "fitted": self.fitted, "optimizer": optimizer,
            "spent": self.spent + time.monotonic() - self._begun,
        })  # fmt: skip

    def _restore(self, saved: Mapping[str, Any]) -> None:
        if not saved:
            return
        self.factors.restore(saved["held"])
        self.best = {name: value.clone() for name, value in saved["best"].items()}
        self.losses, self.fitted = dict(saved["losses"]), int(saved["fitted"])
        self.spent = float(saved["spent"])
