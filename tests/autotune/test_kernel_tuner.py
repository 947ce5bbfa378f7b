"""The kernel tuner: what it searches without a device, and what decides on one."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import optuna
import pytest
import torch

from attnopt.autotune.kernel_device import Device
from attnopt.autotune.kernel_race import difference, odd_sizes, poisoned, race, set_count
from attnopt.autotune.kernel_search import search
from attnopt.autotune.kernel_tuner import DOZEN, Tuned, told, tune
from attnopt.codegen.kernel import Load
from attnopt.codegen.kernels.flash_prefill import FlashPrefill
from attnopt.codegen.target import target
from attnopt.compiler.errors import Problem
from attnopt.compiler.spec import CAUSAL, AttentionSpec
from tests.autotune.tiled import TILES, Compiler, FakeDevice, Tiled, TiledSpec, larger_is_better

H100 = target("h100")
SPEC, LOAD = TiledSpec(8), Load(1, 2000, 2000, "float32")
PREFILL, LONG = AttentionSpec(32, 8, 128, 128, 128**-0.5, CAUSAL), Load(1, 8192, 8192)


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples that take no time would be taken until a thousand are, however sure the ratio is."""
    monkeypatch.setattr("attnopt.autotune.timing._MOST_ROUNDS", 28)


def _tuned(compiler: Compiler, device: Device | None = None, **options: Any) -> Tuned:
    options = {"seconds": 1000.0, **options}
    return tune(Tiled, SPEC, LOAD, H100, device, compile=compiler, **options)


def _times(**seconds: float) -> FakeDevice:
    """A device on which tiles take these times, t16=... and so on, with a per cent of noise."""
    noise = random.Random(0)
    return FakeDevice(lambda k, n: seconds.get(f"t{k.tile}", 1.0) * noise.uniform(0.99, 1.01))


def test_without_a_device_a_default_that_fits_stays_and_nothing_is_searched() -> None:
    compiler = Compiler(larger_is_better)
    made = _tuned(compiler)
    assert made.tiles == {"tile": 32, "stages": 2} and not made.changed
    assert (made.evidence, made.tried, compiler.jobs) == ("estimated", 1, [Tiled()])
    assert made.ratio is None and not made.device


def test_without_a_device_a_default_that_does_not_fit_is_mended_by_the_score() -> None:
    def figures(kernel: Any) -> Any:
        if kernel.tile == 128:
            return {"shared": 300_000}
        if kernel.stages == 3:
            return "does not compile"
        return {**larger_is_better(kernel), "spills": 4 if kernel.tile == 32 else 0}

    made = _tuned(Compiler(figures))
    assert made.tiles == {"tile": 64, "stages": 2} and made.changed
    assert made.evidence == "estimated" and "the default spills" in made.why
    assert made.tried == 12
    assert made.dropped == {
        "does not compile": 3, "exceeds the target's shared memory": 3,
        "spills registers": 2,
    }  # fmt: skip
    assert made.took[0]["registers"] == 128
    assert [c.seconds for c in made.contenders] == [None] * 4


def test_the_sampler_is_told_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    told_of = list[float]()
    plain = optuna.trial.Trial.set_constraint

    def noted(trial: optuna.trial.Trial, key: str, value: float) -> None:
        told_of.append(value)
        plain(trial, key, value)

    monkeypatch.setattr(optuna.trial.Trial, "set_constraint", noted)
    figures = lambda k: {"spills": 4 if k.stages > 2 else 0}  # noqa: E731
    found = search(FlashPrefill, PREFILL, LONG, H100, Compiler(figures), trials=30)
    assert found.dropped["spills registers"] >= told_of.count(1.0) > 0
    assert len(found.candidates) >= told_of.count(-1.0) > 0


def test_where_nothing_fits_it_says_why() -> None:
    with pytest.raises(Problem, match="no tile sizes of tiled") as caught:
        _tuned(Compiler(lambda kernel: "does not compile"))
    assert caught.value.code == "A838" and caught.value.why == "of 12 tried: 12 does not compile"


def test_what_cannot_be_tuned() -> None:
    compiler = Compiler(larger_is_better)
    with pytest.raises(Problem, match="does not compute this") as caught:
        tune(Tiled, TiledSpec(5000), LOAD, H100, compile=compiler)
    assert "more than 999" in caught.value.why
    with pytest.raises(Problem, match="no code for"):
        tune(Tiled, SPEC, LOAD, target("cpu"), compile=compiler)
    other = replace(_times(), not_target="it has 114 units, NVIDIA H100 SXM 132")
    with pytest.raises(Problem, match="Test device is not NVIDIA H100") as caught:
        _tuned(compiler, other)
    assert "114 units" in caught.value.why and not compiler.jobs


