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


def test_the_figures_are_measured_on_data_that_decided_nothing(
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
    return Tried(number, (MERGE,), drop, drop, gain, feasible)


def test_where_the_budget_is_missed_the_nearest_plan_that_reaches_it_is_healed(
    bench: Workbench, done: HealedPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = object.__new__(Run)
    run.bench, run.warnings, run.healing = bench, [], None
    slow, near, far = _tried(0, 1.1, 0.001, True), _tried(1, 2.1, 0.02, False), _tried(
        2, 2.5, 0.5, False
    )  # fmt: skip
    pace: Any = SimpleNamespace(built=bench.build([MERGE]), ratio=1.1)
    asked = list[Any]()

    def heal(bench: Any, steps: Any, budget: Any, before: Any) -> HealedPlan:
        asked.append(steps)
        return done

    monkeypatch.setattr("attnopt.autotune.run.healed", heal)
    monkeypatch.setattr(run, "_raced", lambda tried: pace)
    monkeypatch.setattr(run, "_pace", lambda built: SimpleNamespace(built=built, ratio=2.1))
    monkeypatch.setattr(run, "_enough", lambda at: at.ratio >= 2.0)
    for largest, wins in ((0.9, near), (1e-9, slow)):
        run.request = Request(budget=2.0, max_drop=largest, heal=HealBudget(tokens=1))
        best = run._healed(_Best(pace, slow), [slow, near, far])
        assert best.tried is wins
    assert "still drops" in run.warnings[-1] and len(asked) == 2
    run.request = Request(heal=HealBudget(tokens=1))
    assert run._healed(_Best(pace, slow), [slow, near, far]).tried is slow
    run.request = Request(budget=2.0)
    assert run._healed(_Best(pace, slow), [slow, near]).pace is pace and len(asked) == 3


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
