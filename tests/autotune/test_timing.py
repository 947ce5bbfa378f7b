"""Timing under a planted clock: order, pairing, stopping, verdicts, and what is refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnopt.autotune import baselines as base
from attnopt.autotune.environment import environment
from attnopt.autotune.timing import Contender, Timing, check_inputs, compare
from attnopt.compiler.errors import Problem
from attnopt.compiler.program import Batch


class Clock:
    """A clock that only models advance; `drift` slows everything down as time goes by."""

    def __init__(self, drift: float = 0.0) -> None:
        self.now, self.drift, self.calls = 0.0, drift, list[str]()

    def __call__(self) -> float:
        return self.now

    def model(self, name: str, seconds: float, noise: float = 0.0) -> Contender:
        """A contender that takes this long, give or take `noise` (relative)."""
        source = random.Random(name)

        def run(x: Tensor) -> Tensor:
            self.calls.append(name)
            factor = 1.0 + noise * source.uniform(-1, 1)
            self.now += seconds * factor * (1.0 + self.drift * self.now)
            return x

        return Contender(name, run)


BATCH = Batch((torch.arange(12.0).reshape(3, 4),))


def _compare(clock: Clock, contenders: list[Contender], **options: Any) -> Timing:
    return compare(contenders, [BATCH], clock=clock, **options)


def test_a_planted_ratio_is_found_with_its_verdict() -> None:
    clock = Clock()
    got = _compare(clock, [clock.model("slow", 0.2, 0.05), clock.model("fast", 0.1, 0.05)])
    ratio = got.ratio("fast", "slow")
    assert ratio.interval.low < 2.0 < ratio.interval.high
    assert ratio.value == pytest.approx(2.0, rel=0.05)
    assert ratio.verdict == "faster"
    assert got.ratio("slow", "fast").verdict == "slower"
    assert got.fastest() == "fast"


def test_equal_contenders_are_inconclusive() -> None:
    clock = Clock()
    got = _compare(clock, [clock.model("a", 0.1, 0.2), clock.model("b", 0.1, 0.2)])
    assert got.ratio("a", "b").verdict == "inconclusive"


def test_drift_of_the_machine_cancels_within_a_round() -> None:
    clock = Clock(drift=0.1)
    got = _compare(clock, [clock.model("a", 0.1), clock.model("b", 0.1)], seconds=0.0, rounds=20)
    assert got.spread("a").max > 1.1 * got.spread("a").min
    assert got.ratio("a", "b").value == pytest.approx(1.0, abs=0.02)


def test_rounds_interleave_and_rotate() -> None:
    clock = Clock()
    names = ["a", "b", "c"]
    contenders = [clock.model(name, 1.0) for name in names]
    _compare(clock, contenders, rounds=6, seconds=0.0, warmup=1)
    timed = clock.calls[6:]  # after one warm-up and one calibration run of each
    rounds = ["".join(timed[i : i + 3]) for i in range(0, len(timed), 3)]
    assert rounds == ["abc", "bca", "cab", "cba", "acb", "bac"]


def test_the_floor_of_rounds_holds_past_the_budget() -> None:
    clock = Clock()
    got = _compare(clock, [clock.model("a", 50.0), clock.model("b", 40.0)], seconds=1.0, rounds=4)
    assert got.rounds == 4


def test_rounds_stop_early_when_the_ratio_is_known() -> None:
    clock = Clock()
    sure = _compare(clock, [clock.model("a", 0.2), clock.model("b", 0.1)], seconds=100.0)
    assert sure.rounds == 7
    noisy = _compare(clock, [clock.model("a", 0.2, 0.5), clock.model("b", 0.1, 0.5)], seconds=20.0)
    assert noisy.rounds > 20


def test_short_calls_are_repeated_within_a_sample() -> None:
    clock = Clock()
    got = _compare(clock, [clock.model("a", 1e-5), clock.model("b", 2e-5)], shortest=1e-3, rounds=3)
    assert got.repeats in (100, 101)  # the clock's own rounding
    assert got.median("a") == pytest.approx(1e-5)


def test_progress_ends_at_one() -> None:
    clock, seen = Clock(), list[float]()
    _compare(clock, [clock.model("a", 0.1)], rounds=3, seconds=0.0,
             progress=lambda _, share: seen.append(share))  # fmt: skip
    assert seen == sorted(seen) and seen[-1] == 1.0


@pytest.mark.parametrize(
    "batch",
    [
        Batch((torch.zeros(2, 3),)),
        Batch((torch.ones(2, 3),)),
        Batch((), {"input_ids": torch.full((2, 3), 7), "attention_mask": torch.eye(2, 3)}),
        Batch((), {"input_ids": torch.zeros(2, 3), "position_ids": torch.arange(3)}),
        Batch((torch.ones(2, 3, dtype=torch.bool),)),
        Batch(),
    ],
)
def test_constant_inputs_are_refused(batch: Batch) -> None:
    with pytest.raises(Problem) as caught:
        check_inputs(batch)
    assert caught.value.code == "A403"
    with pytest.raises(Problem):
        compare([Contender("a", lambda *a, **k: torch.ones(1))], [batch])


def test_real_inputs_with_a_constant_mask_pass() -> None:
    check_inputs(Batch((), {"input_ids": torch.tensor([[1, 2]]), "mask": torch.ones(1, 2)}))


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda x: x * float("nan"), "not finite"),
        (lambda x: x[:, :2], "first contender"),
    ],
)
def test_no_speed_without_a_correct_result(broken: Callable[..., Any], said: str) -> None:
    with pytest.raises(Problem, match="not timed") as caught:
        compare([Contender("given", lambda x: x), Contender("broken", broken)], [BATCH])
    assert caught.value.code == "A404" and said in caught.value.why


def test_nan_at_padded_positions_does_not_count() -> None:
    valid = torch.tensor([[True, True], [True, False]])
    x = torch.tensor([[[1.0], [2.0]], [[3.0], [float("nan")]]])
    got = compare([Contender("a", lambda x: x)], [Batch((x,), {}, valid)], seconds=0.0, rounds=1)
    assert got.rounds == 1


def test_the_ratio_as_json_says_measured() -> None:
    timing = Timing({"a": (1.0, 1.1, 0.9, 1.0), "b": (2.0, 2.1, 1.9, 2.0)})
    said = timing.ratio("a", "b").as_json()
    assert said["evidence"] == "measured" and said["verdict"] == "faster" and said["rounds"] == 4
    assert timing.as_json()["seconds"]["a"]["median"] == 1.0


def test_one_round_is_inconclusive() -> None:
    ratio = Timing({"a": (1.0,), "b": (9.0,)}).ratio("a", "b")
    assert ratio.verdict == "inconclusive" and ratio.as_json()["low"] is None


def test_the_environment_names_the_machine() -> None:
    facts = environment()
    assert facts["torch"] == torch.__version__ and facts["threads"] == torch.get_num_threads()
    assert facts["cpu"] and facts["cores"] >= 1 and facts["date"].endswith("+00:00")


def test_two_baselines_where_compiling_works(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(4, 3)
    monkeypatch.setattr(
        torch, "compile", lambda model, **options: lambda *a: model(*a) * (1 + 1e-6)
    )
    got = base.baselines(model, [BATCH])
    assert [contender.name for contender in got.contenders] == [base.EAGER, base.COMPILED]
    assert not got.left_out


def test_a_compiled_baseline_with_other_outputs_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Linear(4, 3)
    monkeypatch.setattr(torch, "compile", lambda model, **options: lambda *a: model(*a) * 1.01)
    got = base.baselines(model, [BATCH])
    assert [contender.name for contender in got.contenders] == [base.EAGER]
    assert "off eager's" in got.left_out[base.COMPILED]


def test_a_machine_without_a_compiler_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.exc import InvalidCxxCompiler

    def broken(model: Any, **options: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            raise InvalidCxxCompiler()

        return run

    monkeypatch.setattr(torch, "compile", broken)
    got = base.baselines(nn.Linear(4, 3), [BATCH])
    assert len(got.contenders) == 1
    assert got.left_out[base.COMPILED].startswith("InvalidCxxCompiler")


def test_a_bug_in_the_model_is_not_blamed_on_the_compiler() -> None:
    with pytest.raises(RuntimeError, match="mat1"):
        base.baselines(nn.Linear(5, 3), [BATCH])


@pytest.mark.slow
def test_a_real_compiled_baseline_runs_or_says_why_not() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3)).eval()
    got = base.baselines(model, [BATCH, Batch((torch.randn(5, 4),))])
    names = [contender.name for contender in got.contenders]
    assert (base.COMPILED in names) != (base.COMPILED in got.left_out)
    if base.COMPILED in names:
        timing = compare(got.contenders, [BATCH], seconds=0.0, rounds=3)
        assert timing.rounds == 3 and timing.median(base.COMPILED) > 0
    else:
        assert got.left_out[base.COMPILED]
