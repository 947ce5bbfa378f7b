"""Replaying a plan: on the model of the run, on another one, and without what it was fitted on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from attnopt.autotune import check as checking
from attnopt.autotune.baselines import Baselines
from attnopt.autotune.check import check
from attnopt.autotune.replay import UNMEASURED, apply
from attnopt.autotune.result import Result
from attnopt.autotune.timing import Contender
from attnopt.compiler.artifact import load_calibration, read_report, save, source_sha256
from attnopt.compiler.contract import Notes
from attnopt.compiler.errors import Problem
from attnopt.compiler.intake.source import load
from attnopt.compiler.pipeline import apply_plan, read
from attnopt.compiler.plan import Plan, Step
from attnopt.compiler.program import Batch
from tests.autotune.results import full
from tests.cli.conftest import LENGTH, ROWS, WIDTH, encoder, save_encoder

MERGE, REFIT = "merge_kv_heads{method=mean}", "refit{}"
EXACT = Plan((Step("fuse_attention{}"),))
HEALED = Plan((Step(MERGE), Step(REFIT), Step("fuse_attention{}")))


def _run(folder: Path, plan: Plan) -> Path:
    """The folder of a run, with figures that nobody measured."""
    model, inputs = save_encoder(folder)
    program = read(load(str(model), inputs=inputs))
    batches = [Batch((torch.randn(ROWS, LENGTH, WIDTH),)) for _ in range(4)]
    kept = {"calibration": batches[:2], "heldout": batches[2:]} if plan is HEALED else {}
    made, outcomes = apply_plan(program, plan, Notes(program, *kept.values()))
    found = replace(
        full("encoder"), plan=plan, outcomes=tuple(outcomes), model_sha256=source_sha256(model)
    )
    return save(folder / "out", made, plan, found, kept)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _run(tmp_path_factory.mktemp("exact"), EXACT)


@pytest.fixture
def healed(tmp_path: Path) -> Path:
    return _run(tmp_path, HEALED)


def _again(out: Path, to: Path | None = None, model: Path | None = None, **more: Any) -> Any:
    inputs = out.parent / "inputs.pt"
    return apply(out, model or out.parent / "encoder.pt", out=to, inputs=inputs, **more)


def _reported(folder: Path) -> Result:
    return Result.from_json(read_report(folder))


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Another model of the same shape."""
    model = encoder()
    nn.init.normal_(next(model.parameters()))
    torch.save(model, tmp_path / "other.pt")
    return tmp_path / "other.pt"


def test_the_model_of_the_run_keeps_its_figures(exact: Path, tmp_path: Path) -> None:
    done = _again(exact, tmp_path / "new", command="attnopt apply")
    before, after = _reported(exact), _reported(tmp_path / "new")
    assert not done.warnings and after == before


def test_another_model_has_no_figures(
    exact: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = _again(exact, tmp_path / "new", other, command="attnopt apply out other.pt")
    made = _reported(tmp_path / "new")
    assert done.warnings == (UNMEASURED,) and UNMEASURED in made.warnings
    assert (made.model, made.model_sha256) == ("other", source_sha256(other))
    assert made.command == "attnopt apply out other.pt"
    assert made.speed is made.accuracy is made.optimized is made.ceiling is made.budget is None
    assert not (made.baselines or made.trials or made.sensitivities or made.ceilings)
    assert [site.applied for site in made.sites] == [("fuse_attention{}",)] * 2
    evidence = json.loads((tmp_path / "new/plan.json").read_text())["evidence"]
    assert evidence["speed"] is None and evidence["model"] == "other"
    assert "was not met" not in (tmp_path / "new/report.md").read_text()
    _eager_only(monkeypatch)
    found = check(tmp_path / "new", other, inputs=exact.parent / "inputs.pt", seconds=0.1)
    assert found.speed_bound == 1.0 and found.drop is not None


def _eager_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        checking, "baselines", lambda model, batches: Baselines((Contender("eager", model),))
    )


