"""Healing what a run chose: how long, what is told of it, and which plan is healed."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attnopt.autotune.data import Data
from attnopt.autotune.heal import HealedPlan, healed
from attnopt.autotune.replay import apply
from attnopt.autotune.report import markdown
from attnopt.autotune.report_html import page
from attnopt.autotune.request import HealBudget, Request, parse_healing
from attnopt.autotune.result import HealingEntry, Number, Result
from attnopt.autotune.run import Run, _Best
from attnopt.autotune.search import Tried
from attnopt.autotune.workbench import Journal, Workbench
from attnopt.compiler.artifact import save, source_sha256
from attnopt.compiler.contract import read_pass
from attnopt.compiler.errors import Problem
from attnopt.compiler.intake.source import load
from attnopt.compiler.pipeline import read
from attnopt.compiler.plan import Step
from attnopt.compiler.program import Batch
from tests.autotune.results import full
from tests.cli.conftest import LENGTH, ROWS, WIDTH, save_encoder

MERGE = Step("merge_kv_heads{factor=2 method=mean}")


def _bench(folder: Path) -> Workbench:
    model, inputs = save_encoder(folder)
    loaded = load(str(model), inputs=inputs)
    assert loaded.module is not None
    made = torch.Generator().manual_seed(4)
    batches = [Batch((torch.randn(ROWS, LENGTH, WIDTH, generator=made),)) for _ in range(7)]
    data = Data(
        tuple(batches[:1]), tuple(batches[:3]), tuple(batches[3:5]), tuple(batches[5:]), True
    )
    return Workbench(loaded.module, read(loaded), data, task="other")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("heal")


@pytest.fixture(scope="module")
def bench(folder: Path) -> Workbench:
    return _bench(folder)


@pytest.fixture(scope="module")
def done(bench: Workbench) -> HealedPlan:
    before = bench.verdict(bench.build([MERGE]))
    return healed(bench, [MERGE], HealBudget(tokens=2400), before)


def test_the_figures_are_of_data_that_decides_nothing_while_healing(
    bench: Workbench, done: HealedPlan
) -> None:
    entry = done.entry
    assert entry.accepted and entry.loss_before and entry.loss_after and entry.seconds
    assert entry.loss_after.value < entry.loss_before.value and entry.loss_after.kind == "measured"
    assert entry.drop_before and entry.drop_after and entry.metric == "cosine similarity"
    assert entry.drop_after.value < entry.drop_before.value
    assert entry.drop_after.value == bench.verdict(done.built).drop == done.accuracy.drop
    assert entry.rewrite == "heal{tokens=1800 local=600}" and entry.sites == 2
    assert [s.rewrite for s in done.built.plan.steps].count(entry.rewrite) == 1


def test_a_time_becomes_tokens_once(
    bench: Workbench, done: HealedPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, made = HealBudget(seconds=0.2, rank=8), list[Any]()
    for _ in range(2):  # the second reads what the first one wrote
        monkeypatch.setattr(bench, "journal", Journal(tmp_path / "measurements.jsonl", "scope"))
        entry = healed(bench, [MERGE], asked, done.accuracy).entry
        made.append(read_pass(entry.rewrite))
    assert made[0] == made[1]
    assert made[0].tokens >= ROWS * LENGTH and made[0].rank == 8


def test_nothing_touched_is_told(bench: Workbench) -> None:
    before = bench.verdict(bench.build([]))
    for asked in (HealBudget(tokens=2400), HealBudget(seconds=1.0)):
        made = healed(bench, [], asked, before)
        assert not made.entry.accepted and "no site differs" in made.entry.reason


def test_a_plan_that_heals_is_replayed_with_the_same_weights(
    bench: Workbench, done: HealedPlan, folder: Path
) -> None:
    model, inputs = folder / "encoder.pt", folder / "inputs.pt"
    found = replace(
        full("encoder"), plan=done.built.plan, outcomes=done.built.outcomes, healing=done.entry,
        model_sha256=source_sha256(model), seed=0,
    )  # fmt: skip
    kept = {"calibration": bench.data.calibration, "heldout": bench.data.heldout}
    out = save(folder / "out", done.built.program, done.built.plan, found, kept)
    made = apply(out, model, inputs=inputs)
    for name, value in done.built.program.module.named_parameters():
        assert torch.equal(made.program.weight(name), value), name


def _tried(number: int, gain: float, drop: float, feasible: bool) -> Tried:
    return Tried(number, (MERGE,) * (number + 1), drop, drop, gain, feasible)


@pytest.fixture
def run(bench: Workbench, done: HealedPlan, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run of which plans race at `paces`, and healing takes no time; `asked` were healed."""
    made: Any = object.__new__(Run)
    made.bench, made.warnings, made.healing, made.passed = bench, [], None, set()
    made.raced, made.asked, made.after = dict[int, float](), list[Any](), 2.1
    built = bench.build([MERGE])

    def heal(bench: Any, steps: Any, budget: Any, before: Any) -> HealedPlan:
        made.asked.append(steps)
        return done

    monkeypatch.setattr("attnopt.autotune.run.healed", heal)
    made._raced = lambda plan: SimpleNamespace(built=built, ratio=made.raced[plan.number])
    made._pace = lambda built: SimpleNamespace(built=built, ratio=made.after)
    made._enough = lambda at: made.request.budget is not None and at.ratio >= made.request.budget
    return made