def test_what_is_surely_faster_replaces_the_default() -> None:
    device = _times(t64=0.5, t128=0.8)
    made = _tuned(Compiler(larger_is_better), device)
    assert made.tiles["tile"] == 64 and made.evidence == "measured"
    assert (made.device, made.driver) == ("Test device", "1.2")
    assert made.ratio is not None and 1.9 < made.ratio.interval.low < 2 < made.ratio.interval.high
    assert made.ratio.rounds >= 25
    timed = {(c.tiles["tile"], c.tiles["stages"]): c.seconds for c in made.contenders}
    assert timed[64, 2] == pytest.approx(0.5, rel=0.01)
    assert timed[32, 2] == pytest.approx(1.0, rel=0.01)
    assert "2.0" in "\n".join(told(made)) and "Test device" in "\n".join(told(made))


def test_what_is_not_surely_faster_does_not() -> None:
    noise = random.Random(1)
    device = FakeDevice(lambda k, n: noise.uniform(0.5, 1.5))
    made = _tuned(Compiler(larger_is_better), device)
    assert max(Counter(device.sampled).values()) <= 28  # there was no second race
    assert not made.changed and made.evidence == "measured" and made.ratio is None


def test_a_lead_that_is_gone_in_the_second_race_does_not_count() -> None:
    fading = FakeDevice(lambda k, n: 0.5 if k.tile == 64 and n <= 7 else 1.0)
    made = _tuned(Compiler(larger_is_better), fading)
    assert max(Counter(fading.sampled).values()) > 30  # it was raced again
    assert not made.changed


def test_the_default_is_timed_though_its_score_is_the_worst(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worst = Compiler(lambda k: {"instructions": 9999 if k == Tiled() else 100 + k.tile + k.stages})
    monkeypatch.setattr("attnopt.autotune.kernel_tuner.DOZEN", 3)
    made = _tuned(worst, _times())
    assert [c.tiles for c in made.contenders] == [
        {"tile": 16, "stages": 1}, {"tile": 16, "stages": 2}, {"tile": 32, "stages": 2},
    ]  # fmt: skip
    assert all(c.seconds for c in made.contenders)


def test_only_the_best_dozen_are_timed() -> None:
    def figures(kernel: Any) -> Any:
        return {"instructions": kernel.block_m + kernel.block_n + kernel.warps + kernel.stages}

    found = search(FlashPrefill, PREFILL, LONG, H100, Compiler(figures), trials=30)
    default = FlashPrefill.default(PREFILL, H100, LONG)
    short = found.shortlist(default, DOZEN)
    assert len(short) == DOZEN and found.tried == 30
    assert default in [c.kernel for c in short]
    assert [c.score.value for c in short[:-1]] == sorted(c.score.value for c in short[:-1])[::-1]


@pytest.mark.parametrize("how", ["raises", "leaves the last", "large"])
def test_what_is_wrong_is_not_timed_however_fast(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tiled, "broken", {64: how})
    device = _times(t64=0.1, t16=0.9)
    made = _tuned(Compiler(larger_is_better), device)
    assert made.tiles["tile"] == 16
    why = "fails on the device" if how == "raises" else "wrong on the device"
    assert made.dropped == {why: 3}
    assert not any("tile=64" in line for line in device.sampled)
    told_of = {c.tiles["tile"]: c.why_not for c in made.contenders}
    said = {
        "raises": "too many resources", "leaves the last": "8 of 8800 numbers are off",
        "large": "8 of 16000 numbers",
    }  # fmt: skip
    assert said[how] in told_of[64] and not told_of[16]


def test_a_default_that_is_wrong_is_replaced_without_a_ratio(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Tiled, "broken", {32: "leaves the last"})
    made = _tuned(Compiler(larger_is_better), _times(t16=2.0))
    assert made.tiles["tile"] in (64, 128) and made.ratio is None and "not" in made.why


def test_where_all_are_wrong_it_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tiled, "broken", dict.fromkeys(TILES, "leaves the last"))
    with pytest.raises(Problem, match="are right on Test device"):
        _tuned(Compiler(larger_is_better), _times())


def test_a_device_that_stops_answering_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tiled, "broken", {64: "raises"})
    with pytest.raises(Problem, match="does not answer") as caught:
        _tuned(Compiler(larger_is_better), replace(_times(), alive=False))
    assert caught.value.code == "A836" and "tile=64" in caught.value.what


def test_calls_rotate_among_sets_of_inputs_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    run = Tiled.run

    def noted(self: Any, spec: Any, inputs: Any) -> Any:
        seen.append(inputs["x"])
        return run(self, spec, inputs)

    monkeypatch.setattr(Tiled, "run", noted)
    monkeypatch.setattr("attnopt.autotune.kernel_race.set_count", lambda *given: 3)
    device = _times()
    _tuned(Compiler(larger_is_better), device, trials=2)
    timed = [x for x in seen[-3:] if x.shape == (2000, 8)]
    assert len({x.data_ptr() for x in timed}) == 3 and not torch.equal(timed[0], timed[1])
    assert device.ran == 2 * 3