def test_a_plan_changed_by_hand_has_no_figures(exact: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(Plan((*EXACT.steps, *EXACT.steps)).as_json()))
    (tmp_path / "report.json").write_bytes((exact / "report.json").read_bytes())
    inputs = exact.parent / "inputs.pt"
    done = apply(tmp_path, exact.parent / "encoder.pt", out=tmp_path / "new", inputs=inputs)
    assert done.warnings and _reported(tmp_path / "new").speed is None


def test_a_fitted_plan_is_not_replayed_without_its_data(healed: Path, tmp_path: Path) -> None:
    assert any(o.applied for o in _again(healed).outcomes if o.rewrite == REFIT)
    (healed / "calibration.pt").unlink()
    with pytest.raises(Problem, match="fitted on") as caught:
        apply(healed, "missing.pt")  # before the model is looked for
    assert caught.value.code == "A511" and "calibration.pt" in caught.value.where
    (healed / "report.json").unlink()
    with pytest.raises(Problem, match="fitted on"):
        apply(healed, "missing.pt")


def test_a_step_that_did_nothing_needs_no_data(healed: Path) -> None:
    (healed / "calibration.pt").unlink()
    report = _reported(healed)
    undone = tuple(replace(o, applied=o.applied and "fuse" in o.rewrite) for o in report.outcomes)
    _rewrite(healed, replace(report, outcomes=undone))
    _again(healed)


def _rewrite(folder: Path, report: Result) -> None:
    (folder / "report.json").write_text(json.dumps(report.as_json()))


def test_what_was_applied_in_the_run_has_to_apply_again(healed: Path) -> None:
    batches = load_calibration(healed)["calibration"]
    plain = [{"args": b.args, "kwargs": b.kwargs, "valid": None} for b in batches]
    torch.save({"calibration": plain, "heldout": []}, healed / "calibration.pt")
    with pytest.raises(Problem, match="refit") as caught:
        _again(healed)
    assert caught.value.code == "A512" and "held-out" in caught.value.why
    report = _reported(healed)
    _rewrite(healed, replace(report, model_sha256="0" * 64))
    _again(healed)  # of another model nothing is known


def test_what_a_plan_names_has_to_apply_unless_it_did_not_in_the_run(
    exact: Path, tmp_path: Path
) -> None:
    named = Plan((Step("fuse_attention{}", ("s0", "s9")),))
    (tmp_path / "plan.json").write_text(json.dumps(named.as_json()))
    files = exact.parent / "encoder.pt", exact.parent / "inputs.pt"
    with pytest.raises(Problem, match="s9") as caught:
        apply(tmp_path, files[0], inputs=files[1])
    assert caught.value.code == "A512"
    report = _reported(exact)
    left = replace(report.outcomes[0], target="s9", applied=False)
    _rewrite(tmp_path, replace(report, plan=named, outcomes=(left,)))
    apply(tmp_path, files[0], inputs=files[1])


def test_a_guarded_rewrite_depends_on_the_machine(exact: Path, tmp_path: Path) -> None:
    report = _reported(exact)
    guarded = replace(report.outcomes[0], rewrite="cpu_dtype{}", exactness="guarded", applied=True)
    kept = Plan((*EXACT.steps, Step("cpu_dtype{}")))
    _rewrite(tmp_path, replace(report, plan=kept, outcomes=(*report.outcomes, guarded)))
    (tmp_path / "plan.json").write_text(json.dumps(kept.as_json()))
    apply(tmp_path, exact.parent / "encoder.pt", inputs=exact.parent / "inputs.pt")


@pytest.mark.parametrize(
    ("content", "code"), [("{", "A505"), ("[]", "A505"), ("", "A505"), ('{"schema": 1}', "A504")]
)
def test_a_damaged_report(exact: Path, tmp_path: Path, content: str, code: str) -> None:
    (tmp_path / "plan.json").write_bytes((exact / "plan.json").read_bytes())
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(Problem) as caught:
        apply(tmp_path, "missing.pt", out=tmp_path / "new")
    assert caught.value.code == code
    with pytest.raises(Problem) as caught:
        check(tmp_path, "missing.pt")
    assert caught.value.code == code