LOOSE, TIGHT = 0.9, 1e-9  # the bound, beside what `done` drops by


def _run_healed(
    run: Any, budget: float | None, bound: float, best: Tried | None, *tried: Tried
) -> Any:
    run.request = Request(budget=budget, max_drop=bound, heal=HealBudget(tokens=1))
    run.passed = {best.steps} if best else set()
    ratio = run.raced[best.number] if best else 1.05
    return run._healed(_Best(SimpleNamespace(built=None, ratio=ratio), best), tried)


def test_where_the_budget_is_missed_the_nearest_plan_that_reaches_it_is_healed(run: Any) -> None:
    slow, near, far = _tried(0, 1.1, 0.001, True), _tried(1, 2.1, 0.02, False), _tried(
        2, 2.5, 0.5, False
    )  # fmt: skip
    run.raced = {0: 1.1, 1: 2.1, 2: 2.5}
    assert _run_healed(run, 2.0, LOOSE, slow, slow, near, far).tried is near
    assert run.healing.accepted and not run.warnings
    assert _run_healed(run, 2.0, TIGHT, slow, slow, near, far).tried is slow
    assert "still drops" in run.warnings[-1] and len(run.asked) == 2
    assert not run.healing.accepted and "still drops" in run.healing.reason
    assert _run_healed(run, None, LOOSE, slow, slow, near, far).tried is slow
    run.request = Request(budget=2.0)
    assert run._healed(_Best(run._raced(slow), slow), [slow, near]).pace.ratio == 1.1
    assert len(run.asked) == 3


def test_a_plan_is_healed_for_the_budget_only_where_it_reaches_it_when_raced(run: Any) -> None:
    slow, said, held = _tried(0, 1.8, 0.001, True), _tried(1, 2.1, 0.02, False), _tried(
        2, 2.2, 0.03, True  # passed on held-out data, not on evaluation data
    )  # fmt: skip
    run.raced = {0: 1.8, 1: 1.3, 2: 2.2}
    assert _run_healed(run, 2.0, LOOSE, slow, slow, said).tried is slow
    assert _run_healed(run, 2.0, LOOSE, slow, slow, said, held).tried is held
    run.after = 1.7  # raced again it is slower than the winner
    assert _run_healed(run, 2.0, LOOSE, slow, slow, held).tried is slow
    assert "no faster" in run.healing.reason and not run.healing.accepted
    count = len(run.asked)
    assert _run_healed(run, None, LOOSE, None, said, held).tried is None
    assert len(run.asked) == count


def test_a_winner_within_the_bound_is_not_given_up_for_a_healed_one_beyond_it(run: Any) -> None:
    best = _tried(0, 2.1, 0.001, True)
    run.raced = {0: 2.1}
    assert _run_healed(run, 2.0, TIGHT, best, best).pace.built is None  # not the healed one
    assert not run.healing.accepted and "within the bound" in run.healing.reason
    assert run.warnings == [f"healing was not kept: {run.healing.reason}"]
    assert _run_healed(run, 2.0, LOOSE, best, best).pace.built is not None


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("5m", HealBudget(seconds=300.0)),
        ("90s", HealBudget(seconds=90.0)),
        ("200ktok", HealBudget(tokens=200_000)),
        ("1.5Mtok", HealBudget(tokens=1_500_000)),
        (" 64tok ", HealBudget(tokens=64)),
    ],
)
def test_how_long_is_read(said: str, meant: HealBudget) -> None:
    assert parse_healing(said) == meant
    assert parse_healing(said, 4).rank == 4


@pytest.mark.parametrize("said", ["5", "0m", "0tok", "tok", "-3m", "5 apples", ""])
def test_what_is_no_length_is_refused(said: str) -> None:
    with pytest.raises(Problem) as caught:
        parse_healing(said)
    assert caught.value.code == "A410"


def test_what_is_no_healing_is_refused_before_any_work() -> None:
    for wrong in (lambda: HealBudget(tokens=9, rank=-1), lambda: Request(heal=300)):  # type: ignore[arg-type]
        with pytest.raises(Problem) as caught:
            wrong()
        assert caught.value.code == "A410"


def test_reports_tell_what_healing_did_or_why_it_was_thrown_away() -> None:
    number = Number(0.0321, "measured")
    entry = HealingEntry(
        True, "heal{}", "", number, number, "perplexity", number, number, number, number, number,
        51_200, 983_040, 6, 0, Number(118.0, "measured", unit="s"),
    )  # fmt: skip
    result = replace(full("m"), healing=entry)
    assert Result.from_json(result.as_json()) == result
    for text in (markdown(result), page(result)):
        plain = re.sub(r"\\", "", text)
        assert "51,200 tokens" in plain and "perplexity, evaluation data" in plain
        assert "before healing" in plain and "118 s" in plain
    lost = replace(result, healing=HealingEntry(False, "heal{}", "the loss would go up"))
    for text in (markdown(lost), page(lost)):
        assert "was not kept: the loss would go up" in re.sub(r"\\", "", text)
        assert "before healing" not in text