def test_rounds_rotate_their_order() -> None:
    order: list[str] = []

    def sampler(name: str) -> Any:
        return lambda: order.append(name) or 1.0

    race({name: sampler(name) for name in "abc"}, seconds=0.0, rounds=7)
    assert ["".join(order[i : i + 3]) for i in range(0, 18, 3)] == [
        "abc", "bca", "cab", "cba", "acb", "bac",
    ]  # fmt: skip


def test_how_many_sets_of_inputs() -> None:
    inputs = {"x": torch.zeros(1000, 1000), "some": (torch.zeros(250_000), None, 3)}  # 5 MB
    assert set_count(inputs, 50_000_000, 10**10) == 20  # twice the cache
    assert set_count(inputs, 50_000_000, 90_000_000) == 6  # a third of the memory
    assert set_count(inputs, 0, 10**10) == 2
    assert set_count({}, 50_000_000, 10**10) == 256


def test_sizes_that_the_reference_can_be_computed_at() -> None:
    assert odd_sizes(Load(8, 16384, 16384)) == Load(2, 1100, 1100)
    assert odd_sizes(Load(16, 1, 131072)) == Load(2, 1, 4100)
    assert odd_sizes(Load(1, 100, 100, "float16")) == Load(1, 100, 100, "float16")
    assert odd_sizes(Load(1, 2048, 131072)) == Load(1, 1100, 4100)


def test_memory_is_poisoned_within() -> None:
    with poisoned():
        assert torch.empty(3).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_differences_are_told() -> None:
    wanted = [torch.tensor([0.01, -float("inf"), 1.0])]
    assert not difference([wanted[0] * (1 + 1e-3)], wanted, 4e-3)
    assert "1 of 3 numbers are off" in difference(
        [wanted[0] + torch.tensor([0.02, 0, 0])], wanted, 4e-3
    )
    assert "by up to inf" in difference([torch.tensor([0.01, 5.0, 1.0])], wanted, 4e-3)
    assert "by up to inf" in difference([wanted[0] * float("nan")], wanted, 4e-3)
    assert "shapes" in difference([torch.zeros(2)], wanted, 4e-3)
    assert "shapes" in difference([], wanted, 4e-3)


def test_a_search_tries_the_default_first_and_nothing_twice() -> None:
    compiler = Compiler(lambda kernel: {"instructions": 10 * kernel.block_m + kernel.block_n})
    found = search(FlashPrefill, PREFILL, LONG, H100, compiler, trials=40)
    assert compiler.jobs[0] == FlashPrefill.default(PREFILL, H100, LONG)
    assert len(compiler.jobs) == len(set(compiler.jobs)) == found.tried == 40


def test_a_search_follows_its_seed() -> None:
    def tried(seed: int) -> list[Any]:
        compiler = Compiler(lambda kernel: {"instructions": 10 * kernel.block_m + kernel.block_n})
        search(FlashPrefill, PREFILL, LONG, H100, compiler, trials=24, seed=seed)
        return compiler.jobs

    assert tried(0) == tried(0) != tried(1)


def test_a_search_is_led_by_the_score_and_keeps_away_from_what_does_not_fit() -> None:
    def figures(kernel: Any) -> Any:
        if kernel.block_m == 256 or kernel.stages == 4:
            return {"shared": 300_000}
        return {"instructions": 9**6 // (kernel.block_m * kernel.block_n) + 500 * kernel.warps}

    compiler = Compiler(figures)
    found = search(FlashPrefill, PREFILL, LONG, H100, compiler, trials=64)
    size = math.prod(map(len, FlashPrefill.space(H100).values()))
    every = search(FlashPrefill, PREFILL, LONG, H100, compiler, trials=size)
    values = [c.score.value for c in every.candidates]
    assert every.tried == size and len(values) == size * 4 // 5 * 3 // 4
    assert found.candidates[0].score.value > 0.95 * values[0] > 3 * values[-1]
    assert found.candidates[9].score.value > values[len(values) // 4]
    late = compiler.jobs[32:64]
    assert sum(k.block_m == 256 or k.stages == 4 for k in late) < 8  # by chance 13 would not fit
    assert sum(found.dropped.values()) + len(found.candidates) == found.tried == 64


def test_a_search_ends_with_its_time() -> None:
    found = search(FlashPrefill, PREFILL, LONG, H100, Compiler(lambda k: {}), seconds=0.0)
    assert found.tried == 1 and not found.default_misfit
