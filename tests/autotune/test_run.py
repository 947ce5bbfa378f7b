"""What a run decides: which steps count, and which exact rewrites are kept where they do not
pay."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from attnopt.autotune.data import Data
from attnopt.autotune.result import Number, Speed
from attnopt.autotune.run import Run
from attnopt.autotune.workbench import Workbench
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
    return SimpleNamespace(built=built, ratio=ratio, speed=speed)


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
    run.bench, run.data, run.warnings = bench, bench.data, []

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
    run.bench, run.data, run.warnings = bench, bench.data, []

    def pace(built: Any, seconds: float = 8.0) -> Any:
        timed.append(built)
        return _pace(built, 0.9, "slower")

    monkeypatch.setattr(run, "_pace", pace)
    run._exactly()
    assert len(timed) == 1 and isinstance(bench.original, nn.Module)
