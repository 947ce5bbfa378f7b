"""What a run decides: which steps count, and which exact rewrites are kept where they do not
pay."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from attnopt.autotune.accuracy import Accuracy
from attnopt.autotune.data import Data
from attnopt.autotune.entries import relaxation
from attnopt.autotune.optimize import optimize
from attnopt.autotune.order import approximate, healing, ordered
from attnopt.autotune.place import Place
from attnopt.autotune.request import Request
from attnopt.autotune.result import Number, Speed
from attnopt.autotune.run import Run
from attnopt.autotune.search import Tried
from attnopt.autotune.workbench import Journal, Workbench, _digest
from attnopt.compiler.errors import Problem
from attnopt.compiler.plan import Outcome, Plan, Step
from attnopt.compiler.program import Batch
from attnopt.compiler.raising import raise_program
from tests.cli.conftest import LENGTH, ROWS, WIDTH, encoder
from tests.residual_models import traced


@pytest.fixture(scope="module")
def bench() -> Workbench:
    batches = tuple(Batch((torch.randn(ROWS, LENGTH, WIDTH),)) for _ in range(3))
    model = encoder()
    program = raise_program(traced(model, *batches[0].args))
    data = Data(batches[:1], batches[:1], batches[1:2], batches[2:], real=True)
    return Workbench(model, program, data, task="other")


def test_steps_that_change_nothing_do_not_count(bench: Workbench) -> None:
    halved, none = Step("merge_kv_heads{factor=2 method=mean}"), Step("merge_kv_heads{factor=8}")
    assert bench.effective([none]) == []
    assert bench.effective([halved, Step("sliding_window{left=4096}")]) == [halved]


def _pace(built: Any, ratio: float, verdict: Any) -> Any:
    speed = Speed({"eager": Number(ratio, "measured")}, "eager", verdict)
    return SimpleNamespace(built=built, ratio=ratio, speed=speed, kind="measured")


@pytest.mark.parametrize(
    ("packed", "verdict", "padded", "kept"),
    [(0.9, "slower", 1.0, False), (0.9, "slower", 0.8, True), (3.0, "faster", 9.0, True)],
)
def test_unpad_is_left_out_where_it_does_not_pay(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, packed: float, verdict: str, padded: float,
    kept: bool,
) -> None:  # fmt: skip
    plain = bench.build([])
    unpad = Outcome("unpad{}", "program", True, "exact")

    class Bench(Workbench):
        def build(self, steps: list[Step], verify: bool = True) -> Any:
            done = () if "unpad" in self.without else (unpad,)
            return replace(plain, plan=Plan(()), outcomes=done)

    monkeypatch.setattr(bench, "__class__", Bench)
    run = object.__new__(Run)
    run.bench, run.data, run.warnings, run.place = bench, bench.data, [], Place()

    def pace(built: Any, seconds: float = 8.0) -> Any:
        return _pace(built, packed, verdict) if built.outcomes else _pace(built, padded, "slower")

    monkeypatch.setattr(run, "_pace", pace)
    chosen = run._exactly()
    assert bool(chosen.built.outcomes) is kept
    assert ("unpad" in bench.without) is not kept and bool(run.warnings) is not kept
    bench.without = frozenset()


def test_a_model_without_padding_is_timed_once(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, timed = object.__new__(Run), list[Any]()
    run.bench, run.data, run.warnings, run.place = bench, bench.data, [], Place()

    def pace(built: Any, seconds: float = 8.0) -> Any:
        timed.append(built)
        return _pace(built, 0.9, "slower")

    monkeypatch.setattr(run, "_pace", pace)
    run._exactly()
    assert len(timed) == 1 and isinstance(bench.original, nn.Module)


def test_healing_comes_after_everything_that_breaks() -> None:
    names = [kind.name for kind in ordered()]
    broken = [k.name for k in approximate()]
    assert all(names.index(k.name) > names.index(name) for k in healing() for name in broken)


def test_a_step_keeps_the_targets_that_it_changes(bench: Workbench) -> None:
    skipped = Step("skip_sublayers{method=delete}", (bench.program.sublayers[0].id,))
    window = Step("sliding_window{left=4}", ("s0", "s1"))
    assert bench.effective([skipped, window]) == [skipped, replace(window, targets=("s1",))]


def test_measurements_are_those_of_the_same_data() -> None:
    first = Data((Batch((torch.ones(2, 3),)),))
    other = Data((Batch((torch.ones(2, 3) * 2,)),))
    assert _digest(Data((Batch((torch.tensor(1.5),)),)))  # a number, as time steps are
    assert _digest(first) == _digest(Data((Batch((torch.ones(2, 3),)),))) != _digest(other)


def test_a_torn_line_is_cut_off_before_another_is_written(tmp_path: Path) -> None:
    path = tmp_path / "measurements.jsonl"
    Journal(path, "one").get("a", lambda: 1)
    with path.open("a") as file:
        file.write('{"scope": "one", "ke')
    assert Journal(path, "one").get("b", lambda: 2) == 2
    again = Journal(path, "one")
    assert again.found == {"a": 1, "b": 2} and Journal(path, "two").found == {}


def test_a_compiled_form_that_computes_something_else_is_not_taken(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = bench.build([])

    def compiled(model: Any, batches: Any, **more: Any) -> Any:
        return (lambda *args: torch.full_like(args[0], 7.0)), ""

    monkeypatch.setattr("attnopt.autotune.workbench.compiled_form", compiled)
    made, reason = bench.compiled(built)
    assert made is None and "off eager's" in reason


@pytest.mark.parametrize(
    ("ratio", "verdict", "met"),
    [(2.1, "faster", True), (2.1, "inconclusive", False), (1.9, "faster", False)],
)
def test_a_budget_is_met_by_what_is_surely_faster(ratio: float, verdict: str, met: bool) -> None:
    run = object.__new__(Run)
    run.request = Request(budget=2.0)
    assert run._enough(_pace(None, ratio, verdict)) is met


@dataclass(frozen=True)
class Plans:
    """Plans as a search reports them: (gain, largest drop, within the bound)."""

    of: tuple[tuple[float, float, bool], ...]

    def tried(self) -> list[Tried]:
        return [Tried(i, (), d, d, gain, ok) for i, (gain, d, ok) in enumerate(self.of)]


@pytest.mark.parametrize(
    ("plans", "ratio", "sequences", "said", "unsaid"),
    [
        (Plans(()), 1.5, 20, "--budget 1.50x is met at --max-drop 0.04%", "no plan"),
        (Plans(((1.4, 0.03, False),)), 1.5, 20, "2x would take --max-drop 3%", "no plan"),
        (Plans(((1.4, 3.2, False),)), 1.5, 20, "it may drop by 320%", "--max-drop 320%"),
        (Plans(((1.1, 0.03, False),)), 1.5, 20, "no plan tried reaches 2x", "would take"),
        (Plans(((1.4, 0.0001, False),)), 1.5, 20, "the data too little", "would take"),
        (Plans(()), 2.5, 3, "3 sequences are too few", "is met"),
    ],
)
def test_a_relaxation_says_what_would_do(
    plans: Plans, ratio: float, sequences: int, said: str, unsaid: str
) -> None:
    drop = 0.0 if sequences > 8 else 0.1
    accuracy = Accuracy("encoder", drop, drop, drop, worst=drop, cosine=0.9, sequences=sequences)
    pace = SimpleNamespace(ratio=ratio, kind="measured", speed=_pace(None, ratio, "faster").speed)
    made = relaxation(plans.tried(), ratio, 2.0, cast(Any, pace), 0.0004, accuracy)
    assert said in made.words and unsaid not in made.words


def test_a_module_on_the_meta_device_has_no_weights() -> None:
    with torch.device("meta"):
        model = torch.nn.Linear(2, 2)
    with pytest.raises(Problem, match="no weights") as caught:
        optimize(model, (torch.ones(1, 2),))
    assert caught.value.code == "A118"


def test_a_metric_that_fails_does_so_before_anything_is_timed(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = object.__new__(Run)
    run.request, run.place = Request(metric="math:isnan"), Place()  # a model is no number
    monkeypatch.setattr(run, "_bench", lambda: bench)
    monkeypatch.setattr(run, "_exactly", lambda: pytest.fail("it was timed"))
    with pytest.raises(Problem, match="`math:isnan` failed") as caught:
        run.go()
    assert caught.value.code == "A407"
